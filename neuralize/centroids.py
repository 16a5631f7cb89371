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
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lrp.errors import ConvergenceError, RuleError, TargetError
from neuralize.heads import Details, Head, Part, Request, Workspace, buffer, numbers

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

    rules: ClassVar[tuple[str, ...]] = ("auto", "divided", "undivided", "midpoint", "shapley")
    residual_names: ClassVar[tuple[str, ...]] = ("competition", "reference")
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

    def request(self, rule: str, beta: float | str, contrast: bool) -> tuple[str, float]:
        if rule in ("gi", "hybrid"):
            raise RuleError(
                f"rule {rule!r} belongs to support vector machines",
                expected=f"one of {', '.join(self.rules)} for a centroid model",
                got=rule,
                fix="use rule='auto'; the pairs of a centroid model have exact root points, their midpoints",
            )
        if rule not in self.rules:
            raise RuleError(
                "unknown rule", expected=f"one of {', '.join(self.rules)}", got=repr(rule), fix="choose one"
            )
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
        if isinstance(beta, str):
            if beta != "auto":
                raise RuleError("unknown beta", expected="'auto' or a number > 0", got=repr(beta), fix="choose one")
            if contrast or rule == "midpoint":
                return rule, math.inf
            margin = float(self.margin)
            # coinciding prototypes: every relevance is zero, whatever the stiffness
            return rule, 1.0 / margin if margin > 0 else 1.0
        try:
            stiffness = float(beta)
        except (TypeError, ValueError):
            stiffness = math.nan
        except OverflowError:  # an integer beyond floating point; its digits would fill the message
            stiffness, beta = math.nan, "an integer beyond 1e308"
        if isinstance(beta, bool) or not stiffness > 0:
            raise RuleError(
                "beta is no stiffness", expected="'auto', a number > 0 or inf", got=repr(beta), fix="choose one"
            )
        if rule == "midpoint" and not contrast and math.isfinite(stiffness):
            raise RuleError(
                "rule 'midpoint' has only the nearest competitor",
                expected="beta 'auto' or inf",
                got=repr(beta),
                fix="use rule='undivided' for soft shares of all competitors",
            )
        return rule, stiffness

    def explain(self, z: Tensor, request: Request, out: Tensor, work: Workspace) -> Part:
        layer, k = self.pairs, self.clusters
        x = torch.sub(z, layer.centre, out=buffer(work, "centred", (len(z), self.features), z))
        scores = buffer(work, "scores", (len(z), k), z)
        torch.addmm(layer.offset, x, layer.prototypes.T, alpha=-2, out=scores)
        # competitors first: sums over them then run along contiguous rows
        s = buffer(work, "pairs", (k, len(z)), z).copy_(scores.T)
        best = s.amin(0)
        decided = _lowest(s, best)
        target = decided if request.target is None else request.target
        _distinct(target, request.contrast)
        if self._delicate(z.dtype):
            return self._explain_exactly(x, target, decided, request, out)
        h = s.sub_(best if request.target is None else s.gather(0, target[None]))
        rho, output, rest, divided = self._shares(h, target, request)
        signed = rho.scatter_(0, target[None], -rho.sum(0, keepdim=True)).T
        slope = torch.mm(signed, layer.prototypes.mul(-2), out=buffer(work, "slope", (len(z), self.features), z))
        if request.rule == "shapley":
            rest = self._baseline(target, request)
            torch.mul(x.sub_(self.reference_mean - layer.centre), slope, out=out)
        else:
            torch.mm(signed, layer.prototypes.square(), out=out)
            out.addcmul_(x, slope)
        return Part(output, self._parts(rest, request), target, decided, divided)

    def _delicate(self, dtype: torch.dtype) -> bool:
        """Whether differences of scores would lose too many digits."""
        eps = torch.finfo(dtype).eps
        return eps * float(self.condition) > (1e-11 if dtype == torch.float64 else 1e-5)

    def _parts(self, rest: Tensor, request: Request) -> dict[str, Tensor]:
        competition, reference = (torch.zeros_like(rest), rest) if request.rule == "shapley" else (rest, None)
        return {"competition": competition} | ({} if reference is None else {"reference": reference})

    def _shares(self, h: Tensor, target: Tensor, request: Request) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """rho (K, n), output, residual and divided rows (n,) of pairs h (K, n); overwrites h."""
        tiny = torch.finfo(h.dtype).tiny
        if request.contrast is not None:
            output = h.gather(0, request.contrast[None])[0]
            rho = torch.zeros_like(h).scatter_(0, request.contrast[None], 1.0)
            return rho, output, torch.zeros_like(output), torch.zeros_like(target, dtype=torch.bool)
        p, f = self._softmin(h, target, request.beta)
        # where f < 0 the target is not the winner and f / h_k is unbounded
        divided = torch.full_like(target, request.rule in ("auto", "divided"), dtype=torch.bool)
        if request.rule == "midpoint":
            return p, f, torch.zeros_like(f), divided
        if request.target is None and request.rule != "undivided" and not self._delicate(h.dtype):
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
            sub = Request(
                request.rule,
                request.beta,
                None if request.target is None else target[rows],
                None if request.contrast is None else request.contrast[rows],
                None if request.divided is None else request.divided[rows],
            )
            if request.contrast is None:
                p = self._softmin(h.clone(), target[rows], request.beta)[0]
            else:
                p = torch.zeros_like(h).scatter_(0, sub.contrast[None], 1.0)  # type: ignore[index]
            yield rows, u, gap, p, *self._shares(h, target[rows], sub)

    def _explain_exactly(self, x: Tensor, target: Tensor, decided: Tensor, request: Request, out: Tensor) -> Part:
        output, rest = torch.empty_like(x[:, 0]), torch.empty_like(x[:, 0])
        divided = torch.zeros_like(target, dtype=torch.bool)
        for rows, u, gap, _, rho, f, residual, division in self._groups(x, target, request):
            slope = rho.T @ gap.mul(2)
            if request.rule == "shapley":
                out[rows] = slope * (
                    u + self.pairs.prototypes[target[rows]] - (self.reference_mean - self.pairs.centre)
                )
            else:
                out[rows] = (rho.T @ gap.square()).addcmul_(u, slope)
            output[rows], rest[rows], divided[rows] = f, residual, division
        if request.rule == "shapley":
            rest = self._baseline(target, request)
        return Part(output, self._parts(rest, request), target, decided, divided)

    def details(self, z: Tensor, request: Request) -> Details:
        assert request.target is not None
        x = z - self.pairs.centre
        n = len(x)
        output, shares = x.new_empty(n), x.new_empty(n, self.clusters)
        slope, root = torch.empty_like(x), torch.empty_like(x)
        for rows, _, gap, p, rho, f, *_ in self._groups(x, request.target, request):
            output[rows], shares[rows] = f, p.T
            w = rho.T @ gap.mul(2)
            slope[rows] = w
            step = (rho.T @ gap.square()) / w
            root[rows] = torch.where(w == 0, math.nan, self.pairs.prototypes[request.target[rows]] - step)
        root = root + self.pairs.centre
        if request.rule == "shapley":
            root = torch.where(slope == 0, math.nan, self.reference_mean.expand_as(root))
        return Details(numbers(output), numbers(shares), numbers(slope), numbers(root))

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

    def midpoints(self, cluster: int) -> Tensor:
        """Midpoints (K-1, D) of the cluster with the others, in scaled units: where its pairs are zero."""
        others = [k for k in range(self.clusters) if k != cluster]
        mu = self.pairs.prototypes
        return (mu[others] + mu[cluster]) / 2 + self.pairs.centre


def _lowest(s: Tensor, best: Tensor) -> Tensor:
    """Lowest position (n,) of the minimum ``best`` of s (K, n); several times faster than ``s.min(0)``."""
    order = torch.arange(len(s), dtype=s.dtype, device=s.device)[:, None]
    return torch.where(s == best, order, len(s) - 1).amin(0).long()


def _distinct(target: Tensor, contrast: Tensor | None) -> None:
    if contrast is not None and bool((same := target == contrast).any()):
        raise TargetError(
            "target and contrast are the same cluster",
            expected="two different clusters in every row",
            got=f"{int(same.sum())} rows of a batch of {len(target)} with one cluster against itself",
            fix="pass target= as well, or explain only rows of other clusters",
        )


def _gaps(mu: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Squared distances (K, K) between prototypes, without cancellation; infinite on the diagonal."""
    gaps = np.empty((len(mu), len(mu)))
    for c, row in enumerate(mu):
        gaps[c] = ((mu - row) ** 2).sum(1)
    np.fill_diagonal(gaps, np.inf)
    return gaps
