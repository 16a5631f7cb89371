"""The code of the documentation runs as it stands, page by page, and prints what the page says."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from sklearn.cluster import AffinityPropagation, Birch, BisectingKMeans, KMeans, MeanShift, MiniBatchKMeans
from sklearn.datasets import load_wine
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Perceptron, RidgeClassifier, RidgeClassifierCV, SGDClassifier
from sklearn.mixture import BayesianGaussianMixture, GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KernelDensity, KNeighborsClassifier, NearestCentroid
from sklearn.preprocessing import MinMaxScaler
from sklearn.svm import SVC, SVR, LinearSVC, NuSVC, NuSVR, OneClassSVM

from experiments import customers
from lrp.errors import DataError, UnsupportedEstimatorError
from neuralize import DeepKMeans, KernelKMeans, neuralize

PAGES = [
    "explain-a-network.md",
    "relevance-of-filters.md",
    "explain-a-table.md",
    "prune-a-network.md",
    "quantize-a-network.md",
]
DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page: str) -> None:
    mpl.use("Agg")
    text = (DOCS / page).read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "page"}
    # a block without a language right behind one of Python is what that prints
    blocks = list(re.finditer(r"^```python\n(.*?)^```$(?:\n\n^```\n(.*?)^```$)?", text, re.M | re.S))
    assert len(blocks) > 5
    try:
        for block in blocks:
            above = text[: block.start(1)].count("\n")  # so that errors name the line of the page
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile("\n" * above + block[1], str(DOCS / page), "exec"), names)
            if block[2] is not None:
                assert _lines(printed.getvalue()) == _lines(block[2])
    finally:
        plt.close("all")


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("page", [*PAGES, "kinds-of-models.md", "what-relevance-does-not-mean.md", "../README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = DOCS / page
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8")):
        assert (path.parent / link).exists(), link


# ---------------------------------------------------------------------- the table of kinds of models


def _mixtures(kind: str, *classes: Any) -> list[Any]:
    named = {GaussianMixture: {}, BayesianGaussianMixture: {"max_iter": 300}}
    return [c(n_components=3, covariance_type=kind, random_state=0, reg_covar=1e-3, **named[c]) for c in classes]


def _machines(*kernels: str) -> list[Any]:
    return [m for k in kernels for m in (SVC(kernel=k, coef0=0.5), NuSVC(nu=0.3, kernel=k, coef0=0.5))]


def _regressions(*kernels: str) -> list[Any]:
    return [m for k in kernels for m in (SVR(kernel=k, coef0=0.5), NuSVR(kernel=k, coef0=0.5))]


_BOTH = GaussianMixture, BayesianGaussianMixture
_PRIORS = [0.2, 0.5, 0.3]
# the models of every row of the table, by the text of its first cell
MODELS: dict[str, list[Any]] = {
    "KMeans, MiniBatchKMeans, MeanShift, AffinityPropagation": [
        KMeans(3, n_init=1, random_state=0),
        MiniBatchKMeans(3, n_init=1, random_state=0),
        MeanShift(bandwidth=0.6),
        AffinityPropagation(random_state=0),
    ],
    "BisectingKMeans": [BisectingKMeans(4, random_state=0)],
    "Birch": [Birch(n_clusters=3, threshold=0.4)],
    "NearestCentroid": [NearestCentroid()],
    "NearestCentroid, unequal priors": [NearestCentroid(priors=_PRIORS)],
    "NearestCentroid, manhattan": [NearestCentroid(metric="manhattan")],
    "GaussianMixture, BayesianGaussianMixture: full; QuadraticDiscriminantAnalysis": [
        *_mixtures("full", *_BOTH),
        QuadraticDiscriminantAnalysis(reg_param=0.1),
    ],
    "GaussianMixture: diag, spherical; GaussianNB": [
        *_mixtures("diag", GaussianMixture),
        *_mixtures("spherical", GaussianMixture),
        GaussianNB(),
    ],
    "BayesianGaussianMixture: diag, spherical": [
        *_mixtures("diag", BayesianGaussianMixture),
        *_mixtures("spherical", BayesianGaussianMixture),
    ],
    "GaussianMixture, BayesianGaussianMixture: tied; LinearDiscriminantAnalysis": [
        *_mixtures("tied", *_BOTH),
        LinearDiscriminantAnalysis(priors=_PRIORS),
    ],
    "LogisticRegression": [LogisticRegression()],
    "LinearSVC, RidgeClassifier, RidgeClassifierCV, SGDClassifier, Perceptron": [
        LinearSVC(),
        RidgeClassifier(),
        RidgeClassifierCV(),
        SGDClassifier(random_state=0),
        Perceptron(random_state=0),
    ],
    "SVC, NuSVC: rbf": _machines("rbf"),
    "SVC, NuSVC: linear": _machines("linear"),
    "SVC, NuSVC: poly, sigmoid": _machines("poly", "sigmoid"),
    "OneClassSVM: rbf": [OneClassSVM(nu=0.2, gamma=0.5)],
    "KernelDensity: gaussian": [KernelDensity(bandwidth=0.3)],
    "SVR, NuSVR: rbf": _regressions("rbf"),
    "SVR, NuSVR: linear": _regressions("linear"),
    "SVR, NuSVR: poly, sigmoid": _regressions("poly", "sigmoid"),
    "KernelRidge: rbf; GaussianProcessRegressor: RBF": [
        KernelRidge(kernel="rbf", gamma=0.5),
        GaussianProcessRegressor(ConstantKernel(2.0) * RBF(1.5) + WhiteKernel(), normalize_y=True, optimizer=None),
    ],
    "KernelRidge: linear": [KernelRidge()],
    "KernelRidge: poly, sigmoid": [KernelRidge(kernel="poly", degree=2), KernelRidge(kernel="sigmoid")],
    "KNeighborsClassifier: uniform, euclidean": [KNeighborsClassifier(4)],
    "KNeighborsClassifier: uniform, manhattan": [KNeighborsClassifier(4, metric="manhattan")],
    "KernelKMeans: rbf, laplacian": [KernelKMeans(3, kernel=k, n_init=1, random_state=0) for k in ("rbf", "laplacian")],
    "KernelKMeans: chi2, l4": [KernelKMeans(3, kernel=k, n_init=1, random_state=0) for k in ("chi2", "l4")],
    "DeepKMeans, encoded(network, centres, example)": [
        DeepKMeans(3, n_latent=2, hidden=(8,), pretrain_epochs=2, epochs=2, random_state=0, progress=False)
    ],
}
# where a counterfactual exists for some only: a model of the row that has one
SOME = {
    "two classes": (SVC(kernel="linear"), lambda y: (y > 0).astype(int)),
    "one neighbour": (KNeighborsClassifier(1), lambda y: y),
}


def _table() -> dict[str, list[str]]:
    """Cells of the first table, by its first cell; the row of surrogates, which have no rules of their own, apart."""
    text = (DOCS / "kinds-of-models.md").read_text(encoding="utf-8")
    lines = [line for line in text.split("## Rules")[0].splitlines() if line.startswith("| `")]
    cells = [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines]
    return {first.replace("`", ""): rest for first, *rest in cells if not first.startswith("`from_labels")}


def test_table_has_every_model() -> None:
    assert set(_table()) == set(MODELS)


@pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
@pytest.mark.parametrize("name", MODELS)
def test_table_of_models_holds(name: str) -> None:
    _, _, rules, residual, break_even, answers, _ = _table()[name]
    X, y = load_wine(return_X_y=True)
    X = MinMaxScaler().fit_transform(X)
    rows, other = X[::5], X[1::4]
    for estimator in MODELS[name]:
        net = neuralize(
            copy.deepcopy(estimator).fit(X, y.astype(float) if re.search("SVR|Ridge:|Process", name) else y),
            reference=X,
        )
        assert [f"`{rule}`" for rule in net.head.rules[1:]] == rules.split(", ")
        known = np.asarray(net.labels)
        parts: set[str] = set()
        for rule in net.head.rules:
            if rule != "shapley":
                parts |= set(net.explain(rows, rule=rule).residual_parts)
            if len(known) > 1 and rule != "divided":
                elsewhere = rows[net.predict(rows) != known[0]]
                parts |= set(net.explain(elsewhere, contrast=known[0], rule=rule).residual_parts)
        assert sorted(parts) == sorted(re.findall('"(.*?)"', residual))
        # "auto" is the first rule, or divides for a row's own label
        ex = net.explain(other)
        first = net.explain(other, rule=net.head.rules[1])
        np.testing.assert_allclose(ex.values, first.values, rtol=1e-9, atol=1e-9)
        there = np.isfinite(ex.break_even)
        used = np.abs(ex.values).max(0) > 0
        assert {"yes": there[:, used].all(), "some": there.any(), "no": not there.any()}[break_even]
        _answers(net, rows[:2], answers)
    if answers in SOME:
        one, labels = SOME[answers]
        _answers(neuralize(copy.deepcopy(one).fit(X, labels(y)), reference=X), rows[:2], "yes")


def _answers(net: Any, rows: Any, answers: str) -> None:
    if answers == "yes":
        found = net.counterfactual(rows)
        assert (net.predict(found.rows) != net.predict(rows)).all()
    else:
        with pytest.raises(UnsupportedEstimatorError):
            net.counterfactual(rows)


# ---------------------------------------------------------------------- the picture of customers


def test_picture_of_customers_names_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"wholesale_customers\.csv.*--data"):
        customers.table(tmp_path)


@pytest.mark.data
def test_picture_of_customers_shows_what_the_readme_says(tmp_path: Path) -> None:
    data = Path(os.environ.get("NEURALIZE_DATA", DOCS.parents[1] / "shared" / "data"))
    if not (data / customers.TABLE).is_file():
        pytest.skip(f"needs {data / customers.TABLE}: set NEURALIZE_DATA to the data folder")
    X = customers.table(data)
    fitted = customers.fit(X)
    net = neuralize(fitted)
    assert (net.predict(X) == fitted.predict(X)).all()
    i = customers.nearest_to_border(net, X)
    duel = net.explain(X.loc[[141]], contrast=customers.RIVAL)
    assert (i, duel.target.item()) == (141, customers.GROUP)
    # halfway between two centres of logarithms, which is a geometric mean of 1 + spending
    centres = net.head.pairs.prototypes + net.head.pairs.centre
    middle = fitted[1].inverse_transform(centres[[customers.GROUP, customers.RIVAL]].numpy()).mean(0)
    np.testing.assert_allclose(duel.break_even[0], np.expm1(middle))
    customers.draw(net, X, i, tmp_path / "customers.png")
    assert plt.imread(tmp_path / "customers.png").shape[:2] == (600, 1725)
