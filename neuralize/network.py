"""The neuralized model: an ``nn.Module`` that decides as the estimator does, and explains itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import InputError, RuleError
from neuralize.explanation import Explanation, warn_coverage
from neuralize.heads import Details, Head, Request, Workspace, buffer, numbers
from neuralize.labels import positions
from neuralize.lines import Lines
from neuralize.scaling import Lift, Scaler, lift
from neuralize.tables import Table, non_finite, table

__all__ = ["NeuralizedModel"]


class NeuralizedModel(nn.Module):
    """A fitted estimator as an equivalent network.

    Made by :func:`neuralize.neuralize`; build it yourself only to register an
    estimator of your own.

    Parameters
    ----------
    head : Head
        From scaled values to logits.
    labels : array (K,), optional
        What ``predict`` returns for each logit; default 0..K-1 (int32).
    scalers : iterable of Scaler
        Elementwise layers in front, first to last.
    feature_names : sequence of str, optional
        Columns seen in fit.
    source : str
        What it was made from; shown.

    Notes
    -----
    Buffers, and hence computation and results, are float64 whatever the type
    of X; ``net.float()`` computes in float32. The network keeps copies: the
    estimator is neither modified nor needed afterwards.

    Examples
    --------
    >>> from neuralize import CentroidHead
    >>> net = NeuralizedModel(CentroidHead([[0.0], [2.0]]))
    >>> net.predict([[0.4], [1.7]]).tolist(), net.explain([[0.4]]).values.tolist()
    ([0, 1], [[2.4]])
    """

    def __init__(
        self,
        head: Head,
        *,
        labels: npt.ArrayLike | None = None,
        scalers: Iterable[Scaler] = (),
        feature_names: Iterable[str] | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        self.scaler = nn.Sequential(*scalers)
        self.head = head
        self.labels = np.arange(head.clusters, dtype=np.int32) if labels is None else np.array(labels)
        self.feature_names = None if feature_names is None else tuple(str(n) for n in feature_names)
        self.source = source
        self.eval()

    @property
    def n_features(self) -> int:
        """D: columns of X."""
        return self.head.features

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return next(b.dtype for b in self.head.buffers() if b.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.head.buffers()).device

    def __repr__(self) -> str:
        text = super().__repr__()
        steps = f"{self.n_features} columns -> {self.head.clusters} logits"
        return f"{self.source or 'network'}: {steps}\n{text}"

    def behind(self, scalers: Iterable[Scaler], source: str) -> NeuralizedModel:
        """The same head behind further scalers in front; used for pipelines."""
        return NeuralizedModel(
            self.head,
            labels=self.labels,
            scalers=[*scalers, *(s for s in self.scaler if isinstance(s, Scaler))],
            feature_names=self.feature_names,
            source=source,
        )

    # ------------------------------------------------------------------ forward

    def forward(self, X: Any) -> Tensor:
        """Logits.

        Parameters
        ----------
        X : Tensor (N, D), array or DataFrame
            In raw units. A tensor is only cast: NaN goes through.

        Returns
        -------
        Tensor (N, K)
            In the unit of the head; the largest belongs to the decided
            cluster. Hard models: at most one is positive.
        """
        if not isinstance(X, Tensor):
            tab = self._table(X)
            X = torch.from_numpy(np.array(tab.array, dtype=np.float64)).to(self.device)
        return self.head(self.scaler(X.to(self.dtype)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, X: Any, batch_size: int | str = "auto") -> npt.NDArray[Any]:
        """Labels (N,), equal to those of the estimator.

        Equality holds in float64, rows on a border to within rounding excepted;
        exact ties go to the lowest index, as in scikit-learn.

        Raises
        ------
        InputError, ColumnError, NonFiniteError
            If X does not fit; see :mod:`lrp.errors`.
        """
        tab = self._table(X)
        winner = np.empty(len(tab), dtype=np.int64)
        work: Workspace = {}
        for rows in self._batches(len(tab), batch_size):
            position, finite = self.head.assign(self._scaled(tab, rows, work))
            self._verify(finite, tab, rows)
            winner[rows] = numbers(position)
        return np.asarray(self.labels[winner])

    def layered(self, cluster: Any = 0) -> nn.Sequential:
        """The plain layers of one logit: pairs, then pool, from scaled rows (N, D) to (N, 1).

        For study and tests: it builds what the fast path factorises.
        """
        return self.head.layered(int(positions(cluster, self.labels, 1, "target")[0]))

    # ------------------------------------------------------------------ explanation

    def explain(
        self,
        X: Any,
        target: Any = None,
        contrast: Any = None,
        beta: float | str = "auto",
        rule: str = "auto",
        output: str = "logit",
        batch_size: int | str = "auto",
        device: Any = None,
        out: npt.NDArray[Any] | None = None,
    ) -> Explanation:
        r"""Why a row is in its cluster, exactly, column by column.

        Parameters
        ----------
        X : array-like or DataFrame (N, D)
            Raw rows, any numeric dtype.
        target : None, label or array (N,) of labels
            Cluster to explain; None takes each row's own.
        contrast : None, label or array (N,) of labels
            Explain the duel "why target rather than contrast": the output is
            :math:`h_{ck}` itself, the residual 0.
        beta : "auto", float > 0 or inf
            Stiffness of the softmin that shares the output among competitors.
            "auto" is 1 / mean output of each row's own cluster over the
            reference rows, or over the fitted centres weighted by cluster
            size; never over X. inf: the nearest competitor, ties averaged.
            It does not enter a contrast.
        rule : str
            "divided": residual 0, each row's own cluster only. "undivided":
            any target; residual f - sum p h. "auto": divided where the target
            is the row's own cluster, row by row, undivided elsewhere.
            "midpoint": the expansion at the midpoint with a single competitor,
            the contrast if given and else the nearest one; residual 0.
            "shapley": with a contrast and a reference, the exact interventional
            Shapley values of the duel; residual = its mean over the reference.
        output : "logit" or "decision"
            The same for centroid models: the logit decides.
        batch_size : int or "auto"
            Rows per batch; the result does not depend on it.
        device : optional
            Compute there, on a copy of the network.
        out : ndarray or memmap (N, D), optional
            Receives the values; of the network's precision. It holds part of
            them if an error ends the work.

        Returns
        -------
        Explanation
            ``values.sum(1) + residual == output``.

        Raises
        ------
        InputError, ColumnError, NonFiniteError, TargetError, RuleError
            See :mod:`lrp.errors`.

        Warns
        -----
        CoverageWarning
            If, for the median row, the features carry less than half of the
            output, or more than twice it.

        Notes
        -----
        Values are in the unit of the model: its squared, scaled distance.
        Cost O(N K D), memory one batch beyond the result. X is referred to, not
        copied.

        Examples
        --------
        >>> from neuralize import CentroidHead
        >>> net = NeuralizedModel(CentroidHead([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]]))
        >>> net.explain([[0.5, 3.0]], target=0, contrast=2).values.tolist()
        [[0.0, 27.0]]
        """
        tab = self._table(X)
        request = self._request(len(tab), target, contrast, beta, rule, output)
        # no decorator: the warning must point to the caller's line
        with torch.no_grad():
            explanation = self._on(device)._explain(tab, request, batch_size, out)
        warn_coverage(explanation)
        return explanation

    def explain_batches(
        self,
        X: Any,
        target: Any = None,
        contrast: Any = None,
        beta: float | str = "auto",
        rule: str = "auto",
        output: str = "logit",
        batch_size: int | str = "auto",
        device: Any = None,
    ) -> Iterator[Explanation]:
        """As :meth:`explain`, one Explanation per batch: memory does not grow with the rows.

        Yields
        ------
        Explanation
            Of consecutive rows.
        """
        tab = self._table(X)
        request = self._request(len(tab), target, contrast, beta, rule, output)
        net = self._on(device)
        for rows in self._batches(len(tab), batch_size):
            part = Table(tab.array[rows], tab.names, None if tab.index is None else tab.index[rows])
            with torch.no_grad():
                explanation = net._explain(part, request.rows(rows), batch_size, None, first_row=rows.start)
            warn_coverage(explanation)
            yield explanation

    def _explain(
        self, tab: Table, request: Request, batch_size: int | str, out: npt.NDArray[Any] | None, first_row: int = 0
    ) -> Explanation:
        n, dtype = len(tab), _NUMPY[self.dtype]
        values = np.empty((n, self.n_features), dtype) if out is None else self._receiver(out, n, dtype)
        request = request.to(self.device)
        result = np.empty(n, dtype)
        parts: dict[str, npt.NDArray[Any]] = {}
        target, decided, divided = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, bool)
        work: Workspace = {}
        direct = self.device.type == "cpu"
        for rows in self._batches(n, batch_size):
            z = self._scaled(tab, rows, work)
            shape = (rows.stop - rows.start, self.n_features)
            into = torch.from_numpy(values[rows]) if direct else buffer(work, "values", shape, z)
            part = self.head.explain(z, request.rows(rows), into, work)
            self._verify(part.output, tab, rows, first_row)
            if not direct:
                values[rows] = numbers(into)
            result[rows] = numbers(part.output)
            target[rows], decided[rows], divided[rows] = map(numbers, (part.target, part.decided, part.divided))
            for name, rest in part.parts.items():
                parts.setdefault(name, np.empty(n, dtype))[rows] = numbers(rest)
        residual = sum(parts.values(), start=np.zeros(n, dtype))
        contrast = None if request.contrast is None else self.labels[numbers(request.contrast)]
        known = Request(
            request.rule,
            request.beta,
            torch.from_numpy(target),
            None if request.contrast is None else request.contrast.cpu(),
            torch.from_numpy(divided),
        )
        return Explanation(
            values=values,
            output=result,
            residual=residual,
            residual_parts=parts,
            target=np.asarray(self.labels[target]),
            contrast=contrast,
            decided=np.asarray(self.labels[decided]),
            divided=divided,
            feature_names=tab.names,
            labels=self.labels,
            data=tab.array,
            beta=None if contrast is not None else request.beta,
            rule=request.rule,
            model=self.source,
            unit=self.unit,
            index=tab.index,
            lines=Lines(self, tab, known),
        )

    @property
    def unit(self) -> str:
        """What one unit of the values is."""
        names = [s.source for s in self.scaler if isinstance(s, Scaler)]
        return self.head.unit + (f" after {', '.join(names)}" if names else " of the raw columns")

    def set_reference(self, X: Any) -> NeuralizedModel:
        """Take the stiffness, and the baseline of Shapley values, from these rows; returns self."""
        tab = self._table(X)

        def batches() -> Iterator[Tensor]:
            for rows in self._batches(len(tab), "auto"):
                z = self._scaled(tab, rows, {})
                self._verify(self.head.assign(z)[1], tab, rows)
                yield z

        with torch.no_grad():
            self.head.refer(batches())
        return self

    def details(self, tab: Table, rows: slice, request: Request) -> Details:
        """Competitors and lines of some rows, in raw units."""
        way: Lift = lift(self.scaler, self.n_features)
        with torch.no_grad():
            found = self.head.details(self._scaled(tab, rows, {}), request)
        # w_t z_t = (w_t a_t) x_t + constant: slopes per raw unit
        return Details(found.output, found.competitors, found.slope * way.slope, way.raw(found.break_even))

    # ------------------------------------------------------------------ private

    def _table(self, X: Any) -> Table:
        if self.dtype not in _NUMPY:
            raise InputError(
                "the network's precision is too low to explain",
                expected="float64 or float32",
                got=str(self.dtype),
                fix="call net.float() or, better, convert the estimator again",
            )
        return table(X, self.n_features, self.feature_names)

    def _batches(self, n: int, size: int | str) -> Iterator[slice]:
        if size == "auto":
            # large enough to hide the calls, small enough for the cache: measured at 100 columns
            size = max(256, min(16384, 2**21 // max(self.n_features, self.head.clusters)))
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise InputError(
                "batch_size is no number of rows", expected="'auto' or an integer > 0", got=repr(size), fix="choose one"
            )
        for start in range(0, n, int(size)):
            yield slice(start, min(start + int(size), n))

    def _scaled(self, tab: Table, rows: slice, work: Workspace) -> Tensor:
        """Scaled rows on the device; without a copy where there is nothing to do."""
        chunk = tab.array[rows]
        plain = self.device.type == "cpu" and _NUMPY[self.dtype] == chunk.dtype
        if plain and not len(self.scaler) and chunk.flags.writeable and min(chunk.strides) >= 0:
            return torch.from_numpy(chunk)
        if any(isinstance(s, Scaler) and s.clip is not None for s in self.scaler) and not np.isfinite(chunk).all():
            raise non_finite(chunk, tab.names, rows.start)
        wide = np.float32 if self.dtype == torch.float32 else np.float64
        host = buffer(
            work, "host", chunk.shape, torch.empty(0, dtype=torch.float32 if wide is np.float32 else torch.float64)
        )
        with np.errstate(over="ignore"):
            np.copyto(host.numpy(), chunk, casting="unsafe")
        z = host.to(device=self.device, dtype=self.dtype)
        for scaler in self.scaler:
            assert isinstance(scaler, Scaler)
            z = scaler.apply_(z)
        return z

    def _verify(self, finite: Tensor, tab: Table, rows: slice, first_row: int = 0) -> None:
        if not bool(finite.isfinite().all()):
            raise non_finite(tab.array[rows], tab.names, first_row + rows.start)

    def _receiver(self, out: Any, n: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        if not isinstance(out, np.ndarray) or out.shape != (n, self.n_features) or out.dtype != dtype:
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise InputError(
                "out can not receive the values",
                expected=f"a numpy array or memmap {dtype} ({n}, {self.n_features})",
                got=got,
                fix="allocate it with this shape and dtype; net.float() computes in float32",
            )
        if not out.flags.writeable or min(out.strides, default=0) < 0:
            raise InputError(
                "out is read-only or reversed", expected="a writable array", got="one that is not", fix="pass mode='r+'"
            )
        return out

    def _on(self, device: Any) -> NeuralizedModel:
        if device is None:
            return self
        try:
            if torch.device(device) == self.device:
                return self
            if torch.device(device).type == "meta":
                raise RuntimeError("the meta device holds no numbers")
            return copy.deepcopy(self).to(torch.device(device))
        except (RuntimeError, AssertionError, TypeError) as error:
            raise InputError(
                f"device {device!r} can not be used",
                expected="'cpu' or a device torch sees",
                got=str(error).split("\n")[0],
                fix="drop device=",
            ) from error

    def _request(self, n: int, target: Any, contrast: Any, beta: float | str, rule: str, output: str) -> Request:
        if output not in ("logit", "decision"):
            raise RuleError("unknown output", expected="'logit' or 'decision'", got=repr(output), fix="choose one")
        rule, stiffness = self.head.request(rule, beta, contrast is not None)
        t = None if target is None else torch.from_numpy(positions(target, self.labels, n, "target"))
        k = None if contrast is None else torch.from_numpy(positions(contrast, self.labels, n, "contrast"))
        return Request(rule, stiffness, t, k)


_NUMPY: dict[torch.dtype, np.dtype[Any]] = {torch.float64: np.dtype(np.float64), torch.float32: np.dtype(np.float32)}
