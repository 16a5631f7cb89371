"""The neuralized model: an ``nn.Module`` that decides as the estimator does, and explains itself."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import InputError, RuleError, TargetError
from neuralize.bases import Basis, rebased
from neuralize.explanation import Explanation, warn_coverage
from neuralize.fronts import Front
from neuralize.heads import Head, Request, Workspace, numbers
from neuralize.labels import positions
from neuralize.lines import Lined, Lines, lined
from neuralize.rows import NUMPY, Receiver, batches, dense, loaded, verify
from neuralize.schema import Schema
from neuralize.stages import Stage
from neuralize.tables import Table, table

if TYPE_CHECKING:
    import pandas as pd

    from neuralize._decision import Reference
    from neuralize.counterfactuals import Counterfactuals
    from neuralize.surrogates import Surrogate

__all__ = ["NeuralizedModel"]

_SPARSE_TOP = 32


class NeuralizedModel(nn.Module):
    """A fitted estimator as an equivalent network.

    Made by :func:`neuralize.neuralize`; build it yourself only to register an
    estimator of your own.

    Parameters
    ----------
    head : Head
        From coordinates z (N, d) to logits (N, K).
    labels : array (K,), optional
        What ``predict`` returns for each logit; default 0..K-1 (int32).
    front : Front or iterable of Stage, optional
        The layers from the columns (N, D) to z; nothing by default.
    schema : Schema, optional
        Names, kinds and categories of the raw columns; numbers by default.
    feature_names : sequence of str, optional
        Columns seen in fit; instead of a schema.
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
        front: Front | Iterable[Stage] = (),
        schema: Schema | None = None,
        feature_names: Iterable[str] | None = None,
        source: str = "",
    ) -> None:
        super().__init__()
        if not isinstance(front, Front):
            stages = list(front)
            front = Front(stages, stages[0].inputs if stages and stages[0].inputs else head.features)
        self.front = front
        self.head = head
        self.labels = np.arange(head.clusters, dtype=np.int32) if labels is None else np.array(labels)
        names = None if feature_names is None else tuple(str(n) for n in feature_names)
        self.schema = Schema.plain(front.inputs, names) if schema is None else schema
        self.source = source
        # which raw column each column of an explanation is, -1 where it is several; None: just these
        self.view: npt.NDArray[np.int64] | None = None
        self._view_names: tuple[str, ...] = ()
        # of a partition that came without a function; see neuralize.from_labels
        self.surrogate: Surrogate | None = None
        # what the columns of the reference rows range over, for counterfactuals
        self.reference: Reference | None = None
        self._copied: tuple[Any, NeuralizedModel] | None = None
        self.eval()

    @property
    def n_features(self) -> int:
        """D: columns of X."""
        return self.front.inputs

    @property
    def feature_names(self) -> tuple[str, ...] | None:
        """Columns seen in fit, if they had names."""
        return self.schema.names

    @feature_names.setter
    def feature_names(self, names: Iterable[str] | None) -> None:
        self.schema = replace(self.schema, names=None if names is None else tuple(str(n) for n in names))

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the computation."""
        return self.head.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.head.buffers()).device

    @property
    def kind(self) -> str:
        """What the logits stand for: "cluster", "class", "outlier", "density" or "value"."""
        return self.head.kind

    @property
    def unit(self) -> str:
        """What one unit of the values is."""
        return self._unit("logit")

    def _unit(self, output: str) -> str:
        names, unit = [s.source for s in self.front.parts()], self.head.unit_of(output)
        if "distance" not in unit:
            return unit
        return unit + (f" after {', '.join(names)}" if names else " of the raw columns")

    def __repr__(self) -> str:
        steps = f"{self.n_features} columns -> {self.head.clusters} logit{'s' * (self.head.clusters != 1)}"
        stands = "" if self.surrogate is None else f"{self.surrogate}\n"
        return f"{self.source or 'network'}: {steps}\n{stands}{super().__repr__()}"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_copied": None}

    def behind(self, front: Front | Iterable[Stage], schema: Schema | None, source: str) -> NeuralizedModel:
        """The same head behind layers in front of this network's own; used for pipelines."""
        stages = front.parts() if isinstance(front, Front) else list(front)
        whole = Front([*stages, *self.front.parts()], stages[0].inputs or self.n_features) if stages else self.front
        return NeuralizedModel(self.head, labels=self.labels, front=whole, schema=schema or self.schema, source=source)

    # ------------------------------------------------------------------ forward

    def encode(self, X: Any) -> npt.NDArray[np.float64]:
        """The numbers (N, D) that ``forward`` and exported files take: categories as codes, missing values as NaN.

        Raises
        ------
        InputError, ColumnError
            If X does not fit; see :mod:`lrp.errors`.
        """
        return self.schema.encode(X)

    def forward(self, X: Any) -> Tensor:
        """Logits.

        Parameters
        ----------
        X : Tensor (N, D), array or DataFrame
            In raw units; a tensor as :meth:`encode` returns it. A tensor is
            only cast: NaN goes through.

        Returns
        -------
        Tensor (N, K)
            In the unit of the head; the largest belongs to the decided
            cluster. Hard models: at most one is positive. Soft models: the
            log-odds of each.
        """
        if not isinstance(X, Tensor):
            X = torch.from_numpy(self.encode(X)).to(self.device)
        if X.ndim > 2:
            X = X.flatten(1)
        return self.head(self.front(X.to(self.dtype)))  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, X: Any, batch_size: int | str = "auto") -> npt.NDArray[Any]:
        """What the estimator says of every row, (N,).

        Labels, equal to those of the estimator in float64, rows on a border to
        within rounding excepted; exact ties go to the lowest index, as in
        scikit-learn. For regressions the predicted value, for densities
        ``score_samples``. X may have no rows.

        Raises
        ------
        InputError, ColumnError, NonFiniteError
            If X does not fit; see :mod:`lrp.errors`.
        """
        tab = self._table(X, empty=True)
        single = self.kind in ("value", "density")
        winner = np.empty(len(tab), dtype=NUMPY[self.dtype] if single else np.int64)
        for rows, z in self._coordinates(tab, batch_size):
            if single:
                value = self.head(z)[:, 0] + self.head.level
                verify(value, tab, rows, self._nullable)
                winner[rows] = numbers(value)
            else:
                position, finite = self.head.assign(z)
                verify(finite, tab, rows, self._nullable)
                winner[rows] = numbers(position)
        return winner if single else np.asarray(self.labels[winner])

    def layered(self, cluster: Any = 0) -> nn.Sequential:
        """The plain layers of one logit: pairs, then pool, from coordinates (N, d) to (N, 1).

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
        top: int | str | None = "auto",
        basis: Any = None,
    ) -> Explanation:
        r"""Why a row is in its cluster, exactly, column by column.

        Parameters
        ----------
        X : array-like, DataFrame or CSR (N, D)
            Raw rows, as the estimator takes them.
        target : None, label or array (N,) of labels
            Cluster to explain; None takes each row's own.
        contrast : None, label or array (N,) of labels
            Explain the duel "why target rather than contrast".
        beta : "auto", float > 0 or inf
            Stiffness of the softmin that shares the output among competitors.
            "auto" is 1 / mean output of each row's own cluster over the
            reference rows, or over the fitted centres weighted by cluster
            size; never over X. Linear classifiers have no centres: without
            reference rows it is inf, the nearest competitor, ties averaged. For
            log-odds 1, and for kernel pools gamma, are the model's own. It does
            not enter a contrast of centroids.
        rule : str
            "divided": no competition left over, each row's own cluster only.
            "undivided": any target. "auto": divided where that is safe, for hard
            minima over pairs and a row's own cluster, row by row; undivided
            elsewhere. "midpoint": the nearest competitor. "gi", "hybrid": gradient times input, and its mix
            with "midpoint", for support vector machines and k nearest
            neighbours; they depend on the origin. "shapley": with a contrast of
            centroids and a reference, the exact interventional Shapley values of
            the duel. Each model says which rules it has: ``net.head.rules``.
        output : "logit" or "decision"
            "decision": the estimator's own decision value instead, where that
            is another number: ``decision_function``.
        batch_size : int or "auto"
            Rows per batch; the result does not depend on it.
        device : optional
            Compute there, on a copy of the network.
        out : ndarray or memmap (N, D), optional
            Receives the values; of the network's precision. It holds part of
            them if an error ends the work.
        top : int, None or "auto"
            Keep the largest values of each row only, as a CSR array; what they
            leave is the residual's "columns beyond the top". "auto": 32 for
            CSR, everything else whole.
        basis : optional
            Explain in other coordinates: groups of columns ``{name: [column,
            ...]}``, or a :class:`neuralize.bases.Basis`, such as
            ``neuralize.bases.dct((8, 8))``.

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
        Values are in ``net.unit``. Memory: one batch beyond the result. X is
        referred to, not copied. No rows give an empty explanation.

        Examples
        --------
        >>> from neuralize import CentroidHead
        >>> net = NeuralizedModel(CentroidHead([[0.0, 0.0], [2.0, 0.0], [0.0, 9.0]]))
        >>> net.explain([[0.5, 3.0]], target=0, contrast=2).values.tolist()
        [[0.0, 27.0]]
        """
        net, tab = self._asked(X, basis)
        request = net._request(len(tab), target, contrast, beta, rule, output)
        # no decorator: the warning must point to the caller's line
        with torch.no_grad():
            explanation = net._on(device)._explain(tab, request, batch_size, out, top)
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
        top: int | str | None = "auto",
        basis: Any = None,
    ) -> Iterator[Explanation]:
        """As :meth:`explain`, one Explanation per batch: memory does not grow with the rows.

        Yields
        ------
        Explanation
            Of consecutive rows.
        """
        asked, tab = self._asked(X, basis)
        request = asked._request(len(tab), target, contrast, beta, rule, output)
        net = asked._on(device)
        for rows in batches(len(tab), batch_size, net.width):
            part = Table(tab.array[rows], tab.names, None if tab.index is None else tab.index[rows])
            with torch.no_grad():
                explanation = net._explain(part, request.rows(rows), batch_size, None, top, first_row=rows.start)
            warn_coverage(explanation)
            yield explanation

    def explain_batch(self, X: Any, **options: Any) -> pd.DataFrame:
        """One partition of a large table, as a frame: values beside target, output, residual and coverage.

        The bound method can be pickled, so it maps over the partitions of dask,
        Spark or Ray; a row gets the same values in any partition, and a
        partition may be empty.

        Parameters
        ----------
        X : DataFrame or array (N, D)
        **options
            Of :meth:`explain`, except ``out``, ``top`` and ``device``.

        Examples
        --------
        >>> from neuralize import CentroidHead
        >>> net = NeuralizedModel(CentroidHead([[0.0], [2.0]]), feature_names=["age"])
        >>> net.explain_batch([[0.5]])[["target", "output", "age"]].values.tolist()
        [[0.0, 2.0, 2.0]]
        """
        return self.explain(X, **options).to_frame(books=True)

    def _explain(
        self,
        tab: Table,
        request: Request,
        batch_size: int | str,
        out: npt.NDArray[Any] | None,
        top: int | str | None,
        first_row: int = 0,
    ) -> Explanation:
        n, dtype = len(tab), NUMPY[self.dtype]
        frame = self.front.frame
        receiver = Receiver(out, (n, frame.columns), dtype, self._top(top, tab))
        request = request.to(self.device)
        result = np.empty(n, dtype)
        parts: dict[str, npt.NDArray[Any]] = {}
        notes: dict[str, npt.NDArray[np.bool_]] = {}
        target, decided, divided = np.empty(n, np.int64), np.empty(n, np.int64), np.empty(n, bool)
        work: Workspace = {}
        for rows, z in self._coordinates(tab, batch_size, work):
            into = receiver.tensor(rows, z, work)
            part = self.head.explain(z, request.rows(rows), into, work, frame)
            verify(part.output, tab, rows, self._nullable, first_row)
            dropped = receiver.take(rows, into)
            result[rows] = numbers(part.output)
            target[rows], decided[rows], divided[rows] = map(numbers, (part.target, part.decided, part.divided))
            rests = part.parts if dropped is None else part.parts | {"columns beyond the top": dropped}
            for name, rest in rests.items():
                parts.setdefault(name, np.empty(n, dtype))[rows] = numbers(rest)
            for name, flags in part.notes.items():
                notes.setdefault(name, np.zeros(n, bool))[rows] = numbers(flags)
        residual = sum(parts.values(), start=np.zeros(n, dtype))
        contrast = None if request.contrast is None else self.labels[numbers(request.contrast)]
        known = replace(
            request.to(torch.device("cpu")), target=torch.from_numpy(target), divided=torch.from_numpy(divided)
        )
        return Explanation(
            values=receiver.result(),
            output=result,
            residual=residual,
            residual_parts=parts,
            target=np.asarray(self.labels[target]),
            contrast=contrast,
            decided=np.asarray(self.labels[decided]),
            divided=divided,
            feature_names=tab.names if self.view is None else self._view_names,
            labels=self.labels,
            data=self._viewed(tab.array),
            beta=request.beta if self.head.beta_counts(request) else None,
            rule=request.rule,
            model=self.source,
            unit=self._unit(request.output),
            index=tab.index,
            kind=self.kind,
            categories=self.schema.categories,
            notes=notes,
            output_name=request.output,
            level=self.head.level,
            grouped=()
            if self.view is None
            else tuple(n for n, t in zip(self._view_names, self.view.tolist(), strict=True) if t < 0),
            lines=Lines(self._snapshot(), tab, known),
        )

    def set_reference(self, X: Any) -> NeuralizedModel:
        """Take the stiffness, reference values and baselines from these rows; returns self."""
        tab = self._table(X)

        def checked() -> Iterator[Tensor]:
            for rows, z in self._coordinates(tab, "auto"):
                verify(self.head.assign(z)[1], tab, rows, self._nullable)
                yield z

        with torch.no_grad():
            self.head.refer(checked())
        if not hasattr(tab.array, "toarray"):
            from neuralize._affine import reference_of

            self.reference = reference_of(self, tab)
        return self

    def set_level(self, level: float) -> NeuralizedModel:
        """Explain a regression as a difference from this value; returns self.

        Raises
        ------
        RuleError
            The network is no regression.
        """
        self.head.set_level(float(level))
        return self

    def details(self, tab: Table, rows: slice, request: Request) -> Lined:
        """Competitors, lines and prototypes of some rows, in raw units."""
        frame = self.front.frame
        with torch.no_grad():
            z = loaded(tab, rows, self.front, self._nullable, self._like, {})
            found = self.head.details(z, request, frame)
            values = torch.empty(len(z), frame.columns, dtype=z.dtype, device=z.device)
            self.head.explain(z, request, values, {}, frame)
            return lined(found, frame, dense(self._viewed(tab.array[rows])), values, z)

    def on(self, basis: Any) -> NeuralizedModel:
        """The same network on other coordinates; see ``basis`` of :meth:`explain`.

        Its X are the coordinates: of a :class:`neuralize.bases.Basis`,
        ``basis.coordinates(X)``; of groups, X itself.
        """
        front, schema, names, view = rebased(self.front, self.schema, basis)
        net = NeuralizedModel(self.head, labels=self.labels, front=front, schema=schema, source=self.source)
        net.view, net._view_names = view, names
        return net.to(self.device, self.dtype)

    def _viewed(self, array: Any) -> Any:
        """Rows (N, D) as an explanation shows them (N, G): NaN for a group of columns."""
        if self.view is None:
            return array
        rows = np.asarray(dense(array), dtype=np.float64)
        return np.where(self.view >= 0, rows[:, self.view], np.nan)

    # ------------------------------------------------------------------ what else can be asked

    def counterfactual(self, X: Any, to: Any = None, **options: Any) -> Counterfactuals:
        """The nearest rows with another label; see :func:`neuralize.counterfactuals.counterfactuals`.

        Parameters
        ----------
        X : array-like or DataFrame (N, D)
        to : None, label or array (N,) of labels
            The label to reach; None: any other.
        **options
            ``metric`` and ``bounds`` ("scaled" and "data" go by the reference
            rows: ``reference=``, or those the network was given), ``fixed``,
            ``change``, ``integers``, ...

        Raises
        ------
        UnsupportedEstimatorError
            The network's borders are curved.
        """
        from neuralize.counterfactuals import of_network

        return of_network(self, X, to, **options)

    # ------------------------------------------------------------------ private

    def _asked(self, X: Any, basis: Any) -> tuple[NeuralizedModel, Table]:
        if basis is None:
            return self, self._table(X, empty=True)
        net = self.on(basis)
        tab = self._table(X, empty=True)
        if isinstance(basis, Basis):
            return net, Table(basis.coordinates(dense(tab.array)), net.schema.feature_names, tab.index)
        return net, tab

    def _table(self, X: Any, empty: bool = False) -> Table:
        if self.dtype not in NUMPY:
            raise InputError(
                "the network's precision is too low to explain",
                expected="float64 or float32",
                got=str(self.dtype),
                fix="call net.float() or, better, convert the estimator again",
            )
        shape = np.shape(X) if hasattr(X, "shape") and not hasattr(X, "toarray") else ()
        if len(shape) > 2 and shape[1:] == self.head.shape:
            X = X.reshape(len(X), -1)
        if isinstance(X, Tensor):
            # encoded already, as for forward
            return table(X, self.n_features, self.schema.names, empty)
        return self.schema.read(X, empty)

    @property
    def _nullable(self) -> npt.NDArray[np.bool_]:
        return np.array(self.schema.nullable, dtype=bool)

    @property
    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def width(self) -> int:
        """Numbers per row that its widest layer holds; the size of batches goes by it."""
        return max(self.n_features, self.front.outputs, self.head.width)

    def _coordinates(
        self, tab: Table, batch_size: int | str, work: Workspace | None = None
    ) -> Iterator[tuple[slice, Tensor]]:
        work = {} if work is None else work
        nullable, like = self._nullable, self._like
        for rows in batches(len(tab), batch_size, self.width):
            z = loaded(tab, rows, self.front, nullable, like, work)
            if self.head.non_negative and bool((z < 0).any()):
                first = rows.start + int(torch.nonzero((z < 0).any(1))[0, 0])
                raise InputError(
                    "the chi2 kernel is defined for values >= 0 only",
                    expected="no negative value in the columns the model sees",
                    got=f"one in row {first}",
                    fix="rescale with MinMaxScaler(clip=True) in the pipeline, or use another kernel",
                )
            yield rows, z

    def _top(self, top: int | str | None, tab: Table) -> int | None:
        if top == "auto":
            return _SPARSE_TOP if hasattr(tab.array, "toarray") else None
        if top is None:
            return None
        if isinstance(top, bool) or not isinstance(top, (int, np.integer)) or top < 1:
            raise InputError("top is no number of columns", expected="an integer > 0", got=repr(top), fix="choose one")
        return int(top)

    def _snapshot(self) -> NeuralizedModel:
        """A copy on the host that later changes don't reach; made once per state."""
        state = tuple((b.data_ptr(), b._version, b.dtype, b.device) for b in self.buffers())
        if self._copied is None or self._copied[0] != state:
            self._copied = None
            self._copied = state, copy.deepcopy(self).cpu()
        return self._copied[1]

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
        if contrast is not None and self.head.clusters == 1:
            raise TargetError(
                "a single output has no contrast",
                expected="contrast=None",
                got=repr(contrast),
                fix="for a regression choose the value to compare with: net.set_level(value)",
            )
        rule, stiffness = self.head.request(rule, beta, contrast is not None, output)
        t = None if target is None else torch.from_numpy(positions(target, self.labels, n, "target"))
        k = None if contrast is None else torch.from_numpy(positions(contrast, self.labels, n, "contrast"))
        return Request(rule, stiffness, t, k, output=output)
