"""One run of quantization: its parts, its state on disk, its result."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compress._data import check_reiterable, device_of
from compress._modes import modes_kept
from compress._order import order_of
from compress._progress import Folder
from compress.batchnorm import reestimate_
from compress.codebook import codebook_of
from compress.evaluation import evaluator_of
from compress.quantization import KNOWN, QuantizeResult, Reached
from compress.quantization_plan import QuantizationPlan
from compress.quantized_tensors import choose_tensors
from compress.quantizer import Quantizer
from compress.rate import Rate
from compress.rounding import ROUNDING, round_to_nearest
from compress.storage import file_size
from compress.target import Target
from compress.training import FineTune, History
from lrp._distributed import from_first, on_device, place, together
from lrp.errors import BudgetError, InputError

__all__ = ["QuantizationRun"]

_ROUNDS = 8  # of the search for a file of the wanted size
_SLACK = 0.01  # of what a rate asks for: below it, the rate counts as not reached


class QuantizationRun:
    """See :func:`compress.quantize`; ``model`` is the run's own."""

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        method: str,
        train: FineTune | bool | None,
        rate: Rate | None,
        target: Target | None,
        choice: Mapping[str, Any],
        codes: Mapping[str, Any],
        options: Mapping[str, Any],
        reestimate: bool,
        evaluate: Any,
        resume: Any,
        allow_collapse: bool,
        seed: int,
        device: Any,
        progress: bool,
    ) -> None:
        self.home = device_of(model)
        self.device = device_of(model, device)
        self.model = model.to(self.device)
        self.data, self.method, self.target, self.rate = data, method, target, rate
        self.choice, self.codes = dict(choice), dict(codes)
        self.options = {k: v for k, v in options.items() if v is not None}
        self.reestimate, self.resume, self.allow_collapse = reestimate, resume, allow_collapse
        self.seed, self.progress = seed, progress
        self._check(train)
        self.train = self._training(train)
        self.evaluator = evaluator_of(evaluate, device=self.device)
        self.before = file_size(self.model)
        self.limit = None if target is None else int(target.absolute(self.before))
        self.quantizer: Quantizer | None = None
        self.history: History | None = None

    # -- setting up ---------------------------------------------------------
    def _check(self, train: Any) -> None:
        rounding = isinstance(self.method, str) and self.method in ROUNDING
        usual = {name: getattr(Quantizer, name) for name in ("gamma", "lambda_rule", "grad_scale")}
        unread = [name for name, value in usual.items() if self.options.get(name, value) != value]
        wrong = [
            (
                train is not None and not isinstance(train, (bool, FineTune)),
                "train is of another kind",
                "compress.FineTune(...), True, False or None",
                repr(train),
                "train=False assigns once, None trains for 10 epochs",
            ),
            (
                self.rate is not None and not isinstance(self.rate, Rate),
                "rate is of another kind",
                "compress.Rate(zeros=...) or compress.Rate(bits_per_weight=...)",
                repr(self.rate),
                "rate=compress.Rate(zeros=0.9)",
            ),
            (self.method not in KNOWN, "unknown method", ", ".join(KNOWN), repr(self.method), "choose one"),
            (
                rounding and (isinstance(train, FineTune) or train is True or self.resume is not None),
                f"'{self.method}' does not train",
                "no train= and no resume=",
                "one of them",
                "method='ecq' trains",
            ),
            (
                rounding and (self.target is not None or self.rate is not None),
                f"'{self.method}' has no rate to choose",
                "bits= alone",
                "target= or rate=",
                "method='ecq' holds a rate",
            ),
            (
                rounding and self.codes["step"] is not None,
                f"'{self.method}' has a step of its own",
                "no step=",
                repr(self.codes["step"]),
                "method='rtn' takes the largest weight, 'mse' the least squared error",
            ),
            (
                rounding and bool(unread),
                f"'{self.method}' knows no {unread[0] if unread else ''}",
                "no gamma=, lambda_rule= and grad_scale=",
                ", ".join(f"{name}={self.options[name]!r}" for name in unread),
                "method='ecq' reads them",
            ),
            (
                (rounding or self.method == "ecq") and bool({"relevance", "zero_cost"} & set(self.options)),
                f"'{self.method}' knows no relevance",
                "neither relevance= nor zero_cost=",
                "one of them",
                "method='ecqx' takes both",
            ),
            (
                train is False and self.resume is not None,
                "there is no training to resume",
                "resume= with a method that trains",
                "train=False",
                "leave one out",
            ),
            (
                self.target is not None and self.rate is not None,
                "a target and a rate are two goals",
                "one of them",
                "both",
                "leave one out",
            ),
            (
                self.target is not None and not (isinstance(self.target, Target) and self.target.kind == "bytes"),
                "quantization knows no such target",
                "compress.Target(bytes=...)",
                repr(self.target),
                "rate=compress.Rate(zeros=0.9) is for sparsity; prune for MACs and channels",
            ),
            (
                not rounding and self.data is None and not isinstance(train, FineTune) and train is not False,
                f"'{self.method}' trains and there are no data",
                "data= with batches (x, y), or train=FineTune(...)",
                "neither",
                "pass data, or train=False to assign once",
            ),
            (
                self.reestimate and self.data is None,
                "batch-norm statistics need data",
                "data= beside reestimate_batchnorm=True",
                "none",
                "pass samples; labels are not needed for that",
            ),
            (
                isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0,
                "seed makes no sense",
                "an int >= 0",
                repr(self.seed),
                "for example seed=0",
            ),
        ]
        for failed, what, expected, got, fix in wrong:
            if failed:
                raise InputError(what, expected=expected, got=got, fix=fix)
        choose_tensors(self.model, **self.choice)  # before any work

    def _training(self, train: FineTune | bool | None) -> FineTune | None:
        if self.method in ROUNDING or train is False:
            return None
        if isinstance(train, FineTune):
            return train
        return FineTune(
            self.data, epochs=10, optimizer="adamw", lr=1e-3, weight_decay=0.0, seed=self.seed, progress=self.progress
        )

    # -- the run ------------------------------------------------------------
    def result(self) -> QuantizeResult:
        """Quantize, and measure what came of it."""
        evaluation_before = None if self.evaluator is None else self.evaluator(self.model)
        with contextlib.ExitStack() as stack:
            stack.enter_context(modes_kept(self.model))
            on_device(stack, self.device)
            plan = self._quantized()
        evaluation = None if self.evaluator is None else self.evaluator(self.model)
        self.model.to(self.home)
        quantizer = self.quantizer
        return QuantizeResult(
            self.model,
            plan,
            self.before,
            Reached.of(self.model, plan),
            evaluation_before,
            evaluation,
            {} if quantizer is None else quantizer.states,
            self.history,
            None if quantizer is None else quantizer.gamma,
            () if quantizer is None else tuple(quantizer.collapsed),
            self._settings(plan),
        )

    def _quantized(self) -> QuantizationPlan:
        if self.method in ROUNDING:
            chosen, left_out = choose_tensors(self.model, **self.choice)
            plan = round_to_nearest(self.model, chosen, left_out, self.method, self.codes["levels"])
            self._reestimated()
            return plan
        if self.train is None:
            self._once()
        else:
            with contextlib.ExitStack() as stack:
                path: Path | None = None
                if self.resume is not None:
                    folder = Folder(self.resume)
                    with together():
                        if place()[0] == 0:  # which alone writes
                            stack.enter_context(folder.locked())
                    path = folder.path / "quantizing.state"
                self.history = self.train(self.model, resume=path, companion=self._companion)
        quantizer = self.quantizer
        assert quantizer is not None
        if self.limit is not None:
            self._fitted(quantizer, self.limit)
        else:
            if self.rate is not None:
                quantizer.hold(self.rate)  # since the last search the weights have moved
            self._reestimated()
        plan = quantizer.finish(allow_collapse=self.allow_collapse)
        if self.rate is not None and self.rate.excess(quantizer.zeros, quantizer.bits_per_weight) < -_SLACK:
            warnings.warn(
                f"the rate was not reached: {quantizer.zeros:.1%} of the weights are zero, "
                f"{quantizer.bits_per_weight:.3f} bits each, at gamma = {quantizer.gamma:.3g}",
                stacklevel=4,
            )
        return plan

    def _reestimated(self) -> None:
        """Batch-norm statistics anew, if that is asked for."""
        if not self.reestimate:
            return
        with together() if self.train is not None else contextlib.nullcontext():
            reestimate_(self.model, self._batches())
        if self.train is not None:  # a loader may be read in another order
            from_first(self.model.buffers())

    def _companion(self, optimizer: torch.optim.Optimizer) -> Quantizer:
        rate = self.rate
        if self.limit is not None:
            rate = Rate(bits_per_weight=self._room(self.limit))
        self.quantizer = Quantizer(
            self.model,
            optimizer,
            method=self.method,
            **self.choice,
            **self.options,
            levels=self.codes["levels"],
            step_size=self.codes["step"] or "percentile",
            rate=rate,
            seed=self.seed,
        )
        return self.quantizer

    def _once(self) -> None:
        """Without training: relevance is averaged over the data, and the weights are assigned once."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        still = torch.optim.SGD(parameters or list(self.model.parameters()), lr=0.0)
        quantizer = self._companion(still)
        if self.method != "ecq":
            quantizer.settle(None if self.data is None else self._batches(), self.progress)

    def _batches(self) -> Any:
        order = order_of(self.data, 64, self.seed)
        return check_reiterable(list(order.epoch(0)) if order.pair is not None else self.data)

    # -- bytes --------------------------------------------------------------
    def _room(self, limit: int) -> float:
        """Bits per quantized weight that a file of that size leaves beside everything else."""
        chosen, left_out = choose_tensors(self.model, **self.choice)
        twin = copy.deepcopy(self.model)
        weights = {name: p for name, p in twin.named_parameters() if name in chosen}
        step = self.codes["step"] or "percentile"
        books = {n: codebook_of(p, chosen[n], levels=self.codes["levels"], step=step) for n, p in weights.items()}
        for p in weights.values():
            p.data.zero_()
        QuantizationPlan(books, left_out).apply(twin)
        least = file_size(twin)
        if limit < least:
            raise BudgetError(
                "the target leaves no room for the weights",
                expected=f"at least {least:,} bytes, which the file takes if every quantized weight is zero",
                got=f"{limit:,} bytes",
                fix="raise the target, quantize first and last layer too, or prune before",
            )
        return max(8 * (limit - least) / sum(p.numel() for p in weights.values()), 0.02)

    def _size(self, quantizer: Quantizer) -> int:
        """Of the file as things stand."""
        plan = QuantizationPlan(dict(quantizer.books), dict(quantizer.left_out), quantizer.settings())
        plan.apply(self.model)
        return file_size(self.model)

    def _fitted(self, quantizer: Quantizer, limit: int) -> None:
        """The mildest constraint that meets the target, with the statistics that the file will hold."""
        within = limit
        for _ in range(_ROUNDS):
            self._fit(quantizer, within)
            self._reestimated()
            over = self._size(quantizer) - limit
            if over <= 0:
                return
            within -= over + 8  # other statistics, other bytes
        raise BudgetError(
            "the target can not be met with new batch-norm statistics",
            expected=f"at most {limit:,} bytes",
            got=f"{limit + over:,} bytes",
            fix="raise the target by some bytes, or leave out reestimate_batchnorm",
        )

    def _fit(self, quantizer: Quantizer, limit: int) -> None:
        """The mildest constraint with which the file is no larger than the limit."""
        rate = quantizer.rate
        assert rate is not None
        assert rate.bits_per_weight is not None
        low, high, best = 0.0, None, None
        bits = rate.bits_per_weight
        weights = sum(p.numel() for p in quantizer.parameters.values())
        for _ in range(_ROUNDS):
            quantizer.hold(replace(rate, bits_per_weight=bits))
            found = self._size(quantizer)
            if found <= limit:
                best, low = bits, bits
                if limit - found <= max(16, 0.002 * limit) or quantizer.gamma == 0:
                    return
            else:
                high = bits
            bits += 8 * (limit - found) / weights - (1e-4 if found > limit else 0.0)
            if high is not None and not low < bits < high:
                bits = (low + high) / 2
        if best is None:
            raise BudgetError(
                "the target can not be met",
                expected=f"at most {limit:,} bytes",
                got=f"{self._size(quantizer):,} bytes at gamma = {quantizer.gamma:.3g}",
                fix="raise the target, take fewer bits, or prune before",
            )
        quantizer.hold(replace(rate, bits_per_weight=best))

    def _settings(self, plan: QuantizationPlan) -> dict[str, Any]:
        train = None if self.train is None else self.train.settings()
        out = {**plan.settings, **{k: v for k, v in self.choice.items() if k != "bits"}, "train": train}
        bits = self.choice["bits"]
        out["bits"] = dict(bits) if isinstance(bits, Mapping) else bits
        out["exclude"] = list(self.choice["exclude"])
        out["target"] = None if self.target is None else self.target.to_json()
        out["reestimate_batchnorm"] = self.reestimate
        out["seed"] = self.seed
        return out
