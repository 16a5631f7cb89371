r"""Centroids behind an encoder: :math:`f_c(\Phi(x))`, explained back to x.

The head's rule expands every pair at its midpoint and gives the features
:math:`\phi = \Phi(x)` relevances :math:`R_t = w_t(\phi_t - \tau_t)`, whose sum,
with the head's residual, is the output; :math:`w_t = 2\sum_k \rho_k(\mu_{ct}-\mu_{kt})`.
From there the rules of :mod:`lrp` lead on through :math:`\Phi`. Two ways to
hand over, both exact:

"relevance"
    All of :math:`R_t` goes on: the last linear layer gets :math:`s_t = R_t/d_t`
    with its stabilised denominator :math:`d_t`, other layers the coefficient
    :math:`R_t/\phi_t`. A feature that is exactly 0 has nothing to hand it on
    with, and its relevance is the residual's ``encoder lost``. Since
    :math:`R_t` does not vanish with :math:`\phi_t`, :math:`d_t` must be a
    denominator that does not either, as that of the gamma rule. What x
    receives depends on where the origin of feature space lies.
"coefficient"
    The pair layer's weights :math:`w_t` go on, as if the pair layer and the
    last layer of :math:`\Phi` were one: the encoder's outputs count with
    :math:`w_t\phi_t`, and the constant :math:`-\sum_t w_t\tau_t` is the
    residual's ``root``. Nothing is divided or lost, and what x receives does
    not depend on where the origin of feature space lies; but the features
    carry less of the output.

The encoder's ledger (biases, stabilisers, dead outputs, constants, Taylor
remainders, lost) joins the residual part by part. Source: Kauffmann et al.,
TNNLS 35(2), 2024, for the network; both ways of handing over are derived here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import lrp
from lrp._unit import to_coefficient
from lrp.composites import Composite, resolve
from lrp.errors import InputError, OutputError, RuleError
from lrp.plan import Plan
from neuralize.frames import Frame
from neuralize.heads import Head, Part, Request
from neuralize.labels import positions

__all__ = ["EncodedRelevance", "batches", "explain_encoded", "through_encoder"]

HANDOVERS = ("relevance", "coefficient")
BOOKS = ("bias", "stabiliser", "dead", "constant", "nonlinear", "lost")


@dataclass(frozen=True, eq=False)
class EncodedRelevance:
    """Relevance of every input of the encoder.

    ``values`` summed per sample, plus the sum of ``residual_parts``, is ``output``, to rounding.

    Attributes
    ----------
    values : Tensor (N, ...)
        Shaped like x.
    output : Tensor (N,)
        The target's logit, or its duel with the contrast.
    residual_parts : dict of Tensor (N,)
        The head's parts; "root", where coefficients were handed over; and
        "encoder bias", "encoder stabiliser", "encoder dead", "encoder
        constant", "encoder nonlinear", "encoder lost": the columns of the
        encoder's ledger, see :class:`lrp.Ledger`.
    target, decided : LongTensor (N,)
        Positions of the explained and of the winning logits.
    divided : BoolTensor (N,)
        Rows on which the divided rule was used.
    features : Tensor (N, L)
        Relevance of the encoder's outputs: what was handed over.
    """

    values: Tensor
    output: Tensor
    residual_parts: dict[str, Tensor]
    target: Tensor
    decided: Tensor
    divided: Tensor
    features: Tensor

    @property
    def residual(self) -> Tensor:
        """Sum of the parts (N,)."""
        return torch.stack(list(self.residual_parts.values())).sum(0)

    @property
    def coverage(self) -> Tensor:
        """Share of the output that the inputs carry, (N,)."""
        zero = self.output == 0
        ratio = self.residual / torch.where(zero, 1, self.output)
        return torch.where(zero, (self.residual == 0).to(ratio.dtype), 1 - ratio)

    def __repr__(self) -> str:
        parts = ", ".join(f"{n} {v.abs().mean():.3g}" for n, v in self.residual_parts.items() if bool(v.any()))
        typical = f"median coverage {float(self.coverage.median()):.3g}"
        return f"EncodedRelevance(values {tuple(self.values.shape)}, {typical}, mean |residual|: {parts or 'none'})"


# one object each, so that lrp keeps its plans
_DEFAULT: dict[str, Any] = {
    "relevance": Composite([("*", lrp.rules.Gamma(0.25))], name="gamma"),
    "coefficient": "epsilon_plus",
}


def through_encoder(
    plan: Plan, head: Head, x: Tensor, request: Request, hand_over: str = "relevance"
) -> tuple[Tensor, Tensor, Part]:
    """One batch: relevance of x, relevance of the features (N, L), and the books.

    Parameters
    ----------
    plan : lrp.Plan
        Of the encoder, with a composite that keeps a ledger.
    head : Head
        On features, in its own precision and on its own device.
    x : Tensor (N, ...)
        As the plan's example.
    request : Request
        On the head's device.
    hand_over : {"relevance", "coefficient"}

    Returns
    -------
    values : Tensor (N, ...)
    features : Tensor (N, L)
    part : Part
        Its ``parts`` are all of the residual.
    """
    plan.check_model()
    plan._check((x,))
    # the plan's own arithmetic: an output that is 0 there must be 0 here
    with torch.no_grad(), torch.inference_mode(False):
        phi = plan._forward((x.detach().clone(),)).detach()
        if phi.ndim != 2 or phi.shape[1] != head.features:
            raise OutputError(
                "encoder and head do not fit each other",
                expected=f"features (N, {head.features})",
                got=str(tuple(phi.shape)),
                fix="pass the head that was fitted on the output of this encoder",
            )
        held = next(b for b in head.buffers() if b.is_floating_point())
        z = phi.to(device=held.device, dtype=held.dtype)
        features = torch.empty_like(z)
        frame = Frame.identity(z.shape[1]).to(z.device)
        part = head.explain(z.clone(), request, features, {}, frame)
        parts = dict(part.parts)
        if hand_over == "relevance":
            c, lost = to_coefficient(features.to(phi), phi)
        else:
            known = Request(request.rule, request.beta, part.target, request.contrast, part.divided)
            slope = head.details(z, known, frame).lines[0].slope
            c, lost = slope.to(phi), torch.zeros_like(phi)
            parts["root"] = (features - slope * z).sum(1)
    relevance = plan.attribute(x, start=lrp.Seed(c))
    assert isinstance(relevance.input, Tensor)
    assert relevance.ledger is not None
    for name in BOOKS:
        parts[f"encoder {name}"] = getattr(relevance.ledger, name).to(z)
    parts["encoder lost"] = parts["encoder lost"] + lost.double().sum(1).to(z)
    whole = Part(part.output, parts, part.target, part.decided, part.divided, part.notes)
    return relevance.input, features, whole


def explain_encoded(
    encoder: nn.Module | Plan,
    head: Head,
    x: Tensor,
    target: int | Tensor | None = None,
    contrast: int | Tensor | None = None,
    beta: float | str = "auto",
    rule: str = "auto",
    composite: Any = None,
    *,
    hand_over: str = "relevance",
    batch_size: int | str = "auto",
) -> EncodedRelevance:
    r"""Explain a logit of a head on the features of any network, back to the network's input.

    Parameters
    ----------
    encoder : nn.Module or lrp.Plan
        From samples to features (N, L), in evaluation mode; anything
        :func:`lrp.prepare` can plan. Never modified. A Plan has its composite.
    head : Head
        Such as :class:`neuralize.CentroidHead`, on L features; it computes in
        its own precision, float64 unless changed.
    x : Tensor (N, ...)
        Samples; moved to the encoder's device and type batch by batch.
    target, contrast : None, int or LongTensor (N,)
        Positions of the explained logit (None: each row's own cluster) and of
        the single competitor (None: all).
    beta, rule
        The head's, as in :meth:`neuralize.NeuralizedModel.explain`.
    composite : str, lrp rule or lrp.Composite, optional
        Rules of the encoder. Where relevance is handed over, the default is
        gamma in every layer: its denominators stay away from 0 where a feature
        is near 0, which epsilon's do not. Where coefficients are, nothing is
        divided, and it is "epsilon_plus". Composites without a ledger
        (gradients) are refused.
    hand_over : {"relevance", "coefficient"}
        What the head gives to the encoder; see the module's text.
    batch_size : "auto" or int
        Rows per batch; the result does not depend on it, but for rounding.

    Returns
    -------
    EncodedRelevance
        On x's device, values in the encoder's precision.

    Raises
    ------
    InputError, OutputError
        x or its features do not fit.
    RuleError
        A composite without ledger, an unknown rule or hand-over.
    lrp.errors.LRPError
        If the encoder can't be planned; see :func:`lrp.prepare`.

    Notes
    -----
    Conservation holds for every composite: what the encoder's rules do not
    hand to x is in the parts. Cost: two forward passes and one backward pass
    of the encoder with the products of the composite's rules, and the head's.

    Examples
    --------
    >>> from neuralize import CentroidHead
    >>> _ = torch.manual_seed(0)
    >>> encoder = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).double().eval()
    >>> head = CentroidHead([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0]])
    >>> x = torch.randn(5, 4, dtype=torch.float64)
    >>> ex = explain_encoded(encoder, head, x)
    >>> ex.values.shape, bool(torch.allclose(ex.values.sum(1) + ex.residual, ex.output))
    (torch.Size([5, 4]), True)
    """
    if hand_over not in HANDOVERS:
        raise RuleError(
            "unknown hand_over", expected=f"one of {', '.join(HANDOVERS)}", got=repr(hand_over), fix="choose one"
        )
    network = encoder.model if isinstance(encoder, Plan) else encoder
    held = next((p for p in network.parameters() if p.is_floating_point()), None)
    place = (x.device, x.dtype) if held is None else (held.device, held.dtype)
    if not isinstance(x, Tensor) or x.ndim < 2 or not len(x):
        raise InputError(
            "x is no batch of samples",
            expected="a tensor (N, ...), N >= 1",
            got=str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__,
            fix="pass at least one sample, with a batch axis",
        )
    plan = planned(encoder, x[:1].to(*place), composite, hand_over)
    chosen, stiffness = head.request(rule, beta, contrast is not None)
    there = next(head.buffers()).device

    def place_of(value: Any, what: str) -> Tensor | None:
        if value is None:
            return None
        return torch.from_numpy(positions(value, np.arange(head.clusters), len(x), what)).to(there)

    request = Request(chosen, stiffness, place_of(target, "target"), place_of(contrast, "contrast"))
    values, features, found = [], [], []
    for rows in batches(len(x), batch_size, math.prod(x.shape[1:])):
        a, b, part = through_encoder(plan, head, x[rows].to(*place), request.rows(rows), hand_over)
        values.append(a.to(x.device))
        features.append(b.to(x.device))
        found.append(part)

    def joined(*pieces: Tensor) -> Tensor:
        return torch.cat(pieces).to(x.device)

    return EncodedRelevance(
        joined(*values),
        joined(*(p.output for p in found)),
        {name: joined(*(p.parts[name] for p in found)) for name in found[0].parts},
        joined(*(p.target for p in found)),
        joined(*(p.decided for p in found)),
        joined(*(p.divided for p in found)),
        joined(*features),
    )


def planned(encoder: nn.Module | Plan, example: Tensor, composite: Any, hand_over: str) -> Plan:
    """The encoder's plan under a composite that keeps a ledger; lrp keeps it, so that a second call is cheap."""
    if isinstance(encoder, Plan):
        if composite is not None:
            raise InputError(
                "a plan has its composite already",
                expected="a Plan alone, or a network with composite=",
                got="both",
                fix="give it to lrp.prepare, or pass plan.model",
            )
        rules = encoder.composite
    else:
        rules = resolve(_DEFAULT[hand_over] if composite is None else composite)
    if rules.mode != "lrp":
        raise RuleError(
            f"{rules.mode} keeps no ledger, so the books of an explanation would not close",
            expected="a composite of rules, such as 'epsilon_plus', 'epsilon_gamma_box' or lrp.rules.Gamma()",
            got=rules.mode,
            fix="choose one; for plain gradients use torch.autograd on the network itself",
        )
    if isinstance(encoder, Plan):
        return encoder
    named = composite if isinstance(composite, str) else rules
    return lrp.prepare(encoder, example, _DEFAULT[hand_over] if composite is None else named)


def batches(n: int, size: int | str, numel: int) -> Iterator[slice]:
    """Consecutive rows, ``size`` at a time; "auto" goes by the number of elements of one."""
    if size == "auto":
        # a few hundred small samples fill the cores; pictures are bounded by memory
        size = max(1, min(512, 2**21 // max(1, numel)))
    if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
        raise InputError(
            "batch_size is no number of rows", expected="'auto' or an integer > 0", got=repr(size), fix="choose one"
        )
    for start in range(0, n, int(size)):
        yield slice(start, min(start + int(size), n))
