r"""K-means in the space of a kernel: clusters that no plane separates.

.. math:: \min_{\text{labels}} \sum_i w_i\, |\Phi(x_i) - m_{c(i)}|^2, \qquad
          |\Phi(x) - m_k|^2 = k(x,x) - 2 s_k(x) + n_k

with :math:`s_k(x) = \sum_j a_{kj} k(x, u_j)` and :math:`n_k = |m_k|^2`. The
feature map is never computed. Scikit-learn has no such estimator. Sources:

* Schoelkopf, Smola, Mueller, "Nonlinear component analysis as a kernel
  eigenvalue problem", Neural Computation 10(5), 1998: k-means in feature space.
* Dhillon, Guan, Kulis, "Kernel k-means, spectral clustering and normalized
  cuts", KDD 2004: the weighted form.
* Williams, Seeger, "Using the Nystroem method to speed up kernel machines",
  NIPS 2000; Chitta, Jin, Havens, Jain, "Approximate kernel k-means: solution
  to large scale kernel clustering", KDD 2011: centres in the span of few rows.
* Arthur, Vassilvitskii, "k-means++: the advantages of careful seeding", SODA
  2007: seeds and landmarks. Sculley, "Web-scale k-means clustering", WWW 2010:
  mini-batches.
"""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, ClusterMixin, TransformerMixin, _fit_context
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lrp.errors import InputError
from neuralize import _landmarks, _rkhs
from neuralize._rkhs import Ints, Progress
from neuralize.kernels import TERMS, Anchors, Floats, ProductKernel, Term

__all__ = ["KernelKMeans"]

# algorithm="auto": up to so many rows the whole kernel matrix (200 MB) is used
_FULL_ROWS = 5_000
# rows on which landmarks and seeds are chosen; more where there are many landmarks or clusters
_SAMPLE_ROWS = 10_000
_PATIENCE = 10


class KernelKMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):  # type: ignore[misc]
    r"""K-means clustering in the space of a product kernel.

    Parameters
    ----------
    n_clusters : int, default=8
        K.
    kernel : {"rbf", "laplacian", "chi2", "l4"} or callable, default="rbf"
        A product kernel, :math:`k(x,u) = \exp(-\sum_t \gamma_t d_t(x_t,u_t))`;
        a callable is the cost ``d(x, u)`` of one column, elementwise. See
        :mod:`neuralize.kernels`. "l4" is not positive definite: there is no
        space in which distances are real. Squares below zero count as zero,
        and iterations stop when the inertia no longer decreases.
    gamma : "scale", "auto", float or array-like (n_features,), default="scale"
        Inverse scale. "scale": 1 / mean cost of a row against the mean row,
        which for "rbf" is 1 / (sum of the columns' variances), that is
        scikit-learn's rule for centred columns; "auto": 1 / n_features. An
        array has one value per column.
    init : {"k-means++", "random"} or array-like (n_samples,), default="k-means++"
        Seeds by greedy k-means++ with kernel distances, or rows at random, each
        row starting with its nearest seed; or the labels 0 .. K-1 to start from.
    n_init : int or "auto", default="auto"
        Starts, of which the best by inertia is kept: "auto" is 10. One with labels
        given as ``init``.
    max_iter : int, default=300
        Iterations at most (for mini-batches: epochs).
    tol : float, default=1e-6
        Iterations end when the inertia decreases by less than this share, or
        no label changes.
    algorithm : {"auto", "full", "landmarks", "minibatch"}, default="auto"
        "full": Lloyd's iterations on the kernel matrix, exact. "landmarks":
        Lloyd's iterations over all rows with centres in the span of landmarks
        (Nystroem); exact where all distinct rows are landmarks. Seeds are tried
        on the sample that the landmarks come from. "minibatch": centres in the same span,
        moved as running means by random batches instead of passes over all
        rows, until 10 batches in a row bring no improvement. (It is mini-batch
        k-means among landmarks, not mini-batch kernel k-means with truncated lists of
        members.) "auto": "full" up to 5000 rows, then "landmarks".
    n_landmarks : int, default=300
        m, drawn by greedy k-means++ from a sample of 10 000 rows (of 20 m or 20 K,
        if that is more); all distinct rows of the sample where there are no more.
    batch_size : int, default=1024
        Rows per mini-batch.
    verbose : int, default=0
        1: a line per iteration. A bar is shown on a terminal in any case, for
        fits longer than two seconds.
    random_state : int, RandomState or None, default=None
        Draws seeds, sample, landmarks and batches.

    Attributes
    ----------
    labels_ : ndarray of int32 (n_samples,)
        Equal to ``predict`` on the training rows.
    inertia_ : float
        Weighted sum of squared distances, in the space of the kernel, to the nearest centre.
    n_iter_ : int
        Iterations run over all rows (epochs begun, for mini-batches).
    algorithm_ : {"full", "landmarks", "minibatch"}
        The one that was run.
    gamma_ : float or ndarray (n_features,)
        The inverse scale that was used.
    support_vectors_ : ndarray (M, n_features)
        Rows that the centres are made of: all distinct rows of positive weight,
        sorted by cluster ("full"), or the landmarks.
    dual_coef_ : ndarray (K, M)
        Coefficients of the centres, :math:`m_k = \sum_j a_{kj} \Phi(u_j)`.
        "full": :math:`\alpha_j/Z_k` of members, zero elsewhere. Landmarks: of
        either sign, not summing to 1.
    centre_norms_ : ndarray (K,)
        :math:`n_k = |m_k|^2 = a_k' K a_k`.
    alpha_, support_labels_ : ndarray (M,)
        Only after "full": positive weight of each support vector (repeated
        rows are merged and their weights added) and the cluster it belongs to;
        :math:`Z_k` is the sum of a cluster's. On stopping before the labels have
        settled, they are those the centres were made from, one step before
        ``labels_``.
    cluster_weights_ : ndarray (K,)
        Weight of the training rows in each cluster of ``labels_``.
    n_features_in_ : int
    feature_names_in_ : ndarray (n_features,)
        Where X has names.

    Warns
    -----
    ConvergenceWarning
        Fewer clusters than asked for, because there are too few distinct rows,
        or the kernel (or the span of the landmarks) can't tell them apart. Centres that
        no row is nearest to are dropped, so that every cluster has members.

    See Also
    --------
    sklearn.cluster.KMeans : the limit of a small gamma.

    Notes
    -----
    With M distinct rows "full" takes O(M^2 D) time once and O(M^2 K) for an
    iteration at most, less when few labels change. The kernel matrix (8 M^2 bytes)
    is kept where it fits scikit-learn's ``working_memory`` (1 GiB by default,
    so up to 11 500 rows) and is computed again in blocks otherwise. "landmarks" takes
    O(n m (D + K)) per pass over the rows, and memory for X, a sample's kernel
    values (24 MB by default), and those of all rows only where they fit the working memory. ``predict`` takes
    O(N M (D + K)) and the memory of one block. Arithmetic is in float64; a
    float32 table is converted block by block.

    Weights are equal to repetitions: equal rows are merged before anything is
    drawn, as long as all rows are in the sample ("full" always; otherwise up to
    10 000 rows), for "minibatch" up to its random batches.

    References are in the module's docstring.

    Examples
    --------
    Two rings, which no plane separates:

    >>> import numpy as np
    >>> from neuralize.kernel_kmeans import KernelKMeans
    >>> angle = np.linspace(0, 2 * np.pi, 100, endpoint=False)
    >>> ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    >>> X = np.concatenate([0.2 * ring, 2.0 * ring])
    >>> fitted = KernelKMeans(2, gamma=0.5, random_state=0).fit(X)
    >>> sorted(np.bincount(fitted.labels_[:100], minlength=2).tolist())
    [0, 100]
    >>> bool((fitted.predict(X) == fitted.labels_).all())
    True
    >>> fitted.dual_coef_.shape, fitted.centre_norms_.shape
    ((2, 200), (2,))
    """

    labels_: npt.NDArray[np.int32]
    inertia_: float
    gamma_: float | Floats
    support_vectors_: npt.NDArray[Any]
    support_labels_: npt.NDArray[np.int32]
    alpha_: Floats
    dual_coef_: Floats
    centre_norms_: Floats
    cluster_weights_: Floats

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        "n_clusters": [Interval(Integral, 1, None, closed="left")],
        "kernel": [StrOptions(set(TERMS)), callable],
        "gamma": [StrOptions({"scale", "auto"}), Interval(Real, 0, None, closed="neither"), "array-like"],
        "init": [StrOptions({"k-means++", "random"}), "array-like"],
        "n_init": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "algorithm": [StrOptions({"auto", "full", "landmarks", "minibatch"})],
        "n_landmarks": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "verbose": ["verbose"],
        "random_state": ["random_state"],
    }

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        kernel: str | Term = "rbf",
        gamma: str | float | npt.ArrayLike = "scale",
        init: str | npt.ArrayLike = "k-means++",
        n_init: int | str = "auto",
        max_iter: int = 300,
        tol: float = 1e-6,
        algorithm: str = "auto",
        n_landmarks: int = 300,
        batch_size: int = 1024,
        verbose: int = 0,
        random_state: Any = None,
    ) -> None:
        self.n_clusters = n_clusters
        self.kernel = kernel
        self.gamma = gamma
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.algorithm = algorithm
        self.n_landmarks = n_landmarks
        self.batch_size = batch_size
        self.verbose = verbose
        self.random_state = random_state

    @property
    def kernel_(self) -> ProductKernel:
        """The kernel with the gamma that was fitted."""
        return ProductKernel(self.kernel, self.gamma_)

    @_fit_context(prefer_skip_nested_validation=True)  # type: ignore[untyped-decorator]
    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> KernelKMeans:
        """Find the clusters.

        Parameters
        ----------
        X : array-like (n_samples, n_features)
        y : ignored
        sample_weight : array-like (n_samples,), optional
            Not negative; like repeating the row so many times, fractions allowed.

        Returns
        -------
        KernelKMeans
            Itself.

        Raises
        ------
        InputError
            Fewer rows of positive weight than clusters; labels or gammas that
            do not fit X; negative values where the kernel has none.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], order="C")
        w = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        self._check_rows(X, w)
        start = None if isinstance(self.init, str) else _rkhs.initial_labels(self.init, len(X), self.n_clusters)
        rng = check_random_state(self.random_state)
        algorithm = self.algorithm
        if algorithm == "auto":
            algorithm = "full" if len(X) <= _FULL_ROWS else "landmarks"
        with _rkhs.progress(self.verbose) as bar:
            if algorithm == "full":
                self._fit_full(X, w, start, rng, bar)
            else:
                self._fit_landmarks(X, w, start, rng, bar, algorithm == "minibatch")
        self.algorithm_ = algorithm
        self.labels_, self.inertia_ = self._nearest(X, w)
        if self._drop_empty(w):
            self.labels_, self.inertia_ = self._nearest(X, w)
        found = self._n_features_out = len(self.centre_norms_)
        self.cluster_weights_ = np.bincount(self.labels_, w, minlength=found).astype(np.float64)
        if found < self.n_clusters:
            warnings.warn(
                f"{found} clusters found, n_clusters={self.n_clusters}: too few rows differ, or differ "
                f"enough for kernel={self.kernel!r} with gamma {self.gamma_}. Ask for fewer clusters or raise gamma.",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X: Any) -> npt.NDArray[np.int32]:
        """The nearest centre in the space of the kernel.

        Parameters
        ----------
        X : array-like (N, n_features)

        Returns
        -------
        ndarray of int32 (N,)
            The lower label on ties.
        """
        X = self._rows(X)
        return self._nearest(X, np.ones(len(X)))[0]

    def transform(self, X: Any) -> npt.NDArray[Any]:
        r"""Distances :math:`|\Phi(x) - m_k|` to the centres, in the space of the kernel.

        Parameters
        ----------
        X : array-like (N, n_features)

        Returns
        -------
        ndarray (N, K)
            Of the type of X.
        """
        X = self._rows(X)
        out = np.empty((len(X), len(self.centre_norms_)), dtype=X.dtype)
        for rows, kappa in Anchors(self.kernel_, self.support_vectors_).blocks(X):
            squares = 1.0 - 2.0 * (kappa @ self.dual_coef_.T) + self.centre_norms_
            out[rows] = np.sqrt(np.maximum(squares, 0.0))
        return out

    def score(self, X: Any, y: Any = None, sample_weight: Any = None) -> float:
        """Minus the inertia of X.

        Parameters
        ----------
        X : array-like (N, n_features)
        y : ignored
        sample_weight : array-like (N,), optional

        Returns
        -------
        float
        """
        X = self._rows(X)
        w = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        return -self._nearest(X, w)[1]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.positive_only = self.kernel == "chi2"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _rows(self, X: Any) -> npt.NDArray[Any]:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32], order="C")
        self.kernel_.check(X)
        return np.asarray(X)

    def _nearest(self, X: npt.NDArray[Any], w: Floats) -> tuple[npt.NDArray[np.int32], float]:
        """Labels and inertia."""
        labels, inertia = np.empty(len(X), dtype=np.int32), 0.0
        B = np.ascontiguousarray(self.dual_coef_.T)
        for rows, kappa in Anchors(self.kernel_, self.support_vectors_).blocks(X):
            labels[rows], far = _landmarks.nearest(kappa, B, self.centre_norms_)
            inertia += float(w[rows] @ far)
        return labels, inertia

    def _drop_empty(self, w: Floats) -> bool:
        """Forget centres that no row of positive weight is nearest to; whether there were any."""
        kept = np.bincount(self.labels_, w, minlength=len(self.centre_norms_)) > 0
        if kept.all():
            return False
        self.dual_coef_, self.centre_norms_ = self.dual_coef_[kept], self.centre_norms_[kept]
        if self.algorithm_ == "full":
            mine = kept[self.support_labels_]
            self.support_vectors_, self.alpha_ = self.support_vectors_[mine], self.alpha_[mine]
            self.support_labels_ = (np.cumsum(kept) - 1)[self.support_labels_[mine]].astype(np.int32)
            self.dual_coef_ = self.dual_coef_[:, mine]
        return True

    def _check_rows(self, X: npt.NDArray[Any], w: Floats) -> None:
        usable = int((w > 0).sum())
        if usable < self.n_clusters:
            raise InputError(
                f"n_samples={usable} is less than n_clusters={self.n_clusters}",
                expected="at least one row of positive weight per cluster",
                got=f"{len(X)} rows, {usable} of positive weight",
                fix="ask for fewer clusters",
            )
        ProductKernel(self.kernel).check(X)
        self.gamma_ = _rkhs.inverse_scale(self.kernel, self.gamma, X, w)

    def _starts(self) -> int:
        return 10 if isinstance(self.n_init, str) else int(self.n_init)

    def _seeded(self, gram: _rkhs.Gram, w: Floats, rng: np.random.RandomState) -> Ints:
        """Labels from the nearest of newly drawn seeds."""
        k = min(self.n_clusters, len(w))
        random = self.init == "random"
        return _rkhs.nearest_seed(
            gram, _rkhs.random_seeds(w, k, rng) if random else _rkhs.spread_seeds(gram, w, k, rng)
        )

    def _fit_full(
        self, X: npt.NDArray[Any], w: Floats, start: Ints | None, rng: np.random.RandomState, bar: Progress
    ) -> None:
        U, weights, used, where = _rkhs.merged(X, w)
        gram = _rkhs.Gram(self.kernel_, U, _rkhs.working_memory())
        best: _rkhs.Run | None = None
        for run in range(self._starts() if start is None else 1):
            split = np.zeros((len(U), self.n_clusters))
            if start is None:
                split[np.arange(len(U)), self._seeded(gram, weights, rng)] = weights
            else:
                np.add.at(split, (where, start[used]), w[used])
            bar.run = f"run {run + 1}, "
            result = _rkhs.lloyd(gram, weights, split, self.max_iter, self.tol, bar)
            if best is None or _better(result.inertia, best.inertia):
                best = result
        assert best is not None
        cluster, row = np.nonzero(best.split.T)
        self.support_vectors_ = U[row]
        self.support_labels_ = cluster.astype(np.int32)
        self.alpha_ = best.split[row, cluster]
        self.centre_norms_ = best.norms
        Z = np.bincount(cluster, self.alpha_, minlength=self.n_clusters)
        self.dual_coef_ = np.zeros((len(Z), len(row)))
        self.dual_coef_[cluster, np.arange(len(row))] = self.alpha_ / Z[cluster]
        self.n_iter_ = best.iterations

    def _fit_landmarks(
        self,
        X: npt.NDArray[Any],
        w: Floats,
        start: Ints | None,
        rng: np.random.RandomState,
        bar: Progress,
        batches: bool,
    ) -> None:
        kernel, memory = self.kernel_, _rkhs.working_memory()
        rows, times = _landmarks.sampled(w, max(_SAMPLE_ROWS, 20 * self.n_landmarks, 20 * self.n_clusters), rng)
        U, weights, _, _ = _rkhs.merged(X[rows], times)
        chosen = U
        if len(U) > self.n_landmarks:
            chosen = U[_rkhs.spread_seeds(_rkhs.Gram(kernel, U, 0.0), weights, self.n_landmarks, rng)]
        space = _landmarks.Subspace(kernel, chosen)
        if start is None:
            sums, Z = self._sample_runs(space, U, weights, rng, bar)
        features = _landmarks.Features(space.anchors, X, memory if not batches else 0.0)
        if start is not None:
            sums, Z = features.sums(start, w, self.n_clusters)
        bar.run = ""
        if batches:
            run = _landmarks.mini_batches(
                X, space, w, sums, Z, self.batch_size, self.max_iter, self.tol, _PATIENCE, rng, bar
            )
        else:
            run = _landmarks.lloyd(features, space, w, sums, Z, self.max_iter, self.tol, bar)
        self.support_vectors_ = space.landmarks
        self.dual_coef_ = np.ascontiguousarray(run.B.T)
        self.centre_norms_ = run.norms
        self.n_iter_ = run.iterations
        for name in ("alpha_", "support_labels_"):
            self.__dict__.pop(name, None)  # of an earlier fit by the full algorithm

    def _sample_runs(
        self, space: _landmarks.Subspace, U: npt.NDArray[Any], w: Floats, rng: np.random.RandomState, bar: Progress
    ) -> tuple[Floats, Floats]:
        """Sums of features and weights of the best of several runs on a sample."""
        gram = _rkhs.Gram(self.kernel_, U, 0.0)
        features = _landmarks.Features(space.anchors, U, _rkhs.working_memory())
        best: _landmarks.Run | None = None
        for run in range(self._starts()):
            sums, Z = features.sums(self._seeded(gram, w, rng), w, self.n_clusters)
            bar.run = f"sample, run {run + 1}, "
            result = _landmarks.lloyd(features, space, w, sums, Z, self.max_iter, self.tol, bar)
            if best is None or _better(result.inertia, best.inertia):
                best = result
        assert best is not None
        return best.sums, best.Z


def _better(inertia: float, best: float) -> bool:
    """By more than rounding: which of two equal clusterings comes first must not depend on it."""
    return inertia < best * (1 - 1e-9)
