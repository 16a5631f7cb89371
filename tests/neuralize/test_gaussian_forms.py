"""Mixtures, discriminant analysis and naive Bayes against Gaussians written out: log-odds, values, parts, roots."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import prototypes as oracle
from oracles.kernels import Explained, agree, conserves
from oracles.prototypes import Gaussian
from scipy.special import expit, logit
from scipy.stats import multivariate_normal
from sklearn.base import clone
from sklearn.datasets import load_iris, load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import StandardScaler

from lrp.errors import ConvergenceError, RuleError, TargetError
from neuralize import NeuralizedModel, neuralize
from neuralize.additive import AdditiveHead
from neuralize.linear_units import Hyperplanes
from neuralize.pools import SoftPool
from neuralize.units import QuadraticForms

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
KINDS = ("full", "tied", "diag", "spherical")
NAMES = np.array(["red", "green", "blue"])


@functools.cache
def iris() -> tuple[np.ndarray, np.ndarray]:
    X, y = load_iris(return_X_y=True)
    return X, y


def rows(seed: int = 0) -> np.ndarray:
    X, _ = iris()
    rng = np.random.default_rng(seed)
    return np.vstack(
        [X[::19], X.mean(0) + 2 * X.std(0) * rng.normal(size=(6, 4)), X.mean(0) + 30 * rng.normal(size=(3, 4))]
    )


def quiet_fit(estimator: Any, X: np.ndarray, y: Any = None) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(X, y)


def of_classes(
    X: np.ndarray, y: np.ndarray, priors: Any, covariance: Callable[[np.ndarray], np.ndarray], apart: bool = False
) -> list[Gaussian]:
    """Gaussians of classes from the table itself."""
    return [
        Gaussian(X[y == k].mean(0), covariance(X[y == k]), math.log(prior), apart)
        for k, prior in zip(np.unique(y), priors, strict=True)
    ]


def scatter(rows: np.ndarray) -> np.ndarray:
    u = rows - rows.mean(0)
    return u.T @ u


@functools.cache
def model(name: str) -> tuple[Any, list[Gaussian], bool]:
    """An estimator, its Gaussians, and whether they share a covariance."""
    X, y = iris()
    kind, _, shape = name.partition(" ")
    if kind == "mixture":
        fitted = GaussianMixture(3, covariance_type=shape, random_state=1).fit(X)
        return fitted, oracle.mixture(fitted), shape == "tied"
    if kind in ("bayes", "dirichlet"):
        prior = "dirichlet_process" if kind == "bayes" else "dirichlet_distribution"
        fitted = BayesianGaussianMixture(
            n_components=3, covariance_type=shape, weight_concentration_prior_type=prior, random_state=1, max_iter=500
        )
        return quiet_fit(fitted, X), oracle.bayesian_mixture(fitted), shape == "tied"
    frequent = np.bincount(y) / len(y)
    given = np.array([0.2, 0.7, 0.1])
    if kind == "quadratic":
        reg = 0.05 if shape == "regularised" else 0.0
        weights = given if shape == "priors" else frequent
        fitted = QuadraticDiscriminantAnalysis(reg_param=reg, priors=given if shape == "priors" else None).fit(
            X, NAMES[y]
        )
        order = np.argsort(NAMES)
        gaussians = of_classes(X, y, weights, lambda r: (1 - reg) * scatter(r) / len(r) + reg * np.eye(4))
        if shape == "priors":
            gaussians = [
                Gaussian(g.mean, g.covariance, math.log(given[list(order).index(k)])) for k, g in enumerate(gaussians)
            ]
        return fitted, [gaussians[k] for k in order], False
    if kind == "naive":
        fitted = GaussianNB(priors=given if shape == "priors" else None).fit(X, y)
        small = 1e-9 * X.var(0).max()
        weights = given if shape == "priors" else frequent
        return fitted, of_classes(X, y, weights, lambda r: np.diag(r.var(0) + small), True), False
    assert kind == "linear"
    weights = given if shape == "priors" else frequent
    fitted = LinearDiscriminantAnalysis(
        solver="svd" if shape == "svd" else "lsqr", priors=given if shape == "priors" else None
    )
    within = sum(w * scatter(X[y == k]) / (y == k).sum() for k, w in enumerate(weights))
    return fitted.fit(X, y), of_classes(X, y, weights, lambda _: within), True


ALL = [
    *(f"{kind} {shape}" for kind in ("mixture", "bayes", "dirichlet") for shape in KINDS),
    *(f"quadratic {shape}" for shape in ("plain", "regularised", "priors")),
    *(f"naive {shape}" for shape in ("plain", "priors")),
    *(f"linear {shape}" for shape in ("svd", "lsqr", "priors")),
]


def pair(gaussians: list[Gaussian], tied: bool, x: np.ndarray, c: int, k: int) -> oracle.Pair:
    return (oracle.border if tied else oracle.gaussian)(x, gaussians[c], gaussians[k])


def truth(gaussians: list[Gaussian], tied: bool, x: np.ndarray, c: int, beta: float = 1.0) -> Explained:
    return oracle.soft(oracle.rivals(c, len(gaussians), lambda c, k: pair(gaussians, tied, x, c, k)), beta)


@pytest.mark.parametrize("name", ALL)
def test_logits_are_log_odds(name: str) -> None:
    fitted, gaussians, _ = model(name)
    net = neuralize(fitted)
    for X in (iris()[0], rows()):
        P, f = fitted.predict_proba(X), net(X).numpy()
        np.testing.assert_allclose(expit(f), P, atol=1e-9)
        np.testing.assert_array_equal(net.predict(X), fitted.predict(X))
        inner = (P > 1e-6) & (P < 1 - 1e-6)
        np.testing.assert_allclose(f[inner], logit(P[inner]), rtol=1e-7, atol=1e-7)
        for i in range(0, len(X), 7):
            expected = [oracle.log_odds(X[i], gaussians, c) for c in range(3)]
            np.testing.assert_allclose(f[i], expected, rtol=1e-8, atol=1e-8)
        assert ((f > 0).sum(1) <= 1).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("beta", [1.0, 0.2, 3.0, math.inf])
def test_values_and_parts(name: str, beta: float) -> None:
    fitted, gaussians, tied = model(name)
    net, X = neuralize(fitted), rows()
    won = [net.labels.tolist().index(label) for label in fitted.predict(X)]
    for target in (None, 1):
        e = net.explain(
            X, target=None if target is None else net.labels[target], **({} if beta == 1 else {"beta": beta})
        )
        assert e.beta == beta
        for i, x in enumerate(X):
            c = won[i] if target is None else target
            agree(e, i, truth(gaussians, tied, x, c, beta), 1e-8)


@pytest.mark.parametrize("name", ALL)
def test_contrasts(name: str) -> None:
    """A duel of two classes: no competition is left, only what belongs to no column."""
    fitted, gaussians, tied = model(name)
    net, X = neuralize(fitted), rows()
    for c, k in itertools.permutations(range(3), 2):
        e = net.explain(X, target=net.labels[c], contrast=net.labels[k])
        assert not e.residual_parts["competition"].any()
        for i, x in enumerate(X):
            agree(e, i, oracle.duel(pair(gaussians, tied, x, c, k)), 1e-8)
            np.testing.assert_allclose(
                e.output[i], gaussians[c].log_joint(x) - gaussians[k].log_joint(x), rtol=1e-7, atol=1e-7
            )
        if tied:
            assert not e.residual.any()


@pytest.mark.parametrize("name", ALL)
def test_residual_parts_in_closed_form(name: str) -> None:
    fitted, gaussians, tied = model(name)
    net, X = neuralize(fitted), rows()
    e = net.explain(X, target=net.labels[0])
    log = np.array([[g.log_joint(x) for g in gaussians] for x in X])
    others = np.exp(log[:, 1:] - log[:, 1:].max(1, keepdims=True))
    p = others / others.sum(1, keepdims=True)
    entropy = np.array([-sum(v * math.log(v) for v in r if v > 0) for r in p])
    np.testing.assert_allclose(e.residual_parts["competition"], -entropy, atol=1e-9)
    np.testing.assert_allclose(e.competitors[:, 1:], p, atol=1e-9)
    if tied:
        assert set(e.residual_parts) <= {"competition", "equal means", "log weights"}
        np.testing.assert_allclose(e.residual, -entropy, atol=1e-9)
        return
    weights = np.array([g.log_weight for g in gaussians])
    np.testing.assert_allclose(
        e.residual_parts.get("log weights", 0),
        weights[0] - p @ weights[1:],
        atol=1e-8,
    )
    normaliser = np.array([g.normaliser for g in gaussians])
    expected = normaliser[0] - p @ normaliser[1:]
    if gaussians[0].apart and not gaussians[0].extra:
        # the normaliser of a diagonal Gaussian belongs to the columns
        assert "normaliser" not in e.residual_parts
    else:
        np.testing.assert_allclose(e.residual_parts.get("normaliser", 0), expected, rtol=1e-8, atol=1e-8)


def test_normalisers_of_diagonals_go_to_their_columns() -> None:
    """A column with equal means but different spreads: at the mean the narrower one is ahead, by log of the ratio."""
    X = np.array([[0.0, 0.0], [2.0, -0.1], [-2.0, 0.1]] * 10 + [[0.1, 5.0], [-0.1, 5.4], [0.0, 5.2]] * 10)
    fitted = GaussianNB().fit(X, [0] * 30 + [1] * 30)
    e = neuralize(fitted).explain([[0.0, 2.6]], target=1)
    spread = np.sqrt(fitted.var_)
    np.testing.assert_allclose(e.values[0, 0], math.log(spread[0, 0] / spread[1, 0]), rtol=1e-9)
    assert e.values[0, 0] > 2.5
    np.testing.assert_allclose(e.residual, 0, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in ALL if model(n)[2]])
def test_roots_lie_on_the_border(name: str) -> None:
    fitted, gaussians, _ = model(name)
    net, X = neuralize(fitted), rows()
    for c, k in itertools.permutations(range(3), 2):
        w, m = oracle.root(gaussians[c], gaussians[k])
        e = net.explain(X, target=net.labels[c], contrast=net.labels[k])
        np.testing.assert_allclose(e.break_even, np.tile(m, (len(X), 1)), rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(e.slope, np.tile(w, (len(X), 1)), rtol=1e-6, atol=1e-9)
        # the root explains itself by zeros, and is a tie of the two
        at = net.explain(m[None], target=net.labels[c], contrast=net.labels[k])
        np.testing.assert_allclose(at.output, 0, atol=1e-8)
        np.testing.assert_allclose(at.values, 0, atol=1e-8)
        joint = [gaussians[j].log_joint(m) for j in (c, k)]
        np.testing.assert_allclose(joint[0], joint[1], rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_terms_are_shapley_values(seed: int) -> None:
    """1/2 u_t (P u)_t, by brute force over all orders of four columns, absent ones at the mean."""
    rng = np.random.default_rng(seed)
    mu, A = rng.normal(size=(2, 4)), rng.normal(size=(2, 4, 4))
    P = A @ A.transpose(0, 2, 1) + 0.1 * np.eye(4)
    net = NeuralizedModel(AdditiveHead(QuadraticForms(mu, P), SoftPool(2)))
    x = 2 * rng.normal(size=4)
    expected = np.zeros(4)
    for k, sign in ((1, 1), (0, -1)):

        def cost(present: frozenset[int], k: int = k) -> float:
            z = np.array([x[t] if t in present else mu[k, t] for t in range(4)])
            return float(0.5 * (z - mu[k]) @ P[k] @ (z - mu[k]))

        found = oracle.shapley(cost, 4)
        np.testing.assert_allclose(found, oracle.quadratic(x, mu[k], P[k]))
        expected += sign * found
    np.testing.assert_allclose(net.explain(x[None], target=0).values[0], expected, rtol=1e-10, atol=1e-10)
    # integrated gradients from the mean say the same: they are linear along the way
    steps = (np.arange(1000) + 0.5) / 1000
    for k in range(2):
        path = mu[k] + steps[:, None] * (x - mu[k])
        gradient = ((path - mu[k]) @ P[k]).mean(0)
        np.testing.assert_allclose((x - mu[k]) * gradient, oracle.quadratic(x, mu[k], P[k]), rtol=1e-9)


def test_density_against_scipy() -> None:
    """The oracle itself."""
    for name in ("mixture full", "mixture diag", "quadratic plain", "naive plain"):
        _, gaussians, _ = model(name)
        for x in rows()[:5]:
            for g in gaussians:
                expected = g.log_weight + multivariate_normal(g.mean, g.covariance).logpdf(x)
                np.testing.assert_allclose(g.log_joint(x), expected, rtol=1e-9)


# ---------------------------------------------------------------------- decision values


@pytest.mark.parametrize("name", [n for n in ALL if n.split()[0] in ("quadratic", "linear", "naive")])
def test_decision_values(name: str) -> None:
    fitted, gaussians, tied = model(name)
    net, X = neuralize(fitted), rows()
    decision = fitted.predict_joint_log_proba(X) if "naive" in name else fitted.decision_function(X)
    for c, label in enumerate(net.labels):
        e = net.explain(X, target=label, output="decision")
        np.testing.assert_allclose(e.output, decision[:, c], rtol=1e-9, atol=1e-9)
        conserves(e)
        for i, x in enumerate(X):
            if tied:
                np.testing.assert_allclose(e.values[i], fitted.coef_[c] * x, rtol=1e-9)
                np.testing.assert_allclose(e.residual[i], fitted.intercept_[c])
            else:
                np.testing.assert_allclose(e.values[i], -gaussians[c].columns(x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis])
def test_two_classes_have_one_decision_value(kind: Any) -> None:
    X, y = iris()
    fitted = kind().fit(X[y > 0], NAMES[y[y > 0]])
    net, table = neuralize(fitted), rows()
    value = fitted.decision_function(table)
    for c, sign in ((0, -1), (1, 1)):
        for output in ("logit", "decision"):
            e = net.explain(table, target=fitted.classes_[c], output=output)
            np.testing.assert_allclose(e.output, sign * value, rtol=1e-9, atol=1e-9)
            conserves(e)
    np.testing.assert_allclose(net(table)[:, 1], value, rtol=1e-9, atol=1e-9)
    one, other = (net.explain(table, target=label) for label in fitted.classes_)
    np.testing.assert_allclose(one.values, -other.values, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(one.residual, -other.residual, rtol=1e-9, atol=1e-12)
    assert not one.residual_parts["competition"].any()


# ---------------------------------------------------------------------- edges


def test_one_component_is_an_error() -> None:
    X, y = iris()
    for fitted in (
        GaussianMixture(1).fit(X),
        BayesianGaussianMixture(n_components=1).fit(X),
        GaussianNB().fit(X, 0 * y),
    ):
        with pytest.raises(ConvergenceError, match="K = 1"):
            neuralize(fitted)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("far", [0.0, 1e4, 1e7])
def test_far_from_the_origin(kind: str, far: float) -> None:
    """The same data moved: the same values, to the digits the data have left."""
    X = iris()[0]
    fitted = GaussianMixture(3, covariance_type=kind, random_state=1).fit(X)
    moved = GaussianMixture(3, covariance_type=kind, random_state=1).fit(X)
    moved.means_ = moved.means_ + far
    a, b = neuralize(fitted).explain(rows(), target=0), neuralize(moved).explain(rows() + far, target=0)
    conserves(b)
    digits = 1e-9 + 1e-14 * far
    size = np.abs(a.values).sum(1, keepdims=True)
    assert (np.abs(a.values - b.values) <= digits * size).all()
    np.testing.assert_array_equal(np.isnan(a.break_even), np.isnan(b.break_even))
    np.testing.assert_allclose(b.break_even - far, a.break_even, rtol=1e-6, atol=1e-6 + 1e-13 * far)


@pytest.mark.parametrize("kind", KINDS)
def test_means_and_bounds_of_the_break_even_value(kind: str) -> None:
    """The value put into a column, the other columns and the shares held, is neutral there; else there is none."""
    fitted = GaussianMixture(3, covariance_type=kind, random_state=1).fit(iris()[0])
    gaussians, net, X = oracle.mixture(fitted), neuralize(fitted), rows()
    e = net.explain(X, target=0)
    tied = kind == "tied"

    def relevance(x: np.ndarray, p: np.ndarray, t: int) -> float:
        return float(sum(p[k] * pair(gaussians, tied, x, 0, k).terms[t] for k in (1, 2)))

    assert np.isfinite(e.break_even).any()
    for i, x in enumerate(X):
        for t in range(4):
            at = x.copy()
            if np.isnan(e.break_even[i, t]):
                seen = []
                for step in np.concatenate([[0], np.geomspace(1e-3, 1e3, 60), -np.geomspace(1e-3, 1e3, 60)]):
                    at[t] = x[t] + step
                    seen.append(relevance(at, e.competitors[i], t))
                assert min(seen) > 0 or max(seen) < 0
                continue
            at[t] = e.break_even[i, t]
            size = (
                sum(e.competitors[i, k] * np.abs(pair(gaussians, tied, at, 0, k).terms).sum() for k in (1, 2))
                + np.abs(e.values[i]).sum()
            )
            assert abs(relevance(at, e.competitors[i], t)) <= 1e-8 * size
            np.testing.assert_allclose(e.slope[i, t] * (x[t] - at[t]), e.values[i, t], rtol=1e-7, atol=1e-9)


def test_equal_means_are_all_residual() -> None:
    """The same cloud twice, in another order: means differ by rounding only, the priors by much."""
    A = np.random.default_rng(0).normal(size=(50, 3))
    X = np.vstack([A, -A[::-1], 0.5 * A, -0.5 * A])
    y = np.repeat([0, 1], 100)
    fitted = LinearDiscriminantAnalysis(priors=[0.2, 0.8]).fit(X, y)
    assert np.abs(fitted.means_).max() < 1e-15
    e = neuralize(fitted).explain(X, target=1)
    assert np.abs(e.values).max() < 1e-14
    np.testing.assert_allclose(e.residual_parts["equal means"], math.log(4))
    conserves(e)
    # of three classes, two with one mean
    units = Hyperplanes([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], [0.5, -0.25, 0.0], [[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    net = NeuralizedModel(AdditiveHead(units, SoftPool(3)))
    e = net.explain([[0.3, 2.0]], target=0)
    conserves(e)
    np.testing.assert_allclose(e.residual_parts["equal means"], 0.75 * e.competitors[0, 1])
    assert (e.values[0, 1], np.isnan(e.break_even[0, 1])) == (0, True)


CONSTANT: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    **{
        f"mixture {kind}": lambda X, y, kind=kind: GaussianMixture(3, covariance_type=kind, random_state=1).fit(X)
        for kind in KINDS
    },
    "naive": lambda X, y: GaussianNB().fit(X, y),
    "linear": lambda X, y: LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(X, y),
    "quadratic": lambda X, y: QuadraticDiscriminantAnalysis(reg_param=1e-3).fit(X, y),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_constant_column(name: str) -> None:
    """Constant in fit but not in the rows explained: what that adds to all classes alike must not drown the rest."""
    X, y = iris()
    wide = np.column_stack([X, np.full(len(X), 0.25)])
    fitted = CONSTANT[name](wide, y)
    net = neuralize(fitted)
    np.testing.assert_array_equal(net.predict(wide), fitted.predict(wide))
    for value in (0.25, 1.25, 100.25):
        table = np.column_stack([rows(), np.full(len(rows()), value)])
        for question in ({}, {"target": 0}, {"target": 0, "contrast": 1}):
            e = net.explain(table, **question)
            conserves(e)
            if value < 2 and name != "mixture spherical":  # there the spread of all columns is one
                assert (np.abs(e.values[:, 4]) <= 1e-3 * np.abs(e.values[:, :4]).sum(1)).all()


def test_nearly_singular_components() -> None:
    X = np.vstack([iris()[0], np.tile([[9.0, 9.0, 9.0, 9.0]], (20, 1))])
    for kind in ("full", "diag", "spherical"):
        fitted = quiet_fit(GaussianMixture(4, covariance_type=kind, reg_covar=1e-12, random_state=0), X)
        least = min(np.linalg.eigvalsh(C)[0] for C in oracle.covariances(fitted))
        assert least < 1e-11
        net = neuralize(fitted)
        table = np.vstack([rows(), X[-1:], X[-1:] + 1e-6])
        np.testing.assert_array_equal(net.predict(table), fitted.predict(table))
        for target in range(4):
            conserves(net.explain(table, target=target))


def test_singular_class_under_regularisation() -> None:
    """A class on a line: its covariance exists by reg_param alone."""
    X, y = iris()
    X = X.copy()
    X[y == 2, 1:] = X[y == 2, :1] * [1.0, 2.0, -1.0]
    fitted = QuadraticDiscriminantAnalysis(reg_param=1e-3).fit(X, y)
    net = neuralize(fitted)
    gaussians = of_classes(X, y, [1 / 3] * 3, lambda r: (1 - 1e-3) * scatter(r) / len(r) + 1e-3 * np.eye(4))
    table = np.vstack([rows(), X[::15]])
    np.testing.assert_array_equal(net.predict(table), fitted.predict(table))
    for c in range(3):
        e = net.explain(table, target=c)
        for i, x in enumerate(table):
            agree(e, i, truth(gaussians, False, x, c), 1e-8)


@pytest.mark.parametrize("kind", ["quadratic", "naive", "linear"])
def test_a_class_of_prior_zero(kind: str) -> None:
    X, y = iris()
    priors = [0.4, 0.0, 0.6]
    with np.errstate(divide="ignore"):
        fitted = {
            "quadratic": lambda: QuadraticDiscriminantAnalysis(priors=priors).fit(X, y),
            "naive": lambda: GaussianNB(priors=priors).fit(X, y),
            "linear": lambda: LinearDiscriminantAnalysis(priors=priors).fit(X, y),
        }[kind]()
        net = neuralize(fitted)
        expected = fitted.predict(X)
        P = fitted.predict_proba(X)
    np.testing.assert_array_equal(net.predict(X), expected)
    np.testing.assert_allclose(expit(net(X).numpy()), P, atol=1e-9)
    e = net.explain(X, target=2)
    conserves(e)
    assert (e.competitors[:, 1] == 0).all()
    conserves(net.explain(X, target=2, beta=2.0))
    for question in ({"target": 1}, {"target": 0, "contrast": 1}):
        with pytest.raises(TargetError, match="prior 0"):
            net.explain(X[y != 1], **question)
    # the way to a class of prior 0 is no way; to the others it is as without it
    assert net.head.cells(1) in ([], None)
    with np.errstate(divide="ignore"), pytest.raises(ConvergenceError, match="only one class"):
        neuralize(GaussianNB(priors=[0.0, 1.0]).fit(X, y > 0))


def test_no_variance_at_all() -> None:
    with pytest.raises(ConvergenceError, match="without any variance"):
        neuralize(GaussianNB().fit(np.ones((6, 2)), [0, 1] * 3))


@pytest.mark.parametrize("name", [n for n in ALL if model(n)[2]])
@pytest.mark.parametrize("shift", [0.0, 100.0])
def test_cells_of_linear_borders(name: str, shift: float) -> None:
    X = np.vstack([iris()[0], rows()])
    fitted = quiet_fit(clone(model(name)[0]), iris()[0] + shift, iris()[1])
    net, own = neuralize(fitted), fitted.predict(X + shift)
    for c, label in enumerate(net.labels):
        ((A, b),) = net.head.cells(c)
        inside = ((X + shift) @ A.numpy().T + b.numpy() >= 0).all(1)
        np.testing.assert_array_equal(inside, own == label)
    assert neuralize(model("mixture full")[0]).head.cells(0) is None


def test_rules() -> None:
    net = neuralize(model("mixture full")[0])
    for rule in ("divided", "midpoint", "gi"):
        with pytest.raises(RuleError, match="belongs to"):
            net.explain(rows(), rule=rule)


@pytest.mark.parametrize("name", ["mixture full", "mixture tied", "naive plain"])
def test_continuous_and_invariant(name: str) -> None:
    fitted, gaussians, tied = model(name)
    net = neuralize(fitted)
    ends = gaussians[0].mean, gaussians[1].mean
    change = []
    for steps in (2000, 4000):
        path = ends[0] + np.linspace(0, 1, steps + 1)[:, None] * (ends[1] - ends[0])
        e = net.explain(path, target=2)
        change.append([np.abs(np.diff(e.values, axis=0)).max(), np.abs(np.diff(e.residual)).max()])
        assert len(set(net.predict(path).tolist())) >= 2
    np.testing.assert_allclose(np.array(change[0]) / change[1], 2, rtol=0.1)
    # scaling the columns one by one changes no log-odds and no value; diagonal normalisers move by a common constant
    scale, X = np.array([10.0, 0.1, 3.0, 1.0]), rows()
    other = [Gaussian(scale * g.mean, scale[:, None] * g.covariance * scale, g.log_weight, g.apart) for g in gaussians]
    for i, x in enumerate(X):
        agree(net.explain(X[i : i + 1], target=0), 0, truth(other, tied, scale * x, 0), 1e-7)


def test_rows_that_come_twice_do_not_matter() -> None:
    X, y = iris()
    for kind in (QuadraticDiscriminantAnalysis, GaussianNB):
        a = neuralize(kind().fit(X, y)).explain(rows(), target=1)
        b = neuralize(kind().fit(np.vstack([X, X]), np.concatenate([y, y]))).explain(rows(), target=1)
        np.testing.assert_allclose(a.values, b.values, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(a.residual, b.residual, rtol=1e-7, atol=1e-9)


def test_two_gaussians_that_are_one() -> None:
    """Equal components: every value of their duel is exactly zero."""
    mu = np.array([[1.0, 2.0], [1.0, 2.0], [5.0, 5.0]])
    for P in (
        np.array([[2.0, 3.0], [2.0, 3.0], [1.0, 1.0]]),
        np.array([[[2.0, 0.5], [0.5, 3.0]]] * 2 + [np.eye(2).tolist()]),
    ):
        net = NeuralizedModel(AdditiveHead(QuadraticForms(mu, P), SoftPool(3, {"log weights": [0.3, 0.9, 0.5]})))
        e = net.explain([[0.3, 11.0], [1.0, 2.0]], target=0, contrast=1)
        assert not e.values.any()
        assert np.isnan(e.break_even).all()
        np.testing.assert_allclose(e.output, 0.6)
        np.testing.assert_allclose(e.residual_parts["log weights"], 0.6)


def test_plain_layers() -> None:
    """The layers of one logit, by numpy: centre, multiply by the Cholesky factor, square, add, pool."""
    X = StandardScaler().fit_transform(load_wine().data)[:, :5]
    for kind in KINDS:
        fitted = GaussianMixture(3, covariance_type=kind, random_state=0).fit(X)
        logits = neuralize(fitted)(X).numpy()
        joint = np.empty((len(X), 3))
        for k in range(3):
            factor = fitted.precisions_cholesky_ if kind == "tied" else fitted.precisions_cholesky_[k]
            L = np.asarray(factor) if np.ndim(factor) == 2 else np.diag(np.broadcast_to(factor, 5))
            y = (X - fitted.means_[k]) @ L
            joint[:, k] = math.log(fitted.weights_[k]) + np.log(np.diag(L)).sum() - 0.5 * (y**2).sum(1)
        for c in range(3):
            rest = np.delete(joint, c, 1)
            pooled = np.log(np.exp(rest - rest.max(1, keepdims=True)).sum(1)) + rest.max(1)
            np.testing.assert_allclose(logits[:, c], joint[:, c] - pooled, rtol=1e-9, atol=1e-9)
