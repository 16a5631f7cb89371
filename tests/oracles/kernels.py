"""Kernel machines and nearest neighbours written out: plain numpy, every layer materialised, no code of the package.

One row at a time. Pools are explained pair by pair, from the linear unit
``w (x - m)`` of two members, w = 2 (u_i - u_j) and m their midpoint, as in
Bley et al. 2025 and Kauffmann et al. 2020; constants of a kernel expansion are
members that stand at the row itself.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray


# ---------------------------------------------------------------------- small pieces


def log_sum_exp(exponents: Any) -> float:
    listed = [float(a) for a in exponents]
    top = max(listed, default=-math.inf)
    if not math.isfinite(top):
        return top
    return top + math.log(math.fsum(math.exp(a - top) for a in listed))


def softmax(exponents: Any) -> list[float]:
    listed = [float(a) for a in exponents]
    weights = [math.exp(a - max(listed)) for a in listed]
    return [w / math.fsum(weights) for w in weights]


def hardmax(exponents: Any) -> list[float]:
    """The limit of a stiff softmax: all on the largest, equally where several are."""
    listed = [float(a) for a in exponents]
    best = [a == max(listed) for a in listed]
    return [b / sum(best) for b in best]


def entropy(p: Any) -> float:
    return -math.fsum(v * math.log(v) for v in p if v > 0)


def divergence(p: Any, log_q: Any) -> float:
    """KL(p | q)."""
    return math.fsum(v * (math.log(v) - b) for v, b in zip(p, log_q, strict=True) if v > 0)


def columns(kind: str, x: Array, u: Array) -> Array:
    """What every column adds to the distance of two rows."""
    gap = np.asarray(x, dtype=np.float64) - u
    if kind == "rbf":
        return gap**2
    if kind in ("manhattan", "laplacian"):
        return np.abs(gap)
    if kind == "l4":
        return gap**4
    assert kind == "chi2"
    total = x + u
    return np.array([0.0 if s == 0 else v * v / s for v, s in zip(gap, total, strict=True)])


@dataclass(frozen=True)
class Explained:
    output: float
    values: Array
    parts: dict[str, float]
    noise: float = 1e-12

    def scaled(self, factor: float) -> Explained:
        parts = {name: factor * part for name, part in self.parts.items()}
        return Explained(factor * self.output, factor * self.values, parts, abs(factor) * self.noise)

    def __post_init__(self) -> None:
        # an oracle that does not close is wrong itself
        parts = list(self.parts.values())
        size = np.abs(self.values).sum() + sum(map(abs, parts)) + abs(self.output)
        assert abs(self.values.sum() + sum(parts) - self.output) <= 1e-10 * size + self.noise, self


def agree(explanation: Any, row: int, truth: Explained, e: float = 1e-9, floor: float = 1e-300) -> None:
    """Values, output and every part of a row's explanation are those of the reference, in the design's sense."""
    parts = {name: float(part[row]) for name, part in explanation.residual_parts.items()}
    names = {name for name in (*parts, *truth.parts) if parts.get(name, 0) or truth.parts.get(name, 0)}
    size = np.abs(truth.values).sum() + sum(map(abs, truth.parts.values())) + floor / e
    off = {name: parts.get(name, 0.0) - truth.parts.get(name, 0.0) for name in names}
    off["output"] = float(explanation.output[row]) - truth.output
    off["residual"] = float(explanation.residual[row]) - sum(truth.parts.values())
    worst = max(off, key=lambda name: abs(off[name]))
    assert abs(off[worst]) <= e * size, (row, worst, off[worst], parts, truth)
    assert np.abs(explanation.values[row] - truth.values).max() <= e * size, (row, explanation.values[row], truth)


def conserves(explanation: Any, e: float = 1e-9, floor: float | Array = 1e-300) -> None:
    """The design's tolerance; ``floor``: rounding of terms that cancel before they are seen, in degenerate tables."""
    parts = list(explanation.residual_parts.values())
    size = np.abs(explanation.values).sum(1, dtype=np.float64) + sum(np.abs(part) for part in parts)
    for array in (explanation.values, explanation.output, *parts):
        assert np.isfinite(array).all()
    gap = np.abs(explanation.values.sum(1, dtype=np.float64) + explanation.residual - explanation.output)
    assert (gap <= e * size + floor).all(), float((gap - e * size).max())


# ---------------------------------------------------------------------- duels


@dataclass(frozen=True)
class Member:
    """A point and its weight > 0; virtual: a constant of the expansion, at the row itself."""

    u: Array
    weight: float
    virtual: bool = False


def sides(x: Array, points: Array, coefficients: Array, constant: float) -> tuple[list[Member], list[Member]]:
    """The members of S+ and of S- at a row."""
    plus = [Member(u, a) for u, a in zip(points, coefficients, strict=True) if a > 0]
    minus = [Member(u, -a) for u, a in zip(points, coefficients, strict=True) if a < 0]
    if constant > 0:
        plus.append(Member(x, constant, True))
    if constant < 0:
        minus.append(Member(x, -constant, True))
    return plus, minus


def farther(x: Array, i: Member, j: Member) -> float:
    """d_j - d_i, by the linear unit: it keeps its digits far away, where the squares do not."""
    return float(2 * (i.u - j.u) @ (x - (i.u + j.u) / 2))


def layers(x: Array, plus: list[Member], minus: list[Member], gamma: float) -> float:
    """g by its layers: pairs h_ij = z_j - z_i, soft maximum over i, soft minimum over j, times gamma."""
    pairs = [[farther(x, i, j) + (math.log(i.weight) - math.log(j.weight)) / gamma for i in plus] for j in minus]
    inner = [log_sum_exp([gamma * h for h in row]) / gamma for row in pairs]
    return gamma * (-log_sum_exp([-gamma * h for h in inner]) / gamma)


def shares(x: Array, members: list[Member], gamma: float, beta: float) -> list[float]:
    def exponents(stiffness: float) -> list[float]:
        return [math.log(m.weight) - stiffness * farther(x, members[0], m) for m in members]

    # an infinite beta: the member that carries most of the sum
    return softmax(exponents(beta)) if math.isfinite(beta) else hardmax(exponents(gamma))


def duel(
    x: Array,
    points: Array,
    coefficients: Array,
    constant: float,
    gamma: float,
    beta: float | None = None,
    rule: str = "midpoint",
    eta: float = 1.0,
) -> Explained:
    """g = log S+ - log S-, pair by pair."""
    beta = gamma if beta is None else beta
    midpoint = {"gi": 0.0, "hybrid": eta}.get(rule, 1.0)
    plus, minus = sides(x, points, coefficients, constant)
    p, q = shares(x, plus, gamma, beta), shares(x, minus, gamma, beta)
    values = np.zeros(len(x))
    for (i, pi), (j, qj) in itertools.product(zip(plus, p, strict=True), zip(minus, q, strict=True)):
        w, m = 2 * (i.u - j.u), (i.u + j.u) / 2
        values += gamma * pi * qj * w * (x - midpoint * m)
    parts = {"pools": 0.0, "weights": 0.0, "intercept": 0.0, "origin": 0.0}
    for sign, members, share in ((1, plus, p), (-1, minus, q)):
        a = [math.log(m.weight) - gamma * farther(x, members[0], m) for m in members]
        total = log_sum_exp(a)
        parts["pools"] += sign * (entropy(share) + divergence(share, [v - total for v in a]))
        for m, v in zip(members, share, strict=True):
            parts["intercept" if m.virtual else "weights"] += sign * v * math.log(m.weight)
            parts["origin"] -= sign * (1 - midpoint) * gamma * v * float((m.u**2).sum())
    return Explained(layers(x, plus, minus, gamma), values, parts)


def lam(x: Array, points: Array, coefficients: Array, constant: float, gamma: float) -> float:
    """The logarithmic mean of S+ and S-."""
    plus, minus = (
        log_sum_exp([math.log(m.weight) - gamma * float(((x - m.u) ** 2).sum()) for m in side])
        for side in sides(x, points, coefficients, constant)
    )
    if abs(plus - minus) <= 1e-12:
        return math.exp(plus)
    return (math.exp(plus) - math.exp(minus)) / (plus - minus)


def expansions(fitted: Any) -> list[tuple[int, int, Array, float]]:
    """(winner where positive, other, coefficients, intercept) of every duel of a support vector classifier."""

    def dense(array: Any) -> Array:
        return np.asarray(array.toarray() if hasattr(array, "toarray") else array)

    dual, owner = dense(fitted.dual_coef_), np.repeat(np.arange(len(fitted.classes_)), fitted.n_support_)
    if len(fitted.classes_) == 2:
        return [(1, 0, dual[0], float(fitted.intercept_[0]))]
    found = []
    for i, j in itertools.combinations(range(len(fitted.classes_)), 2):
        a = [dual[j - 1, s] if c == i else dual[i, s] if c == j else 0.0 for s, c in enumerate(owner)]
        found.append((i, j, np.array(a), float(fitted.intercept_[len(found)])))
    return found


def eta(points: Array, gamma: float) -> float:
    """Bley et al.'s heuristic, for data whose median squared distance of pairs is 1."""
    gaps = [float(((a - b) ** 2).sum()) for a, b in itertools.combinations(points, 2)]
    level = math.log10(gamma * float(np.median(gaps))) if np.median(gaps) > 0 else -math.inf
    if level < -0.5:
        return 0.0
    return 1.0 if level > 1.5 else round(0.4 * level + 0.4, 2)


# ---------------------------------------------------------------------- kernels of a dot product


def dot_duel(
    x: Array, points: Array, coefficients: Array, constant: float, kernel: str, gamma: float, c0: float, degree: int = 1
) -> Explained:
    """F of a linear, polynomial or sigmoid expansion, member by member with its factor held."""
    values, offset, output = np.zeros(len(x)), 0.0, constant
    for a, u in zip(coefficients, points, strict=True):
        if kernel == "linear":
            values, output = values + a * u * x, output + a * float(u @ x)
            continue
        t = gamma * float(u @ x) + c0
        if kernel == "sigmoid":
            factor = 1.0 if t == 0 else math.tanh(t) / t
            output += a * math.tanh(t)
        else:
            factor = 1.0
            for _ in range(degree - 1):
                factor *= t
            output += a * factor * t
        values, offset = values + gamma * a * factor * u * x, offset + c0 * a * factor
    return Explained(output, values, {"intercept": constant, "kernel offset": offset})


# ---------------------------------------------------------------------- densities


def density(
    x: Array, points: Array, weights: Array, gamma: float, beta: float | None = None, divided: bool = False
) -> Explained:
    """Outlyingness o = -(1/gamma) log sum w exp(-gamma d); the weights are normalised."""
    beta = gamma if beta is None else beta
    total = math.fsum(weights)
    log_w = [math.log(w / total) for w in weights]
    d = [float(((x - u) ** 2).sum()) for u in points]
    a = [b - gamma * v for b, v in zip(log_w, d, strict=True)]
    log_sum = log_sum_exp(a)
    if gamma * max(d) < 0.5:  # near all points: the logarithm of a number next to 1
        log_sum = math.log1p(math.fsum(w / total * math.expm1(-gamma * v) for w, v in zip(weights, d, strict=True)))
    o = -log_sum / gamma
    p = softmax([b - beta * v for b, v in zip(log_w, d, strict=True)]) if math.isfinite(beta) else hardmax(a)
    values, pool, coinciding = np.zeros(len(x)), 0.0, 0.0
    for share, u, v in zip(p, points, d, strict=True):
        if not divided:
            values += share * (x - u) ** 2
        elif v == 0:
            coinciding += share * o
        else:
            values += share * o * (x - u) ** 2 / v
    if not divided:
        pool = (divergence(p, log_w) - divergence(p, [v - log_sum for v in a])) / gamma
    return Explained(o, values, {"pool": pool, "coinciding": coinciding}, 1e-14 / gamma)


# ---------------------------------------------------------------------- kernel k-means


def centre_norms(points: Array, weights: Array, gamma: float, kind: str = "rbf") -> Array:
    """|m_k|^2 of centres sum_j weights_kj Phi(u_j)."""
    found = []
    for a in weights:
        pairs = itertools.product(zip(a, points, strict=True), repeat=2)
        found.append(math.fsum(v * w * math.exp(-gamma * columns(kind, s, t).sum()) for (v, s), (w, t) in pairs))
    return np.array(found)


def squared_distances(x: Array, points: Array, weights: Array, norms: Array, gamma: float, kind: str = "rbf") -> Array:
    """|Phi(x) - m_k|^2 of every cluster."""
    k = np.array([math.exp(-gamma * columns(kind, x, u).sum()) for u in points])
    return np.array([1 - 2 * math.fsum(a * k) + n for a, n in zip(weights, norms, strict=True)])


def density_form(x: Array, points: Array, weights: Array, gamma: float, kind: str = "rbf") -> Array:
    """-log s_k / gamma: what the kernel densities of the clusters would decide by."""
    d = np.array([columns(kind, x, u).sum() for u in points])
    found = []
    for a in weights:
        found.append(-log_sum_exp([math.log(v) - gamma * t for v, t in zip(a, d, strict=True) if v > 0]) / gamma)
    return np.array(found)


def _feature_pool(
    x: Array, points: Array, own: Array, rival: Array, half: float, gamma: float, kind: str
) -> list[tuple[Array, float, float, bool]]:
    """(cost per column, log-weight, exponent, virtual) of c's own pool: its + members, k's - members, and n_k / 2."""
    found = []
    for weights, sign in ((own, 1), (rival, -1)):
        for u, a in zip(points, weights, strict=True):
            if sign * a > 0:
                t = columns(kind, x, u)
                found.append((t, math.log(sign * a), math.log(sign * a) - gamma * float(t.sum()), False))
    if half > 0:
        found.append((np.zeros(len(x)), math.log(half), math.log(half), True))
    return found


def feature_space_duel(
    x: Array,
    points: Array,
    weights: Array,
    norms: Array,
    gamma: float,
    c: int,
    k: int,
    kind: str = "rbf",
    divided: bool = False,
    epsilon: float | None = None,
    crossed: bool = True,
) -> Explained:
    """h_ck of kernel k-means, pair by pair: own members i (and k's norm) against competing ones j (and c's norm)."""
    n_own, n_rival = (norms[k], norms[c]) if crossed else (norms[c], norms[k])
    own = _feature_pool(x, points, weights[c], weights[k], n_own / 2, gamma, kind)
    rival = _feature_pool(x, points, weights[k], weights[c], n_rival / 2, gamma, kind)
    log_own, log_rival = log_sum_exp([m[2] for m in own]), log_sum_exp([m[2] for m in rival])
    h = (log_own - log_rival) / gamma
    q, p = [math.exp(m[2] - log_own) for m in own], [math.exp(m[2] - log_rival) for m in rival]
    values = np.zeros(len(x))
    if not divided:
        parts = {"pools": (entropy(q) - entropy(p)) / gamma, "weights": 0.0, "norms": 0.0}
        for (i, qi), (j, pj) in itertools.product(zip(own, q, strict=True), zip(rival, p, strict=True)):
            values += qi * pj * (j[0] - i[0])
        for sign, pool, share in ((1, own, q), (-1, rival, p)):
            for m, v in zip(pool, share, strict=True):
                parts["norms" if m[3] else "weights"] += sign * v * m[1] / gamma
        return Explained(h, values, parts)
    gaps = sorted(abs(float(j[0].sum() - i[0].sum())) for i, j in itertools.product(own, rival))
    real = [float(m[0].sum()) for m in (*own, *rival) if not m[3]]
    eps = max(gaps[(len(gaps) - 1) // 2] / 50, 2e-6 * sum(real) / len(real)) if epsilon is None else epsilon
    carried = 0.0
    for (i, qi), (j, pj) in itertools.product(zip(own, q, strict=True), zip(rival, p, strict=True)):
        D = float(j[0].sum() - i[0].sum())
        if D != 0:
            values += h * qi * pj * D / (D * D + eps * eps) * (j[0] - i[0])
            carried += qi * pj * D * D / (D * D + eps * eps)
    return Explained(h, values, {"stabiliser": h * (1 - carried)})


# ---------------------------------------------------------------------- nearest neighbours


def distances(x: Array, X: Array, kind: str = "rbf") -> list[float]:
    """Of all rows of a table, up to a number they share: from linear units, which keep their digits far away."""
    if kind != "rbf":
        return [float(columns(kind, x, u).sum()) for u in X]
    return [float(2 * (X[0] - u) @ (x - (X[0] + u) / 2)) for u in X]


@dataclass(frozen=True)
class Vote:
    """g of a duel between classes, the rows k and k+1 by distance, and the row of the active argument."""

    g: float
    inner: int
    outer: int
    member: int
    own: bool


def vote(x: Array, X: Array, y: Array, k: int, c: int, rival: int | None = None, kind: str = "rbf") -> Vote:
    """f_c, or its duel with one class, by sorting."""
    d = distances(x, X, kind)
    order = sorted(range(len(X)), key=lambda i: (d[i], i))
    inner, outer = order[k - 1], order[k]
    tau = (d[inner] + d[outer]) / 2
    ranked = {a: [i for i in order if y[i] == a] for a in sorted(set(y.tolist()))}
    others = [a for a in ranked if a != c] if rival is None else [rival]
    duels = []
    for other in others:
        found = []
        for j in range(min(k, len(ranked[c]))):  # beyond its members the own distance is infinite, never the largest
            mine = ranked[c][j]
            arguments = [Vote(tau - d[mine], inner, outer, mine, True)]
            if j < len(ranked[other]):
                theirs = ranked[other][j]
                arguments.append(Vote(d[theirs] - tau, inner, outer, theirs, False))
            found.append(min(arguments, key=lambda a: a.g))
        duels.append(max(found, key=lambda a: a.g))
    return min(duels, key=lambda a: a.g)


def neighbours(
    x: Array, X: Array, y: Array, k: int, c: int, rival: int | None = None, kind: str = "rbf", rule: str = "midpoint"
) -> Explained:
    """The values of a vote are those of the two or three rows that decide it."""
    v = vote(x, X, y, k, c, rival, kind)
    sign, values = 1.0 if v.own else -1.0, np.zeros(len(x))
    # far away, g is a small difference of large distances
    noise = 1e-12 + 16 * np.finfo(float).eps * float(np.abs(columns(kind, x, X[v.outer])).sum())
    if kind == "rbf" and rule == "midpoint":
        for i in (v.inner, v.outer):  # pair units
            w = 2 * (X[v.member] - X[i])
            values += sign / 2 * w * (x - (X[v.member] + X[i]) / 2)
        return Explained(v.g, values, {}, noise)
    if rule == "midpoint":
        values = (columns(kind, x, X[v.inner]) + columns(kind, x, X[v.outer])) / 2 - columns(kind, x, X[v.member])
        return Explained(v.g, sign * values, {}, noise)
    # gradient times input of the three squared distances
    eta_, origin = {"gi": 0.0, "hybrid": 0.8}[rule], 0.0
    for weight, i in ((0.5, v.inner), (0.5, v.outer), (-1.0, v.member)):
        values += sign * weight * (eta_ * (x - X[i]) ** 2 - 2 * (1 - eta_) * x * X[i])
        origin += sign * weight * (1 - eta_) * float((X[i] ** 2).sum())
    return Explained(v.g, values, {"origin": origin})


# ---------------------------------------------------------------------- break-even values


def roots(s: float, b: float, c: float) -> list[float]:
    """Real roots of s v^2 + b v + c."""
    if s == 0:
        return [] if b == 0 else [-c / b]
    discriminant = b * b - 4 * s * c
    if discriminant < 0:
        return []
    t = -(b + math.copysign(math.sqrt(discriminant), b)) / 2
    return [t / s] + ([c / t] if t != 0 else [])
