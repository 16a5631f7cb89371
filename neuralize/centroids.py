r"""Centroid models: a linear layer of pairs and a min-pool.

The logit of cluster c is

.. math:: f_c(x) = \min_{k \ne c} h_{ck}(x), \qquad
          h_{ck} = |x-\mu_k|^2 - |x-\mu_c|^2 = 2(\mu_c-\mu_k) \cdot x + |\mu_k|^2 - |\mu_c|^2 .

A pair is a linear unit with its zero on the midpoint :math:`m_{ck}` of the two
prototypes, so expanding there loses no bias:
:math:`w_t(x_t-m_t) = (x_t-\mu_{kt})^2 - (x_t-\mu_{ct})^2`. With softmin shares
:math:`p_k` of the competitors, pair k receives
:math:`\rho_k h_k`, where :math:`\rho_k = p_k f/h_k` (*divided*) or
:math:`\rho_k = p_k` (*undivided*), and the features receive

.. math:: R_t = \sum_k \rho_k \left[(x_t-\mu_{kt})^2 - (x_t-\mu_{ct})^2\right] = w_t (x_t - \tau_t),
   \quad w_t = 2\sum_k \rho_k (\mu_{ct}-\mu_{kt}),
   \quad \tau_t = \tfrac{1}{w_t}\sum_k \rho_k (\mu_{ct}^2-\mu_{kt}^2) .

The sum over pairs factorises into two products with the prototypes; the pair
layer, K (K-1) units, is never built. Source: Kauffmann et al., "From Clustering
to Cluster Explanations via Neural Networks", TNNLS 35(2), 2024, for the network
and the divided rule; the factorisation and the undivided rule are derived here.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import ConvergenceError, RuleError, TargetError
from neuralize.frames import Block, Frame
from neuralize.heads import Details, Head, Part, Polytope, Request, Workspace, buffer, distinct, nearest_only, numbers
from neuralize.units import Line, back, cut, down, gathered, origin

__all__ = ["CentroidHead", "CentroidLinear", "MinPool", "Minimum"]


class CentroidLinear(nn.Module):
    r"""Pair layer in factorised form: :math:`h_{ck} = s_k - s_c`, :math:`s_k = |\mu_k|^2 - 2\mu_k \cdot z`.

    Prototypes and input are centred first: pairs are translation invariant,
    floating-point numbers are not. :math:`|z|^2` is common to all distances and
    left out, so that rows far away lose no digits.

    Parameters
    ----------
    prototypes : array (K, D)
    """

    centre: Tensor
    prototypes: Tensor
    offset: Tensor

    def __init__(self, prototypes: npt.NDArray[np.float64]) -> None:
        super().__init__()
        # the median, not the mean: one prototype far away must not push the others away from zero
        middle = np.median(prototypes, axis=0)
        # a centre that float32 holds exactly stays the same centre under .float()
        with np.errstate(over="ignore"):
            single = middle.astype(np.float32).astype(np.float64)
        centre = np.where(np.isfinite(single), single, middle)
        # a column on which all prototypes agree must get exactly zero
        centre = np.where((prototypes == prototypes[0]).all(0), prototypes[0], centre)
        centred = prototypes - centre
        self.register_buffer("centre", torch.tensor(centre))
        self.register_buffer("prototypes", torch.tensor(centred))
        self.register_buffer("offset", torch.tensor((centred**2).sum(1)))

    def forward(self, z: Tensor) -> Tensor:
        """Scores s (N, K) of rows (N, D): squared distances up to a constant per row."""
        return torch.addmm(self.offset, z - self.centre, self.prototypes.T, alpha=-2)

    def extra_repr(self) -> str:
        k, d = self.prototypes.shape
        return f"{d} -> {k} x {k - 1} pairs, h_ck = |z - mu_k|^2 - |z - mu_c|^2, factorised through {k} prototypes"


class MinPool(nn.Module):
    """All logits from scores: the two smallest per row suffice.

    The winner's competitor is the second; everyone else's is the winner.
    """

    def forward(self, s: Tensor) -> Tensor:
        """Logits (N, K) of scores (N, K)."""
        two = s.topk(2, dim=1, largest=False).values
        won = torch.arange(s.shape[1], device=s.device) == s.argmin(1, keepdim=True)
        return torch.where(won, two[:, 1:] - two[:, :1], two[:, :1] - s)

    def extra_repr(self) -> str:
        return "f_c = min over k != c of h_ck"


class Minimum(nn.Module):
    """Smallest of the inputs: (N, K-1) -> (N, 1)."""

    def forward(self, h: Tensor) -> Tensor:
        return h.amin(1, keepdim=True)


class CentroidHead(Head):
    """Nearest prototype wins: k-means and its relatives.

    Parameters
    ----------
    prototypes : array (K, D)
        Finite, K >= 2.
    sizes : array (K,), optional
        Rows per cluster in fit; weights of the default stiffness.

    Raises
    ------
    ConvergenceError
        Fewer than two prototypes, or prototypes that are not finite.

    Notes
    -----
    Explaining n rows costs three (n, D) x (D, K) products.

    Examples
    --------
    >>> head = CentroidHead(np.array([[0.0, 0.0], [2.0, 0.0]]))
    >>> head(torch.tensor([[0.5, 3.0]], dtype=torch.float64)).tolist()
    [[2.0, -2.0]]
    """

    rules = ("auto", "divided", "undivided", "midpoint", "shapley")
    residual_names = ("competition", "reference")
    margin: Tensor
    condition: Tensor
    reference_mean: Tensor

    def __init__(self, prototypes: npt.ArrayLike, sizes: npt.ArrayLike | None = None) -> None:
        super().__init__()
        mu = np.array(prototypes, dtype=np.float64)
        if mu.ndim != 2 or len(mu) < 2:
            raise ConvergenceError(
                f"K = {len(mu)}: the logit f_c = min over k != c is a minimum over nothing",
                expected="at least two clusters",
                got=f"prototypes {mu.shape}",
                fix="fit two clusters or more; a single group has no competitor to be explained against",
            )
        with np.errstate(over="ignore"):
            finite = np.isfinite(mu).all()
            overflow = finite and not np.isfinite((mu**2).sum())
        if overflow:
            raise ConvergenceError(
                "squared norms of the cluster centres overflow",
                expected="centres whose squares are finite",
                got=f"absolute values up to {np.abs(mu).max():.3g}",
                fix="rescale the table, for example with StandardScaler, and fit again",
            )
        if not finite:
            raise ConvergenceError(
                "the cluster centres are not finite",
                expected="finite centres",
                got=f"NaN or infinity in cluster {np.nonzero(~np.isfinite(mu).all(1))[0].tolist()}",
                fix="check the table that was fitted and fit again",
            )
        self.clusters, self.features = mu.shape
        self.pairs = CentroidLinear(mu)
        self.pool = MinPool()
        gaps = _gaps(numbers(self.pairs.prototypes))
        weights = np.ones(len(mu)) if sizes is None else np.asarray(sizes, dtype=np.float64)
        margin = float(np.average(gaps.min(1), weights=weights if weights.sum() > 0 else None))
        norms = (numbers(self.pairs.prototypes) ** 2).sum(1)
        lost = np.maximum(norms[:, None], norms) / np.where(gaps > 0, gaps, np.inf)
        self.register_buffer("margin", torch.tensor(margin, dtype=torch.float64))
        # squared norm over squared gap of the worst pair: how many digits differences of scores lose
        self.register_buffer("condition", torch.tensor(float(lost.max()), dtype=torch.float64))
        self.register_buffer("reference_mean", torch.full((self.features,), math.nan, dtype=torch.float64))

    def forward(self, z: Tensor) -> Tensor:
        """Logits (N, K) of scaled rows (N, D)."""
        return self.pool(self.pairs(z))  # type: ignore[no-any-return]

    def assign(self, z: Tensor) -> tuple[Tensor, Tensor]:
        best, winner = self.pairs(z).min(1)
        return winner, best

    def request(self, rule: str, beta: float | str, contrast: bool, output: str = "logit") -> tuple[str, float]:
        if rule == "shapley" and not contrast:
            raise RuleError(
                "rule 'shapley' needs a contrast",
                expected="contrast=k: only the duel of two clusters is a sum over features",
                got="no contrast",
                fix="pass contrast=, or rule='auto' for one cluster against all others",
            )
        if rule == "shapley" and bool(self.reference_mean.isnan().any()):
            raise RuleError(
                "rule 'shapley' needs reference rows",
                expected="neuralize(fitted, reference=X)",
                got="a network without reference",
                fix="neuralize again, with the rows whose mean is the baseline",
            )
        rule, value = super().request(rule, beta, contrast, output)
        nearest_only(rule, value, contrast)
        return rule, value

    def default_beta(self, rule: str, contrast: bool) -> float:
        if contrast or rule == "midpoint":
            return math.inf
        margin = float(self.margin)
        # coinciding prototypes: every relevance is zero, whatever the stiffness
        return 1.0 / margin if margin > 0 else 1.0

    def explain(self, z: Tensor, request: Request, out: Tensor, work: Workspace, frame: Frame) -> Part:
        n, d, k, centre = len(z), self.features, self.clusters, self.pairs.centre
        exact = self._delicate(z.dtype) or not frame.plain
        if "lines" not in work:
            self._prepare(work, exact or request.rule == "shapley" or self._far(z.dtype))
        x = torch.sub(z, centre, out=buffer(work, "centred", (n, d), z)) if "centre" in work else z
        # competitors first: sums over them then run along contiguous rows
        s = buffer(work, "pairs", (k, n), z)
        torch.addmm(work["offset"], self.pairs.prototypes, x.T, alpha=-2, out=s)
        best = s.amin(0)
        decided = _lowest(s, best)
        target = decided if request.target is None else request.target
        distinct(target, request.contrast)
        if exact:
            return self._explain_exactly(x, target, decided, request, out, frame)
        h = s.sub_(best if request.target is None else s.gather(0, target[None]))
        rho, output, rest, divided = self._shares(h, target, request, fast=True)
        signed = rho.scatter_(0, target[None], -rho.sum(0, keepdim=True)).T
        lines = torch.mm(signed, work["lines"], out=buffer(work, "row lines", (n, 2 * d), z))
        slope, at_origin = lines[:, :d], lines[:, d:]
        if request.rule == "shapley":
            rest = self._baseline(target, request)
            torch.mul(x.sub_(self.reference_mean - centre), slope, out=out)
        else:
            torch.addcmul(at_origin, x, slope, out=out)
        return Part(output, self._parts(rest, request), target, decided, divided)

    def _prepare(self, work: Workspace, centred: bool) -> None:
        """Constants of all batches: of scores, and slope and value at the origin of every prototype's square."""
        mu, centre = self.pairs.prototypes, self.pairs.centre
        if centred:
            work["centre"] = centre
            offset, squares = self.pairs.offset, mu.square()
        else:  # centring moves into the constants, and a pass over the rows is saved
            offset, squares = self.pairs.offset + 2 * (mu @ centre), mu * (mu + 2 * centre)
        # side by side: one product makes both
        work["offset"], work["lines"] = offset[:, None], torch.cat([mu.mul(-2), squares], 1)

    def _far(self, dtype: torch.dtype) -> bool:
        """Whether rows must be centred: the centre, in units of the prototypes' spread, costs as many digits."""
        spread = self.pairs.prototypes.abs().amax(0)
        away = self.pairs.centre.abs() / spread
        return self._delicate(dtype, 1 + float(torch.where(spread > 0, away, 0.0).max()))

    def _delicate(self, dtype: torch.dtype, factor: float = 1.0) -> bool:
        """Whether differences of scores would lose too many digits, ``factor`` times as many as they do centred."""
        eps = torch.finfo(dtype).eps
        return eps * factor * max(float(self.condition), 1.0) > (1e-11 if dtype == torch.float64 else 1e-5)

    def _parts(self, rest: Tensor, request: Request) -> dict[str, Tensor]:
        competition, reference = (torch.zeros_like(rest), rest) if request.rule == "shapley" else (rest, None)
        return {"competition": competition} | ({} if reference is None else {"reference": reference})

    def _shares(
        self, h: Tensor, target: Tensor, request: Request, fast: bool = False
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rho (K, n), output, residual and divided rows (n,) of pairs h (K, n); overwrites h.

        ``fast``: h is free of cancellation, so that h >= f >= 0 for the winners.
        """
        tiny = torch.finfo(h.dtype).tiny
        if request.contrast is not None:
            output = h.gather(0, request.contrast[None])[0]
            rho = torch.zeros_like(h).scatter_(0, request.contrast[None], 1.0)
            return rho, output, torch.zeros_like(output), torch.zeros_like(target, dtype=torch.bool)
        if fast and request.target is None and request.rule in ("auto", "divided") and math.isfinite(request.beta):
            return self._own_shares(h, target, request.beta)
        p, f = self._softmin(h, target, request.beta)
        # where f < 0 the target is not the winner and f / h_k is unbounded
        divided = torch.full_like(target, request.rule in ("auto", "divided"), dtype=torch.bool)
        if request.rule == "midpoint":
            return p, f, torch.zeros_like(f), divided
        if fast and request.target is None and request.rule != "undivided":
            # h_k = f = 0 gives the ratio 1 without a mask
            rho = p.mul_(f + tiny).div_(h.add_(tiny))
            return rho, f, torch.zeros_like(f), divided
        divided &= f >= 0
        if request.divided is not None:
            divided = request.divided
        elif request.rule == "divided" and request.target is not None and not bool(divided.all()):
            raise TargetError(
                "rule 'divided' explains a row's own cluster only",
                expected="targets equal to net.predict(X)",
                got=f"{int((~divided).sum())} rows with another target, where the ratio f / h_k is unbounded",
                fix="use rule='auto' (divides where that is safe) or 'undivided'",
            )
        rest = f - (p * h).sum(0)
        ratio = (f + tiny) / (h + tiny)
        rho = p * torch.where(divided, ratio, 1.0)
        return rho, f, torch.where(divided, 0.0, rest), divided

    @staticmethod
    def _own_shares(h: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Divided shares of the winners: what _shares says, in fewer passes."""
        tiny = torch.finfo(h.dtype).tiny
        h.scatter_(0, target[None], math.inf)
        f = h.amin(0)
        p = torch.sub(f, h).mul_(beta).exp_()
        per_row = (f + tiny) / p.sum(0)
        # h_k = f = 0 gives the ratio 1, the target's h = inf a share of 0, without a mask
        rho = p.div_(h.add_(tiny)).mul_(per_row)
        return rho, f, torch.zeros_like(f), torch.ones_like(target, dtype=torch.bool)

    @staticmethod
    def _softmin(h: Tensor, target: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """Shares p (K, n), 0 for the target, and f (n,); leaves 1 in h at the target."""
        own = target[None]
        h.scatter_(0, own, math.inf)
        f = h.amin(0)
        if math.isinf(beta):
            p = (h == f).to(h.dtype)
            p.div_(p.sum(0))
        else:
            p = torch.softmax((f - h).mul_(beta), 0)
        h.scatter_(0, own, 1.0)
        return p, f

    def _baseline(self, target: Tensor, request: Request) -> Tensor:
        """Mean over the reference of the duel's output: a linear unit at the mean row."""
        assert request.contrast is not None
        s = self.pairs(self.reference_mean[None])[0]
        return s[request.contrast] - s[target]  # type: ignore[no-any-return]

    def _groups(self, x: Tensor, target: Tensor, request: Request) -> Iterator[tuple[Tensor, ...]]:
        """Rows by target, with everything relative to that target's prototype: free of cancellation.

        Yields rows (m,), u = x - mu_c (m, D), mu_c - mu_k (K, D), and _shares
        of these rows before p is scaled, after it (K, m), and the rest.
        """
        mu = self.pairs.prototypes
        for c in torch.unique(target).tolist():
            rows = torch.nonzero(target == c)[:, 0]
            u, gap = x[rows] - mu[c], mu[c] - mu
            h = torch.addmm(gap.square().sum(1)[:, None], gap, u.T, alpha=2)
            sub = request.rows(rows)
            if request.contrast is None:
                p = self._softmin(h.clone(), target[rows], request.beta)[0]
            else:
                p = torch.zeros_like(h).scatter_(0, sub.contrast[None], 1.0)  # type: ignore[index]
            yield rows, u, gap, p, *self._shares(h, target[rows], sub)

    def _explain_exactly(
        self, x: Tensor, target: Tensor, decided: Tensor, request: Request, out: Tensor, frame: Frame
    ) -> Part:
        output, rest = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])
        lost = None
        divided = torch.zeros_like(target, dtype=torch.bool)
        for rows, u, gap, _, rho, f, residual, division in self._groups(x, target, request):
            parts = []
            for block in frame.parts():
                slope, offset = self._pairs_behind(gap, rho, block)
                if request.rule == "shapley":
                    away = u + self.pairs.prototypes[target[rows]] - (self.reference_mean - self.pairs.centre)
                    parts.append(slope * back(cut(away, block), block))
                else:
                    parts.append(offset.addcmul_(back(cut(u, block), block), slope))
            out[rows], part = gathered(frame, parts)
            output[rows], rest[rows], divided[rows] = f, residual, division
            if part is not None:
                lost = torch.empty_like(output) if lost is None else lost
                lost[rows] = part
        if request.rule == "shapley":
            rest = self._baseline(target, request)
        named = self._parts(rest, request) | ({} if lost is None else {frame.lost_name: lost})
        return Part(output, named, target, decided, divided)

    @staticmethod
    def _pairs_behind(gap: Tensor, rho: Tensor, block: Block) -> tuple[Tensor, Tensor]:
        """Slope and offset (m, n) of R = slope L u + offset, u = x - mu_c: pairs expanded at their midpoints.

        :math:`R_i = \\sum_k \\rho_k (T'w_k)_i (L(x - m_k))_i` with
        :math:`w_k = 2(\\mu_c-\\mu_k)`, :math:`x - m_k = u + (\\mu_c-\\mu_k)/2`.
        """
        away, pull = back(cut(gap, block), block), down(cut(gap, block), block)
        return rho.T @ pull.mul(2), rho.T @ (away * pull)

    def details(self, z: Tensor, request: Request, frame: Frame) -> Details:
        assert request.target is not None
        x = z - self.pairs.centre
        n = len(x)
        output, shares, signed = x.new_empty(n), x.new_empty(n, self.clusters), x.new_empty(n, self.clusters)
        blocks = frame.parts()
        widths = [back(cut(x[:1], b), b).shape[1] for b in blocks]
        slopes = [x.new_empty(n, m) for m in widths]
        points = [x.new_full((n, m), math.nan) for m in widths]
        for rows, _, gap, p, rho, f, *_ in self._groups(x, request.target, request):
            output[rows], shares[rows] = f, p.T
            target = request.target[rows]
            signed[rows] = rho.T.scatter(1, target[:, None], -rho.sum(0)[:, None])
            for block, slope, point in zip(blocks, slopes, points, strict=True):
                w, offset = self._pairs_behind(gap, rho, block)
                slope[rows] = w
                mu = origin(self.pairs.prototypes[target] + self.pairs.centre, block)
                root = origin(self.reference_mean, block) if request.rule == "shapley" else mu - offset / w
                point[rows] = torch.where(w == 0, math.nan, root)
        return Details(output, shares, [Line(a, b) for a, b in zip(slopes, points, strict=True)], signed)

    def refer(self, batches: Iterable[Tensor]) -> None:
        total, count = 0.0, 0
        mean = torch.zeros_like(self.pairs.centre, dtype=torch.float64)
        for z in batches:
            two = self.pairs(z).topk(2, dim=1, largest=False).values
            total += float((two[:, 1] - two[:, 0]).double().sum())
            mean += (z - self.pairs.centre).double().sum(0)
            count += len(z)
        if total > 0:
            self.margin.fill_(total / count)
        self.reference_mean.copy_(mean / count + self.pairs.centre)

    def layered(self, cluster: int) -> nn.Sequential:
        """Pair layer (K-1 linear units, k != c ascending) and minimum, from scaled rows (N, D) to f_c (N, 1)."""
        others = [k for k in range(self.clusters) if k != cluster]
        mu, centre = self.pairs.prototypes, self.pairs.centre
        weight = 2 * (mu[cluster] - mu[others])
        linear = nn.Linear(self.features, len(others), dtype=mu.dtype, device=mu.device)
        with torch.no_grad():
            linear.weight.copy_(weight)
            linear.bias.copy_((mu[others] ** 2).sum(1) - (mu[cluster] ** 2).sum() - weight @ centre)
        linear.requires_grad_(False)
        return nn.Sequential(OrderedDict(pairs=linear, pool=Minimum())).eval()

    def own_explanation(self, z: Tensor, beta: Tensor, frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), divided relevance (N, D) of each row's own cluster, and its output (N,): one fixed graph.

        What :meth:`explain` computes in batches and in place, for export.
        """
        x, mu, tiny = z - self.pairs.centre, self.pairs.prototypes, torch.finfo(z.dtype).tiny
        s = self.pairs(z)
        best = s.amin(1, keepdim=True)
        own = (torch.arange(self.clusters, device=z.device) == s.argmin(1, keepdim=True)).to(z.dtype)
        h = s - best
        others = torch.where(own > 0, math.inf, h)
        f = others.amin(1, keepdim=True)
        rho = torch.softmax((f - others) * beta, 1) * (f + tiny) / (h + tiny)
        rho = torch.where(own > 0, 0.0, rho)
        total = rho.sum(1, keepdim=True)
        parts = []
        for block in frame.parts():
            a, A, B = back(cut(x, block), block), back(cut(mu, block), block), down(cut(mu, block), block)
            A_own, B_own, pulled = own @ A, own @ B, rho @ B
            # sum_k rho_k (B_c - B_k)(2 a - A_c - A_k)
            R = (2 * a - A_own) * (total * B_own - pulled) - (rho @ A) * B_own + rho @ (A * B)
            parts.append(R)
        return self.pool(s), gathered(frame, parts)[0], f[:, 0]

    def cells(self, cluster: int) -> list[Polytope]:
        mu, centre = self.pairs.prototypes, self.pairs.centre
        others = torch.arange(self.clusters, device=mu.device) != cluster
        gap = mu[cluster] - mu[others]
        # h_ck = 2 (mu_c - mu_k) . (z - centre) + |mu_k|^2 - |mu_c|^2, without cancellation
        bias = gap.square().sum(1) - 2 * gap @ mu[cluster]
        return [(2 * gap, bias - 2 * gap @ centre)]

    def prototypes(self) -> npt.NDArray[np.int64]:
        return np.arange(self.clusters)

    def midpoints(self, cluster: int) -> Tensor:
        """Midpoints (K-1, D) of the cluster with the others, in scaled units: where its pairs are zero."""
        others = [k for k in range(self.clusters) if k != cluster]
        mu = self.pairs.prototypes
        return (mu[others] + mu[cluster]) / 2 + self.pairs.centre


def _lowest(s: Tensor, best: Tensor) -> Tensor:
    """Lowest position (n,) of the minimum ``best`` of s (K, n); several times faster than ``s.min(0)``."""
    k = len(s)
    # small integers: a pass over them is nearly free
    rank = torch.uint8 if k < 256 else torch.int16 if k < 32768 else torch.int64
    ranks = torch.arange(k, 0, -1, dtype=rank, device=s.device)[:, None]
    found = s == best
    found = found.view(torch.uint8) if rank == torch.uint8 else found.to(rank)
    # rows that are not finite have no minimum
    return (k - found.mul_(ranks).amax(0).long()).clamp_(max=k - 1)


def _gaps(mu: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Squared distances (K, K) between prototypes, without cancellation; infinite on the diagonal."""
    gaps = np.empty((len(mu), len(mu)))
    for c, row in enumerate(mu):
        gaps[c] = ((mu - row) ** 2).sum(1)
    np.fill_diagonal(gaps, np.inf)
    return gaps
