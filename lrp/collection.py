"""Relevance summed over a data set."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrp._collecting import Plans, reduced, summed
from lrp._distributed import exchange, on_device, place, same_everywhere, sum_over_processes
from lrp._files import read_tensors, write_tensors
from lrp._settings import check_state, compare, same, settings_of
from lrp.errors import FileFormatError, InputError, MismatchError
from lrp.plan import Plan
from lrp.relevance import Relevance
from lrp.seeds import Start

__all__ = ["RelevanceSum", "collect"]

KIND = "lrp.RelevanceSum"


class RelevanceSum:
    """Relevance of channels and weights, summed over samples in float64.

    Made by :func:`collect`, or empty, for :meth:`update`. Sums of parts of a
    data set add up to the sum of the whole.

    Parameters
    ----------
    wrt : str or sequence of str
        "channels", "weights" or both.
    aggregate : str or dict of str to str
        See :func:`collect`.
    composite, start, target, layers
        How the relevance was, or will be, computed: see :func:`collect`. They
        are compared when sums are merged.
    model : nn.Module
        Compared by its class and a digest of its weights; needed for merging
        with what :func:`collect` returns.

    Attributes
    ----------
    count : int
        Samples.
    channels : dict of str to Tensor (C,)
        Module call to the sum over samples, float64.
    weights : dict of str to Tensor
        Parameter name to the sum, shaped like the parameter, float64.
    unexplained : dict of str to str
        What gets no relevance by rule, and why. Modules listed there are absent
        from the sums. Rows listed there (``"attn.qkv[0:384]"``, part of a packed
        projection) are 0 in the sums by rule; do not count them as least
        relevant.
    settings : dict
        What the sum is of; JSON-able. Functions, such as a stabiliser, stand
        there with a digest of their code, defaults and the values they refer
        to, which another version of Python may compute otherwise.

    Examples
    --------
    >>> import torch, lrp
    >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2)).eval()
    >>> x = torch.randn(10, 3)
    >>> total = lrp.RelevanceSum(composite="epsilon")
    >>> for part in x.split(4):
    ...     total.update(lrp.attribute(net, part, composite="epsilon", wrt="channels"))
    >>> total
    RelevanceSum(10 samples, composite epsilon, start logit, channels abs_per_sample: 10 in 3 layers)
    """

    def __init__(
        self,
        wrt: Sequence[str] | str = ("channels",),
        aggregate: str | Mapping[str, str] | None = None,
        *,
        composite: Any = "epsilon_plus",
        start: Start = "logit",
        target: int | str | None = None,
        layers: Sequence[str] | str | None = None,
        model: nn.Module | None = None,
    ) -> None:
        self.settings = settings_of(wrt, aggregate, composite, start, target, layers, model)
        self.count = 0
        self.unexplained: dict[str, str] = {}
        self._labels: bool | None = None
        self._sums: dict[str, dict[str, Tensor]] = {"channels": {}, "weights": {}}

    # -- reading ------------------------------------------------------------
    @property
    def channels(self) -> dict[str, Tensor]:
        return self._read("channels")

    @property
    def weights(self) -> dict[str, Tensor]:
        return self._read("weights")

    def _read(self, kind: str) -> dict[str, Tensor]:
        sums = self._sums[kind]
        if self.settings["aggregate"].get(kind) == "abs_total":
            return {name: t.abs() for name, t in sums.items()}
        return dict(sums)

    def mean(self, kind: str = "channels") -> dict[str, Tensor]:
        """Sums divided by the number of samples; ``kind`` is "channels" or "weights"."""
        if kind not in self.settings["wrt"]:
            raise InputError(
                f"there is no sum of {kind!r}",
                expected=f"one of {self.settings['wrt']}",
                got=repr(kind),
                fix="name it in wrt when collecting",
            )
        return {name: t / max(1, self.count) for name, t in self._read(kind).items()}

    def __repr__(self) -> str:
        s = self.settings
        parts = [f"{self.count} samples", f"composite {s['composite_name']}", f"start {s['start']}"]
        for kind in s["wrt"]:
            sums = self._sums[kind]
            size = sum(t.numel() for t in sums.values())
            where = "layers" if kind == "channels" else "parameters"
            parts.append(f"{kind} {s['aggregate'][kind]}: {size} in {len(sums)} {where}")
        if self.unexplained:
            parts.append(f"{len(self.unexplained)} layers without relevance by rule")
        return f"RelevanceSum({', '.join(parts)})"

    # -- adding -------------------------------------------------------------
    def update(self, relevance: Relevance) -> None:
        """Add the samples of one call of :func:`lrp.attribute`.

        That the call had this sum's composite, start and model is up to the
        caller: a Relevance does not say.

        Raises
        ------
        MismatchError
            If the relevance lacks what this sum is of, or its layers or shapes
            differ from those before.
        InputError
            If a sum over space or samples was taken that the aggregate puts
            the magnitude before: "abs_element", and "abs_per_sample" of the
            weights for more than one sample. :func:`collect` does these.
        """
        n = relevance.output.shape[0]
        for kind, how in self.settings["aggregate"].items():
            if how == "abs_element" or (kind == "weights" and how == "abs_per_sample" and n > 1):
                raise InputError(
                    f"{how!r} of the {kind} can not be had from a relevance that is summed already",
                    expected="a relevance of one sample" if how == "abs_per_sample" else "lrp.collect",
                    got=f"{n} samples, {kind} summed with their sign",
                    fix="use lrp.collect, or another aggregate",
                )
        self._add(relevance)

    def _add(self, relevance: Relevance, labels: bool | None = None) -> None:
        with torch.inference_mode(False), torch.no_grad():  # later sums are added in place, in any mode
            new = reduced(relevance, self.settings["aggregate"])
            self._put(new, relevance.output.shape[0], relevance.unexplained, labels)

    def _put(
        self, new: dict[str, dict[str, Tensor]], count: int, unexplained: Mapping[str, str], labels: bool | None
    ) -> None:
        """Add sums in place; checked before anything is changed."""
        for kind, tensors in new.items():
            held = self._sums[kind]
            if not held:
                continue
            same("layers" if kind == "channels" else "parameters", sorted(held), sorted(tensors))
            for name, t in tensors.items():
                same(f"shape of '{name}'", tuple(held[name].shape), tuple(t.shape))
        for kind, tensors in new.items():
            held = self._sums[kind]
            for name, t in tensors.items():
                held[name] = held[name].to(t.device).add_(t) if name in held else t.clone()
        self.count += count
        self.unexplained |= unexplained
        self._labels = labels if self._labels is None else self._labels

    def merge(self, other: RelevanceSum) -> RelevanceSum:
        """The sum over the samples of both, as a new object; associative to rounding.

        Raises
        ------
        MismatchError
            If the two are sums of different things: another model or weights,
            composite, start, target, wrt, aggregate, layers, shapes, precision
            (autocast) or rules of :func:`lrp.register`.
        """
        if not isinstance(other, RelevanceSum):
            raise MismatchError(
                "only sums can be merged", expected="a RelevanceSum", got=type(other).__name__, fix="use update"
            )
        compare(self.settings, other.settings)
        if None not in (self._labels, other._labels):
            same("targets", *("labels" if held else "predicted classes" for held in (self._labels, other._labels)))
        out = RelevanceSum.__new__(RelevanceSum)
        with torch.inference_mode(False), torch.no_grad():
            out.load_state_dict(self.state_dict())
            if other.count:
                out._put(other._sums, other.count, other.unexplained, other._labels)
        return out

    def all_reduce(self) -> RelevanceSum:
        """Sum over the processes of torch.distributed, in place; itself outside of one.

        A collective call; calling it again would add again. A process without samples takes part: names and
        shapes are agreed on before.

        Returns
        -------
        RelevanceSum
            This one; the same in every process.

        Raises
        ------
        DistributedError
            In every process, if their sums are of different things, or one is gone.
        """
        if place()[1] == 1:
            return self
        shapes = {k: {n: list(t.shape) for n, t in sums.items()} for k, sums in self._sums.items()}
        held = next(iter(self._flat().values()), torch.zeros(()))
        with contextlib.ExitStack() as stack:
            on_device(stack, held.device)
            return self._all_reduce(shapes)

    def _all_reduce(self, shapes: dict[str, dict[str, list[int]]]) -> RelevanceSum:
        notes = exchange({**self._meta(), "shapes": shapes})
        fix = "collect the same sum of the same model in every process"
        same_everywhere(notes, "settings", "what is summed", fix)
        filled = [note for note in notes if note["count"]]
        if not filled:
            return self
        same_everywhere(filled, "shapes", "layers and shapes", fix)
        same_everywhere(filled, "labels", "whether batches bring targets", fix)
        flat = self._flat()
        for kind, names in filled[0]["shapes"].items():
            for name, shape in names.items():
                flat.setdefault(f"{kind}:{name}", torch.zeros(shape, dtype=torch.float64))
        self._unflatten(sum_over_processes(flat), filled[0])
        self.count = sum(note["count"] for note in notes)
        for note in notes:
            self.unexplained |= note["unexplained"]
        return self

    # -- keeping ------------------------------------------------------------
    def _meta(self) -> dict[str, Any]:
        return {
            "settings": self.settings,
            "count": self.count,
            "labels": self._labels,
            "unexplained": self.unexplained,
        }

    def _flat(self) -> dict[str, Tensor]:
        return {f"{kind}:{name}": t for kind, sums in self._sums.items() for name, t in sums.items()}

    def _unflatten(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        sums: dict[str, dict[str, Tensor]] = {"channels": {}, "weights": {}}
        for key, t in tensors.items():
            kind, _, name = key.partition(":")
            sums[kind][name] = t
        self.settings, self.count, self.unexplained = meta["settings"], meta["count"], dict(meta["unexplained"])
        self._labels, self._sums = meta["labels"], sums

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and JSON-able values: {"meta", "channels", "weights"}.

        The tensors are copies; "abs_total" keeps its signed sums.
        """
        copies = {kind: {n: t.clone() for n, t in sums.items()} for kind, sums in self._sums.items()}
        return {"meta": copy.deepcopy(self._meta()), **copies}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what :meth:`state_dict` was taken from; settings included.

        Raises
        ------
        FileFormatError
            If the state is none of a RelevanceSum.
        """
        try:
            meta = copy.deepcopy(dict(state["meta"]))
            flat = {f"{kind}:{n}": t.clone() for kind in ("channels", "weights") for n, t in state[kind].items()}
            check_state(flat, meta)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                "the state is none of a RelevanceSum",
                expected="what state_dict() gives",
                got=f"{type(error).__name__}: {error}",
                fix="pass it unchanged",
            ) from error
        self._unflatten(flat, meta)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Raises
        ------
        DataError
            If the folder is missing.
        """
        write_tensors(path, KIND, self._flat(), self._meta())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RelevanceSum:
        """Read what :meth:`save` wrote.

        Raises
        ------
        FileFormatError
            Damaged, of another kind or version.
        FileNotFoundError
        """
        return cls._of(*read_tensors(path, KIND), path)

    @classmethod
    def _of(cls, tensors: dict[str, Tensor], meta: dict[str, Any], path: Any) -> RelevanceSum:
        out = cls.__new__(cls)
        try:
            check_state(tensors, meta)
            out._unflatten(tensors, meta)
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{path} does not hold a RelevanceSum",
                expected="a file written by this version",
                got=f"{type(error).__name__}: {error}",
                fix="take another copy, or collect again",
            ) from error
        return out


def collect(
    model: nn.Module | Plan,
    batches: Iterable[Any],
    *,
    composite: Any = None,
    wrt: Sequence[str] | str = ("channels",),
    aggregate: str | Mapping[str, str] | None = None,
    target: int | str | None = None,
    start: Start = "logit",
    layers: Sequence[str] | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    resume: str | os.PathLike[str] | None = None,
    save_every: float = 0.0,
) -> RelevanceSum:
    r"""Relevance of channels and weights, summed over a data set.

    Parameters
    ----------
    model : nn.Module or Plan
        In evaluation mode. A Plan accepts batches of its own shape only.
    batches : iterable
        A DataLoader, a list, a generator. Yields ``x`` or ``(x, y)``; several
        inputs are a tuple of their own, ``((x1, x2), y)``, and a list is as
        good as a tuple. Without targets ``(x,)`` and ``((x1, x2),)`` are
        allowed too; ``(x1, x2)`` always reads as input and targets. ``y`` is a
        LongTensor (N,) of classes.
    composite : str, Rule or Composite
        ``"epsilon_plus"`` where not given. A Plan has its own.
    wrt : str or sequence of str
        "channels", "weights" or both.
    aggregate : str or dict of str to str
        How relevance becomes one number per channel or weight. With r the
        relevance of a sample n at a position p of the channel (of the
        contribution of a sample at a position through the weight):

        ================  ==================================================
        "signed"          :math:`\sum_n \sum_p r_{np}`
        "abs_element"     :math:`\sum_n \sum_p |r_{np}|`
        "abs_per_sample"  :math:`\sum_n |\sum_p r_{np}|`
        "abs_total"       :math:`|\sum_n \sum_p r_{np}|`; signed sums are kept,
                          so that merging comes before the magnitude
        ================  ==================================================

        A string holds for everything in ``wrt``; a dictionary such as
        ``{"weights": "abs_total"}`` for what it names. Otherwise channels get
        "abs_per_sample" and weights "signed".
    target : None, int or "predicted"
        None: the targets the batches bring, the largest output if they bring
        none. An integer or "predicted" (the largest output) leaves them aside.
    start : str, Tensor or lrp.Seed
        As in :func:`lrp.attribute`. A Tensor or Seed is shaped like the output
        of one sample and stands for each, or like the output of every batch.
        Such starts, and models without a class axis, leave targets aside.
    layers : str or sequence of str
        Names or shell patterns of module calls, to which channels and weights
        are restricted; the weights of a re-used module count in all its uses.
    device : torch.device or str
        Batches are moved there; the model must be there. None: the model's.
    progress : bool
        A bar on stderr; on a terminal only, and in process 0 only.
    resume : path
        A file for the state. It is written at the start, after every batch and
        when the run is interrupted, each time whole or not at all, and stays
        when the run is finished. Where it exists, the run goes on after its
        last batch: earlier batches are read and compared with those before (by
        shape and about a thousand values of each tensor), but not explained.
        So a finished run returns its sum without a pass if the data are the
        same, goes on if batches follow those it had, and raises MismatchError
        for other data. Several processes add ``.rank0``, ``.rank1``, ...
    save_every : float
        Seconds that lie at least between two writings of the state; 0 writes
        after every batch. A kill loses no more than this.

    Returns
    -------
    RelevanceSum

    Raises
    ------
    InputError, TargetError
        If the batches have no known form, or an argument does not fit.
    RuleError
        For "abs_element" of weights, where the rule has no product for it.
    MismatchError
        If ``resume`` names the state of another run: other weights, settings,
        data or number of processes.
    FileFormatError
        If that file is damaged.
    DistributedError
        If another process failed, or differs in model, settings or data.

    Notes
    -----
    Cost: one pass per batch without ledger, back to the first layer whose
    relevance is asked for; "abs_element" of weights needs up to one more weight
    product per layer, "abs_per_sample" of weights one pass per *sample*. Sums
    are float64 on the model's device (on the CPU if it has no float64) and do
    not depend, but for rounding, on how samples are dealt into batches. Every
    new input shape costs a plan. A state holds 8 bytes per channel and weight.

    Under torch.distributed every process is given the same batches and
    explains every ``world``-th of them, beginning with its rank; each returns
    the sum over all. A digest of the data tells if they were not the same. If
    one process raises, the others do too, as soon as they are through. All
    wait for the slowest at the end, no longer than the group's time-out.

    Examples
    --------
    >>> import torch, lrp
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 2))
    >>> data = [(torch.randn(8, 1, 4, 4), torch.randint(2, (8,))) for _ in range(3)]
    >>> total = lrp.collect(net.eval(), data, layers="0")
    >>> total.count, total.channels["0"].shape
    (24, torch.Size([4]))
    """

    def empty(plans: Plans) -> RelevanceSum:
        return RelevanceSum(
            wrt,
            aggregate,
            composite=plans.composite,
            start=start,
            target=target,
            layers=layers,
            model=plans.model,
        )

    return summed(
        empty,
        model,
        batches,
        composite,
        start,
        device=device,
        progress=progress,
        resume=resume,
        save_every=save_every,
    )
