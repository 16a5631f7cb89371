"""Relevance through an encoder, against loops that restate every rule, closed forms, and lrp on the layered network."""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

import lrp
from lrp.errors import (
    ColumnError,
    CompositeError,
    InputError,
    OutputError,
    RuleError,
    TargetError,
    UnsupportedEstimatorError,
    UnsupportedOperationError,
)
from lrp.rules import Epsilon, Gamma, Rule, ZPlus
from neuralize import DeepKMeans, neuralize
from neuralize.centroids import CentroidHead
from neuralize.deep import EncodedRelevance, explain_encoded
from neuralize.encoding import Encoder, encoded

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")
PARTS = ["competition", *(f"encoder {n}" for n in ("bias", "stabiliser", "dead", "constant", "nonlinear", "lost"))]


def closes(ex: EncodedRelevance, tolerance: float = 1e-9) -> bool:
    total = ex.values.flatten(1).double().sum(1) + sum(ex.residual_parts.values())
    size = ex.values.flatten(1).abs().double().sum(1) + sum(p.abs() for p in ex.residual_parts.values())
    return bool(((total - ex.output).abs() <= tolerance * size).all())


def mlp(sizes: tuple[int, ...] = (5, 7, 6, 4), relu_last: bool = False, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(sizes):
        layers += [nn.Linear(a, b, bias=bias), nn.ReLU()]
    return nn.Sequential(*(layers if relu_last else layers[:-1])).double().eval()


def head_for(features: Tensor, k: int = 4) -> CentroidHead:
    """Centroids among the features, so that every cluster wins somewhere."""
    rng = np.random.default_rng(0)
    mu = features.detach().numpy()[rng.choice(len(features), k, replace=False)]
    return CentroidHead(mu + 0.1 * rng.standard_normal(mu.shape))


# ---------------------------------------------------------------- the slow reference


def pairs_by_hand(
    phi: np.ndarray, mu: np.ndarray, c: int, beta: float, divided: bool, contrast: int | None
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(R_phi, w, residual, output) of one row: one loop over pairs, one over coordinates."""
    others = [k for k in range(len(mu)) if k != c] if contrast is None else [contrast]
    h = [sum((phi[t] - mu[k][t]) ** 2 - (phi[t] - mu[c][t]) ** 2 for t in range(len(phi))) for k in others]
    f = min(h)
    p = [float(v == f) if math.isinf(beta) else math.exp(-beta * (v - f)) for v in h]
    p = [v / sum(p) for v in p]
    R, w = np.zeros(len(phi)), np.zeros(len(phi))
    for share, k, value in zip(p, others, h, strict=True):
        rho = share * (f / value) if divided else share
        for t in range(len(phi)):
            slope = 2 * (mu[c][t] - mu[k][t])
            R[t] += rho * slope * (phi[t] - (mu[c][t] + mu[k][t]) / 2)
            w[t] += rho * slope
    return R, w, f - float(R.sum()), f


def contribution(rule: Rule, xw: float, positive: bool) -> float:
    """What one product, or one bias, counts under a rule; ``positive``: the output is."""
    if isinstance(rule, ZPlus):
        return max(xw, 0.0)
    if isinstance(rule, Gamma):
        return xw + rule.gamma * (max(xw, 0.0) if positive else min(xw, 0.0))
    return xw


def layer_by_hand(
    rule: Rule, x: np.ndarray, W: np.ndarray, b: np.ndarray | None, R: np.ndarray
) -> tuple[np.ndarray, dict[str, float]]:
    """One linear layer: relevance of x, and what the bias, the stabiliser and dead outputs took."""
    back, books = np.zeros(len(x)), {"bias": 0.0, "stabiliser": 0.0, "dead": 0.0}
    for k in range(len(W)):
        z = sum(W[k][j] * x[j] for j in range(len(x))) + (0.0 if b is None else b[k])
        n = [contribution(rule, W[k][j] * x[j], z > 0) for j in range(len(x))]
        own = 0.0 if b is None else contribution(rule, b[k], z > 0)
        if not any(n) and not own:
            books["dead"] += R[k]
            continue
        below = sum(n) + own
        step = rule.epsilon if below >= 0 else -rule.epsilon  # type: ignore[attr-defined]
        s = R[k] / (below + step)
        books["bias"] += own * s
        books["stabiliser"] += step * s
        for j in range(len(x)):
            back[j] += n[j] * s
    return back, books


def network_by_hand(
    net: nn.Sequential, rules: list[Rule], x: np.ndarray, give: Any
) -> tuple[np.ndarray, dict[str, float], np.ndarray]:
    """Relevance of one row x, where ``give(phi)`` is the relevance of the output; books; phi."""
    acts, layers, a = [], [], x
    for module in net:
        if isinstance(module, nn.Linear):
            acts.append(a)
            layers.append(
                (module.weight.detach().numpy(), None if module.bias is None else module.bias.detach().numpy())
            )
            a = layers[-1][0] @ a + (0.0 if layers[-1][1] is None else layers[-1][1])
        else:
            a = np.maximum(a, 0.0)
    R = give(a)
    total = {"bias": 0.0, "stabiliser": 0.0, "dead": 0.0, "lost": float(R[a == 0].sum())}
    R = np.where(a == 0, 0.0, R)
    for rule, below, (W, b) in zip(reversed(rules), reversed(acts), reversed(layers), strict=True):
        R, books = layer_by_hand(rule, below, W, b, R)
        for name, v in books.items():
            total[name] += v
    return R, total, a


COMPOSITES: dict[str, list[Rule]] = {
    "epsilon": [Epsilon(1e-2)] * 3,
    "gamma": [Gamma(0.25)] * 3,
    "z+ below": [ZPlus(1e-6), ZPlus(1e-6), Epsilon(1e-6)],
    "mixed": [ZPlus(1e-6), Epsilon(1e-3), Gamma(1.0, 1e-6)],
}


@pytest.mark.parametrize("hand_over", ["relevance", "coefficient"])
@pytest.mark.parametrize("name", list(COMPOSITES))
@pytest.mark.parametrize("relu_last", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_network_against_loops(name: str, relu_last: bool, bias: bool, hand_over: str) -> None:
    net = mlp(relu_last=relu_last, bias=bias)
    rules = COMPOSITES[name]
    composite = lrp.Composite([(str(2 * i), rule) for i, rule in enumerate(rules)])
    x = torch.randn(8, 5, dtype=torch.float64)
    head = head_for(net(x))
    mu = (head.pairs.prototypes + head.pairs.centre).numpy()
    won = head.assign(net(x))[0]
    cases: list[tuple[Tensor | None, Tensor | None, float]] = [
        (None, None, 0.3),  # the row's own cluster: divided
        ((won + 1) % 4, None, 0.3),  # another: undivided
        ((won + 1) % 4, (won + 2) % 4, 0.3),  # a duel
        (None, None, math.inf),
    ]
    dead = 0
    for target, contrast, beta in cases:
        ex = explain_encoded(net, head, x, target, contrast, beta, composite=composite, hand_over=hand_over)
        assert list(ex.residual_parts) == [PARTS[0], *(["root"] if hand_over == "coefficient" else []), *PARTS[1:]]
        assert closes(ex)
        for i in range(len(x)):
            c = int(won[i]) if target is None else int(target[i])
            k = None if contrast is None else int(contrast[i])
            root, rest, output, given = 0.0, 0.0, 0.0, np.zeros(4)

            def give(phi: np.ndarray, c: int = c, k: int | None = k, own: bool = target is None) -> np.ndarray:
                nonlocal root, rest, output, given
                R, w, rest, output = pairs_by_hand(phi, mu, c, beta, own and k is None, k)  # noqa: B023
                given = R
                if hand_over == "coefficient":
                    root = float(R.sum() - w @ phi)
                    return w * phi
                return R

            R, books, phi = network_by_hand(net, rules, x[i].numpy(), give)
            size = np.abs(given).sum() + np.abs(R).sum() + sum(map(abs, books.values())) + abs(root)
            close = {"abs": 1e-9 * size, "rel": 0}
            assert ex.values[i].numpy() == pytest.approx(R, **close)
            assert ex.features[i].numpy() == pytest.approx(given, **close)
            assert float(ex.output[i]) == pytest.approx(output, **close)
            assert float(ex.residual_parts["competition"][i]) == pytest.approx(rest, **close)
            for part, v in books.items():
                assert float(ex.residual_parts[f"encoder {part}"][i]) == pytest.approx(v, **close), part
            if hand_over == "coefficient":
                assert float(ex.residual_parts["root"][i]) == pytest.approx(root, **close)
            dead += int((phi == 0).sum())
        assert not ex.residual_parts["encoder constant"].any()
        assert not ex.residual_parts["encoder nonlinear"].any()
    if relu_last:  # the trap is there: features that are exactly 0
        assert dead > 0
        lost = ex.residual_parts["encoder lost"]
        assert bool(lost.any()) == (hand_over == "relevance")


@pytest.mark.parametrize("hand_over", ["relevance", "coefficient"])
def test_linear_encoder_has_a_closed_form(hand_over: str) -> None:
    r"""Phi(x) = Ax, A square: with :math:`\phi = Ax`, R_j = sum_t A_tj x_j R_t / phi_t, or x_j (A'w)_j."""
    A = torch.randn(4, 4, dtype=torch.float64)
    assert torch.linalg.cond(A) < 100
    net = nn.Sequential(nn.Linear(4, 4, bias=False)).double().eval()
    net[0].weight.data.copy_(A)
    x = torch.randn(20, 4, dtype=torch.float64)
    phi = x @ A.T
    head = head_for(phi, 3)
    mu = head.pairs.prototypes + head.pairs.centre
    ex = explain_encoded(net, head, x, 0, 2, composite=Epsilon(0), hand_over=hand_over)
    w, m = 2 * (mu[0] - mu[2]), (mu[0] + mu[2]) / 2
    R = w * (phi - m)
    f = (phi - mu[2]).square().sum(1) - (phi - mu[0]).square().sum(1)
    assert torch.allclose(ex.output, f, rtol=1e-10)
    expected = x * ((R / phi) @ A) if hand_over == "relevance" else x * (A.T @ w)
    assert torch.allclose(ex.values, expected, rtol=1e-9, atol=1e-9)
    constant = ex.residual_parts.get("root", torch.zeros(20, dtype=torch.float64))
    assert torch.allclose(constant, torch.full_like(f, 0.0 if hand_over == "relevance" else float(-(w @ m))), atol=1e-9)
    rest = [v for n, v in ex.residual_parts.items() if n != "root"]
    assert all(float(v.abs().max()) < 1e-9 * float(ex.values.abs().sum()) for v in rest)
    # the same decision in x, with the metric A'A: its midpoint rule has the root that Phi maps to m
    pulled = (A.T @ w) * (x - torch.linalg.solve(A, m))
    assert torch.allclose(pulled.sum(1), f, rtol=1e-9, atol=1e-9)
    if hand_over == "coefficient":  # the two differ by that root, a constant
        assert torch.allclose((pulled - ex.values).std(0), torch.zeros(4, dtype=torch.float64), atol=1e-9)


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus", "epsilon_gamma_box", "gamma"])
def test_the_layered_network_gives_the_same(composite: str) -> None:
    """Encoder, pair layer and min-pool as one module under lrp, the midpoint rule as its root-point rule."""
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).double().eval()  # fmt: skip
    net[1].running_mean.uniform_(-0.3, 0.3)
    net[1].running_var.uniform_(0.5, 2.0)
    x = torch.rand(12, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        head = head_for(net(x), 3)
    rules = {
        "epsilon": lrp.composites.epsilon(),
        "epsilon_plus": lrp.composites.epsilon_plus(),
        "epsilon_gamma_box": lrp.composites.epsilon_gamma_box(0.0, 1.0),
        "gamma": lrp.Composite([("*", Gamma())]),
    }[composite]
    won = head.assign(net(x))[0]
    for c in range(3):
        rows = x[won == c]
        if not len(rows):
            continue
        ex = explain_encoded(net, head, rows, c, rule="midpoint", composite=rules)
        assert closes(ex)
        whole = nn.Sequential(net, head.layered(c)).eval()
        first = ("1.pairs", lrp.rules.RootPoint(head.midpoints(c), epsilon=0.0))
        moved = [(f"0.{m}" if isinstance(m, str) and m not in ("*", "first", "last") else m, r) for m, r in rules.rules]
        rel = lrp.attribute(whole, rows, 0, composite=lrp.Composite([first, *moved]))
        assert torch.allclose(rel.output[:, 0], ex.output, rtol=1e-9)
        size = float(ex.values.abs().sum())
        assert torch.allclose(rel.input, ex.values, rtol=0, atol=1e-9 * size)
        for name in ("bias", "stabiliser", "dead", "lost"):
            assert torch.allclose(getattr(rel.ledger, name), ex.residual_parts[f"encoder {name}"], atol=1e-9 * size)


def test_origin_of_feature_space() -> None:
    """Features and centroids moved by a constant: handed-over coefficients leave all but the constants as it was."""
    net = mlp()
    x = torch.randn(30, 5, dtype=torch.float64)
    head = head_for(net(x))
    shift = torch.tensor([3.0, -5.0, 1.0, 8.0], dtype=torch.float64)
    moved = copy.deepcopy(net)
    moved[-1].bias.data += shift
    other = CentroidHead((head.pairs.prototypes + head.pairs.centre + shift).numpy())
    for hand_over in ("relevance", "coefficient"):
        a, b = (
            explain_encoded(n, h, x, composite=Epsilon(1e-12), hand_over=hand_over)
            for n, h in ((net, head), (moved, other))
        )
        size = float(a.values.abs().sum())
        assert torch.allclose(a.output, b.output, rtol=1e-9)
        assert torch.allclose(a.features, b.features, atol=1e-9 * size)
        same = torch.allclose(a.values, b.values, atol=1e-7 * size)
        assert same == (hand_over == "coefficient")
    both = [e.residual_parts["root"] + e.residual_parts["encoder bias"] for e in (a, b)]
    assert torch.allclose(*both, atol=1e-7 * size)


def test_gamma_bounds_what_epsilon_lets_grow() -> None:
    """A feature near 0 that carries relevance: the reason for the default composite."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False)).double().eval()
    net[0].weight.data.copy_(torch.tensor([[1.0, -1.0], [1.0, 1.0]]))
    head = CentroidHead([[2.0, 0.0], [-3.0, 0.0]])
    x = torch.tensor([[1.0, 1.0 + 1e-4]], dtype=torch.float64)
    default, epsilon = (explain_encoded(net, head, x, composite=c) for c in (None, "epsilon"))
    f = float(default.output)
    assert closes(default)
    assert closes(epsilon)
    assert float(epsilon.values.abs().sum()) > 1e3 * f
    assert float(default.values.abs().sum()) < 20 * f


# ---------------------------------------------------------------- use


def picture_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).double().eval()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("hand_over", ["relevance", "coefficient"])
def test_pictures_batches_and_precision(dtype: torch.dtype, hand_over: str) -> None:
    net = picture_net().to(dtype)
    x = torch.rand(11, 2, 8, 8, dtype=dtype)
    with torch.no_grad():
        head = CentroidHead(KMeans(3, n_init=1, random_state=0).fit(net(x).double().numpy()).cluster_centers_)
    ex = explain_encoded(net, head, x, hand_over=hand_over)
    assert ex.values.shape == x.shape
    assert ex.values.dtype == dtype
    assert ex.features.shape == (11, 6)
    assert closes(ex, 1e-9 if dtype == torch.float64 else 1e-4)
    assert bool((ex.output > 0).all())
    size = float(ex.values.abs().sum())
    for size_of_batch in (1, 4):
        other = explain_encoded(net, head, x, hand_over=hand_over, batch_size=size_of_batch)
        atol = size * (1e-12 if dtype == torch.float64 else 1e-5)
        assert torch.allclose(other.values, ex.values, rtol=0, atol=atol)
        assert torch.allclose(other.residual, ex.residual, rtol=0, atol=atol)
    assert torch.allclose(ex.coverage * ex.output, ex.values.flatten(1).sum(1).double(), atol=size * 1e-4)
    assert "median coverage" in repr(ex)


def test_float32_follows_float64() -> None:
    net = picture_net()
    x = torch.rand(11, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        head = head_for(net(x))
    wide = explain_encoded(net, head, x)
    narrow = explain_encoded(copy.deepcopy(net).float(), head, x.float())
    assert torch.allclose(narrow.values.double(), wide.values, atol=1e-4 * float(wide.values.abs().max()))


@pytest.mark.gpu
@pytest.mark.parametrize("hand_over", ["relevance", "coefficient"])
def test_on_a_gpu(hand_over: str) -> None:
    net, x = picture_net(), torch.rand(11, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        model = encoded(net, head_for(net(x)).pairs.prototypes.numpy(), x, hand_over=hand_over)
    here = model.explain(x, target=1)
    there = model.to("cuda").explain(x, target=1)
    size = float(np.abs(here.values).sum())
    np.testing.assert_allclose(there.values, here.values, rtol=0, atol=1e-9 * size)
    for name, part in here.residual_parts.items():
        np.testing.assert_allclose(there.residual_parts[name], part, rtol=0, atol=1e-9 * size)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)],
        [nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.LayerNorm(4)],
        [nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 4), nn.Sigmoid()],
        [nn.Linear(5, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 4), nn.ReLU()],
    ],
    ids=["norm inside", "norm last", "sigmoid", "gelu"],
)
@pytest.mark.parametrize("hand_over", ["relevance", "coefficient"])
def test_other_layers_close_too(layers: list[nn.Module], hand_over: str) -> None:
    net = nn.Sequential(*copy.deepcopy(layers)).double().eval()
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        head = head_for(net(x))
    for composite in (None, "epsilon", "epsilon_plus"):
        ex = explain_encoded(net, head, x, composite=composite, hand_over=hand_over)
        assert closes(ex)


def test_a_residual_network_with_two_uses() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Linear(5, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(x + self.inner(torch.relu(self.inner(x))) + 0.1)
            return self.out(x)

    net = Block().double().eval()
    x = torch.randn(9, 5, dtype=torch.float64)
    with torch.no_grad():
        head = head_for(net(x), 3)
    ex = explain_encoded(net, head, x)
    assert closes(ex)
    assert bool(ex.residual_parts["encoder constant"].any())  # the 0.1


def test_encoded_model() -> None:
    net = picture_net()
    before = copy.deepcopy(net.state_dict())
    x = torch.rand(40, 2, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        phi = net(x)
    found = KMeans(3, n_init=1, random_state=0).fit(phi.numpy())
    names = np.array(["a", "b", "c"])
    model = encoded(net.train(), found.cluster_centers_, x, names, reference=x)
    assert net.training
    assert not model.head.encoder.network.training
    net.eval()
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    labels = names[found.predict(phi.numpy())]
    assert (model.predict(x) == labels).all()
    assert (model.predict(x, batch_size=7) == labels).all()
    assert (model.predict(x.flatten(1).numpy()) == labels).all()
    logits = model(x)
    assert logits.shape == (40, 3)
    assert bool(((logits > 0).sum(1) == 1).all())
    assert (names[logits.argmax(1)] == labels).all()

    ex = model.explain(x)
    size = np.abs(ex.values).sum(1) + sum(np.abs(p) for p in ex.residual_parts.values())
    assert (np.abs(ex.values.sum(1) + ex.residual - ex.output) <= 1e-9 * size).all()
    np.testing.assert_allclose(ex.output, logits.amax(1))
    assert (ex.target == labels).all()
    # the same as by the function, picture by picture
    direct = explain_encoded(net, model.head.head, x)
    np.testing.assert_allclose(ex.values, direct.values.flatten(1), atol=1e-12)
    assert list(ex.residual_parts) == list(direct.residual_parts)
    np.testing.assert_allclose(model.explain(x.flatten(1)).values, ex.values)
    assert np.isnan(ex.break_even).all()
    np.testing.assert_allclose(ex.competitors.sum(1), 1)
    duel = model.explain(x[:5], target="b", contrast="c")
    d = [((phi[:5] - torch.tensor(found.cluster_centers_[k])) ** 2).sum(1) for k in (1, 2)]
    np.testing.assert_allclose(duel.output, d[1] - d[0])
    # beta from the reference: 1 / mean margin of the rows' own clusters
    margin = float(model.head.head.margin)
    assert margin == pytest.approx(float(logits.amax(1).mean()))
    np.testing.assert_array_equal(model.explain(x, beta=1 / margin).values, ex.values)


def test_behind_a_pipeline() -> None:
    """DeepKMeans as the last step: relevance goes on through scalers to the table's own columns."""
    frame = load_wine(as_frame=True).data
    deep = DeepKMeans(3, hidden=(8,), n_latent=2, pretrain_epochs=3, epochs=2, random_state=0, progress=False)
    fitted = make_pipeline(StandardScaler(), deep).fit(frame)
    model = neuralize(fitted)
    assert (model.predict(frame) == fitted.predict(frame)).all()
    ex = model.explain(frame)
    assert ex.feature_names == tuple(frame.columns)
    size = np.abs(ex.values).sum(1) + sum(np.abs(p) for p in ex.residual_parts.values())
    assert (np.abs(ex.values.sum(1) + ex.residual - ex.output) <= 1e-9 * size).all()
    with pytest.raises(UnsupportedEstimatorError, match="mix"):
        neuralize(make_pipeline(PCA(4), deep).fit(frame)).explain(frame)


def test_encoder_stage() -> None:
    stage = Encoder(picture_net(), torch.zeros(1, 2, 8, 8))
    assert (stage.inputs, stage.outputs, stage.shape, stage.source) == (128, 6, (2, 8, 8), "Sequential")
    assert stage.dtype == torch.float64
    x = torch.rand(3, 2, 8, 8, dtype=torch.float64)
    assert torch.equal(stage(x), stage(x.flatten(1)))
    assert "(2, 8, 8) -> 6 features" in repr(stage)
    assert not any(p.requires_grad for p in stage.parameters())


def test_a_plan_is_used_as_it_is() -> None:
    net = mlp()
    x = torch.randn(6, 5, dtype=torch.float64)
    head = head_for(net(x))
    plan = lrp.prepare(net, x, "epsilon")
    assert torch.equal(explain_encoded(plan, head, x).values, explain_encoded(net, head, x, composite="epsilon").values)
    with pytest.raises(InputError, match="composite already"):
        explain_encoded(plan, head, x, composite="epsilon")
    with pytest.raises(RuleError, match="no ledger"):
        explain_encoded(lrp.prepare(net, x, "gradient"), head, x)


def test_errors() -> None:
    net = mlp()
    x = torch.randn(6, 5, dtype=torch.float64)
    head = head_for(net(x))
    with pytest.raises(RuleError, match="hand_over"):
        explain_encoded(net, head, x, hand_over="gradient")
    with pytest.raises(RuleError, match="no ledger"):
        explain_encoded(net, head, x, composite="gradient_x_input")
    with pytest.raises(CompositeError):
        explain_encoded(net, head, x, composite="nothing")
    with pytest.raises(RuleError, match="unknown rule"):
        explain_encoded(net, head, x, rule="nothing")
    with pytest.raises(TargetError, match="does not exist"):
        explain_encoded(net, head, x, 4)
    with pytest.raises(TargetError, match="same label"):
        explain_encoded(net, head, x, 1, 1)
    with pytest.raises(InputError, match="no batch"):
        explain_encoded(net, head, x[0])
    with pytest.raises(InputError, match="no batch"):
        explain_encoded(net, head, x[:0])
    with pytest.raises(InputError, match="batch_size"):
        explain_encoded(net, head, x, batch_size=0)
    with pytest.raises(OutputError, match="do not fit"):
        explain_encoded(net, CentroidHead([[0.0], [1.0]]), x)
    with pytest.raises(InputError, match="is not finite"):
        explain_encoded(net, head, torch.full_like(x, math.nan))
    with pytest.raises(OutputError, match="no features"):
        encoded(nn.Sequential(nn.Conv2d(1, 2, 3)), [[0.0], [1.0]], torch.zeros(1, 1, 5, 5))
    with pytest.raises(InputError, match="do not fit each other"):
        encoded(net, [[0.0], [1.0]], x)
    mu = np.eye(4)
    with pytest.raises(InputError, match="labels"):
        encoded(net, mu, x, ["a"])
    with pytest.raises(ColumnError, match="columns"):
        encoded(net, mu, x).predict(torch.zeros(2, 6))
    with pytest.raises(InputError, match="no network"):
        encoded("resnet", mu, x)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="example"):
        encoded(net, mu, x[0])

    class Sorted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.fft(x).real

    with pytest.raises(UnsupportedOperationError):
        explain_encoded(Sorted(), CentroidHead(np.eye(5)), x)
