"""Linear classifiers against their scores written out: log-odds, margins, reference rows, refusals."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch
from oracles import prototypes as oracle
from oracles.kernels import Explained, agree, conserves
from scipy.special import expit, softmax
from sklearn.datasets import load_iris, make_multilabel_classification
from sklearn.linear_model import (
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC

from lrp.errors import NotFittedError, RuleError, TargetError, UnsupportedEstimatorError
from neuralize import neuralize

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
NAMES = np.array(["red", "green", "blue"])


@functools.cache
def table(classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    X, y = load_iris(return_X_y=True)
    kept = y < 3 if classes == 3 else y > 0
    return X[kept], NAMES[y[kept]]


def rows() -> np.ndarray:
    X, _ = table()
    rng = np.random.default_rng(0)
    return np.vstack([X[::19], X.mean(0) + 3 * rng.normal(size=(6, 4)), 1e3 * rng.normal(size=(3, 4))])


SOFT: dict[str, Callable[[], Any]] = {
    "logistic": lambda: LogisticRegression(max_iter=1000),
    "logistic, no intercept": lambda: LogisticRegression(fit_intercept=False, max_iter=1000),
    "logistic cv": lambda: LogisticRegressionCV(
        Cs=2, cv=2, max_iter=2000, use_legacy_attributes=False, l1_ratios=(0.0,), scoring="accuracy"
    ),
    "logistic sparse": lambda: LogisticRegression(solver="saga", l1_ratio=1.0, C=0.2, max_iter=5000, random_state=0),
}
HARD: dict[str, Callable[[], Any]] = {
    "linear svc": lambda: LinearSVC(random_state=0),
    "linear svc, crammer and singer": lambda: LinearSVC(multi_class="crammer_singer", random_state=0, max_iter=20000),
    "ridge": RidgeClassifier,
    "ridge cv": RidgeClassifierCV,
    "sgd hinge": lambda: SGDClassifier(random_state=0),
    "sgd log": lambda: SGDClassifier(loss="log_loss", random_state=0),
    "perceptron": lambda: Perceptron(random_state=0),
}


@functools.cache
def fitted(name: str, classes: int = 3) -> Any:
    made = (SOFT | HARD)[name]().fit(*table(classes))
    return made.sparsify() if name in ("logistic sparse", "perceptron") else made


def scores(estimator: Any) -> list[tuple[np.ndarray, float]]:
    """(w, b) of every class; of two classes half of the one score each."""
    W = np.atleast_2d(estimator.coef_.toarray() if scipy.sparse.issparse(estimator.coef_) else estimator.coef_)
    b = np.broadcast_to(estimator.intercept_, len(W))
    if len(W) == 1:
        return [(-W[0] / 2, -b[0] / 2), (W[0] / 2, b[0] / 2)]
    return list(zip(W, b.tolist(), strict=True))


def pairs(estimator: Any, x: np.ndarray, c: int, start: np.ndarray) -> list[oracle.Pair]:
    z = scores(estimator)
    return oracle.rivals(c, len(z), lambda c, k: oracle.linear(x, start, z[c], z[k]))


@pytest.mark.parametrize("name", SOFT)
@pytest.mark.parametrize("classes", [2, 3])
def test_log_odds(name: str, classes: int) -> None:
    estimator = fitted(name, classes)
    net = neuralize(estimator)
    for X in (table(classes)[0], rows()):
        P, f = estimator.predict_proba(X), net(X).numpy()
        np.testing.assert_allclose(expit(f), P, atol=1e-9)
        inner = (P > 1e-6) & (P < 1 - 1e-6)
        np.testing.assert_allclose(f[inner], np.log(P[inner] / (1 - P[inner])), rtol=1e-7, atol=1e-7)
        np.testing.assert_array_equal(net.predict(X), estimator.predict(X))
        z = estimator.decision_function(X)
        z = np.column_stack([-z / 2, z / 2]) if classes == 2 else z
        np.testing.assert_allclose(softmax(z, 1), P, atol=1e-9)
    assert net.kind == "class"
    assert net.unit == "log-odds"


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("classes", [2, 3])
def test_margins(name: str, classes: int) -> None:
    estimator = fitted(name, classes)
    net, X = neuralize(estimator), rows()
    np.testing.assert_array_equal(net.predict(X), estimator.predict(X))
    z = estimator.decision_function(X)
    z = np.column_stack([-z / 2, z / 2]) if classes == 2 else z
    expected = np.column_stack([z[:, c] - np.delete(z, c, 1).max(1) for c in range(classes)])
    np.testing.assert_allclose(net(X).numpy(), expected, rtol=1e-9, atol=1e-9 * np.abs(z).max())
    assert ((net(X) > 0).sum(1) == 1).all()
    assert net.unit == "margin"


@pytest.mark.parametrize("referred", [False, True])
@pytest.mark.parametrize("name", [*SOFT, *HARD])
@pytest.mark.parametrize("classes", [2, 3])
def test_values_from_the_origin_or_a_row(name: str, classes: int, referred: bool) -> None:
    """w.(x - x0), and what the scores say at x0 is the intercept."""
    estimator, X = fitted(name, classes), rows()
    reference = table(classes)[0][::3]
    net = neuralize(estimator, reference=reference) if referred else neuralize(estimator)
    start = reference.mean(0) if referred else np.zeros(4)
    won = estimator.predict(X)
    for target in (None, "green"):
        for beta in (0.3, 1.0, math.inf):
            for rule in ("auto", "undivided"):
                e = net.explain(X, target=target, beta=beta, rule=rule)
                for i, x in enumerate(X):
                    c = net.labels.tolist().index(won[i] if target is None else target)
                    found = pairs(estimator, x, c, start)
                    divided = rule == "auto" and net.labels[c] == won[i]
                    truth = oracle.soft(found, beta) if name in SOFT else oracle.hard(found, beta, divided)
                    agree(e, i, truth, 1e-8)


@pytest.mark.parametrize("name", [*SOFT, *HARD])
def test_contrasts_and_their_lines(name: str) -> None:
    estimator, X = fitted(name), rows()
    reference = table()[0]
    net, z = neuralize(estimator, reference=reference), scores(estimator)
    x0 = reference.mean(0)
    for c, k in itertools.permutations(range(3), 2):
        e = net.explain(X, target=net.labels[c], contrast=net.labels[k])
        for i, x in enumerate(X):
            agree(e, i, oracle.duel(oracle.linear(x, x0, z[c], z[k])))
        w = z[c][0] - z[k][0]
        np.testing.assert_allclose(e.slope, np.tile(w, (len(X), 1)), rtol=1e-6, atol=1e-9 * np.abs(w).max())
        expected = np.where(w == 0, np.nan, x0)
        np.testing.assert_allclose(e.break_even, np.tile(expected, (len(X), 1)), rtol=1e-9)
        # all relevance is measured from that row, whose own output is the residual
        at = net.explain(x0[None], target=net.labels[c], contrast=net.labels[k])
        np.testing.assert_allclose(at.values, 0, atol=1e-12)
        np.testing.assert_allclose(at.output, e.residual[0], rtol=1e-9, atol=1e-12)


def test_values_from_the_origin_move_with_it() -> None:
    """LRP-0 is no property of the decision; relevance from a reference row is."""
    X = table()[0]
    shift = np.array([5.0, -3.0, 0.0, 100.0])
    estimator = fitted("logistic")
    moved = copy.deepcopy(estimator)
    moved.intercept_ = moved.intercept_ - moved.coef_ @ shift
    plain = neuralize(estimator).explain(X, target="red"), neuralize(moved).explain(X + shift, target="red")
    assert np.abs(plain[0].values - plain[1].values).max() > 1
    fixed = [neuralize(m, reference=t).explain(t, target="red") for m, t in ((estimator, X), (moved, X + shift))]
    np.testing.assert_allclose(fixed[0].values, fixed[1].values, rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(fixed[0].residual, fixed[1].residual, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", [*SOFT, *HARD])
def test_decision_values(name: str) -> None:
    X = rows()
    for classes in (2, 3):
        estimator = fitted(name, classes)
        for net in (neuralize(estimator), neuralize(estimator, reference=table(classes)[0])):
            decision, z = estimator.decision_function(X), scores(estimator)
            start = net.head.units.start.numpy()
            for c, label in enumerate(net.labels):
                e = net.explain(X, target=label, output="decision", rule="undivided")
                if classes == 2:
                    expected = (2 * c - 1) * decision
                    w, b = (2 * v for v in z[c])
                else:
                    expected, (w, b) = decision[:, c], z[c]
                np.testing.assert_allclose(e.output, expected, rtol=1e-9, atol=1e-9 * np.abs(decision).max())
                for i, x in enumerate(X):
                    agree(e, i, Explained(float(expected[i]), w * (x - start), {"intercept": float(b + w @ start)}))


def test_two_classes_are_antisymmetric() -> None:
    for name in ("logistic", "ridge", "linear svc"):
        net, X = neuralize(fitted(name, 2)), rows()
        one, other = (net.explain(X, target=label) for label in net.labels)
        np.testing.assert_allclose(one.values, -other.values, rtol=1e-12)
        np.testing.assert_allclose(one.residual, -other.residual, rtol=1e-12)


def test_hard_stiffness() -> None:
    """Without reference rows the nearest competitor; with them the mean margin."""
    estimator, (X, _) = fitted("ridge"), table()
    assert neuralize(estimator).explain(X).beta == math.inf
    net = neuralize(estimator, reference=X)
    z = np.sort(estimator.decision_function(X), 1)
    assert net.explain(X[:3]).beta == pytest.approx(1 / (z[:, -1] - z[:, -2]).mean())
    assert neuralize(fitted("logistic"), reference=X).explain(X[:3]).beta == 1


def test_hard_minimum_shares() -> None:
    """f / h lies in [0, 1] for the winner; ties are shared."""
    net, X = neuralize(fitted("ridge")), rows()
    e = net.explain(X, beta=0.2)
    assert e.divided.all()
    assert not e.residual_parts["competition"].any()
    for rule in ("divided", "auto"):
        conserves(net.explain(X, rule=rule, beta=0.2))
    with pytest.raises(TargetError, match="own cluster"):
        net.explain(X, rule="divided", target="red")


def test_sparse_coefficients() -> None:
    estimator = fitted("logistic sparse")
    assert scipy.sparse.issparse(estimator.coef_)
    assert estimator.coef_.nnz < estimator.coef_.shape[0] * estimator.coef_.shape[1]
    e = neuralize(estimator).explain(rows(), target="red", contrast="green")
    w = estimator.coef_.toarray()
    idle = w[estimator.classes_ == "red"][0] == w[estimator.classes_ == "green"][0]
    assert (e.values[:, idle] == 0).all()
    assert np.isnan(e.break_even[:, idle]).all()


def test_classes_of_probabilities_that_are_no_softmax() -> None:
    """SGD normalises one-vs-rest probabilities: its margins are no log-odds, and are not called so."""
    estimator, X = fitted("sgd log"), rows()
    P, f = estimator.predict_proba(X), neuralize(estimator)(X).numpy()
    assert np.abs(expit(f) - P).max() > 0.1
    assert neuralize(estimator).unit == "margin"


@pytest.mark.parametrize(
    ("classes", "changes"),
    [(3, {"multi_class": "ovr"}), (3, {"solver": "liblinear"}), (2, {"multi_class": "multinomial"})],
)
def test_schemes_of_older_releases(classes: int, changes: dict[str, str]) -> None:
    """Before scikit-learn 1.8 these had other probabilities; their decisions are the same."""
    older = copy.deepcopy(fitted("logistic", classes))
    for name, value in changes.items():
        setattr(older, name, value)
    net = neuralize(older)
    assert net.unit == "margin"
    np.testing.assert_array_equal(net.predict(rows()), fitted("logistic", classes).predict(rows()))
    plain = copy.deepcopy(fitted("logistic", 5 - classes))
    for name, value in changes.items():
        if name != "solver" or classes == 3:
            setattr(plain, name, value)
    assert neuralize(plain).unit == "log-odds"


def test_liblinear_of_two_classes() -> None:
    X, y = table(2)
    estimator = LogisticRegression(solver="liblinear").fit(X, y)
    np.testing.assert_allclose(expit(neuralize(estimator)(X).numpy()), estimator.predict_proba(X), atol=1e-9)


@pytest.mark.parametrize("labels", [2, 3, 5])
@pytest.mark.parametrize("kind", [RidgeClassifier, RidgeClassifierCV])
def test_several_labels_per_row_are_refused(kind: Any, labels: int) -> None:
    X, Y = make_multilabel_classification(60, 4, n_classes=labels, random_state=0)
    estimator = kind().fit(X, Y)
    assert estimator.predict(X).shape == (60, labels)
    with pytest.raises(UnsupportedEstimatorError, match="several targets"):
        neuralize(estimator)


def test_refusals() -> None:
    X, y = table()
    with pytest.raises(UnsupportedEstimatorError, match="OneVsRestClassifier"):
        neuralize(OneVsRestClassifier(RidgeClassifier()).fit(X, y))
    with pytest.raises(NotFittedError):
        neuralize(LogisticRegression())
    with pytest.raises(NotFittedError):
        neuralize(RidgeClassifier())

    class Loud(LogisticRegression):
        def predict_proba(self, X: Any) -> Any:
            return super().predict_proba(X) ** 2

    with pytest.raises(UnsupportedEstimatorError, match="overrides"):
        neuralize(Loud(max_iter=1000).fit(X, y))
    for name, rule in (("logistic", "divided"), ("logistic", "gi"), ("ridge", "hybrid"), ("ridge", "shapley")):
        with pytest.raises(RuleError, match="belongs to"):
            neuralize(fitted(name)).explain(X, rule=rule)


def test_plain_layers() -> None:
    """Scores, differences, minimum or log-sum-exp, in torch."""
    X = torch.tensor(rows())
    for name in ("logistic", "ridge"):
        estimator = fitted(name)
        W, b = torch.tensor(estimator.coef_), torch.tensor(estimator.intercept_)
        z = X @ W.T + b
        logits = neuralize(estimator)(X)
        for c in range(3):
            rest = [k for k in range(3) if k != c]
            h = z[:, [c]] - z[:, rest]
            f = h.amin(1) if name == "ridge" else -torch.logsumexp(-h, 1)
            torch.testing.assert_close(logits[:, c], f, rtol=1e-9, atol=1e-9)


def test_copies_of_columns_and_rows() -> None:
    """A column of zeros gets nothing; a column given twice shares what one got in proportion to its weights."""
    X, y = table()
    estimator = RidgeClassifier().fit(np.column_stack([X, X[:, 0], np.zeros(len(X))]), y)
    wide = np.column_stack([rows(), rows()[:, 0], np.zeros(len(rows()))])
    e = neuralize(estimator).explain(wide)
    assert (e.values[:, 5] == 0).all()
    np.testing.assert_allclose(e.values[:, 0], e.values[:, 4], rtol=1e-6)
