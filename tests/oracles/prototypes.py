"""Prototypes, trees of them, Gaussians and linear classifiers written out: plain numpy, one row at a time.

Every pair of classes is materialised as a unit of its own, from the fitted
numbers as scikit-learn documents them (or from the table itself), and pooled.
No code of the package.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.special import digamma

from oracles.kernels import Explained, divergence, entropy, log_sum_exp, softmax

Array = np.ndarray


@dataclass(frozen=True)
class Pair:
    """Competitor k of class c: h = sum of terms + constants, positive where c is ahead."""

    terms: Array
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def h(self) -> float:
        return math.fsum([*self.terms, *self.parts.values()])

    def turned(self) -> Pair:
        return Pair(-self.terms, {name: -part for name, part in self.parts.items()})


# ---------------------------------------------------------------------- pools


def shares(h: Sequence[float], beta: float) -> list[float]:
    """Softmin of stiffness beta; its limit is equal shares of those that are smallest."""
    if math.isinf(beta):
        least = [value == min(h) for value in h]
        return [one / sum(least) for one in least]
    return softmax([-beta * value for value in h])


def weighted(pairs: Sequence[Pair], weights: Sequence[float], output: float, competition: float) -> Explained:
    values = np.zeros_like(pairs[0].terms)
    parts: dict[str, float] = {"competition": competition}
    for pair, weight in zip(pairs, weights, strict=True):
        values = values + weight * pair.terms
        for name, part in pair.parts.items():
            parts[name] = parts.get(name, 0.0) + weight * part
    return Explained(output, values, parts)


def hard(pairs: Sequence[Pair], beta: float, divided: bool) -> Explained:
    """f = min h: the divided rule leaves nothing of the competition, the undivided rule f - sum p h."""
    h = [pair.h for pair in pairs]
    f, p = min(h), shares(h, beta)
    if divided:
        # p f / h; where h = f = 0 the ratio is 1
        weights = [share * (1.0 if value == f else f / value) for share, value in zip(p, h, strict=True)]
        return weighted(pairs, weights, f, 0.0)
    return weighted(pairs, p, f, f - math.fsum(share * value for share, value in zip(p, h, strict=True)))


def soft(pairs: Sequence[Pair], beta: float = 1.0) -> Explained:
    """f = -log sum exp(-h): the entropy of the shares is left, and what a wrong stiffness costs."""
    h = [pair.h for pair in pairs]
    f, p = -log_sum_exp([-value for value in h]), shares(h, beta)
    return weighted(pairs, p, f, -entropy(p) - divergence(p, [f - value for value in h]))


def duel(pair: Pair) -> Explained:
    """A contrast is its pair."""
    return Explained(pair.h, pair.terms, dict(pair.parts))


def rivals(c: int, count: int, make: Callable[[int, int], Pair]) -> list[Pair]:
    return [make(c, k) for k in range(count) if k != c]


# ---------------------------------------------------------------------- distances


def squared(x: Array, own: Array, other: Array) -> Pair:
    """|x - u_k|^2 - |x - u_c|^2 as a linear unit that is zero on its midpoint."""
    terms = np.zeros(len(x))
    for t in range(len(x)):
        weight, middle = 2 * (own[t] - other[t]), (own[t] + other[t]) / 2
        terms[t] = weight * (x[t] - middle)
    return Pair(terms)


def manhattan(x: Array, own: Array, other: Array) -> Pair:
    return Pair(np.array([abs(x[t] - other[t]) - abs(x[t] - own[t]) for t in range(len(x))]))


def scaled(x: Array, own: Array, other: Array, sigma: Array, own_prior: float, other_prior: float) -> Pair:
    """Differences of the discriminant scores of nearest centroids; deviations of 0 leave their column unscaled."""
    terms = np.zeros(len(x))
    for t in range(len(x)):
        unit = sigma[t] if sigma[t] != 0 else 1.0
        terms[t] = ((x[t] - other[t]) / unit) ** 2 - ((x[t] - own[t]) / unit) ** 2
    return Pair(terms, {"priors": 2 * math.log(own_prior / other_prior)})


# ---------------------------------------------------------------------- a tree of duels


@dataclass(frozen=True)
class Step:
    """On the way to a leaf: a node, its sibling, and the leaves beneath each."""

    node: Array
    sibling: Array
    beneath: frozenset[int]
    beside: frozenset[int]


def paths(fitted: Any) -> dict[int, list[Step]]:
    """The way from the root to each leaf of a fitted BisectingKMeans."""
    mean = getattr(fitted, "_X_mean", 0.0)
    found: dict[int, list[Step]] = {}

    def leaves(node: Any) -> frozenset[int]:
        if node.left is None:
            return frozenset([int(node.label)])
        return leaves(node.left) | leaves(node.right)

    def walk(node: Any, way: list[Step]) -> None:
        if node.left is None:
            found[int(node.label)] = way
            return
        for child, sibling in ((node.left, node.right), (node.right, node.left)):
            walk(child, [*way, Step(child.center + mean, sibling.center + mean, leaves(child), leaves(sibling))])

    walk(fitted._bisecting_tree, [])
    return found


def descend(x: Array, fitted: Any) -> int:
    """The leaf a row falls to: left where the distances are equal."""
    node, mean = fitted._bisecting_tree, getattr(fitted, "_X_mean", 0.0)
    while node.left is not None:
        left, right = (((x - child.center - mean) ** 2).sum() for child in (node.left, node.right))
        node = node.left if left <= right else node.right
    return int(node.label)


def parting(way: list[Step], other: int) -> Step:
    """Where the path to another leaf leaves this one."""
    return next(step for step in way if other in step.beside)


# ---------------------------------------------------------------------- Gaussians


def quadratic(x: Array, mean: Array, precision: Array) -> Array:
    """1/2 u_t (P u)_t."""
    terms, u = np.zeros(len(x)), x - mean
    for t in range(len(x)):
        terms[t] = 0.5 * u[t] * math.fsum(precision[t, s] * u[s] for s in range(len(x)))
    return terms


@dataclass(frozen=True)
class Gaussian:
    """log of weight times density; ``apart``: each column brings its own normaliser. ``extra``: further constants."""

    mean: Array
    covariance: Array
    log_weight: float
    apart: bool = False
    extra: float = 0.0

    @property
    def precision(self) -> Array:
        return np.linalg.inv(self.covariance)

    def log_joint(self, x: Array) -> float:
        sign, log = np.linalg.slogdet(self.covariance)
        assert sign > 0
        form = quadratic(x, self.mean, self.precision).sum()
        return self.log_weight + self.extra - 0.5 * (len(x) * math.log(2 * math.pi) + float(log)) - float(form)

    def columns(self, x: Array) -> Array:
        """Costs (D,) that belong to the columns."""
        terms = quadratic(x, self.mean, self.precision)
        if self.apart:
            terms = terms + 0.5 * np.log(2 * math.pi * np.diag(self.covariance))
        return terms

    @property
    def normaliser(self) -> float:
        """The log constants that belong to no column."""
        if self.apart:
            return self.extra
        return self.extra - 0.5 * float(np.linalg.slogdet(self.covariance)[1])


def gaussian(x: Array, own: Gaussian, other: Gaussian) -> Pair:
    return Pair(
        other.columns(x) - own.columns(x),
        {"log weights": own.log_weight - other.log_weight, "normaliser": own.normaliser - other.normaliser},
    )


def root(own: Gaussian, other: Gaussian) -> tuple[Array, Array]:
    """w, and the point of the line through both means that lies on their border; they share a covariance."""
    w, delta = own.precision @ (own.mean - other.mean), own.mean - other.mean
    middle = (own.mean + other.mean) / 2
    return w, middle - (own.log_weight + own.extra - other.log_weight - other.extra) / (w @ delta) * delta


def border(x: Array, own: Gaussian, other: Gaussian) -> Pair:
    """Two Gaussians of one covariance: a linear unit that is zero on their border."""
    w, m = root(own, other)
    return Pair(np.array([w[t] * (x[t] - m[t]) for t in range(len(x))]))


def log_odds(x: Array, gaussians: Sequence[Gaussian], c: int) -> float:
    joint = [g.log_joint(x) for g in gaussians]
    return joint[c] - log_sum_exp(joint[:c] + joint[c + 1 :])


def covariances(fitted: Any) -> list[Array]:
    """Of a mixture's components, each (D, D)."""
    count, columns = fitted.means_.shape
    shape = fitted.covariance_type
    if shape == "tied":
        return [np.array(fitted.covariances_)] * count
    if shape == "full":
        return [np.array(C) for C in fitted.covariances_]
    if shape == "diag":
        return [np.diag(C) for C in fitted.covariances_]
    return [C * np.eye(columns) for C in fitted.covariances_]


def mixture(fitted: Any) -> list[Gaussian]:
    apart = fitted.covariance_type in ("diag", "spherical")
    return [
        Gaussian(mean, C, math.log(weight), apart)
        for mean, C, weight in zip(fitted.means_, covariances(fitted), fitted.weights_, strict=True)
    ]


def bayesian_mixture(fitted: Any) -> list[Gaussian]:
    """Expected log weights and log precisions under the fitted posteriors (Blei & Jordan 2006; Bishop 2006, 10.2)."""
    count, columns = fitted.means_.shape
    nu = np.broadcast_to(fitted.degrees_of_freedom_, count)
    kappa = np.broadcast_to(fitted.mean_precision_, count)
    if fitted.weight_concentration_prior_type == "dirichlet_process":
        a, b = fitted.weight_concentration_
        total = digamma(a + b)
        rest = np.concatenate([[0.0], np.cumsum(digamma(b) - total)[:-1]])
        weights = digamma(a) - total + rest
    else:
        alpha = fitted.weight_concentration_
        weights = digamma(alpha) - digamma(alpha.sum())
    found = []
    apart = fitted.covariance_type in ("diag", "spherical")
    for k, (mean, C) in enumerate(zip(fitted.means_, covariances(fitted), strict=True)):
        wishart = columns * math.log(2) + sum(float(digamma(0.5 * (nu[k] - i))) for i in range(columns))
        extra = 0.5 * (wishart - columns / kappa[k] - columns * math.log(nu[k]))
        found.append(Gaussian(mean, C, float(weights[k]), apart, float(extra)))
    return found


def shapley(game: Callable[[frozenset[int]], float], players: int) -> Array:
    """By all orders."""
    found = np.zeros(players)
    orders = list(itertools.permutations(range(players)))
    for order in orders:
        present: set[int] = set()
        before = game(frozenset())
        for t in order:
            present.add(t)
            after = game(frozenset(present))
            found[t] += after - before
            before = after
    return found / len(orders)


# ---------------------------------------------------------------------- linear scores


def linear(x: Array, start: Array, own: tuple[Array, float], other: tuple[Array, float]) -> Pair:
    """z_c - z_k, z = w.x + b: relevance from a row ``start``, whose own output is the intercept."""
    w, b = own[0] - other[0], own[1] - other[1]
    terms = np.array([w[t] * (x[t] - start[t]) for t in range(len(x))])
    return Pair(terms, {"intercept": b + math.fsum(w[t] * start[t] for t in range(len(x)))})


# ---------------------------------------------------------------------- behind the steps of a pipeline


class View:
    """How relevance of coordinates, displacement times covector, reaches the raw columns."""

    def bilinear(self, delta: Array, g: Array) -> Array:
        raise NotImplementedError

    def unit(self, z: Array, w: Array, m: Array) -> Array:
        """A linear unit w.(z - m)."""
        return self.bilinear(z - m, w)

    def distance(self, z: Array, u: Array) -> Array:
        """|z - u|^2."""
        return self.bilinear(z - u, z - u)

    def form(self, z: Array, mean: Array, precision: Array) -> Array:
        """1/2 u'Pu, u = z - mu."""
        return self.bilinear(z - mean, precision @ (z - mean)) / 2


@dataclass(frozen=True)
class Way(View):
    """z = T x + t, and a right inverse: x^ = L z + l. A linear unit gets (T'w)_i (x^ - m^)_i."""

    T: Array
    t: Array
    L: Array
    l: Array  # noqa: E741

    def __post_init__(self) -> None:
        np.testing.assert_allclose(self.T @ self.L, np.eye(len(self.T)), atol=1e-9)
        np.testing.assert_allclose(self.T @ self.l + self.t, 0, atol=1e-9)

    def to(self, x: Array) -> Array:
        return self.T @ x + self.t

    def back(self, z: Array) -> Array:
        return self.L @ z + self.l

    def bilinear(self, delta: Array, g: Array) -> Array:
        away, pull = self.L @ delta, self.T.T @ g
        return np.array([away[i] * pull[i] for i in range(len(away))])

    def unit(self, z: Array, w: Array, m: Array) -> Array:
        pull, away = self.T.T @ w, self.back(z) - self.back(m)
        return np.array([pull[i] * away[i] for i in range(len(pull))])

    def distance(self, z: Array, u: Array) -> Array:
        """v_i (T'T v)_i, v = x^ - u^."""
        v = self.back(z) - self.back(u)
        pull = self.T.T @ self.T @ v
        return np.array([v[i] * pull[i] for i in range(len(v))])

    def then(self, other: Way) -> Way:
        """First this, then the other."""
        return Way(other.T @ self.T, other.T @ self.t + other.t, self.L @ other.L, self.L @ other.l + self.l)


@dataclass(frozen=True)
class Sums(View):
    """Columns that are kept apart: coordinate i belongs to column ``owner[i]``."""

    owner: Sequence[int]
    columns: int

    def bilinear(self, delta: Array, g: Array) -> Array:
        found = np.zeros(self.columns)
        for i, column in enumerate(self.owner):
            found[column] += delta[i] * g[i]
        return found


@dataclass(frozen=True)
class Blocks(View):
    """Steps side by side, each with some of the coordinates."""

    views: Sequence[tuple[slice, View]]

    def bilinear(self, delta: Array, g: Array) -> Array:
        parts = [view.bilinear(delta[some], g[some]) for some, view in self.views]
        return np.sum(parts, axis=0)


def scaler_way(step: Any) -> Way:
    """A fitted StandardScaler, MinMaxScaler or RobustScaler."""
    name = type(step).__name__
    if name == "MinMaxScaler":
        a, b = np.asarray(step.scale_), np.asarray(step.min_)
    else:
        a = 1 / np.asarray(step.scale_)
        b = -(step.mean_ if name == "StandardScaler" else step.center_) * a
    return Way(np.diag(a), b, np.diag(1 / a), -b / a)


def pca_way(step: Any) -> Way:
    V, root = step.components_, np.sqrt(step.explained_variance_) if step.whiten else np.ones(len(step.components_))
    T = np.diag(1 / root) @ V
    return Way(T, -T @ step.mean_, V.T @ np.diag(root), step.mean_)


def pipeline_way(steps: Sequence[Any]) -> Way:
    ways = [pca_way(s) if type(s).__name__ == "PCA" else scaler_way(s) for s in steps]
    whole = ways[0]
    for way in ways[1:]:
        whole = whole.then(way)
    return whole
