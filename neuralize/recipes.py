"""Estimators that the command line fits itself: ``--fit kmeans:3``, and what stands in front of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lrp.errors import DataError
from neuralize.readers import without

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RECIPES", "Recipe", "fit"]

_CATEGORIES = 50  # of one column; rarer ones share one place
_COVARIANCES = ("full", "tied", "diag", "spherical")


@dataclass(frozen=True)
class Recipe:
    """An estimator by name, with its arguments separated by colons.

    Parameters
    ----------
    usage : str
    make : callable
        ``make(arguments, seed)`` returns the estimator; raises ``ValueError``.
    supervised : bool
        Whether it is fitted on labels.
    counted : bool
        Whether the first argument is a number of clusters.
    """

    usage: str
    make: Callable[[list[str], int], Any]
    supervised: bool = False
    counted: bool = False


def _count(arguments: Sequence[str], least: int = 2) -> int:
    if not arguments or not arguments[0].isdecimal() or int(arguments[0]) < least:
        raise ValueError(f"K >= {least}")
    return int(arguments[0])


def _number(arguments: Sequence[str], place: int, default: Any, words: Sequence[str] = (), most: float = np.inf) -> Any:
    if len(arguments) <= place:
        return default
    text = arguments[place]
    if text in words:
        return text
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not 0 < value <= most or not np.isfinite(value):
        raise ValueError(f"a number > 0{'' if np.isinf(most) else f' and <= {most:g}'}{', or '.join(['', *words])}")
    return value


def _choice(arguments: Sequence[str], place: int, options: Sequence[str]) -> str:
    text = arguments[place] if len(arguments) > place else options[0]
    if text not in options:
        raise ValueError(", ".join(options))
    return text


def _clustering(name: str, **options: Any) -> Callable[[list[str], int], Any]:
    def make(arguments: list[str], seed: int) -> Any:
        from sklearn import cluster

        return getattr(cluster, name)(_count(arguments), random_state=seed, **options)

    return make


def _mixture(arguments: list[str], seed: int) -> Any:
    from sklearn.mixture import GaussianMixture

    kind = _choice(arguments, 1, _COVARIANCES)
    return GaussianMixture(_count(arguments), covariance_type=kind, n_init=5, random_state=seed)


def _birch(arguments: list[str], seed: int) -> Any:
    from sklearn.cluster import Birch

    return Birch(n_clusters=_count(arguments))


def _mean_shift(arguments: list[str], seed: int) -> Any:
    from sklearn.cluster import MeanShift

    return MeanShift()


def _kernel_kmeans(arguments: list[str], seed: int) -> Any:
    from neuralize.kernel_kmeans import KernelKMeans

    gamma = _number(arguments, 1, "scale", ("scale", "auto"))
    return KernelKMeans(_count(arguments), gamma=gamma, random_state=seed)


def _one_class(arguments: list[str], seed: int) -> Any:
    from sklearn.svm import OneClassSVM

    return OneClassSVM(nu=_number(arguments, 0, 0.1, most=1.0))


def _density(arguments: list[str], seed: int) -> Any:
    from sklearn.neighbors import KernelDensity

    return KernelDensity(bandwidth=_number(arguments, 0, 1.0, ("scott", "silverman")))


def _svc(arguments: list[str], seed: int) -> Any:
    from sklearn.svm import SVC

    return SVC(random_state=seed)


def _neighbours(arguments: list[str], seed: int) -> Any:
    from sklearn.neighbors import KNeighborsClassifier

    return KNeighborsClassifier(_count(arguments, 1))


def _logistic(arguments: list[str], seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000, random_state=seed)


def _linear_discriminants(arguments: list[str], seed: int) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis()


def _quadratic_discriminants(arguments: list[str], seed: int) -> Any:
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    return QuadraticDiscriminantAnalysis()


def _naive_bayes(arguments: list[str], seed: int) -> Any:
    from sklearn.naive_bayes import GaussianNB

    return GaussianNB()


RECIPES = {
    "kmeans": Recipe("kmeans:K", _clustering("KMeans", n_init=10), counted=True),
    "minibatch": Recipe("minibatch:K", _clustering("MiniBatchKMeans", n_init=10), counted=True),
    "bisecting": Recipe("bisecting:K", _clustering("BisectingKMeans", n_init=10), counted=True),
    "gmm": Recipe("gmm:K[:covariance]", _mixture, counted=True),
    "birch": Recipe("birch:K", _birch, counted=True),
    "meanshift": Recipe("meanshift", _mean_shift),
    "kernel-kmeans": Recipe("kernel-kmeans:K[:gamma]", _kernel_kmeans, counted=True),
    "one-class-svm": Recipe("one-class-svm[:nu]", _one_class),
    "kde": Recipe("kde[:bandwidth]", _density),
    "svc": Recipe("svc", _svc, supervised=True),
    "knn": Recipe("knn:K", _neighbours, supervised=True),
    "logistic": Recipe("logistic", _logistic, supervised=True),
    "lda": Recipe("lda", _linear_discriminants, supervised=True),
    "qda": Recipe("qda", _quadratic_discriminants, supervised=True),
    "nb": Recipe("nb", _naive_bayes, supervised=True),
}


def fit(recipe: str, frame: pd.DataFrame, labels: Any = None, *, prepare: bool = False, seed: int = 0) -> Any:
    """Fit an estimator, by its recipe, to a table.

    Parameters
    ----------
    recipe : str
        A name of ``RECIPES`` with its arguments, such as ``gmm:3:diag``. The
        share of outliers ``nu`` of a one-class SVM is 0.1 by default, the
        bandwidth of a density 1, ``gamma`` of kernel k-means "scale".
    frame : DataFrame (N, D)
    labels : Series (N,), optional
        For recipes with labels.
    prepare : bool
        Standardise numbers; where there are missing values or words, impute
        before (the median, the most frequent word), and encode words one-hot;
        all but the 49 most frequent words of a column share one place.
    seed : int

    Returns
    -------
    estimator or Pipeline

    Raises
    ------
    DataError
        An unknown recipe, labels missing or beside the point, a table that
        can't be fitted.

    Examples
    --------
    >>> import pandas as pd
    >>> fit("kmeans:2", pd.DataFrame({"age": [1.0, 2.0, 8.0, 9.0]})).n_clusters
    2
    """
    chosen, estimator = _estimator(recipe, seed)
    classes = _labels(recipe, chosen, labels, len(frame))
    front = _front(frame, prepare)
    if chosen.counted:
        distinct, wanted = len(frame.drop_duplicates()), int(recipe.split(":")[1])
        if distinct < wanted:
            raise DataError(
                f"{wanted} clusters of {distinct} distinct rows",
                expected=f">= {wanted} distinct rows",
                got=str(distinct),
                fix="ask for fewer",
            )
    if front is not None:
        from sklearn.pipeline import make_pipeline

        estimator = make_pipeline(front, estimator)
    try:
        return estimator.fit(frame, classes)
    except ValueError as error:
        raise DataError(
            f"--fit {recipe} does not fit this table",
            expected="a table that scikit-learn can fit",
            got=str(error).strip().split("\n")[0],
            fix="choose other columns or another recipe",
        ) from error


def _estimator(recipe: str, seed: int) -> tuple[Recipe, Any]:
    name, *arguments = recipe.split(":")
    usages = ", ".join(r.usage for r in RECIPES.values())
    if name not in RECIPES:
        raise DataError(
            f"--fit {recipe} is not understood", expected=usages, got=recipe, fix="for example --fit kmeans:3"
        )
    chosen = RECIPES[name]
    try:
        if len(arguments) > chosen.usage.count(":"):
            raise ValueError("nothing more")
        return chosen, chosen.make(arguments, seed)
    except ValueError as error:
        raise DataError(
            f"--fit {recipe} is not understood",
            expected=f"{chosen.usage} with {error}" if ":" in chosen.usage else chosen.usage,
            got=recipe,
            fix=f"for example --fit {name}{':3' if chosen.usage.startswith(f'{name}:') else ''}",
        ) from error


def _labels(recipe: str, chosen: Recipe, labels: Any, rows: int) -> npt.NDArray[Any] | None:
    """Labels (N,) as scikit-learn takes them, without objects."""
    if not chosen.supervised:
        if labels is not None:
            raise DataError(
                f"--fit {recipe} takes no labels",
                expected="--target-column for " + ", ".join(n for n, r in RECIPES.items() if r.supervised),
                got="--target-column",
                fix="leave the column out with --drop instead",
            )
        return None
    if labels is None:
        raise DataError(
            f"--fit {recipe} learns from labels",
            expected="the column that holds them",
            got="none",
            fix="name it: --target-column NAME",
        )
    blank = int(labels.isna().sum())
    if blank:
        raise DataError(
            f"column {labels.name!r} of labels has missing values",
            expected=f"a label in each of {rows} rows",
            got=f"{blank} without",
            fix="leave these rows out of the table",
        )
    classes = np.array(labels.tolist())
    if classes.dtype.kind not in "biu":
        whole = classes.dtype.kind == "f" and bool((classes == np.round(classes)).all())
        classes = classes.astype(np.int64) if whole else classes
    count = len(np.unique(classes))
    if classes.dtype.kind == "f" or count < 2:
        raise DataError(
            f"column {labels.name!r} holds no labels",
            expected="two classes or more, as words or whole numbers",
            got="fractions" if classes.dtype.kind == "f" else "one class",
            fix="check --target-column",
        )
    return classes


def _front(frame: pd.DataFrame, prepare: bool) -> Any:
    """The unfitted step in front of the estimator, or None; words and truth values of the table are unified."""
    import pandas as pd

    words = [c for c in frame.columns if not pd.api.types.is_numeric_dtype(frame[c].dtype)]
    numbers = [c for c in frame.columns if c not in words]
    table = frame[numbers].to_numpy(dtype=np.float64, na_value=np.nan)
    endless = np.isinf(table)
    if endless.any():
        wrong = [c for c, bad in zip(numbers, endless.any(0), strict=True) if bad]
        raise DataError(
            f"columns with infinite values: {', '.join(wrong)}",
            expected="finite numbers",
            got=f"{int(endless.sum())} infinite cells",
            fix="correct them, or leave the columns out: " + without(wrong),
        )
    with np.errstate(over="ignore"):
        overflow = not np.isfinite(np.nansum(table**2))
    if overflow:
        raise DataError(
            "squares of the numbers overflow, so that no distance can be computed",
            expected="absolute values below 1e150",
            got=f"up to {np.nanmax(np.abs(table)):.3g}",
            fix="rescale the table",
        )
    holes = frame.isna()
    empty = [c for c in frame.columns if holes[c].all()]
    if empty:
        raise DataError(
            f"columns with missing values only: {', '.join(empty)}",
            expected="some values in every column",
            got="none",
            fix="leave them out: " + without(empty),
        )
    if not prepare:
        _complete(frame, words, [c for c in numbers if holes[c].any()], int(holes[numbers].to_numpy().sum()))
        return None
    from sklearn.preprocessing import StandardScaler

    if not words and not holes.to_numpy().any():
        return StandardScaler()
    return _columns(frame, numbers, words)


def _complete(frame: pd.DataFrame, words: list[str], holed: list[str], count: int) -> None:
    """Raise where a table needs preparation."""
    ready = "or let --prepare impute, encode and scale them"
    if words:
        raise DataError(
            f"columns without numbers: {', '.join(words)}",
            expected="numbers in every column",
            got=", ".join(str(frame[c].dtype) for c in words[:8]),
            fix=f"leave them out: {without(words)}; {ready}",
        )
    if holed:
        raise DataError(
            f"columns with missing values: {', '.join(holed)}",
            expected="a number in every cell",
            got=f"{count} missing",
            fix=f"impute them before, or leave the columns out: {without(holed)}; {ready}",
        )


def _columns(frame: pd.DataFrame, numbers: list[str], words: list[str]) -> Any:
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    for c in words:
        different = frame[c].nunique()
        if different > max(20, len(frame) / 2):
            raise DataError(
                f"column {c!r} names the rows rather than describing them",
                expected="words that several rows share",
                got=f"{different:,} different ones in {len(frame):,} rows",
                fix="leave it out: " + without([c]),
            )
        if different > _CATEGORIES:
            warnings.warn(f"column {c!r} has {different:,} different words: the rarest share one place", stacklevel=2)
    encode = OneHotEncoder(
        max_categories=_CATEGORIES, handle_unknown="infrequent_if_exist", sparse_output=False, dtype=np.float64
    )
    steps = [
        ("numbers", make_pipeline(SimpleImputer(strategy="median"), StandardScaler()), numbers),
        ("words", make_pipeline(SimpleImputer(strategy="most_frequent"), encode), words),
    ]
    return ColumnTransformer([step for step in steps if step[2]])
