"""One call from model and batch to relevance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lrp.errors import InputError
from lrp.plan import Plan, prepare
from lrp.relevance import Relevance
from lrp.seeds import Start

__all__ = ["attribute"]


def attribute(
    model: nn.Module | Plan,
    x: Tensor | tuple[Tensor, ...],
    target: int | Tensor | None = None,
    *,
    composite: Any = None,
    wrt: Sequence[str] | str = ("input",),
    start: Start = "logit",
    layers: Sequence[str] | str | None = None,
    ledger: bool = True,
    weight_rule: str = "own",
    compile: bool | str = False,
) -> Relevance:
    """Explain a batch by layer-wise relevance propagation, in one backward pass.

    Parameters
    ----------
    model : nn.Module or Plan
        In evaluation mode. It is bit-identical afterwards.
    x : Tensor (N, ...) or tuple of them
        Finite floating-point input.
    target : None, int or LongTensor (N,)
        Output unit to explain; None takes the largest.
    composite : str, Rule or Composite
        Rules of the layers; ``"epsilon_plus"`` where not given. A Plan has its own.
    wrt : str or sequence of str
        Any of "input", "layers", "channels", "weights".
    start : str, Tensor or lrp.Seed
        "logit" (relevance = the target's output), "one_hot" (1), "probability"
        (its softmax), "margin" (minus the largest other output), a Tensor (the
        relevance of every output), or ``lrp.Seed(c)`` (coefficients).
    layers : str or sequence of str
        Names or shell patterns of modules, which restrict layers, channels and weights.
    ledger : bool
        Keep the books. False saves their cost.
    weight_rule : {"own", "epsilon"}
        How the relevance of a layer's output is shared among its weights:
        ``"own"``, by the rule that hands it on to the input; ``"epsilon"``, as
        w dz/dw R / z with 1e-6 beside z, whatever that rule is (ECQx).
    compile : bool or str
        As in :func:`lrp.prepare`.

    Returns
    -------
    Relevance

    Raises
    ------
    lrp.errors.LRPError
        Of one of its kinds; see :mod:`lrp.errors`.

    Notes
    -----
    The pass carries coefficients c = R / activation (``R = a c`` anywhere), so
    positively homogeneous operations need their ordinary gradient only. Cost:
    the plan's products, see ``plan.print()``. Samples do not influence each
    other. Thread-safe; while a model is being planned, calls on it wait. Forward
    hooks of the model run during planning, once on tensors without data.

    Examples
    --------
    >>> import torch, lrp
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False))
    >>> _ = model[0].weight.data.copy_(torch.eye(2))
    >>> lrp.attribute(model.eval(), torch.tensor([[3.0, 1.0]]), composite=lrp.rules.Epsilon(0)).input
    tensor([[3., 0.]])
    """
    if isinstance(model, Plan):
        if composite is not None or compile:
            raise InputError(
                "a plan has its composite already, and is compiled or not",
                expected="a Plan alone, or a model with composite= and compile=",
                got="both",
                fix="give them to lrp.prepare, or pass plan.model",
            )
        model.check_model()
        plan = model
    else:
        plan = prepare(model, x, "epsilon_plus" if composite is None else composite, compile=compile)
    return plan._attribute(x, target, wrt, start, layers, ledger, weight_rule=weight_rule)
