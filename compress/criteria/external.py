"""Importances of other packages, by their own names: captum's layer attributors, torch-pruning's group importances."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import outputs_of
from compress._dependencies import importance_scores, version
from compress.criteria._layers import by_channel
from compress.criteria._names import AGGREGATES, near
from compress.criteria._objectives import CROSS_ENTROPY, loss_of
from compress.criteria._reading import Reading
from compress.criteria._sums import Sums, check_choice
from compress.criteria._task import Found, Measure, Task
from compress.criteria.scores import Criterion
from compress.cutting import channel_axis, width_of
from lrp.errors import InputError, MissingDependencyError, StructureError

__all__ = ["captum", "torch_pruning", "tp_taylor"]


# -- captum ----------------------------------------------------------------------------


def _attributor(name: str) -> Any:
    """A class of captum.attr that attributes to layers.

    Raises
    ------
    MissingDependencyError, InputError
    """
    if importlib.util.find_spec("captum") is None:
        raise MissingDependencyError(
            f"captum is not installed, and criterion 'captum:{name}' is its",
            expected="the package captum",
            got="no such package",
            fix="pip install captum",
        )
    attr = importlib.import_module("captum.attr")
    kinds = {k: v for k, v in vars(attr).items() if k.startswith("Layer") and hasattr(v, "attribute")}
    kinds |= {k: getattr(attr, k) for k in ("InternalInfluence",) if hasattr(attr, k)}
    if name not in kinds:
        raise InputError(
            f"captum has no layer attributor '{name}'",
            expected=f"one of {', '.join(sorted(kinds))}",
            got=repr(name),
            fix=near(name, kinds, "choose one of these"),
        )
    return kinds[name]


@dataclass(frozen=True, repr=False)
class _Captum(Measure):
    attributor: str
    aggregate: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("aggregate", self.aggregate, AGGREGATES)
        _attributor(self.attributor)

    @property
    def name(self) -> str:
        return f"captum:{self.attributor}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"aggregate": self.aggregate, "options": json.loads(json.dumps(dict(self.options), default=str))}

    def _score(self, task: Task) -> Found:
        kind = _attributor(self.attributor)
        options = dict(self.options)
        takes = inspect.signature(kind.attribute).parameters
        if "attr_dim_summation" in takes:  # Grad-CAM adds up the channels, unless it is told not to
            options = {"attr_dim_summation": False, **options}
        sums, reading, samples = Sums(self.aggregate), Reading(task, "conv"), 0
        unscored: dict[str, str] = {}
        for batch in task.batches():
            samples += batch.inputs[0].shape[0]
            for part in reading.parts(batch):
                n = part.inputs[0].shape[0]
                inputs = tuple(t.clone().requires_grad_(t.is_floating_point()) for t in part.inputs)
                given = {**options, "target": part.y} if "target" in takes else options
                for name, module in task.twins.items():
                    values = self._attributions(kind, task.twin, name, inputs, given)
                    if values.shape[channel_axis(module, values)] == width_of(module):
                        sums.add(name, by_channel(module, values.detach(), n))
                    else:
                        unscored[name] = f"{self.attributor} gives it {tuple(values.shape)}, no number per channel"
        return Found({k: t for k, t in sums.means(samples).items() if k not in unscored}, unscored, samples)

    def _attributions(
        self, kind: Any, model: nn.Module, name: str, inputs: tuple[Tensor, ...], given: Mapping[str, Any]
    ) -> Tensor:
        try:
            with torch.enable_grad():
                found = kind(model, model.get_submodule(name)).attribute(inputs, **given)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise StructureError(
                f"captum's {self.attributor} fails on layer '{name}'",
                expected="a network and options that it can deal with",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                fix="choose another attributor, or 'logit_x_activation'",
            ) from error
        values: Tensor = found[0] if isinstance(found, tuple) else found
        return values


def captum(attributor: str, aggregate: str = "abs_per_sample", **options: Any) -> Criterion:
    """A layer attributor of captum, summed over positions.

    Parameters
    ----------
    attributor : str
        Name of a class of captum.attr whose constructor takes (model, layer):
        LayerConductance, LayerIntegratedGradients, LayerGradCam,
        LayerGradientXActivation, LayerActivation, LayerDeepLift,
        InternalInfluence, ...
    aggregate : str
        See :mod:`compress.criteria`.
    options
        Passed to its ``attribute``, such as ``n_steps=20``. The target is the
        label; where batches bring none, captum is given none.

    Returns
    -------
    Criterion

    Raises
    ------
    MissingDependencyError
        If captum is not installed.
    InputError
        If it has no such attributor.

    Notes
    -----
    Read where captum reads: at the module's own output, in front of any batch
    norm. Cost: one attribution per layer and batch.

    Examples
    --------
    >>> try:
    ...     captum("LayerConductance", n_steps=20).name
    ... except MissingDependencyError:  # it is optional
    ...     "captum:LayerConductance"
    'captum:LayerConductance'
    """
    return _Captum(attributor, aggregate, options)


# -- torch-pruning -----------------------------------------------------------------------

#: of torch_pruning.importance: those that do what they say; True: from gradients
IMPORTANCES = {
    "GroupMagnitudeImportance": False,
    "BNScaleImportance": False,
    "FPGMImportance": False,
    "LAMPImportance": False,
    "GroupTaylorImportance": True,
}
REFUSED = {
    "GroupHessianImportance": "its accumulation counts the last sample only; 'hessian' counts all",
    "HessianImportance": "its accumulation counts the last sample only; 'hessian' counts all",
    "ActivationImportance": "it keeps the last batch only; 'activation' takes all",
    "RandomImportance": "it depends on the global random state; 'random:SEED' does not",
    "OBDCImportance": "it needs hooks on the network while it is trained",
}


@dataclass(frozen=True, repr=False)
class _TorchPruning(Measure):
    importance: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.importance not in IMPORTANCES:
            raise InputError(
                f"torch-pruning's '{self.importance}' can not be used here",
                expected=f"one of {', '.join(IMPORTANCES)}",
                got=REFUSED.get(self.importance, repr(self.importance)),
                fix=near(self.importance, IMPORTANCES, "choose one of these")
                if self.importance not in REFUSED
                else "use ours",
            )
        self._instance()

    def _instance(self) -> Any:
        from torch_pruning.pruner import importance

        kind = getattr(importance, self.importance)
        try:
            return kind(**self.options)
        except (TypeError, AssertionError) as error:
            raise InputError(
                f"torch-pruning's {self.importance} does not take these options",
                expected=f"options among {', '.join(inspect.signature(kind).parameters)}",
                got=f"{dict(self.options)}: {error}",
                fix="leave them out",
            ) from error

    @property
    def needs_data(self) -> bool:  # type: ignore[override]  # it depends on the importance
        return IMPORTANCES[self.importance]

    @property
    def needs_labels(self) -> bool:
        return IMPORTANCES[self.importance]

    @property
    def name(self) -> str:
        return f"tp:{self.importance}"

    @property
    def settings(self) -> dict[str, Any]:
        return {"by": f"torch-pruning {version()}", "options": json.loads(json.dumps(dict(self.options), default=str))}

    def _score(self, task: Task) -> Found:
        from compress.groups import Structure, find_groups

        whole = task.structure or find_groups(task.twin, task.example)
        groups = [g for g in whole.prunable if set(g.producers) & set(task.layers)]
        if task.layers and not groups:
            raise StructureError(
                "no group that can be pruned holds any of the layers",
                expected="layers whose channels can be removed",
                got=", ".join(task.layers)[:300],
                fix="pass structure.layers",
            )
        theirs = _Guarded(self._instance())
        samples = 0

        def loss(twin: nn.Module) -> None:
            nonlocal samples
            objective = functools.partial(loss_of, loss=CROSS_ENTROPY, why=f"criterion '{self.name}'")
            for batch in task.batches():
                total: Tensor = objective(outputs_of(twin, batch.inputs), batch).sum()
                total.backward()  # type: ignore[no-untyped-call]  # torch: untyped
                samples += batch.inputs[0].shape[0]

        values: dict[str, Tensor] = {}
        unscored: dict[str, str] = {}
        needed = loss if IMPORTANCES[self.importance] else None
        found = importance_scores(task.twin, task.example, theirs, Structure(tuple(groups)), needed)
        for g, failure in zip(groups, theirs.failures, strict=True):
            if g.name in found and found[g.name].shape == (g.width,):
                values[g.name] = found[g.name]
            else:
                unscored[g.name] = f"torch-pruning's {self.importance} {failure or 'gives it no score'}"
        return Found(values, unscored, samples, "group")


class _Guarded:
    """An importance that gives no score where it would raise; ``failures`` has one entry per group, in order."""

    def __init__(self, importance: Any) -> None:
        self.importance = importance
        self.failures: list[str] = []

    def __call__(self, group: Any) -> Any:
        try:
            out = self.importance(group)
        except (RuntimeError, IndexError, ValueError) as error:
            self.failures.append(f"fails on it ({type(error).__name__}: {str(error)[:200]})")
            return None
        self.failures.append("")
        return out


def torch_pruning(importance: str, **options: Any) -> Criterion:
    """An importance of torch-pruning: scores of whole groups, by its own rules.

    Parameters
    ----------
    importance : str
        GroupMagnitudeImportance, BNScaleImportance, LAMPImportance,
        FPGMImportance or GroupTaylorImportance. Others are refused, with the
        reason.
    options
        Passed to its constructor, such as ``p=1`` or ``group_reduction="mean"``.
        Its scores are normalised over each group by default; with
        ``normalizer=None`` they are not.

    Returns
    -------
    Criterion
        Its scores have ``level="group"``.

    Raises
    ------
    InputError

    Notes
    -----
    GroupTaylorImportance needs labels: gradients of the cross-entropy summed
    over all samples, one pass. Needs ``structure`` or ``example_inputs`` or
    data.

    Examples
    --------
    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    >>> torch_pruning("GroupMagnitudeImportance", p=1)(net, None, ["0"], example_inputs=torch.zeros(1, 3))
    Scores(tp:GroupMagnitudeImportance: 4 channels in 1 groups)
    """
    return _TorchPruning(importance, options)


def tp_taylor(**options: Any) -> Criterion:
    """torch-pruning's GroupTaylorImportance: weight x gradient of the summed loss, magnitudes summed over the filter.

    Another criterion than :func:`compress.criteria.taylor`, and not
    :func:`compress.criteria.taylor` of weights either: weights that read a
    channel count too, and its batch norms do *not*, whatever their gradients
    (in torch-pruning 1.6 the branch for them is never taken).

    Examples
    --------
    >>> tp_taylor().name
    'tp:GroupTaylorImportance'
    """
    return _TorchPruning("GroupTaylorImportance", options)
