"""Training at low precision: background weights that the optimiser moves, and the levels they are assigned to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress._data import batches_of
from compress.assignment import LAMBDA_RULES, Levels, assign, borders, information, lambda_limit, size_factor
from compress.codebook import codebook_of
from compress.quantization_plan import QuantizationPlan
from compress.quantized_tensors import choose_tensors
from compress.rate import Rate, entropy_of, find_gamma
from compress.weight_relevance import Average, WeightRelevance, mean_over_processes
from compress.zero_cost import ZeroCost
from lrp._distributed import place
from lrp._files import digest
from lrp._identity import unwrapped
from lrp.errors import ConvergenceError, InputError, MismatchError, ModeError, NonFiniteError

__all__ = ["GRAD_SCALES", "METHODS", "Quantizer", "State"]

METHODS = ("ecq", "ecqx", "magnitude", "gradient", "random")
GRAD_SCALES = ("plain", "abs", "signed")
_SOURCES = {"ecqx": "lrp", "magnitude": "magnitude", "gradient": "gradient", "random": "random"}


@dataclass(frozen=True)
class State:
    """How one tensor stands.

    Attributes
    ----------
    limit, multiplier : float
        Largest lambda of the rule, and lambda.
    zeros : float
        Share of weights at level 0.
    beta : float or None
        Exponent of the relevance; None without relevance.
    relevance : str
        "ok", "not_reached" or "skipped" (see :class:`compress.ZeroCost`), or
        "none".
    """

    limit: float
    multiplier: float
    zeros: float
    beta: float | None = None
    relevance: str = "none"


@dataclass(eq=False)
class Quantizer:
    r"""Entropy-constrained training (ECQ, ECQx) inside the user's own loop.

    Forward and backward see the quantized weights Q; the optimiser moves
    background weights W by the gradient at Q (straight through); after every
    step all tensors are assigned anew.

    Parameters
    ----------
    model : nn.Module
        Its weights are replaced by their levels at once.
    optimizer : torch.optim.Optimizer
        Of the model's own parameters.
    method : {"ecq", "ecqx", "magnitude", "gradient", "random"}
        ECQ, ECQx with relevance by LRP, or the controls that put another
        measure into ECQx; see :class:`compress.WeightRelevance`.
    bits : int or mapping
        2 to 8; by layer as in
        :func:`compress.quantized_tensors.choose_tensors`, as are ``first``,
        ``last`` and ``exclude``.
    gamma : float
        Share of the largest lambda: 0 rounds to the nearest level, 1 is where
        the largest tensor may lose one sign. Above 1 the rule's guarantee ends.
    rate : Rate, optional
        A share of zeros or an entropy to be held; gamma then follows from it.
    lambda_rule : {"thesis", "max", "released"}
        See :func:`compress.assignment.lambda_limit`.
    levels, step
        See :func:`compress.codebook.codebook_of`.
    relevance : WeightRelevance or mapping, optional
        Its settings; or relevance collected before, by parameter name, which is
        not refreshed.
    zero_cost : ZeroCost, optional
    grad_scale : {"plain", "abs", "signed"}
        Factor on the gradient of a weight that is not 0: 1, the size of its
        level, or its level with its sign, as in the published ECQx code, where
        it turns the gradient of negative levels; for reproduction.
    seed : int

    Raises
    ------
    InputError, NonFiniteError, MismatchError

    Notes
    -----
    lambda_l = gamma delta_l lambda_max,l (thesis, 4.8). Memory: two copies of
    the quantized weights, one more for relevance, and one more while
    ``at="quantized_jitter"`` refreshes it. Under torch.distributed relevance is
    the mean over the samples of all processes, and all raise if it fails in one;
    gradients are shared by DistributedDataParallel or by
    :class:`compress.FineTune`, with which all processes assign alike.

    Examples
    --------
    >>> import torch, compress
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
    >>> x = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
    >>> y = (x[:, 0] * x[:, 1] > 0).long()
    >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    >>> quantizer = compress.Quantizer(net, optimizer, method="ecqx", bits=4)
    >>> for _ in range(60):
    ...     optimizer.zero_grad()
    ...     torch.nn.functional.cross_entropy(net(x), y).backward()
    ...     optimizer.step()
    ...     quantizer.step(x, y)
    >>> plan = quantizer.finish()
    >>> plan.codebooks["0.weight"].bits, len(net[0].weight.unique()) <= 255
    (8, True)
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    method: str = "ecq"
    bits: int | Mapping[str, int] = 4
    gamma: float = 0.05
    rate: Rate | None = None
    lambda_rule: str = "thesis"
    levels: str = "symmetric"
    step_size: str | float = "percentile"
    first: int | str | None = 8
    last: int | str | None = 8
    exclude: Iterable[str] | str = ()
    relevance: WeightRelevance | Mapping[str, Tensor] | None = None
    zero_cost: ZeroCost = field(default_factory=ZeroCost)
    grad_scale: str = "plain"
    seed: int = 0

    def __post_init__(self) -> None:
        self.model = unwrapped(self.model)
        self._check()
        chosen, self.left_out = choose_tensors(
            self.model, self.bits, first=self.first, last=self.last, exclude=self.exclude
        )
        own = dict(self.model.named_parameters())
        self.parameters = {name: own[name] for name in chosen}
        self.books = {
            name: codebook_of(p, chosen[name], levels=self.levels, step=self.step_size)
            for name, p in self.parameters.items()
        }
        names = tuple(self.parameters)
        factors = size_factor([p.numel() for p in self.parameters.values()])
        self._delta = torch.tensor(factors, dtype=torch.float64, device=next(iter(own.values())).device)
        self._levels = Levels.of(list(self.books.values()))
        self._background = [p.detach().clone() for p in self.parameters.values()]
        self._quantized = [p.detach() for p in self.parameters.values()]
        self._moved: list[Tensor] | None = None
        self._average = self._make_average(names)
        self._digest = ""
        self.steps = 0
        self.stepped = False
        self._finished = False
        self._fates: tuple[list[float], list[str]] | None = None
        self._numbers: tuple[Tensor, Tensor] | None = None
        self._hooks = [
            self.optimizer.register_step_pre_hook(self._before),
            self.optimizer.register_step_post_hook(self._after),
        ]
        self._assign()

    # -- setting up ---------------------------------------------------------
    def _check(self) -> None:
        for name, allowed in (("method", METHODS), ("lambda_rule", LAMBDA_RULES), ("grad_scale", GRAD_SCALES)):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"{name} is unknown",
                    expected=f"one of {', '.join(allowed)}",
                    got=repr(getattr(self, name)),
                    fix="post-training baselines (rtn, mse) need no training: compress.quantize(model, method=...)"
                    if name == "method"
                    else "choose one",
                )
        if (
            isinstance(self.gamma, bool)
            or not isinstance(self.gamma, (int, float))
            or not 0 <= self.gamma < float("inf")
        ):
            raise InputError(
                "gamma makes no sense", expected="a number from 0", got=repr(self.gamma), fix="0.05 is a mild start"
            )
        for name, kinds, told in (
            ("relevance", (WeightRelevance, Mapping, type(None)), "compress.WeightRelevance(...), or tensors by name"),
            ("zero_cost", (ZeroCost,), "compress.ZeroCost(...)"),
            ("rate", (Rate, type(None)), "compress.Rate(zeros=...) or compress.Rate(bits_per_weight=...)"),
        ):
            if not isinstance(getattr(self, name), kinds):
                got = repr(getattr(self, name))
                raise InputError(f"{name} is of another kind", expected=told, got=got, fix="change it")
        if self.method == "ecq" and self.relevance is not None:
            raise InputError(
                "ECQ knows no relevance", expected="method='ecqx'", got="relevance= with method='ecq'", fix="drop one"
            )
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        lost = [n for n, p in self.model.named_parameters() if p.requires_grad and id(p) not in held]
        if lost:
            raise MismatchError(
                "the optimiser does not hold the model's parameters",
                expected="one made from model.parameters()",
                got=f"'{lost[0]}' and {len(lost) - 1} more are not in it",
                fix="make the optimiser first, then the quantizer; freeze what is not to be trained",
            )

    def _make_average(self, names: tuple[str, ...]) -> Average | None:
        if self.method == "ecq":
            return None
        if isinstance(self.relevance, Mapping):
            if self.method != "ecqx":
                raise InputError(
                    f"'{self.method}' has a source of its own",
                    expected="relevance that was collected before with method='ecqx'",
                    got=f"relevance= as tensors with method='{self.method}'",
                    fix="leave one out",
                )
            wrong = [n for n in names if n not in self.relevance or self.relevance[n].shape != self.parameters[n].shape]
            if wrong:
                raise MismatchError(
                    "the relevance does not fit the weights",
                    expected=f"a tensor for '{wrong[0]}' of shape {tuple(self.parameters[wrong[0]].shape)}",
                    got="none, or one of another shape",
                    fix="collect it from this network: lrp.collect(model, batches, wrt='weights').weights",
                )
            average = Average(WeightRelevance(momentum=0.0), names, self.seed)
            average.update({n: self.relevance[n].to(self.parameters[n]) for n in names})
            self._given = True
            return average
        how = self.relevance or WeightRelevance()
        source = _SOURCES[self.method]
        if self.relevance is not None and self.method != "ecqx" and how.source not in ("lrp", source):
            raise InputError(
                "method and relevance name different sources",
                expected=f"source='{source}'",
                got=f"source='{how.source}'",
                fix="name the source once, by the method",
            )
        self._given = False
        return Average(replace(how, source=source), names, self.seed)

    # -- the optimiser's step -----------------------------------------------
    def _before(self, *_: Any) -> None:
        """The optimiser sees the background weights."""
        if self._finished:
            return
        average = self._average
        if average is not None and average.how.at == "quantized_jitter" and self.steps % average.how.every == 0:
            self._moved = [w.clone() for w in self._background]
        for p, w, q in zip(self.parameters.values(), self._background, self._quantized, strict=True):
            if p.grad is not None and self.grad_scale != "plain":
                size = q.abs() if self.grad_scale == "abs" else q
                p.grad.mul_(torch.where(q == 0, 1.0, size))
            p.data = w

    def _after(self, *_: Any) -> None:
        if self._finished:
            return
        self.stepped = True
        for p, q in zip(self.parameters.values(), self._quantized, strict=True):
            p.data = q

    def step(self, x: Any = None, y: Tensor | None = None) -> None:
        """Refresh the relevance when it is due, and assign all weights; after ``optimizer.step()``.

        Parameters
        ----------
        x, y : Tensor (N, ...), LongTensor (N,)
            The batch; read only where LRP is to run. Under torch.distributed
            that of this process, both None in one that has no sample left.

        Raises
        ------
        ModeError
            If the optimiser made no step since, or the quantizer is finished.
        InputError
            If the relevance needs the batch.
        DistributedError
            If the relevance could not be had in another process.
        NonFiniteError
        """
        if self._finished:
            raise ModeError(
                "the quantizer is finished", expected="steps before finish()", got="one after it", fix="make another"
            )
        if not self.stepped:
            raise ModeError(
                "the optimiser made no step",
                expected="optimizer.step() of the optimiser this quantizer was made with, before quantizer.step()",
                got="none since the last call",
                fix="call them in this order; mixed precision may have skipped a step: then skip this one, too",
            )
        self.stepped = False
        average = self._average
        if average is not None and not self._given and self.steps % average.how.every == 0:
            average.update(self._found(average, x, y))
        self.steps += 1
        self._assign()

    def settle(self, batches: Any, progress: bool = False) -> None:
        """Average the relevance over all samples and assign once: quantization without training.

        Parameters
        ----------
        batches : iterable of (x, y)
            Under torch.distributed those of this process, at least one. None
            where they are not read: for magnitudes and given relevance.
        progress : bool

        Raises
        ------
        InputError
            If gradients are asked for, which come with training.
        """
        from tqdm import tqdm

        average = self._average
        if average is not None and not self._given:
            if average.how.source == "gradient":
                raise InputError(
                    "gradients are those of a training step",
                    expected="another source of relevance",
                    got="method='gradient' without training",
                    fix="train, or pass relevance= with values of your own",
                )
            if average.how.source == "magnitude":
                average.update(dict(zip(average.names, self._background, strict=True)))
            else:
                found = batches_of(batches, self._background[0].device)
                average.mean_of(self._with_weights, tqdm(found, "relevance", disable=None if progress else True))
        self._assign()

    def hold(self, rate: Rate) -> None:
        """Assign anew at the smallest gamma that meets a rate; the background stays."""
        kept, self.rate = self.rate, rate
        try:
            self._assign(search=True)
        finally:
            self.rate = kept

    def _found(self, average: Average, x: Any, y: Tensor | None) -> dict[str, Tensor]:
        names, how = average.names, average.how
        if how.source == "magnitude":
            return dict(zip(names, self._background, strict=True))
        if how.source == "gradient":
            grads = [p.grad for p in self.parameters.values()]
            if any(g is None for g in grads):
                raise InputError(
                    "a weight has no gradient",
                    expected="quantizer.step() before zero_grad(), and no frozen weight",
                    got=names[[g is None for g in grads].index(True)],
                    fix="move zero_grad() to the beginning of the step; exclude frozen layers",
                )
            return {n: g * w for n, g, w in zip(names, grads, self._background, strict=True)}  # type: ignore[operator]  # none is None

        def sums() -> tuple[dict[str, Tensor], int]:
            if x is None and y is None and place()[1] > 1:  # the others have the samples of this step
                return {n: torch.zeros_like(w) for n, w in zip(names, self._background, strict=True)}, 0
            if x is None or y is None:
                raise InputError(
                    "the relevance is due and there is no batch",
                    expected="quantizer.step(x, y)",
                    got="no x or no y",
                    fix=f"pass the batch of this step; it is read every {how.every} steps",
                )
            return self._with_weights(x, y), len(y)

        return mean_over_processes(sums)

    def _with_weights(self, x: Any, y: Tensor) -> dict[str, Tensor]:
        """Sums of LRP at the weights that the settings name."""
        average = self._average
        assert average is not None
        how = average.how
        at = self._quantized if how.at == "quantized" else self._background
        if how.at == "quantized_jitter" and self._moved is not None:  # None: no step was made
            at = [q + (w - b) for q, w, b in zip(self._quantized, self._background, self._moved, strict=True)]
            self._moved = None
        try:
            for p, t in zip(self.parameters.values(), at, strict=True):
                p.data = t
            return average.sums(self.model, x, y)
        finally:
            for p, q in zip(self.parameters.values(), self._quantized, strict=True):
                p.data = q

    # -- the levels -----------------------------------------------------------
    @torch.no_grad()
    def _assign(self, search: bool | None = None) -> None:
        """At gamma, or at the one that the rate asks for; ``search`` None: where it is due."""
        levels, weights, books = self._levels, self._background, list(self.books.values())
        ends = torch.stack([torch.stack(w.aminmax()) for w in weights])
        self._check_finite(ends)
        counts = levels.counts([b.nearest(w) - b.low for b, w in zip(books, weights, strict=True)])
        _, bits = information(levels, counts)
        limit = lambda_limit(levels, bits, ends[:, 0], ends[:, 1], self.lambda_rule)
        if self.rate is not None and (self.steps % self.rate.every == 0 if search is None else search):
            self.gamma = find_gamma(lambda gamma: self._excess(bits, gamma * self._delta * limit), self.gamma or None)
        lambdas = self.gamma * self._delta * limit
        self._numbers = limit, lambdas
        positions, self._fates = self._positions(bits, lambdas)
        for q, book, at in zip(self._quantized, books, positions, strict=True):
            q.copy_(book.values(at + book.low))

    def _check_finite(self, ends: Tensor) -> None:
        finite = ends.isfinite().all(1)
        if not bool(finite.all()):
            name = list(self.parameters)[finite.tolist().index(False)]
            raise NonFiniteError(
                f"'{name}' has weights that are no finite numbers",
                expected="finite weights after every step",
                got="NaN or infinity",
                fix="lower the learning rate, clip gradients, or look for NaN in the data",
            )

    def _positions(self, bits: Tensor, lambdas: Tensor) -> tuple[list[Tensor], tuple[list[float], list[str]] | None]:
        """Positions of the levels, and how the relevance fared."""
        levels, weights = self._levels, self._background
        if self._average is None or not self._average.values:
            cells = borders(levels, bits, lambdas)
            return [assign(w, cells[t]) for t, w in enumerate(weights)], None
        relevance = [self._average.values[name] for name in self._average.names]
        positions, beta, states = self.zero_cost.assign(levels, bits, lambdas, weights, relevance)
        return positions, (beta, states)

    def _excess(self, bits: Tensor, lambdas: Tensor) -> float:
        assert self.rate is not None
        counts = self._levels.counts(self._positions(bits, lambdas)[0])
        zeros = float(counts.gather(1, self._levels.zero[:, None]).sum()) / float(counts.sum())
        return self.rate.excess(zeros, entropy_of(counts.tolist()))

    @property
    def bits_per_weight(self) -> float:
        """Entropy of the levels, in bits per quantized weight."""
        pairs = zip(self.books.values(), self._quantized, strict=True)
        return entropy_of(self._levels.counts([b.nearest(q) - b.low for b, q in pairs]).tolist())

    @property
    def states(self) -> dict[str, State]:
        """How every tensor stands after the last assignment."""
        assert self._numbers is not None
        limits, lambdas = (t.tolist() for t in self._numbers)
        zeros = torch.stack([(q == 0).double().mean() for q in self._quantized]).tolist()
        out = {}
        for t, name in enumerate(self.parameters):
            beta, relevance = (None, "none") if self._fates is None else (self._fates[0][t], self._fates[1][t])
            out[name] = State(limits[t], lambdas[t], zeros[t], beta, relevance)
        return out

    @property
    def zeros(self) -> float:
        """Share of all quantized weights that are 0."""
        count = sum(q.numel() for q in self._quantized)
        return float(sum((q == 0).sum() for q in self._quantized)) / count

    @property
    def collapsed(self) -> list[str]:
        """Tensors that are 0 throughout while their background is not."""
        pairs = zip(self.parameters, self._quantized, self._background, strict=True)
        return [name for name, q, w in pairs if not bool(q.any()) and bool(w.any())]

    def background(self) -> dict[str, Tensor]:
        """A copy of the weights that the optimiser moves."""
        return {name: w.clone() for name, w in zip(self.parameters, self._background, strict=True)}

    def finish(self, *, allow_collapse: bool = False) -> QuantizationPlan:
        """Let go of the optimiser; the model keeps its levels, and carries the plan that is returned.

        Raises
        ------
        ConvergenceError
            If a whole tensor became zero, unless ``allow_collapse``.
        """
        gone = self.collapsed
        if gone and not allow_collapse:
            raise ConvergenceError(
                f"'{gone[0]}' became zero throughout",
                expected="at least one weight that is not 0 in every tensor",
                got=f"{len(gone)} tensors without any",
                fix="lower gamma, give that layer more bits, or exclude it; allow_collapse=True takes it as it is",
            )
        for hook in self._hooks:
            hook.remove()
        self._finished = True
        plan = QuantizationPlan(dict(self.books), dict(self.left_out), self.settings())
        plan.apply(self.model)
        return plan

    # -- settings and state -----------------------------------------------------
    def settings(self) -> dict[str, Any]:
        """What the result depends on beside model, data and optimiser: JSON-able."""
        plain = ("method", "gamma", "lambda_rule", "levels", "step_size", "first", "last", "grad_scale", "seed")
        out = {name: getattr(self, name) for name in plain}
        out["rate"] = None if self.rate is None else self.rate.settings()
        out["bits"] = dict(self.bits) if isinstance(self.bits, Mapping) else self.bits
        out["exclude"] = [self.exclude] if isinstance(self.exclude, str) else list(self.exclude)
        out["relevance"] = None if self._average is None else self._average.how.settings()
        if self._average is not None and self._given:
            out["relevance"] = "given"
            out["relevance_digest"] = self._digest = self._digest or digest(self._average.values)
        out["zero_cost"] = None if self._average is None else self.zero_cost.settings()
        return out

    def state_dict(self) -> dict[str, Tensor]:
        """Background weights, relevance and the number of steps: what a resumed run needs beside the model."""
        out = {f"background.{n}": w for n, w in zip(self.parameters, self._background, strict=True)}
        if self._average is not None:
            out |= {f"relevance.{n}": r for n, r in self._average.values.items()}
        return {**out, "steps": torch.tensor(self.steps), "gamma": torch.tensor(self.gamma, dtype=torch.float64)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put back what :meth:`state_dict` gave, and assign from it.

        Raises
        ------
        MismatchError
            If it is of another network.
        """
        wanted = {f"background.{n}": tuple(w.shape) for n, w in zip(self.parameters, self._background, strict=True)}
        found = {n: tuple(t.shape) for n, t in state.items() if n.startswith("background.")}
        if wanted != found or "steps" not in state:
            raise MismatchError(
                "the state is of another quantizer",
                expected=f"background weights of {len(wanted)} tensors",
                got=f"{len(found)} tensors, or other names or shapes",
                fix="make model and quantizer as for the first start",
            )
        with torch.no_grad():
            for name, w in zip(self.parameters, self._background, strict=True):
                w.copy_(state[f"background.{name}"])
        if self._average is not None and not self._given:
            held = {n.removeprefix("relevance."): t for n, t in state.items() if n.startswith("relevance.")}
            self._average.values = {n: t.to(self.parameters[n]).clone() for n, t in held.items()}
        self.steps, self.gamma = int(state["steps"]), float(state["gamma"])
        self._assign(search=False)
