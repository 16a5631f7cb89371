r"""The search for the nearest row with another label: many cells, categories and whole numbers, best first.

A cell is a polytope of z-space in which one label wins. With
:math:`v_t = \sqrt{w_t}\,(x'_t - x_t)` its borders are unit rows
:math:`G v \ge r`, and :math:`\max_i r_i` is a lower bound of the distance: that
to the farthest violated border alone. Where the step to that border lands in
the cell it is the answer, and a batch of rows takes it at once. For the other
rows candidates wait in order of their lower bounds, and a quadratic programme
is solved only for those that come up: a cell, the categories that change, and
the intervals of whole numbers (branch and bound). The first candidate that
comes up solved is the nearest.

Borders are moved inwards by the margin, and by no less than the rounding of
the border's value, so that rows end in the open cell; ``predict`` has the last
word, and doubles the margin until it agrees.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lrp.errors import ConvergenceError, RuleError, UnsupportedEstimatorError
from neuralize._decision import Decision
from neuralize._projection import InfeasibleError, displace
from neuralize.tables import non_finite

__all__ = ["Found", "Search"]

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

_EPS = float(np.finfo(np.float64).eps)
# of the margin; a network that rounds more than it says may need many
_DOUBLINGS, _TIED = 40, 3
_WHOLE = 1e-7
_LARGEST = float(np.finfo(np.float64).max)
# numbers per array of a batch
_BATCH = 2**21


@dataclass
class Found:
    """Nearest rows of a batch.

    Attributes
    ----------
    rows : ndarray (n, D)
    distance, margin : ndarray (n,)
    new : ndarray (n,) of int
        Position of the label; -1 where nothing was found.
    exact : ndarray (n,) of bool
        Proven to be the nearest.
    """

    rows: Floats
    distance: Floats
    margin: Floats
    new: npt.NDArray[np.int64]
    exact: Bools


@dataclass(frozen=True)
class Stack:
    """Cells on top of each other: cell c is the rows start[c]:start[c + 1]."""

    A: Floats
    b: Floats
    G: Floats
    norm: Floats
    flat: Bools
    start: npt.NDArray[np.int64]
    precision: float

    def _noise(self, z: Floats) -> Floats:
        """Rounding of the borders' values in the network, (n, M)."""
        size = np.abs(z) @ np.abs(self.A).T + np.abs(self.b)
        return np.asarray((8 + z.shape[1]) * self.precision * size)

    def lacks(self, z: Floats) -> tuple[Floats, Floats]:
        """How far each border is, and the rounding of that, (n, M) each; negative inside, -inf if met by any v."""
        h = z @ self.A.T + self.b
        noise = self._noise(z)
        lack, rounding = -h / self.norm, noise / self.norm
        if self.flat.any():
            lack[:, self.flat] = np.where(h[:, self.flat] >= -noise[:, self.flat], -np.inf, np.inf)
            rounding[:, self.flat] = 0.0
        return lack, rounding

    def ties(self, z: Floats) -> Bools:
        """Cells (n, C) with a border that is 0 whatever v is: the labels' order decides there, not the place."""
        if not self.flat.any():
            return np.zeros((len(z), len(self.start) - 1), dtype=bool)
        h = z @ self.A.T + self.b
        return np.asarray(np.logical_or.reduceat(self.flat & (np.abs(h) <= self._noise(z)), self.start[:-1], axis=1))

    def farthest(self, lack: Floats) -> Floats:
        """Lower bounds of the distances to the cells, (n, C)."""
        return np.asarray(np.maximum.reduceat(lack, self.start[:-1], axis=1))

    def spread(self, per_cell: Floats) -> Floats:
        """(n, C) -> (n, M)."""
        return np.repeat(per_cell, np.diff(self.start), axis=1)


@dataclass(frozen=True)
class Node:
    """A candidate: scenario, cell, intervals of v, how far its borders are moved; solved if it has v."""

    scenario: int
    cell: int
    lower: Floats
    upper: Floats
    doublings: int = 0
    least: bool = False
    v: Floats | None = None


@dataclass
class Scenarios:
    """What a row may be before its continuous columns move.

    rows (S, D) with other categories, the cost (S,) of that, which columns may
    move (S, D), their z (S, d); what scenarios left out cost at least.
    """

    rows: Floats
    cost: Floats
    free: Bools
    z: Floats
    left_out: float


class Search:
    """Nearest rows for one question; see :func:`neuralize.counterfactuals.counterfactuals`."""

    def __init__(
        self, decision: Decision, weights: Floats, free: Bools, change: list[int], whole: list[int],
        margin: float, budget: int,
    ) -> None:  # fmt: skip
        self.decision, self.margin, self.budget = decision, margin, budget
        self.change, self.whole = change, whole
        self.weights, self.free = weights, free
        self.scale = np.sqrt(weights)
        affine = decision.affine
        d = len(weights)
        self.low = np.full(d, -np.inf) if affine.low is None else np.asarray(affine.low, dtype=np.float64)
        self.high = np.full(d, np.inf) if affine.high is None else np.asarray(affine.high, dtype=np.float64)
        self.steps = np.where(free, np.asarray(affine.T, dtype=np.float64) / self.scale, 0.0)
        self._stacks: dict[tuple[int, int], Stack | None] = {}

    # ------------------------------------------------------------------ cells

    def stack(self, old: int, want: int) -> Stack | None:
        """The cells in which a row of label ``old`` has label ``want``, or any other one if that is -1."""
        if want >= 0:
            old = -1
        if (old, want) not in self._stacks:
            if want >= 0:
                cells = self._cells(want)
            elif len(own := self._cells(old)) == 1:
                # outside of one polytope is beyond one of its borders
                A, b = own[0]
                cells = [(-A[i : i + 1], -b[i : i + 1]) for i in range(len(b)) if A[i].any()]
            else:
                others = (k for k in range(len(self.decision.labels)) if k != old)
                cells = [cell for k in others for cell in self._cells(k)]
            self._stacks[old, want] = self._stacked(cells)
        return self._stacks[old, want]

    def _cells(self, position: int) -> list[tuple[Floats, Floats]]:
        found = self.decision.cells(position)
        if found is None:
            name = self.decision.source or "this network"
            raise UnsupportedEstimatorError(
                f"{name} has borders that are curved or voted on: the nearest row beyond them has no closed form",
                expected="a network that is piecewise linear, such as k-means or a linear classifier",
                got=name,
                fix="use explain(..., contrast=...) and its break-even points, or search with net.predict",
            )
        return [(np.asarray(A, dtype=np.float64), np.asarray(b, dtype=np.float64)) for A, b in found]

    def _stacked(self, cells: list[tuple[Floats, Floats]]) -> Stack | None:
        if not cells:
            return None
        d = len(self.steps)
        # a cell without borders is the whole space: one border that always holds
        cells = [(A, b) if len(b) else (np.zeros((1, d)), np.zeros(1)) for A, b in cells]
        A, b = np.vstack([c[0] for c in cells]), np.concatenate([c[1] for c in cells])
        G = A @ self.steps
        norm = np.linalg.norm(G, axis=1)
        flat = norm <= 16 * _EPS * np.linalg.norm(np.abs(A) @ np.abs(self.steps), axis=1)
        norm = np.where(flat, 1.0, norm)
        G = np.where(flat[:, None], 0.0, G / norm[:, None])
        start = np.concatenate([[0], np.cumsum([len(c[1]) for c in cells])])
        return Stack(A, b, G, norm, flat, start, self.decision.precision)

    # ------------------------------------------------------------------ batches

    def batch(self, x: Floats, old: npt.NDArray[np.int64], want: int, lower: Floats, upper: Floats) -> Found:
        """Rows (n, D) of one old label, towards ``want`` or, if that is -1, away."""
        n = len(x)
        found = Found(x.copy(), np.full(n, np.nan), np.zeros(n), np.full(n, -1), np.ones(n, dtype=bool))
        stack = self.stack(int(old[0]), want)
        if stack is None:
            return found
        step = max(1, _BATCH // max(len(stack.b), x.shape[1]))
        for at in range(0, n, step):
            rows = slice(at, min(at + step, n))
            self._some(stack, x[rows], old[rows], want, lower[rows], upper[rows], found, at)
        return found

    def _some(
        self, stack: Stack, x: Floats, old: npt.NDArray[np.int64], want: int,
        lower: Floats, upper: Floats, found: Found, at: int,
    ) -> None:  # fmt: skip
        affine = self.decision.affine
        u, z = affine.columns(x), affine.z(x)
        if not np.isfinite(z).all():
            raise non_finite(x, self.decision.names, at)
        low, high = self._interval(x, u, lower, upper)
        done = np.zeros(len(x), dtype=bool)
        if not self.change and not self.whole:
            done = self._at_once(stack, x, u, z, old, want, (low, high), (lower, upper), found, at)
        for i in np.flatnonzero(~done).tolist():
            row = _Row(self, stack, x[i], u[i], int(old[i]), want, (low[i], high[i]), (lower[i], upper[i]))
            self._keep(row, row.search(), found, at + i)

    def _interval(self, x: Floats, u: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Floats]:
        """Bounds (n, D) in the columns' units u."""
        transform = self.decision.affine.transform
        if transform is None:
            return lower, upper
        low, high = transform(np.where(np.isfinite(lower), lower, x)), transform(np.where(np.isfinite(upper), upper, x))
        if ((low > u) | (high < u))[:, self.free].any():
            raise RuleError(
                "a step in front of the network is decreasing",
                expected="elementwise steps that increase",
                got=self.decision.affine.transformed or "a decreasing one",
                fix="negate the column before it",
            )
        return np.where(np.isfinite(lower), low, -np.inf), np.where(np.isfinite(upper), high, np.inf)

    def _at_once(
        self, stack: Stack, x: Floats, u: Floats, z: Floats, old: npt.NDArray[np.int64], want: int,
        within: tuple[Floats, Floats], raw: tuple[Floats, Floats], found: Found, at: int,
    ) -> Bools:  # fmt: skip
        """The rows for which the step to one border is the answer; bounds in units u, and raw."""
        (low, high), (lower, upper) = within, raw
        n = np.arange(len(x))
        lack, rounding = stack.lacks(z)
        gap = self.margin * np.clip(stack.farthest(lack), 0, _LARGEST)
        lack += np.maximum(stack.spread(gap), rounding)
        cell = stack.farthest(lack).argmin(1)
        inside = (np.arange(len(stack.b)) >= stack.start[cell][:, None]) & (
            np.arange(len(stack.b)) < stack.start[cell + 1][:, None]
        )
        lack[~inside] = -np.inf
        which = lack.argmax(1)
        length = lack[n, which]
        good = np.isfinite(length) & (length > 0)
        v = np.where(good, length, 0.0)[:, None] * stack.G[which]
        good &= (lack - v @ stack.G.T <= 1e-9 * np.abs(length)[:, None]).all(1)
        target = u + v / self.scale
        at_home = (u >= self.low) & (u <= self.high) & (target >= self.low) & (target <= self.high)
        good &= (at_home & (target >= low) & (target <= high) | ~self.free).all(1)
        some = np.flatnonzero(good)
        if len(some):
            rows = self._raw(x[some], target[some], v[some] != 0, lower[some], upper[some])
            some, rows = some[ok := np.isfinite(rows[:, self.free]).all(1)], rows[ok]
            new = self.decision.predict(rows)
            agrees = new == want if want >= 0 else new != old[some]
            some, rows, new = some[agrees], rows[agrees], new[agrees]
            found.rows[at + some], found.new[at + some] = rows, new
            found.distance[at + some] = self._length(u[some], rows)
            found.margin[at + some] = np.maximum(gap[some, cell[some]], rounding[some, which[some]])
        done = np.zeros(len(x), dtype=bool)
        done[some] = True
        return done

    def _raw(self, x: Floats, u: Floats, moved: Bools, lower: Floats, upper: Floats) -> Floats:
        """Raw rows within raw bounds, with every cell that does not move bit for bit as it was."""
        inverse = self.decision.affine.inverse
        return np.where(moved & self.free, np.clip(u if inverse is None else inverse(u), lower, upper), x)

    def _length(self, u: Floats, rows: Floats) -> Floats:
        change = np.where(self.free, self.decision.affine.columns(rows) - u, 0.0)
        return np.asarray(np.sqrt((self.weights * np.nan_to_num(change) ** 2).sum(1)))

    # ------------------------------------------------------------------ one row, best first

    @staticmethod
    def _keep(row: _Row, best: Best | None, found: Found, at: int) -> None:
        if best is None:
            found.exact[at] = row.options.left_out == math.inf and not row.exhausted
        else:
            found.distance[at], found.rows[at], found.new[at], found.margin[at], found.exact[at] = best

    def scenarios(self, x: Floats, u: Floats) -> Scenarios:
        """Alternatives of the categories, and of the columns beyond a clipping scaler, that the budget allows."""
        options: list[tuple[int, list[float], float]] = []
        for t in self.change:
            codes = range(len(self.decision.categories[self.decision.names[t]]))
            options.append((t, [float(c) for c in codes if c != x[t]], float(self.weights[t])))
        clipped = np.flatnonzero(self.free & ((u < self.low) | (u > self.high))).tolist()
        # beyond the clip a column may stay for nothing, or come back: nan stands for that
        options += [(t, [math.nan], 0.0) for t in clipped]
        picked, left_out = self._pick(options)
        rows = np.tile(x, (len(picked), 1))
        free = np.tile(self.free & np.isfinite(u), (len(picked), 1))
        free[:, clipped] = False
        cost = np.zeros(len(picked))
        shift = np.zeros((len(picked), len(x)))
        for s, changes in enumerate(picked):
            for t, value in changes:
                if math.isnan(value):
                    free[s, t] = True
                    shift[s, t] = u[t] - np.clip(u[t], self.low[t], self.high[t])
                else:
                    rows[s, t] = value
                    cost[s] += self.weights[t]
        affine = self.decision.affine
        z = affine.z(rows) + shift @ np.asarray(affine.T, dtype=np.float64).T
        # a category that the network's encoder refuses is no alternative
        known = np.isfinite(z).all(1)
        return Scenarios(rows[known], cost[known], free[known], z[known], left_out)

    def _pick(self, options: list[tuple[int, list[float], float]]) -> tuple[list[tuple[tuple[int, float], ...]], float]:
        options = sorted(options, key=lambda o: o[2])
        costs = np.cumsum([o[2] for o in options])
        picked: list[tuple[tuple[int, float], ...]] = []

        def level(r: int) -> Iterator[tuple[tuple[int, float], ...]]:
            for group in itertools.combinations(options, r):
                yield from itertools.product(*([(t, c) for c in codes] for t, codes, _ in group))

        for r in range(len(options) + 1):
            for combination in level(r):
                if len(picked) == self.budget:
                    return picked, float(costs[r - 1]) if r else 0.0
                picked.append(combination)
        return picked, math.inf


Best = tuple[float, Floats, int, float, bool]


class _Row:
    """Best-first search for one row."""

    def __init__(
        self, task: Search, stack: Stack, x: Floats, u: Floats, old: int, want: int,
        within: tuple[Floats, Floats], raw: tuple[Floats, Floats],
    ) -> None:  # fmt: skip
        (low, high), self.raw = within, raw
        self.task, self.stack, self.x, self.u, self.old, self.want = task, stack, x, u, old, want
        self.options = task.scenarios(x, u)
        self.whole = [t for t in task.whole if np.isfinite(x[t])]
        self.lack, self.rounding = stack.lacks(self.options.z)
        self.ties = stack.ties(self.options.z)
        self.gap = task.margin * np.clip(stack.farthest(self.lack), 0, _LARGEST)
        # bounds of v; a column that comes back from beyond a clip has to end within it
        scale, still = task.scale, ~np.isfinite(u)
        at = np.where(still, 0.0, u)
        self.lower = np.where(still, 0.0, (np.maximum(low, task.low) - at) * scale)
        self.upper = np.where(still, 0.0, (np.minimum(high, task.high) - at) * scale)
        self.heap: list[tuple[float, int, Node]] = []
        self.count = itertools.count()
        self.best: Best | None = None
        # the budget, or float64, ended before a proof
        self.exhausted = False

    def push(self, squared: float, node: Node) -> None:
        heapq.heappush(self.heap, (squared, next(self.count), node))

    def search(self) -> Best | None:
        self._roots()
        work = 0
        while self.heap:
            squared, _, node = heapq.heappop(self.heap)
            if self.best is not None and squared >= self.best[0] ** 2:
                break
            if node.v is None:
                work += 1
                if work > self.task.budget:
                    self.exhausted = True
                    return None if self.best is None else (*self.best[:4], False)
                self._solve(squared, node)
            elif (split := self._fraction(node)) is not None:
                if node.lower is self.lower:
                    self._round(node)
                self._branch(squared, node, split)
            elif (candidate := self._verified(node)) is not None:
                self.best = candidate
                break
            elif node.doublings < (_TIED if self.ties[node.scenario, node.cell] else _DOUBLINGS):
                self.push(
                    squared,
                    Node(node.scenario, node.cell, self.lower, self.upper, node.doublings + 1, node.least),
                )
        if self.best is None:
            return None
        return (*self.best[:4], self.best[0] ** 2 <= self.options.left_out and not self.exhausted)

    def _roots(self) -> None:
        need = self.lack + np.maximum(self.stack.spread(self.gap), self.rounding)
        squared = self.options.cost[:, None] + np.maximum(self.stack.farthest(need), 0) ** 2
        for s, c in zip(*np.nonzero(np.isfinite(squared)), strict=True):
            self.push(float(squared[s, c]), Node(int(s), int(c), self.lower, self.upper))

    def _inwards(self, node: Node) -> Floats:
        """How far the borders of a cell are moved inwards."""
        s, rows = node.scenario, slice(self.stack.start[node.cell], self.stack.start[node.cell + 1])
        least = self.rounding[s, rows]
        return np.asarray((least if node.least else np.maximum(self.gap[s, node.cell], least)) * 2.0**node.doublings)

    def _displaced(self, node: Node) -> Floats | None:
        rows = slice(self.stack.start[node.cell], self.stack.start[node.cell + 1])
        need, G = self.lack[node.scenario, rows] + self._inwards(node), self.stack.G[rows]
        real = need > -np.inf
        free = self.options.free[node.scenario]
        lower, upper = np.where(free, node.lower, 0.0), np.where(free, node.upper, 0.0)
        if (lower > upper).any():
            return None
        try:
            return displace(G[real], need[real], lower, upper).v
        except InfeasibleError:
            return None
        except ConvergenceError:
            self.exhausted = True
            return None

    def _solve(self, squared: float, node: Node) -> None:
        v = self._displaced(node)
        if v is not None:
            cost = float(self.options.cost[node.scenario] + v @ v)
            self.push(
                max(cost, squared),
                Node(node.scenario, node.cell, node.lower, node.upper, node.doublings, node.least, v),
            )
        elif node.doublings == 0 and node.lower is self.lower and node.upper is self.upper:
            # a cell thinner than the margin, or even than the rounding one has to expect, may still hold a row
            halvings = _DOUBLINGS if node.least else 0
            self.push(squared, Node(node.scenario, node.cell, node.lower, node.upper, -halvings, True))

    def _row(self, node: Node, v: Floats) -> Floats:
        """The raw row (1, D), whole numbers whole."""
        task = self.task
        # what is left of a zero after rounding is no change
        moved = np.abs(v) > 1e-12 * float(np.linalg.norm(v))
        at = np.where(moved, self.u + v / task.scale, self.u)
        row = task._raw(self.options.rows[node.scenario][None], at[None], moved[None], *self.raw)
        for t in self.whole:
            if abs(row[0, t] - (near := round(row[0, t]))) <= _WHOLE * max(1.0, abs(row[0, t])):
                row[0, t] = near
        wrong = task.free & np.isfinite(self.x) & ~np.isfinite(row[0])
        if wrong.any():
            column = task.decision.names[int(np.flatnonzero(wrong)[0])]
            raise RuleError(
                f"no value of {column!r} leads to where the nearest row would be",
                expected=f"a value that {task.decision.affine.transformed or 'the step in front'} can return",
                got="NaN or infinity from its inverse",
                fix=f"pass bounds={{{column!r}: (low, high)}}",
            )
        return row

    def _verified(self, node: Node) -> Best | None:
        assert node.v is not None
        task = self.task
        row = self._row(node, node.v)
        new = int(task.decision.predict(row)[0])
        if (new != self.want) if self.want >= 0 else (new == self.old):
            return None
        changed = self.options.cost[node.scenario]
        distance = math.sqrt(changed + float(task._length(self.u[None], row)[0]) ** 2)
        return distance, row[0], new, float(self._inwards(node).min()), True

    # ------------------------------------------------------------------ whole numbers

    def _fraction(self, node: Node) -> tuple[int, float] | None:
        """The whole-numbered column that is farthest from a whole number, with its value."""
        if not self.whole or node.v is None:
            return None
        row = self._row(node, node.v)[0]
        values = [(abs(row[t] - round(row[t])), t) for t in self.whole]
        far, t = max(values, default=(0.0, -1))
        return (t, float(row[t])) if far > 0 else None

    def _position(self, t: int, value: float) -> float:
        """v_t of a raw value."""
        affine = self.task.decision.affine
        row = self.x.copy()
        row[t] = value
        return float((affine.columns(row[None])[0, t] - self.u[t]) * self.task.scale[t])

    def _branch(self, squared: float, node: Node, split: tuple[int, float]) -> None:
        t, value = split
        for side, whole in ((node.upper, math.floor(value)), (node.lower, math.ceil(value))):
            moved = side.copy()
            moved[t] = self._position(t, whole)
            low, high = (node.lower, moved) if side is node.upper else (moved, node.upper)
            if low[t] <= high[t]:
                self.push(squared, Node(node.scenario, node.cell, low, high, node.doublings, node.least))

    def _round(self, node: Node) -> None:
        """A first answer to beat: whole numbers outwards, then back one by one while the label holds."""
        assert node.v is not None
        row = self._row(node, node.v)[0]
        ends = {t: math.ceil(row[t]) if row[t] > self.x[t] else math.floor(row[t]) for t in self.whole}
        if not (better := self._with(node, ends)):
            return
        while better:
            better = False
            # the longest change first: a step back saves most there
            for t in sorted(self.whole, key=lambda t: -abs(self._position(t, ends[t]))):
                if ends[t] != self.x[t]:
                    fewer = ends | {t: ends[t] + (1 if ends[t] < self.x[t] else -1)}
                    if self._with(node, fewer):
                        ends, better = fewer, True
                        break

    def _with(self, node: Node, ends: dict[int, int]) -> bool:
        """Whether these whole numbers give a better answer than the best so far; it is kept."""
        lower, upper = node.lower.copy(), node.upper.copy()
        for t, end in ends.items():
            lower[t] = upper[t] = self._position(t, end)
            if not node.lower[t] <= lower[t] <= node.upper[t]:
                return False
        trial = Node(node.scenario, node.cell, lower, upper, node.doublings, node.least)
        if (v := self._displaced(trial)) is None:
            return False
        candidate = self._verified(Node(trial.scenario, trial.cell, lower, upper, node.doublings, node.least, v))
        if candidate is None or (self.best is not None and candidate[0] >= self.best[0]):
            return False
        self.best = candidate
        return True
