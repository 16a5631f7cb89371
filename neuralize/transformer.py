"""Relevances as features: a scikit-learn transformer around any estimator that has a network."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import sklearn
from sklearn.base import BaseEstimator, OneToOneFeatureMixin, TransformerMixin, clone
from sklearn.cluster import KMeans
from sklearn.frozen import FrozenEstimator
from sklearn.utils import get_tags
from sklearn.utils.metadata_routing import MetadataRouter, MethodMapping, process_routing
from sklearn.utils.validation import check_is_fitted, has_fit_parameter, validate_data

from neuralize.conversion import neuralize
from neuralize.explanation import CoverageWarning
from neuralize.network import NeuralizedModel
from neuralize.tables import check_names

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RelevanceTransformer"]


class RelevanceTransformer(OneToOneFeatureMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]
    r"""From rows (N, D) to the relevance of every column, (N, D).

    A row becomes what speaks for its cluster, column by column: rows that are
    in a cluster for the same reasons are near each other. Its columns keep
    their names.

    Parameters
    ----------
    clusterer : estimator or Pipeline, optional
        A clustering, classifier, mixture, ... that :func:`neuralize.neuralize`
        takes; cloned and fitted by ``fit``. One that is fitted already goes in as
        ``sklearn.frozen.FrozenEstimator(fitted)``: it is used as it is. None:
        ``KMeans(random_state=0)``.
    target, contrast : None or label
        "Why ``target`` rather than ``contrast``", for all rows; None: each
        row's own cluster, all competitors.
    beta, rule, output
        As in :meth:`neuralize.NeuralizedModel.explain`.
    top : int, None or "auto"
        Keep the largest values of each row only, as a CSR array; "auto": 32
        for sparse X, everything else whole.

    Attributes
    ----------
    clusterer_ : estimator
        Fitted.
    net_ : NeuralizedModel
        Its network. The rows of ``fit`` are its reference, so that stiffness
        and baselines are fixed: a row has the same relevances alone, in a
        batch, in a partition.
    by_cluster_ : DataFrame
        Explained cluster x ("mean" | "magnitude", feature): mean relevance and
        mean magnitude over the rows of ``fit``. Signed means cancel; the
        magnitude says how much a column matters.
    n_features_in_ : int
    feature_names_in_ : ndarray (n_features_in_,)
        Where X has names.

    Notes
    -----
    Computed in float64; float32 rows give float32 values. ``transform`` takes
    tables without rows. What the values leave to the residual is in
    ``net_.explain(X)``. ``fit`` costs the clusterer's own fit, and explains
    its rows once, in batches.

    See Also
    --------
    neuralize.neuralize : the network alone, of a fitted estimator.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn.pipeline import make_pipeline
    >>> from sklearn.preprocessing import StandardScaler
    >>> X = load_iris(as_frame=True).data
    >>> clusterer = make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0))
    >>> relevance = RelevanceTransformer(clusterer).set_output(transform="pandas").fit(X)
    >>> relevance.transform(X).shape, list(relevance.get_feature_names_out()) == list(X.columns)
    ((150, 4), True)
    >>> relevance.by_cluster_["magnitude"].idxmax(axis=1).tolist()
    ['sepal width (cm)', 'petal length (cm)', 'sepal length (cm)']
    """

    clusterer_: Any
    net_: NeuralizedModel
    by_cluster_: pd.DataFrame
    n_features_in_: int

    def __init__(
        self,
        clusterer: Any = None,
        *,
        target: Any = None,
        contrast: Any = None,
        beta: float | str = "auto",
        rule: str = "auto",
        output: str = "logit",
        top: int | str | None = "auto",
    ) -> None:
        self.clusterer = clusterer
        self.target = target
        self.contrast = contrast
        self.beta = beta
        self.rule = rule
        self.output = output
        self.top = top

    def fit(self, X: Any, y: Any = None, **fit_params: Any) -> RelevanceTransformer:
        """Fit the clusterer, and keep its network.

        Parameters
        ----------
        X : array-like, DataFrame or CSR (N, D)
        y : array (N,), optional
            For classifiers.
        **fit_params
            For the clusterer's ``fit``, such as ``sample_weight``.

        Returns
        -------
        RelevanceTransformer
            Itself.

        Raises
        ------
        ValueError
            What the clusterer raises for rows it can't take.
        UnsupportedEstimatorError, ConvergenceError
            It has no exact network; it found one cluster only.
        TargetError, RuleError
            The question does not fit it.
        """
        validate_data(self, X, reset=True, skip_check_array=True)
        fitted = clone(self._chosen())
        if sklearn.get_config()["enable_metadata_routing"]:
            fit_params = process_routing(self, "fit", **fit_params).clusterer.fit
        answers = {"y": y} if has_fit_parameter(fitted, "y") else {}
        self.clusterer_ = fitted.fit(X, **answers, **fit_params)
        net = neuralize(_thawed(fitted))
        names = getattr(self, "feature_names_in_", None)
        if names is not None and net.feature_names is not None:
            # a frozen one has seen other rows
            check_names([str(n) for n in names], net.feature_names)
        self.net_ = net
        rows = self._rows(X)
        net.set_reference(rows)
        self.by_cluster_ = self._means(rows)
        return self

    def transform(self, X: Any) -> npt.NDArray[Any]:
        """The relevance of every column.

        Parameters
        ----------
        X : array-like, DataFrame or CSR (N, D)

        Returns
        -------
        ndarray (N, D)
            Of the type of X if that is float32, else float64; a CSR array for
            sparse X, or with ``top``.

        Raises
        ------
        InputError, ColumnError, NonFiniteError
            X does not fit.

        Warns
        -----
        CoverageWarning
            If the residual, which a table of features leaves out, carries more
            than half of the median row's output.
        """
        check_is_fitted(self)
        rows = self._rows(X)
        values = self.net_.explain(rows, **self._question(), top=self.top).values
        return values.astype(_precision(rows), copy=False)

    def get_metadata_routing(self) -> MetadataRouter:
        """How metadata reaches the clusterer; see scikit-learn's user guide."""
        return MetadataRouter(owner=self).add(
            clusterer=self._chosen(), method_mapping=MethodMapping().add(caller="fit", callee="fit")
        )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        chosen = self._chosen()
        if hasattr(chosen, "__sklearn_tags__"):
            inner = get_tags(chosen)
            tags.input_tags = inner.input_tags
            tags.target_tags.required = inner.target_tags.required
            tags.non_deterministic = inner.non_deterministic
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _chosen(self) -> Any:
        return KMeans(random_state=0) if self.clusterer is None else self.clusterer

    def _question(self) -> dict[str, Any]:
        names = ("target", "contrast", "beta", "rule", "output")
        return {name: getattr(self, name) for name in names}

    def _rows(self, X: Any) -> Any:
        """X as the network takes it, its columns checked the way scikit-learn does."""
        if not self.net_.schema.numeric:
            # categories: the network reads the raw table
            validate_data(self, X, reset=False, skip_check_array=True)
            return X
        return validate_data(
            self,
            X,
            reset=False,
            accept_sparse="csr",
            dtype=[np.float64, np.float32],
            ensure_all_finite=False,  # the network names the cells
            ensure_min_samples=0,
        )

    def _means(self, rows: Any) -> pd.DataFrame:
        """``Explanation.by_cluster`` of all rows, one batch at a time."""
        import pandas as pd

        sums, sizes = [], []
        with warnings.catch_warnings():
            # transform says it, once for all rows
            warnings.simplefilter("ignore", CoverageWarning)
            for part in self.net_.explain_batches(rows, **self._question(), top=self.top):
                size = pd.Series(part.target).value_counts()
                sums.append(part.by_cluster().mul(size, axis=0))
                sizes.append(size)
        return pd.concat(sums).groupby(level=0).sum().div(pd.concat(sizes).groupby(level=0).sum(), axis=0)


def _thawed(estimator: Any) -> Any:
    while isinstance(estimator, FrozenEstimator):
        estimator = estimator.estimator
    return estimator


def _precision(rows: Any) -> type[np.floating[Any]]:
    kinds = set(rows.dtypes) if hasattr(rows, "dtypes") else {getattr(rows, "dtype", None)}
    return np.float32 if kinds == {np.dtype(np.float32)} else np.float64
