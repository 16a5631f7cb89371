"""Outliers among digits: which pixels make a picture an outlier to a one-class SVM or a kernel density.

A machine learns one digit of MNIST. What it finds outlying has a known place
where a held-out picture of the same digit was spoilt: a planted stroke, a patch
of noise, a piece that was wiped out. Relevance of the outlyingness (Kauffmann
et al. 2020, arXiv 1805.06230; Montavon et al. 2022) is judged by how well it
ranks those pixels, and by how fast the picture becomes an inlier when the most
relevant pixels are replaced; pictures of the other digits are judged by the
latter alone.

The decision function of these machines is a falling function of the
outlyingness, so its gradient orders the pixels as that of the outlyingness
does: gradient x input and sensitivity stand for both.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from experiments import data as sets
from experiments.experiment import Experiment, Report

if TYPE_CHECKING:
    from experiments.study import Study

__all__ = [
    "CONTROLS",
    "EXPERIMENT",
    "KINDS",
    "MACHINES",
    "METHODS",
    "PLANTED",
    "RULES",
    "Machine",
    "learn",
    "ranking",
    "relevances",
    "spoil",
    "stiffness",
]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

SIDE = 28
MACHINES = {
    "ocsvm": "one-class SVM",
    "kde": "kernel density, the authors' stiffness",
    "kde sharp": "kernel density, bandwidth of largest likelihood",
}
RULES = ("LRP, undivided", "LRP, divided")
CONTROLS = (
    "gradient x input",
    "sensitivity",
    "occlusion by the mean",
    "squared difference to the nearest",
    "squared difference to the mean",
    "random",
)
METHODS = (*RULES, *CONTROLS)
PLANTED = {"stroke": "a planted stroke", "noise": "a patch of noise", "wiped": "a piece wiped out"}
KINDS = {**PLANTED, "others": "other digits"}


def spoil(picture: Floats, kind: str, rng: np.random.Generator) -> tuple[Floats, Mask]:
    """A spoilt copy of a picture (28, 28) in 0..1, and the pixels that differ by more than 0.1.

    Parameters
    ----------
    picture : ndarray (28, 28)
    kind : "stroke", "noise" or "wiped"
        A straight line of 10 pixels, two wide, at full ink; uniform noise on 5 x 5 pixels, both anywhere within the
        inner 20 x 20; 6 x 6 pixels around one with ink, set to 0.
    rng : Generator

    Returns
    -------
    spoilt : ndarray (28, 28)
    mask : ndarray (28, 28) of bool
    """
    while True:
        new = picture.copy()
        if kind == "stroke":
            angle, (row, column) = rng.uniform(0, np.pi), rng.uniform(9, 19, 2)
            for step in np.linspace(-5, 5, 40):
                i, j = int(row + step * np.sin(angle)), int(column + step * np.cos(angle))
                new[i : i + 2, j : j + 2] = 1.0
        elif kind == "noise":
            i, j = rng.integers(4, 20, 2)
            new[i : i + 5, j : j + 5] = rng.random((5, 5))
        else:
            inked = np.argwhere(picture > 0.5)
            i, j = np.clip(inked[rng.integers(len(inked))] - 3, 0, SIDE - 6)
            new[i : i + 6, j : j + 6] = 0.0
        mask = np.abs(new - picture) > 0.1
        if mask.sum() >= 5:
            return new, mask


def stiffness(points: Floats, share: float = 0.25) -> float:
    """gamma at which the mean perplexity of a row's kernel values with the others is a share of their number.

    As in the authors' code; by bisection.
    """
    from scipy.spatial.distance import cdist
    from scipy.special import logsumexp

    d = cdist(points, points, "sqeuclidean")
    np.fill_diagonal(d, np.inf)
    low, high = -12.0, 12.0  # of log gamma

    def perplexity(log_gamma: float) -> float:
        a = -math.exp(log_gamma) * d
        log_p = a - logsumexp(a, axis=1, keepdims=True)
        p = np.exp(log_p)
        return float(np.exp(-(p * np.where(p > 0, log_p, 0)).sum(1)).mean())

    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if perplexity(middle) > share * len(points) else (low, middle)
    return math.exp((low + high) / 2)


@dataclass(frozen=True, eq=False)
class Machine:
    """A fitted machine, its network, and how outlying rows are to it.

    Parameters
    ----------
    fitted : OneClassSVM or KernelDensity
    net : NeuralizedModel
    train : ndarray (M, D)
    gamma : float
    points, log_weights : ndarray (m, D), (m,)
        Of its kernel sum, weights normalised.
    """

    fitted: Any
    net: Any
    train: Floats
    gamma: float
    points: Floats
    log_weights: Floats

    @property
    def sign(self) -> float:
        """Of the network's explained output, to make it grow with the outlyingness."""
        return 1.0 if self.net.kind == "outlier" else -1.0

    @property
    def target(self) -> Any:
        """The logit that is explained."""
        return self.net.labels[0]

    @cached_property
    def zero(self) -> float:
        """What the network's output has beside the outlyingness: its threshold or log normaliser."""
        from neuralize import CoverageWarning

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            parts = self.net.explain(self.train[:1], target=self.target, rule="divided").residual_parts
        return self.sign * float(parts["threshold" if self.net.kind == "outlier" else "normaliser"][0])

    def score(self, rows: Floats) -> Floats:
        """The outlyingness o >= 0 as the network has it; of a density, gamma times it."""
        return np.asarray(self.sign * self.net(rows).detach().numpy()[:, 0]) - self.zero


def learn(name: str, train: Floats, nu: float) -> Machine:
    """One of :data:`MACHINES` on rows (M, D)."""
    from sklearn.neighbors import KernelDensity
    from sklearn.svm import OneClassSVM

    from neuralize import neuralize
    from neuralize.evaluation import ConditionalKDE

    sharp = name == "kde sharp"
    gamma = 1 / (2 * float(ConditionalKDE(scale=False).fit(train).h) ** 2) if sharp else stiffness(train)
    if name == "ocsvm":
        fitted = OneClassSVM(kernel="rbf", gamma=gamma, nu=nu).fit(train)
        points, weights = fitted.support_vectors_, fitted.dual_coef_[0]
    else:
        fitted = KernelDensity(bandwidth=math.sqrt(1 / (2 * gamma))).fit(train)
        points, weights = train, np.ones(len(train))
    return Machine(fitted, neuralize(fitted), train, gamma, points, np.log(weights / weights.sum()))


def _occluded(machine: Machine, X: Floats, mean: Floats) -> Floats:
    """How much the outlyingness falls when one pixel takes the mean, in closed form from the distances."""
    from scipy.special import logsumexp

    found = np.empty_like(X)
    for i, x in enumerate(X):
        apart = (x - machine.points) ** 2
        a = machine.log_weights - machine.gamma * apart.sum(1)
        changed = a[:, None] - machine.gamma * ((mean - machine.points) ** 2 - apart)
        found[i] = (logsumexp(changed, axis=0) - logsumexp(a)) / machine.gamma
    return found


def relevances(machine: Machine, X: Floats, seed: int) -> tuple[dict[str, Floats], dict[str, float]]:
    """All methods on rows (N, D), larger for what is outlying; and conservation and time of the rules."""
    from scipy.spatial.distance import cdist

    from neuralize import CoverageWarning
    from neuralize.evaluation import gradient, random_values

    found: dict[str, Floats] = {}
    lost, began = 0.0, time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        for name in RULES:
            ex = machine.net.explain(X, target=machine.target, rule=name.split(", ")[1])
            found[name] = machine.sign * np.asarray(ex.values)
            gap = np.abs(ex.values.sum(1) + ex.residual - ex.output)
            lost = max(lost, float((gap / (np.abs(ex.values).sum(1) + np.abs(ex.output))).max()))
    ms = (time.perf_counter() - began) * 1000 / (2 * len(X))
    slope = machine.sign * gradient(machine.net, X, target=machine.target)
    mean = machine.train.mean(0)
    nearest = machine.train[cdist(X, machine.train).argmin(1)]
    values = (slope * X, slope**2, _occluded(machine, X, mean), (X - nearest) ** 2, (X - mean) ** 2)
    found |= dict(zip(CONTROLS[:-1], values, strict=True))
    found["random"] = random_values(X, seed)
    return found, {"conservation": lost, "ms_per_row": ms}


def ranking(values: Floats, masks: Mask) -> tuple[float, float]:
    """Mean over rows of the area under the ROC curve of the planted pixels, and the share of them among the
    as many most relevant ones (rank accuracy)."""
    from scipy.stats import rankdata

    areas, shares = [], []
    for v, mask in zip(values, masks, strict=True):
        k = int(mask.sum())
        areas.append((rankdata(v)[mask].sum() - k * (k + 1) / 2) / (k * (len(v) - k)))
        shares.append(mask[np.argsort(-v, kind="stable")[:k]].mean())
    return float(np.mean(areas)), float(np.mean(shares))


def equivalence(machine: Machine, X: Floats) -> dict[str, float]:
    """Decisions and decision values, or densities, of the network against those of the machine."""
    from scipy.spatial.distance import cdist
    from scipy.special import logsumexp

    if machine.net.kind == "density":
        plain = logsumexp(machine.log_weights - machine.gamma * cdist(X, machine.points, "sqeuclidean"), axis=1)
        d, h = X.shape[1], float(machine.fitted.bandwidth_)
        plain = plain - d * (math.log(h) + 0.5 * math.log(2 * math.pi))
        ours = machine.net.predict(X)
        return {
            "rows_compared": float(len(X)),
            "decision_gap": float(np.abs(ours - plain).max() / np.abs(plain).max()),
            "score_samples_gap": float(np.abs(ours - machine.fitted.score_samples(X)).max() / np.abs(plain).max()),
        }
    wanted = machine.fitted.decision_function(X)
    ex = machine.net.explain(X, target=1, output="decision", rule="undivided")
    return {
        "rows_compared": float(len(X)),
        "rows_differing": float((machine.net.predict(X) != machine.fitted.predict(X)).sum()),
        "decision_gap": float(np.abs(ex.output - wanted).max() / np.abs(wanted).max()),
        "least_outlyingness": float(machine.score(X).min()),
    }


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures (N, 28, 28) in 0..1: of one digit for training and held out, and of the other digits."""

    train: Floats
    held_out: Floats
    others: Floats


def pictures(data: Path, digit: int, seed: int, rows: int, judged: int) -> Pictures:
    """Drawn with a seed: training pictures from the training set, the others from the test set."""
    rng = np.random.default_rng([digit, seed])
    X, y = sets.mnist(data, "train")
    T, z = sets.mnist(data, "test")
    train = rng.permutation(np.flatnonzero(y == digit))[:rows]
    held_out = rng.permutation(np.flatnonzero(z == digit))[:judged]
    others = rng.permutation(np.flatnonzero(z != digit))[:judged]
    return Pictures(X[train] / 255.0, T[held_out] / 255.0, T[others] / 255.0)


def _judged(found: Pictures, kind: str, seed: int) -> tuple[Floats, Mask | None]:
    """Rows (N, 784) of a kind and their planted pixels; None for other digits."""
    if kind == "others":
        return found.others.reshape(len(found.others), -1), None
    rng = np.random.default_rng([seed, list(KINDS).index(kind)])
    both = [spoil(picture, kind, rng) for picture in found.held_out]
    n = len(both)
    return np.stack([b[0] for b in both]).reshape(n, -1), np.stack([b[1] for b in both]).reshape(n, -1)


def one(study: Study, name: str, digit: int, seed: int) -> dict[str, Any]:
    """A cell: one machine on one digit and draw of the pictures."""
    from sklearn.metrics import roc_auc_score

    from neuralize import CoverageWarning
    from neuralize.evaluation import ConditionalKDE, Mean, flip

    s = study.settings
    found = pictures(study.data, digit, seed, s["rows"], s["judged"])
    train = found.train.reshape(len(found.train), -1)
    clean = found.held_out.reshape(len(found.held_out), -1)
    machine = learn(name, train, s["nu"])
    fillings = {"density": ConditionalKDE(scale=False, noise=False).fit(train), "mean": Mean().fit(train)}

    row: dict[str, Any] = {"machine": name, "digit": digit, "seed": seed, "gamma": machine.gamma}
    rows = {kind: _judged(found, kind, seed) for kind in KINDS}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        row |= equivalence(machine, np.concatenate([train, clean, *(X for X, _ in rows.values())]))
    measured: list[dict[str, float]] = []
    for kind, (X, masks) in rows.items():
        values, numbers = relevances(machine, X, seed)
        measured.append(numbers)
        told: dict[str, Any] = {
            "detected": float(
                roc_auc_score(
                    [0] * len(clean) + [1] * len(X), np.append(machine.score(clean), machine.score(X)).tolist()
                )
            )
        }
        if masks is not None:
            told["planted"] = float(masks.sum(1).mean())
            told["auc"], told["rank"] = ({m: ranking(v, masks)[i] for m, v in values.items()} for i in (0, 1))
        told["areas"], told["curves"] = {}, {}
        for filling, imputer in fillings.items():
            curves = {
                m: flip(machine.score, X, v, imputer=imputer, draws=s["draws"], seed=seed, steps=s["steps"])
                for m, v in values.items()
            }
            told["areas"][filling] = {m: float(c.area("mean", "index").value) for m, c in curves.items()}
            told["curves"][filling] = {m: [round(float(v), 5) for v in c.mean] for m, c in curves.items()}
        row[kind] = told
    row["conservation"] = max(m["conservation"] for m in measured)
    row["ms_per_row"] = float(np.mean([m["ms_per_row"] for m in measured]))
    return row


SHOWN = ("LRP, undivided", "gradient x input", "sensitivity", "squared difference to the nearest")


def shown(study: Study) -> dict[str, Any]:
    """Pictures and heat maps of the first digit and draw, for the figure: the first row of every kind."""
    s = study.settings
    digit = s["digits"][0]
    found = pictures(study.data, digit, 0, s["rows"], s["judged"])
    machine = learn("ocsvm", found.train.reshape(len(found.train), -1), s["nu"])
    out = []
    for kind in KINDS:
        X, _ = _judged(found, kind, 0)
        values, _ = relevances(machine, X[:1], 0)
        maps = {m: values[m][0] / np.abs(values[m][0]).max() for m in SHOWN}
        out.append(
            {
                "kind": kind,
                "picture": np.round(X[0], 2).tolist(),
                "maps": {m: np.round(v, 3).tolist() for m, v in maps.items()},
            }
        )
    return {"digit": digit, "shown": out}


def work(study: Study) -> None:
    """Every machine, digit and draw; the pictures to be looked at."""
    s = study.settings
    study.cell("shown", partial(shown, study))
    cells = [(m, d, seed) for seed in study.seeds for d in s["digits"] for m in MACHINES]
    for name, digit, seed in study.progress(cells, "machines"):
        study.cell(f"{name}|{digit}|{seed}", partial(one, study, name, digit, seed))


def report(study: Study) -> Report:
    """Tables, pictures and verdicts from the rows."""
    from experiments.papers.outliers_report import report as written

    return written(study)


_COMMON: dict[str, Any] = {"nu": 0.1, "steps": [4, 8, 16, 32, 64, 128, 256]}
EXPERIMENT = Experiment(
    name="outliers",
    paper="Kauffmann et al. 2020, arXiv 1805.06230; Montavon et al. 2022, doi 10.1007/978-3-031-04083-2_7",
    question="Does relevance find what makes a digit an outlier?",
    full={"seeds": 3, "digits": [3, 0, 8], "rows": 300, "judged": 40, "draws": 3, **_COMMON},
    quick={"seeds": 1, "digits": [3, 0, 8], "rows": 100, "judged": 10, "draws": 2, **_COMMON},
    work=work,
    report=report,
    data=("mnist",),
)
