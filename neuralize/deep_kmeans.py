r"""Deep k-means: an autoencoder whose codes are made to cluster, and k-means in them.

Source: Yang, Fu, Sidiropoulos and Hong, "Towards K-means-friendly Spaces:
Simultaneous Deep Learning and Clustering", ICML 2017 (arXiv 1610.04794), for
the joint loss and the alternation; differences are listed in
:class:`DeepKMeans`.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.base import BaseEstimator, ClusterMixin, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from lrp.errors import InputError, OutputError
from neuralize._autoencoders import convolutional, fully_connected
from neuralize._training import Training, encode, lloyd, nearest, open_folder, seeded, stored_seed

__all__ = ["DeepKMeans"]

Network = nn.Module | Callable[[], nn.Module]
_DTYPES = ("float32", "float64")


class DeepKMeans(ClusterMixin, TransformerMixin, BaseEstimator):  # type: ignore[misc]  # sklearn: untyped
    r"""K-means in the codes of an autoencoder that is trained along with it.

    Parameters
    ----------
    n_clusters : int
        K.
    encoder, decoder : nn.Module or callable, optional
        From rows to codes (n, L) and back, both or none. A module is copied,
        weights included, and never modified; parameters that require no
        gradient stay as they are. A callable without arguments builds one, its
        weights drawn by ``random_state``. Default: dense layers with ReLUs, or
        with ``input_shape`` convolutions.
    n_latent : int, optional
        L of the default networks; ``min(10, D)``.
    hidden : sequence of int, optional
        Widths of the default networks' hidden layers, (128, 64); their
        channels where there is an ``input_shape``, (16, 32).
    input_shape : tuple of int, optional
        Shape of a sample, for rows that are flattened pictures:
        (channels, height, width). The networks get and return this shape.
    lambda_ : float
        Weight of the k-means loss, without units.
    pretrain_epochs, epochs : int
        Epochs on the reconstruction alone, then on the joint loss.
    batch_size : "auto" or int
        "auto": a twentieth of the rows, from 16 to 256.
    learning_rate : float
        Of Adam.
    n_init : int
        Starts of k-means (k-means++) on the codes after pre-training; the best
        counts.
    random_state : None, int or RandomState
        With an integer, the same machine gives the same result bit for bit on
        the CPU, for the same number of threads.
    device : str or torch.device, optional
        "cpu" where not given; "cuda". The fitted networks stay there.
    dtype : {"float32", "float64"}
        Precision of training. The fitted encoder is kept, and applied, in
        float64.
    mixed_precision : bool
        Train under bfloat16 autocast; codes for the centres are computed
        without.
    resume : path, optional
        A folder for the state of training. It is written after every epoch,
        whole or not at all (safetensors with a JSON header: digests of rows
        and of initial networks, settings, history). Where it holds a state,
        training goes on after its last epoch; on the CPU with the same result,
        bit for bit. ``epochs`` may have grown since; anything else that differs
        raises MismatchError.
    progress : bool
        A bar on stderr, on a terminal only.

    Attributes
    ----------
    cluster_centers_ : ndarray (K, L)
        In codes, float64.
    labels_ : ndarray (n,) of int32
        ``predict`` of the rows of fit.
    encoder_, decoder_ : nn.Module
        Fitted, in evaluation mode, float64, without gradients. ``encoder_``
        takes rows (n, D), also where these are flattened pictures; ``decoder_``
        returns rows.
    inertia_ : float
        Sum of squared distances of codes to their centres.
    loss_curve_ : list of float
        Mean loss of every epoch: reconstruction while pre-training, then joint.
    history_ : list of dict
        Per epoch "phase", "loss", "reconstruction" and, in joint epochs,
        "within", "spread" (variance of the codes relative to the end of
        pre-training) and "reseeded" (empty clusters that were moved).
    n_reseeded_, n_iter_ : int
        Their total; joint epochs.
    n_features_in_, feature_names_in_

    Raises
    ------
    InputError
        Parameters out of range, a table that does not fit.
    OutputError
        Networks that do not return codes (n, L), or rows.
    ConvergenceError
        If the loss is not finite any more.
    DataError, MismatchError, FileFormatError
        A folder for ``resume`` that can't be used.

    Warns
    -----
    ConvergenceWarning
        If clusters stay empty, or codes shrink below a hundredth of their
        variance.

    Notes
    -----
    **Loss.** With encoder f, decoder g and centres :math:`\mu_k`, the mean over
    the rows x of a batch of

    .. math:: \frac{|x - g(f(x))|^2}{V_x}
        + \frac{\lambda}{2}\,\frac{\min_k |f(x)-\mu_k|^2}{V_z} ,

    where :math:`V_x` and :math:`V_z` are the total variances of the rows and,
    after pre-training, of the codes: constants, so that both terms are shares
    of a variance and ``lambda_`` has no units. The loss of Yang et al. is the
    same with :math:`\lambda V_x / V_z` in the place of :math:`\lambda`.

    **Alternation.** In an epoch the centres are fixed; every batch assigns its
    rows to the nearest centre and takes one Adam step on the networks. After
    it all rows are encoded, and Lloyd's algorithm updates centres and
    assignments from where they were: at most ten iterations, fewer where the
    assignments are stable. These never raise the loss. (Yang et al. move the
    centres along with every batch instead, at rates that fall with the number
    of rows a centre has had.)

    **Collapse.** Codes can't all shrink onto their centres, since they must
    allow the reconstruction; a lambda so large that they nearly do is
    reported. A cluster that loses all rows is moved onto a row that is among
    the farthest from their centres (the count is in ``history_``), in the manner of
    scikit-learn's KMeans; Caron et al. 2018 split another cluster instead.

    **Scale.** Columns count by their variance, as in k-means; standardise
    columns of different units before. Cost per epoch: one training pass and
    one encoding pass over the rows. Rows stay where they are (a memmap is read
    batch by batch).

    ``transform`` gives the codes, not the distances to the centres: they are
    the representation that was learnt, and distances follow from them.

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> X = load_iris().data
    >>> fitted = DeepKMeans(3, n_latent=2, hidden=(16,), pretrain_epochs=5, epochs=5, random_state=0).fit(X)
    >>> fitted.cluster_centers_.shape, fitted.transform(X).shape
    ((3, 2), (150, 2))
    >>> bool((fitted.predict(X) == fitted.labels_).all())
    True
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        encoder: Network | None = None,
        decoder: Network | None = None,
        n_latent: int | None = None,
        hidden: Sequence[int] | None = None,
        input_shape: tuple[int, ...] | None = None,
        lambda_: float = 0.1,
        pretrain_epochs: int = 50,
        epochs: int = 50,
        batch_size: int | str = "auto",
        learning_rate: float = 1e-3,
        n_init: int = 10,
        random_state: Any = None,
        device: Any = None,
        dtype: str = "float32",
        mixed_precision: bool = False,
        resume: str | os.PathLike[str] | None = None,
        progress: bool = True,
    ) -> None:
        self.n_clusters = n_clusters
        self.encoder = encoder
        self.decoder = decoder
        self.n_latent = n_latent
        self.hidden = hidden
        self.input_shape = input_shape
        self.lambda_ = lambda_
        self.pretrain_epochs = pretrain_epochs
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.n_init = n_init
        self.random_state = random_state
        self.device = device
        self.dtype = dtype
        self.mixed_precision = mixed_precision
        self.resume = resume
        self.progress = progress

    # ------------------------------------------------------------------ fitting

    def fit(self, X: Any, y: Any = None) -> DeepKMeans:
        """Train networks and centres.

        Parameters
        ----------
        X : array-like or DataFrame (n, D)
            Finite numbers; at least K rows.
        y : ignored
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        self._check(*X.shape)
        device = self._device()
        folder = None if self.resume is None else open_folder(self.resume)
        seed = self._seed(folder)
        shape = (X.shape[1],) if self.input_shape is None else tuple(int(s) for s in self.input_shape)
        with seeded(device, seed, 3):
            encoder, decoder = self._networks(X.shape[1], shape)
            _check_networks(encoder, decoder, X[:2].copy(), shape, device, getattr(torch, self.dtype))
        settings = {
            "n_clusters": int(self.n_clusters),
            "input_shape": list(shape),
            "lambda_": float(self.lambda_),
            "batch_size": self.batch_size if isinstance(self.batch_size, str) else int(self.batch_size),
            "learning_rate": float(self.learning_rate),
            "n_init": int(self.n_init),
            "seed": seed,
            "dtype": self.dtype,
            "mixed_precision": bool(self.mixed_precision),
        }
        training = Training(encoder, decoder, X, shape, settings, device, folder, bool(self.progress))
        training.run(int(self.pretrain_epochs), int(self.epochs))
        self._keep(training, shape)
        return self

    def _keep(self, training: Training, shape: tuple[int, ...]) -> None:
        """Fitted attributes, from a training that is finished."""
        nets = training.nets.double().eval().requires_grad_(False)
        encoder, decoder = nets["encoder"], nets["decoder"]
        if self.input_shape is not None:
            encoder, decoder = nn.Sequential(nn.Unflatten(1, shape), encoder), nn.Sequential(decoder, nn.Flatten())
        self.encoder_, self.decoder_ = encoder.eval(), decoder.eval()
        assert training.centres is not None
        z = self._codes(training.X)
        # the codes in float64 differ from those that were trained with by rounding
        centres, index, distance, _ = lloyd(z, training.centres.to(z), 10)
        self.cluster_centers_ = centres.cpu().numpy()
        self.labels_ = index.cpu().numpy().astype(np.int32)
        self.inertia_ = float(distance.sum())
        self.history_ = training.history
        self.loss_curve_ = [entry["loss"] for entry in training.history]
        self.n_reseeded_ = sum(entry.get("reseeded", 0) for entry in training.history)
        self.n_iter_ = training.done["joint"]
        found = len(np.unique(self.labels_))
        if found < self.n_clusters:
            warnings.warn(
                f"{self.n_clusters - found} of {self.n_clusters} clusters are empty: there are fewer distinct codes. "
                "Ask for fewer clusters, or train longer",
                ConvergenceWarning,
                stacklevel=3,
            )
        spread = next((e["spread"] for e in reversed(self.history_) if "spread" in e), 1.0)
        if spread < 0.01:
            warnings.warn(
                f"the codes have shrunk to {spread:.2g} of their variance after pre-training: lower lambda_",
                ConvergenceWarning,
                stacklevel=3,
            )

    def _seed(self, folder: Path | None) -> int:
        if folder is not None and not isinstance(self.random_state, (int, np.integer)):
            # a run that is taken up again keeps the seed it drew
            held = stored_seed(folder)
            if held is not None:
                return held
        return int(check_random_state(self.random_state).randint(2**31 - 1))

    def _device(self) -> torch.device:
        try:
            device = torch.device("cpu" if self.device is None else self.device)
            torch.empty(1, device=device, dtype=torch.float64).cpu()
        except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
            raise InputError(
                f"device {self.device!r} can not be used",
                expected="'cpu', or a device that torch sees and that has float64",
                got=str(error).split("\n")[0],
                fix="drop device=",
            ) from error
        return device

    def _networks(self, columns: int, shape: tuple[int, ...]) -> tuple[nn.Module, nn.Module]:
        if (self.encoder is None) != (self.decoder is None):
            raise InputError(
                "an encoder needs a decoder, and a decoder an encoder",
                expected="both or none",
                got="only the encoder" if self.decoder is None else "only the decoder",
                fix="pass both",
            )
        if self.encoder is None:
            latent = min(10, columns) if self.n_latent is None else int(self.n_latent)
            if self.input_shape is None:
                return fully_connected(columns, latent, (128, 64) if self.hidden is None else self.hidden)
            return convolutional(shape, latent, (16, 32) if self.hidden is None else self.hidden)
        built = [n if isinstance(n, nn.Module) else n() for n in (self.encoder, self.decoder)]  # type: ignore[misc]
        for network in built:
            if not isinstance(network, nn.Module):
                raise InputError(
                    "encoder and decoder must be networks",
                    expected="an nn.Module, or a callable without arguments that returns one",
                    got=type(network).__name__,
                    fix="pass such",
                )
        if not any(p.requires_grad for network in built for p in network.parameters()):
            raise InputError(
                "there is nothing to train",
                expected="encoder and decoder with parameters that require gradients",
                got="none",
                fix="for a fixed encoder use neuralize.encoding with the centres of KMeans in its features",
            )
        # together, so that parameters they share stay shared
        encoder, decoder = copy.deepcopy((built[0], built[1]))
        return encoder, decoder

    def _check(self, n: int, columns: int) -> None:
        """Parameters, one by one."""

        def whole(name: str, low: int, value: Any) -> None:
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
                raise InputError(
                    f"{name} is out of range", expected=f"an integer >= {low}", got=repr(value), fix="choose one"
                )

        def number(name: str, value: Any, positive: bool) -> None:
            fits = isinstance(value, (int, float, np.number)) and not isinstance(value, bool) and math.isfinite(value)
            if not fits or value < 0 or (positive and value == 0):
                sign = "> 0" if positive else ">= 0"
                raise InputError(
                    f"{name} is out of range", expected=f"a finite number {sign}", got=repr(value), fix="choose one"
                )

        whole("n_clusters", 1, self.n_clusters)
        whole("pretrain_epochs", 0, self.pretrain_epochs)
        whole("epochs", 0, self.epochs)
        whole("n_init", 1, self.n_init)
        if self.n_latent is not None:
            whole("n_latent", 1, self.n_latent)
        if self.batch_size != "auto":
            whole("batch_size", 1, self.batch_size)
        for width in () if self.hidden is None else self.hidden:
            whole("a width in hidden", 1, width)
        number("lambda_", self.lambda_, False)
        number("learning_rate", self.learning_rate, True)
        if self.dtype not in _DTYPES:
            raise InputError("unknown dtype", expected=" or ".join(_DTYPES), got=repr(self.dtype), fix="choose one")
        if self.input_shape is not None:
            for size in self.input_shape:
                whole("a size in input_shape", 1, size)
            if math.prod(self.input_shape) != columns:
                raise InputError(
                    "the columns are not those of flattened samples",
                    expected=f"{math.prod(self.input_shape)} columns for input_shape={tuple(self.input_shape)}",
                    got=f"{columns} columns",
                    fix="pass X.reshape(len(X), -1), or another input_shape",
                )
        if n < self.n_clusters:
            raise InputError(
                f"n_samples={n} is fewer than n_clusters={self.n_clusters}",
                expected="at least one row per cluster",
                got=f"{n} rows",
                fix="ask for fewer clusters",
            )

    # ------------------------------------------------------------------ use

    def __sklearn_is_fitted__(self) -> bool:
        # lambda_ ends in an underscore and is no result
        return hasattr(self, "cluster_centers_")

    @property
    def _n_features_out(self) -> int:
        return int(self.cluster_centers_.shape[1])

    def get_feature_names_out(self, input_features: Any = None) -> npt.NDArray[Any]:
        """Names of the codes: deepkmeans0, deepkmeans1, ..."""
        check_is_fitted(self)
        return np.array([f"deepkmeans{i}" for i in range(self._n_features_out)], dtype=object)

    def _codes(self, X: npt.NDArray[Any]) -> torch.Tensor:
        device = next((p.device for p in self.encoder_.parameters()), torch.device("cpu"))
        return encode(self.encoder_, X, (X.shape[1],), torch.float64, device)

    def _rows(self, X: Any) -> npt.NDArray[Any]:
        check_is_fitted(self)
        return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)  # type: ignore[no-any-return]

    def predict(self, X: Any) -> npt.NDArray[np.int32]:
        """Position (n,) of the nearest centre of every row's code, the lowest on ties."""
        z = self._codes(self._rows(X))
        index, _ = nearest(z, torch.tensor(self.cluster_centers_).to(z))
        return index.cpu().numpy().astype(np.int32)

    def transform(self, X: Any) -> npt.NDArray[np.float64]:
        """Codes (n, L) of the rows, float64."""
        return self._codes(self._rows(X)).cpu().numpy()

    def inverse_transform(self, Z: Any) -> npt.NDArray[np.float64]:
        """Rows (n, D) decoded from codes (n, L): of ``cluster_centers_``, pictures of the clusters."""
        check_is_fitted(self)
        z = np.asarray(Z, dtype=np.float64)
        if z.ndim != 2 or z.shape[1] != self._n_features_out or not np.isfinite(z).all():
            raise InputError(
                "these are no codes",
                expected=f"finite numbers (n, {self._n_features_out})",
                got=str(z.shape),
                fix="pass what transform returns, or cluster_centers_",
            )
        device = next((p.device for p in self.decoder_.parameters()), torch.device("cpu"))
        return encode(self.decoder_, z, (z.shape[1],), torch.float64, device).cpu().numpy()


def _check_networks(
    encoder: nn.Module,
    decoder: nn.Module,
    rows: npt.NDArray[Any],
    shape: tuple[int, ...],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Run both on two rows, in the precision of training and in float64, before any time is spent."""
    x = torch.tensor(rows).reshape(-1, *shape)
    if any(nn.parameter.is_lazy(p) for f in (encoder, decoder) for p in f.parameters()):
        with torch.no_grad():  # lazy layers take their sizes from what they see first
            decoder.eval()(encoder.eval()(x.float()))
    for kind in (dtype, torch.float64):
        f, g = copy.deepcopy((encoder, decoder))
        f, g = f.to(device, kind).eval(), g.to(device, kind).eval()
        with torch.no_grad():
            try:
                z = f(x.to(device, kind))
                y = g(z)
            except (RuntimeError, ValueError, TypeError) as error:
                raise OutputError(
                    f"encoder or decoder can not be run on samples of shape {shape} in {kind}",
                    expected="networks from samples to codes (n, L) and back; the fitted encoder is kept in float64",
                    got=f"{type(error).__name__}: {error}".split("\n")[0],
                    fix="fit them to the columns, or to input_shape; let them follow the type of their input",
                ) from error
        if not isinstance(z, torch.Tensor) or z.ndim != 2 or len(z) != len(x) or not z.shape[1]:
            raise OutputError(
                "the encoder returns no codes",
                expected="a tensor (n, L)",
                got=f"{tuple(z.shape)}" if isinstance(z, torch.Tensor) else type(z).__name__,
                fix="end it with nn.Flatten(), for example",
            )
        if not isinstance(y, torch.Tensor) or len(y) != len(x) or y.numel() != x.numel():
            raise OutputError(
                "the decoder returns no samples",
                expected=f"a tensor {tuple(x.shape)}",
                got=f"{tuple(y.shape)}" if isinstance(y, torch.Tensor) else type(y).__name__,
                fix="let it mirror the encoder",
            )
