"""One run of pruning: its steps, and what it keeps of them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import time
from typing import Any

import torch
from torch import nn

from compress._progress import Checkpoint
from compress._pruning_state import evaluation_of, left_of, scores_of
from compress._pruning_terms import RANKING, Terms
from compress._randomness import put_generators, seed_of, seeded
from compress._remainder import remaining_table
from compress._trainer import load_state, state_of
from compress.batchnorm import reestimate_
from compress.costs import Costs, CostTable, count
from compress.criteria.scores import Scores
from compress.evaluation import Evaluation
from compress.groups import Structure
from compress.plan import PruningPlan
from compress.planning import _everything, _reachable, _refuse, plan_pruning, refuse_rigid, score, structure_for
from compress.pruning import PruneResult, Step
from compress.ranking import Ranking
from compress.schedules import step_target
from compress.target import Target
from compress.training import FineTune, History
from lrp._identity import unwrapped
from lrp.errors import BudgetError, FileFormatError

__all__ = ["Run"]

MET = "the target is met as it is, and nothing was removed"
_SCORE, _TRAIN, _ASK = range(3)  # parts of a step, each with random numbers of its own


class Run(Terms):
    """The steps of :func:`compress.prune`."""

    # what the steps change
    plan: PruningPlan | None = None
    scores: Scores | None
    before: Evaluation | None = None
    after: Evaluation | None = None
    history: tuple[Step, ...] = ()
    stopped = ""
    pinned: dict[str, Any]
    targets: list[Target]
    start_latency: float | None = None

    # -- the run ------------------------------------------------------------
    def run(self) -> PruneResult:
        from tqdm import tqdm

        self.scores, self.targets = self.options.get("scores"), []
        with contextlib.ExitStack() as stack:
            structure = self._structure()
            table = CostTable.of(self.base, self.example, structure)
            self.pinned = self._pinned(structure)
            if self.folder is None or not self.folder.finished.exists():
                self.targets = self._targets(structure, table)  # before anything is written
            if self.folder is not None:
                stack.enter_context(self.folder.locked())
            model, done = self._open()
            total = len(self.targets)
            hidden = None if self.progress and total > 1 else True
            bar = stack.enter_context(tqdm(total=total, initial=done, desc="pruning", unit="step", disable=hidden))
            for number in range(done + 1, total + 1):
                if self.stopped:
                    break
                model = self._step(number, self.targets[number - 1], model, table)
                bar.update()
            return self._result(model, structure, table)

    def _structure(self) -> Structure:
        given: Structure | None = self.options.get("structure")
        protect, allow = (self.options.get(name, ()) for name in ("protect", "allow"))
        return structure_for(self.base, self.example, given, protect, allow)

    def _targets(self, structure: Structure, table: CostTable) -> list[Target]:
        """One per step; refuses what can not be met."""
        refuse_rigid(structure, self.target)
        ranking = Ranking(**{name: self.options[name] for name in RANKING if name in self.options})
        ranking.check(structure)
        if self.target.kind == "latency_ms":
            from compress._latency_search import LatencySearch

            meter = self.options.get("meter")
            cache = self.options.get("latency_cache")
            search = LatencySearch(self.base, self.example, self.target, structure, table, meter, cache, self.progress)
            search.check(_everything(structure, ranking))
            before, limit = search.before, search.limit
            self.start_latency = before
        else:
            _refuse(self.target, _reachable(structure, table, ranking), table, "")
            before = self._size(table)
            limit = self.target.absolute(before)
        if before <= limit:
            self.stopped = MET
        if self.schedule.steps == 1:
            return [self.target]
        return [step_target(self.target.kind, level) for level in self.schedule.limits(before, limit)]

    def _pinned(self, structure: Structure) -> dict[str, Any]:
        """Options of the ranking for every step, with floors and roundings as the original widths have them."""
        out = {name: self.options[name] for name in RANKING if name in self.options}
        if self.schedule.steps > 1:
            ranking = Ranking(**out)
            out["floor"] = {g.name: ranking.kept(g) for g in structure.prunable}
            out["round_to"] = {g.name: ranking.block(g) for g in structure.prunable}
        return out

    def _step(self, number: int, target: Target, model: nn.Module, table: CostTable) -> nn.Module:
        """One round; the network it leaves, which is the given one if it was rolled back."""
        began = time.monotonic()
        good, plan_before, after_before = model, self.plan, self.after
        resumed = self._read_cut(number)
        if resumed is None:
            model, first = self._cut(number, target, model, table)
            spent = 0.0
        else:
            model, first, spent = resumed
        trained = self._train(number, model)
        after = self._ask(number, model) if self.fine_tune is not None else first
        reached = self._count(model)
        seconds = round(spent + time.monotonic() - began, 3)
        cut = first if self.fine_tune is not None else None
        self.history = (*self.history, Step(number, target, reached, cut, after, trained, seconds))
        self.after = after
        if self._too_low(after, number):
            model, self.plan, self.after = good, plan_before, after_before
        self._save(number, model)
        return model

    def _cut(
        self, number: int, target: Target, model: nn.Module, table: CostTable
    ) -> tuple[nn.Module, Evaluation | None]:
        """Score, plan, cut and re-estimate."""
        began = time.monotonic()
        with seeded(seed_of(self.seed, number, _SCORE), self.device):
            left = table if self.plan is None else remaining_table(table, self.plan.removed)
            scores = self._scores(model, left.structure)
            later = plan_pruning(
                model,
                self.example,
                self.data,
                criterion=self.criterion,
                target=target,
                scores=scores,
                structure=left.structure,
                table=left,
                meter=self.options.get("meter"),
                latency_cache=self.options.get("latency_cache"),
                done=self._done(number),
                progress=self.progress,
                **self.pinned,
            )
            self.plan = later if self.plan is None else self.plan.then(later)
            model = later.apply(model)
            if self.reestimate:
                reestimate_(model, self.statistics)
        first = self._ask(number, model)
        if self.folder is not None:
            held = Checkpoint(number, {"model": state_of(model)}, {"seconds": time.monotonic() - began})
            self._note(held, first)
            self.folder.write(self.folder.cut, held, self.settings)
        return model, first

    def _scores(self, model: nn.Module, structure: Structure) -> Scores:
        """Of the network as it is, or what is left of those of the original."""
        if self.schedule.rescore == "once" and self.scores is not None:
            return left_of(self.scores, self.plan)
        if self.scores is not None:
            return self.scores  # given, for a single step
        found = score(
            model, self.example, self.data, criterion=self.criterion, structure=structure, progress=self.progress
        )
        if self.schedule.rescore == "once":
            self.scores = found
        return found

    def _train(self, number: int, model: nn.Module) -> History | None:
        if self.fine_tune is None:
            return None
        with seeded(seed_of(self.seed, number, _TRAIN), self.device):
            if isinstance(self.fine_tune, FineTune):
                own, shown = self.fine_tune, self.progress and self.fine_tune.progress
                task = dataclasses.replace(own, seed=seed_of(own.seed, number), progress=shown)
                return task(model, resume=None if self.folder is None else self.folder.tuning(number))
            found = self.fine_tune(model)
        if isinstance(found, nn.Module) and unwrapped(found) is not model:
            load_state(model, state_of(unwrapped(found)))
        return found if isinstance(found, History) else None

    def _ask(self, number: int, model: nn.Module) -> Evaluation | None:
        if self.evaluator is None:
            return None
        with seeded(seed_of(self.seed, number, _ASK), self.device):
            return self.evaluator(model)

    def _least(self) -> float | None:
        if self.floor is None or self.before is None:
            return None
        return self.floor if self.floor >= 0 else self.before.accuracy + self.floor

    def _too_low(self, after: Evaluation | None, number: int) -> bool:
        least = self._least()
        if least is None or after is None or after.accuracy >= least:
            return False
        self.stopped = f"accuracy floor at step {number}: {after.accuracy:.4f} < {least:.4f}; rolled back"
        return True

    def _count(self, model: nn.Module) -> Costs:
        """Measured on the network; channels and latency as the plan knows them."""
        assert self.plan is not None
        latency = dict(self.plan.settings.get("latency_ms", {})).get("after", self.start_latency)
        found, known = count(model, self.example), self.plan.after
        return dataclasses.replace(
            found, channels=known.channels, latency_ms=latency, file_bytes=known.file_bytes or self._file_bytes()
        )

    def _result(self, model: nn.Module, structure: Structure, table: CostTable) -> PruneResult:
        self.plan = self.plan or PruningPlan(structure, table, {})
        before = dataclasses.replace(table.costs({}), latency_ms=self.start_latency, file_bytes=self._file_bytes())
        reached = self._count(model)
        # what was done is said of the network, not of others that the plan is applied to
        own = {name: value for name, value in self.plan.settings.items() if name != "done"}
        plan = dataclasses.replace(self.plan, settings=own)
        settings = {
            "target": self.target.to_json(),
            "criterion": plan.settings.get("criterion"),
            "samples": plan.settings.get("samples"),
            "ranking": plan.settings.get("ranking"),
            **self._done(int(dict(self.plan.settings.get("done", {})).get("cuts", 0))),
            "fine_tune": self._training,
            "torch": torch.__version__,
        }
        return PruneResult(
            model=model.to(self.home),
            plan=plan,
            before=before,
            reached=reached,
            evaluation_before=self.before,
            evaluation=self.after,
            history=self.history,
            stopped=self.stopped,
            settings=settings,
            meter=self.options.get("meter"),
        )

    # -- state on disk ------------------------------------------------------
    def _open(self) -> tuple[nn.Module, int]:
        """The network to go on with, and how many steps are done."""
        held = None if self.folder is None else self.folder.read(self.folder.finished, self.settings)
        if held is None:
            model = copy.deepcopy(self.base)
            self.before = self.after = self._ask(0, model)
            least = self._least()
            if least is not None and self.before is not None and self.before.accuracy < least:
                raise BudgetError(
                    "the network is below the accuracy floor before anything is removed",
                    expected=f"accuracy >= {least:.4f}",
                    got=str(self.before),
                    fix="lower accuracy_floor, or give the largest drop as a negative number",
                )
            self._save(0, model)
            return model, 0
        assert self.folder is not None
        model = self._restore(held, self.folder.finished)
        cut = self.folder.read(self.folder.cut, self.settings)
        if cut is not None and cut.step <= held.step:  # killed before it was removed
            self.folder.clear(held.step)
        return model, held.step

    def _restore(self, held: Checkpoint, path: Any) -> nn.Module:
        try:
            plan = held.values["plan"]
            self.plan = None if plan is None else PruningPlan.from_json(plan)
            model = copy.deepcopy(self.base) if self.plan is None else self.plan.apply(self.base)
            load_state(model, held.tensors["model"])
            self.history = tuple(Step.from_json(s) for s in held.values["history"])
            self.stopped = str(held.values["stopped"])
            self.targets = [Target.from_json(t) for t in held.values["targets"]]
            self.start_latency = held.values["latency_ms"]
            self.before, self.after = (evaluation_of(held, part) for part in ("before", "after"))
            self.scores = scores_of(held) or self.scores
            put_generators(self.generators, list(held.tensors.get("generators", {}).values()))
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(
                f"{path} holds no state of compress.prune",
                expected="a file that resume= wrote",
                got=f"{type(error).__name__}: {error}",
                fix="name another folder",
            ) from error
        return model

    def _read_cut(self, number: int) -> tuple[nn.Module, Evaluation | None, float] | None:
        """What an earlier process has cut in this step."""
        if self.folder is None:
            return None
        held = self.folder.read(self.folder.cut, self.settings)
        if held is None or held.step != number:
            return None
        after = self.after
        model = self._restore(held, self.folder.cut)
        first, self.after = self.after, after
        return model, first, float(held.values["seconds"])

    def _save(self, number: int, model: nn.Module) -> None:
        if self.folder is None:
            return
        held = Checkpoint(number, {"model": state_of(model)})
        self._note(held, self.after)
        self.folder.write(self.folder.finished, held, self.settings)
        self.folder.clear(number)

    def _note(self, held: Checkpoint, after: Evaluation | None) -> None:
        """All that the run has found so far."""
        held.values |= {
            "plan": None if self.plan is None else self.plan.to_json(),
            "history": [step.to_json() for step in self.history],
            "stopped": self.stopped,
            "targets": [target.to_json() for target in self.targets],  # times are measured once
            "latency_ms": self.start_latency,
        }
        for part, found in (("before", self.before), ("after", after)):
            held.values[part] = None if found is None else {**found.to_json(), "outputs": found.outputs}
            if found is not None and found.labels is not None and found.predictions is not None:
                held.tensors[part] = {"labels": found.labels, "predictions": found.predictions}
        if self.schedule.rescore == "once" and self.scores is not None:
            held.tensors["scores"] = dict(self.scores.values)
            own = self.scores
            told_of = {"name": own.name, "samples": own.samples, "level": own.level}
            held.values["scores"] = {**told_of, "unscored": dict(own.unscored), "settings": dict(own.settings)}
        held.tensors["generators"] = {str(k): g.get_state() for k, g in enumerate(self.generators)}
