"""What a neuralized model says about its borders: its front as curves of single columns and one affine map.

Every coordinate of z has to be an affine function of the columns, or of
increasing curves of single columns. A step that is neither closes the columns
it reads: they can be held fixed, since z is computed by the network itself,
but not moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse
import torch
from torch import Tensor

from lrp.errors import InputError, UnsupportedEstimatorError
from neuralize._decision import Affine, Cells, Decision, Reference
from neuralize.curves import Curve, PowerCurve, QuantileCurve
from neuralize.encoders import Imputer, Indicator, Lookup, OneHot
from neuralize.fronts import Branches, Front, Series
from neuralize.heads import numbers
from neuralize.rows import batches
from neuralize.scaling import Scaler
from neuralize.schema import Column
from neuralize.stages import Monomials, Projection, Selection, Stage, picking

if TYPE_CHECKING:
    from neuralize.network import NeuralizedModel
    from neuralize.tables import Table

__all__ = ["affine_of", "decision_of"]

Floats = npt.NDArray[np.float64]
_CURVES = (Curve, PowerCurve, QuantileCurve)
_FAR = 1e150


def decision_of(net: NeuralizedModel, reference: Any = None) -> Decision:
    """What a network says about its borders.

    Parameters
    ----------
    net : NeuralizedModel
    reference : array-like or DataFrame (N, D), optional
        Rows that give the columns their standard deviations and ranges.

    Raises
    ------
    UnsupportedEstimatorError
        The network has one logit, and no labels to change.
    """
    if net.kind in ("value", "density"):
        name = net.source or "this network"
        raise UnsupportedEstimatorError(
            f"{name} gives a number, not a label",
            expected="a network that decides between labels",
            got=name,
            fix="ask a clustering or a classifier for counterfactuals",
        )
    names, schema = net.schema.feature_names, net.schema
    coded = frozenset(names.index(name) for name in schema.categories)
    affine = affine_of(net.front, coded, net.dtype)
    width = max(net.front.outputs, net.n_features, net.head.width)

    def z(rows: Floats) -> Tensor:
        return net.front(torch.from_numpy(rows).to(net.device, net.dtype))  # type: ignore[no-any-return]

    @torch.no_grad()
    def forward(rows: Floats) -> Floats:
        out = np.empty((len(rows), net.front.outputs))
        for part in batches(len(rows), "auto", width):
            out[part] = numbers(z(rows[part]))
        return out

    @torch.no_grad()
    def predict(rows: Floats) -> npt.NDArray[np.int64]:
        out = np.empty(len(rows), dtype=np.int64)
        for part in batches(len(rows), "auto", width):
            out[part] = numbers(net.head.assign(z(rows[part]))[0])
        return out

    def cells(position: int) -> Cells | None:
        found = net.head.cells(position)
        return None if found is None else [(numbers(A.double()), numbers(b.double())) for A, b in found]

    return Decision(
        cells,
        replace(affine, forward=forward),
        predict,
        net.labels,
        names,
        schema.names,
        {name: _categories(schema.columns[names.index(name)]) for name in schema.categories},
        net.reference if reference is None else Reference.of(net.encode(reference), affine),
        net.source,
        net.kind,
        float(torch.finfo(net.dtype).eps),
    )


def reference_of(net: NeuralizedModel, tab: Table) -> Reference | None:
    """What the columns of reference rows range over; None where a column is empty."""
    coded = frozenset(net.schema.feature_names.index(name) for name in net.schema.categories)
    try:
        return Reference.of(np.asarray(tab.array, dtype=np.float64), affine_of(net.front, coded, net.dtype))
    except InputError:
        return None


def _categories(column: Column) -> tuple[Any, ...]:
    return (False, True) if column.truth else tuple(column.names)


def affine_of(front: Front, coded: frozenset[int] = frozenset(), dtype: torch.dtype = torch.float64) -> Affine:
    """The front as curves and one affine map, without ``forward``.

    Parameters
    ----------
    front : Front
    coded : set of int
        Raw columns of categories.
    dtype : torch.dtype
        Of its buffers.

    Examples
    --------
    >>> front = Front([Scaler(divide=[2.0, 4.0]), Projection([[1.0, 1.0]])], inputs=2)
    >>> affine = affine_of(front)
    >>> affine.T.tolist(), affine.spread.tolist()
    ([[0.5, 0.25]], [2.0, 4.0])
    """
    walk = _Walk(front.inputs, coded)
    M, shift = scipy.sparse.eye_array(front.inputs, format="csr"), np.zeros(front.inputs)
    for stage in front.parts():
        M, shift = walk.through(stage, M, shift)
    walk.measure(M)
    return walk.affine(M, front.inputs, dtype)


@dataclass(frozen=True)
class _Link:
    """u -> stage(slope u + shift), of one column of a stage."""

    stage: Stage
    column: int
    slope: float
    shift: float


@dataclass
class _Atom:
    """A raw column behind some curves, and the interval on which it counts."""

    raw: int
    chain: tuple[_Link, ...] = ()
    low: float = -np.inf
    high: float = np.inf
    clipped: bool = False


@dataclass
class _Walk:
    """Coordinates as affine functions of atoms, stage by stage: M (width, atoms) and their constants."""

    columns: int
    coded: frozenset[int]
    atoms: list[_Atom] = field(default_factory=list)
    closed: dict[int, str] = field(default_factory=dict)
    still: set[int] = field(default_factory=set)
    spread: dict[int, float] = field(default_factory=dict)
    scalers: list[str] = field(default_factory=list)
    curves: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.atoms = [_Atom(t) for t in range(self.columns)]

    # ------------------------------------------------------------------ stages

    def through(self, stage: Stage, M: Any, c: Floats) -> tuple[Any, Floats]:
        if isinstance(stage, Series):
            for part in stage.parts():
                M, c = self.through(part, M, c)
            return M, c
        if isinstance(stage, Branches):
            made = []
            for index, part in stage.parts():
                pick = slice(None) if index is None else index.cpu().numpy()
                made.append(self.through(part, M[pick], c[pick]))
            parts = [self._wide(m) for m, _ in made]
            return scipy.sparse.csr_array(scipy.sparse.vstack(parts)), np.concatenate([s for _, s in made])
        if isinstance(stage, Selection):
            return M[stage.keeps()], c[stage.keeps()]
        if isinstance(stage, Scaler):
            return self._scaled(stage, M, c)
        if isinstance(stage, Projection):
            self.measure(M)
            W = numbers(stage.matrix.double())
            centre = 0.0 if stage.centre is None else numbers(stage.centre.double())
            image = 0.0 if stage.image is None else numbers(stage.image.double())
            return scipy.sparse.csr_array(W @ M), W @ (c - centre) + image
        if isinstance(stage, _CURVES):
            return self._curved(stage, M, c)
        if isinstance(stage, Monomials):
            return self._powers(stage, M, c)
        if isinstance(stage, (Imputer, Indicator)):
            return self._filled(stage, M, c)
        if isinstance(stage, (OneHot, Lookup)):
            # numbers read as categories: no value between two of them means anything
            self.still |= self._raws(M) - self.coded
        else:
            self._close(self._raws(M), f"{stage.label} is not affine")
        return self._constants(stage.outputs)

    def _constants(self, width: int) -> tuple[Any, Floats]:
        return scipy.sparse.csr_array((width, len(self.atoms))), np.zeros(width)

    def _wide(self, M: Any) -> Any:
        """With columns for the atoms made since."""
        M = scipy.sparse.csr_array(M)
        return scipy.sparse.csr_array((M.data, M.indices, M.indptr), shape=(M.shape[0], len(self.atoms)))

    def _raws(self, M: Any) -> set[int]:
        M = scipy.sparse.csr_array(M)
        return {self.atoms[a].raw for a in set(M.indices[M.data != 0].tolist())}

    def _close(self, raws: set[int], why: str) -> None:
        for t in raws - self.coded:
            self.closed.setdefault(t, why)

    def _singles(self, M: Any) -> list[tuple[int, float] | None]:
        """Atom and coefficient of each row; None where there is not just one. Rows of several are closed by callers."""
        M = scipy.sparse.csr_array(M)
        found: list[tuple[int, float] | None] = []
        for i in range(M.shape[0]):
            part = slice(M.indptr[i], M.indptr[i + 1])
            real = M.data[part] != 0
            where, value = M.indices[part][real], M.data[part][real]
            found.append((int(where[0]), float(value[0])) if len(where) == 1 else None)
        return found

    def _with(self, M: Any, rows: dict[int, int]) -> Any:
        """Rows replaced by single new atoms: {row: atom}."""
        M = scipy.sparse.lil_array(self._wide(M))
        for i, atom in rows.items():
            M[i, :] = 0.0
            M[i, atom] = 1.0
        return scipy.sparse.csr_array(M)

    def _scaled(self, stage: Scaler, M: Any, c: Floats) -> tuple[Any, Floats]:
        slope, shift = stage.line()
        M, c = scipy.sparse.csr_array(scipy.sparse.diags_array(slope) @ M), slope * c + shift
        if stage.source not in self.scalers:
            self.scalers.append(stage.source)
        if stage.clip is None:
            return M, c
        M = self._wide(M)
        for i, single in enumerate(self._singles(M)):
            if single is None:
                self._close(self._raws(M[[i]]), f"{stage.label} clips a mixture of columns")
                continue
            atom, a = single
            low, high = sorted(((stage.clip[0] - c[i]) / a, (stage.clip[1] - c[i]) / a))
            old = self.atoms[atom]
            new = _Atom(old.raw, old.chain, max(low, old.low), min(high, old.high), True)
            # another use of the column without this clip makes it another atom, and closes the column
            self.atoms.append(new)
            M = self._wide(M)
            M.indices[M.indptr[i] : M.indptr[i + 1]][M.data[M.indptr[i] : M.indptr[i + 1]] != 0] = len(self.atoms) - 1
        return M, c

    def _curved(self, stage: Stage, M: Any, c: Floats) -> tuple[Any, Floats]:
        if stage.source not in self.curves:
            self.curves.append(stage.source)
        singles = self._singles(M)
        rows: dict[int, int] = {}
        for i, single in enumerate(singles):
            if single is None:
                self._close(self._raws(M[[i]]), f"{stage.label} is behind a mixture of columns")
                continue
            old = self.atoms[single[0]]
            link = _Link(stage, i, single[1], float(c[i]))
            if why := _jumps(stage, i):
                self._close({old.raw}, f"{stage.label} {why}")
            low, high = _range(link, old)
            rows[i] = len(self.atoms)
            self.atoms.append(_Atom(old.raw, (*old.chain, link), low, high, old.clipped))
        M = self._with(scipy.sparse.csr_array((stage.outputs, len(self.atoms))), rows)
        return M, np.zeros(stage.outputs)

    def _powers(self, stage: Monomials, M: Any, c: Floats) -> tuple[Any, Floats]:
        degree = stage.powers.sum(1)
        bent = stage.powers[degree > 1].any(0)
        self._close(self._raws(M[np.flatnonzero(bent)]), f"{stage.label} multiplies columns")
        kept = stage.keeps()
        return picking(kept, stage.inputs) @ M, np.where(kept >= 0, c[kept], 0.0)

    def _filled(self, stage: Imputer | Indicator, M: Any, c: Floats) -> tuple[Any, Floats]:
        marked = ~np.isnan(numbers(stage.marks))
        self._close(self._raws(M[np.flatnonzero(marked)]), f"{stage.label} takes one of its numbers for missing")
        if isinstance(stage, Indicator):
            return self._constants(stage.outputs)
        kept = stage.keeps()
        return picking(kept, stage.inputs) @ M, np.where(kept >= 0, c[kept], 0.0)

    def measure(self, M: Any) -> None:
        """Take down what scalers divide by, while coordinates still are single columns."""
        for single in self._singles(M):
            if single is not None:
                self.spread.setdefault(self.atoms[single[0]].raw, 1 / abs(single[1]))

    # ------------------------------------------------------------------ what comes of it

    def affine(self, M: Any, columns: int, dtype: torch.dtype) -> Affine:
        M = scipy.sparse.csc_array(self._wide(M))
        M.eliminate_zeros()
        T = np.zeros((M.shape[0], columns))
        used: dict[int, _Atom] = {}
        for a in np.flatnonzero(np.diff(M.indptr)).tolist():
            atom = self.atoms[a]
            first = used.setdefault(atom.raw, atom)
            if (first.chain, first.low, first.high) != (atom.chain, atom.low, atom.high):
                self._close({atom.raw}, "it goes in twice, through different steps")
            part = slice(M.indptr[a], M.indptr[a + 1])
            T[M.indices[part], atom.raw] += M.data[part]
        off = [*self.coded, *self.closed, *self.still]
        T[:, off] = 0.0
        live = {t: atom for t, atom in used.items() if t not in off}
        low, high, spread = np.full(columns, -np.inf), np.full(columns, np.inf), np.ones(columns)
        for t, atom in live.items():
            low[t], high[t], spread[t] = atom.low, atom.high, self.spread.get(t, 1.0)
        curve = _Curves({t: atom.chain for t, atom in live.items() if atom.chain}, dtype)
        bent = bool(curve.chains)
        return Affine(
            T,
            np.zeros(len(T)),
            transform=curve.forward if bent else None,
            inverse=curve.inverse if bent else None,
            low=low if np.isfinite(low).any() else None,
            high=high if np.isfinite(high).any() else None,
            spread=spread if self.scalers else None,
            scalers=", ".join(self.scalers),
            transformed=", ".join(self.curves),
            closed=self.closed,
            still=tuple(sorted(self.still)),
        )


def _run(stage: Stage, x: Floats, dtype: torch.dtype) -> Floats:
    device = next((b.device for b in stage.buffers()), torch.device("cpu"))
    with torch.no_grad():
        return np.asarray(numbers(stage(torch.from_numpy(x).to(device, dtype))), dtype=np.float64)


def _back(stage: Stage, y: Floats, columns: list[int], dtype: torch.dtype) -> Floats:
    device = next((b.device for b in stage.buffers()), torch.device("cpu"))
    with torch.no_grad():
        x = stage.invert(torch.from_numpy(y).to(device, dtype), torch.tensor(columns, device=device))
    return np.asarray(numbers(x), dtype=np.float64)


def _dtype(stage: Stage) -> torch.dtype:
    return next((b.dtype for b in stage.buffers() if b.is_floating_point()), torch.float64)


def _at(link: _Link, u: float) -> float:
    x = np.zeros((1, link.stage.inputs))
    x[0, link.column] = link.slope * u + link.shift
    return float(_run(link.stage, x, _dtype(link.stage))[0, link.column])


def _range(link: _Link, old: _Atom) -> tuple[float, float]:
    """What the curve gives on the interval of its atom."""
    ends = sorted(link.slope * (u if np.isfinite(u) else np.sign(u) * _FAR) + link.shift for u in (old.low, old.high))
    plain = _Link(link.stage, link.column, 1.0, 0.0)
    low, high = _at(plain, ends[0]), _at(plain, ends[1])
    if np.isnan(low):
        # a curve that starts at 0, such as the root, or one that falls without end
        zero = _at(plain, 0.0)
        below = _back(link.stage, np.array([[zero - 1e-9]]), [link.column], _dtype(link.stage))
        low = zero if np.isfinite(zero) and np.isnan(below[0, 0]) else -np.inf
    return low, np.inf if np.isnan(high) else high


def _jumps(stage: Stage, column: int) -> str:
    """Why this column of a curve is not one-to-one, or nothing."""
    if isinstance(stage, QuantileCurve):
        knots = numbers(stage.knots[column])
        return "jumps where values repeat" if (np.diff(knots) <= 0).any() else ""
    return "jumps at 0" if isinstance(stage, Curve) and stage.name == "1 + log" else ""


@dataclass
class _Curves:
    """All curves at once: raw columns to u, and back."""

    chains: dict[int, tuple[_Link, ...]]
    dtype: torch.dtype

    def _groups(self, depth: int) -> list[tuple[Stage, list[int], list[_Link]]]:
        found: dict[int, tuple[Stage, list[int], list[_Link]]] = {}
        for t, chain in self.chains.items():
            if depth < len(chain):
                link = chain[depth]
                _, raws, links = found.setdefault(id(link.stage), (link.stage, [], []))
                raws.append(t)
                links.append(link)
        return list(found.values())

    @property
    def _depth(self) -> int:
        return max(map(len, self.chains.values()))

    def forward(self, rows: Floats) -> Floats:
        u = np.array(rows, dtype=np.float64)
        for depth in range(self._depth):
            for stage, raws, links in self._groups(depth):
                slope, shift = np.array([k.slope for k in links]), np.array([k.shift for k in links])
                x = np.zeros((len(u), stage.inputs))
                columns = [k.column for k in links]
                x[:, columns] = u[:, raws] * slope + shift
                u[:, raws] = _run(stage, x, self.dtype)[:, columns]
        return u

    def inverse(self, u: Floats) -> Floats:
        rows = np.array(u, dtype=np.float64)
        for depth in reversed(range(self._depth)):
            for stage, raws, links in self._groups(depth):
                slope, shift = np.array([k.slope for k in links]), np.array([k.shift for k in links])
                x = _back(stage, rows[:, raws], [k.column for k in links], self.dtype)
                rows[:, raws] = (x - shift) / slope
        return rows
