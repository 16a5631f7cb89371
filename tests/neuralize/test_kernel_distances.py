"""Kernels beside a column of huge numbers: distances keep the digits that exp(-gamma d) needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from sklearn.datasets import load_iris
from sklearn.neighbors import KernelDensity
from sklearn.svm import SVC, SVR

from neuralize import neuralize
from neuralize.kernel_distances import KernelDistances
from neuralize.units import SquaredDistances

pytestmark = pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning")


def closes(e: object) -> bool:
    size = np.abs(e.values).sum(1) + sum(np.abs(p) for p in e.residual_parts.values())  # type: ignore[attr-defined]
    return bool((np.abs(e.values.sum(1) + e.residual - e.output) <= 1e-9 * size).all())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def stamped() -> np.ndarray:
    """Iris beside a column of time stamps."""
    X = load_iris().data
    return np.c_[1.7e9 + np.random.default_rng(0).uniform(0, 3e7, len(X)), X]


def test_a_density_beside_time_stamps(stamped: np.ndarray) -> None:
    net = neuralize(KernelDensity(bandwidth=0.3).fit(stamped))
    exact = [logsumexp(-((x - stamped) ** 2).sum(1) / (2 * 0.09)) for x in stamped]
    constant = -np.log(len(stamped)) - 5 * (np.log(0.3) + 0.5 * np.log(2 * np.pi))
    np.testing.assert_allclose(net.predict(stamped), np.array(exact) + constant, rtol=1e-12)
    e = net.explain(stamped)
    assert (e.values <= 0).all()
    assert closes(e)
    # the product of norms loses them: the test can fail
    z = torch.from_numpy(stamped + np.array([0, 0.1, 0, 0, 0]))
    assert float((SquaredDistances(stamped)(z).diagonal() - 0.01).abs().max()) > 1e-3
    assert float((KernelDistances(stamped, 5.0)(z).diagonal() - 0.01).abs().max()) < 1e-15


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_machines_on_unscaled_columns(gamma: float) -> None:
    X, y = load_iris(return_X_y=True)
    S = X * [1e6, 1, 1, 1]
    value = SVR(gamma=gamma).fit(S, y + 0.5)
    net = neuralize(value)
    np.testing.assert_allclose(net.predict(S), value.predict(S), rtol=1e-9)
    assert closes(net.explain(S))
    machine = SVC(gamma=gamma).fit(S, y)
    net = neuralize(machine)
    assert (net.predict(S) == machine.predict(S)).all()
    assert closes(net.explain(S))


def test_scaled_columns_take_the_fast_way() -> None:
    points = np.random.default_rng(0).normal(size=(50, 6))
    units, plain = KernelDistances(points, 0.2), SquaredDistances(points)
    z = torch.from_numpy(points + 0.1)
    assert torch.equal(units(z), plain(z))
    slow = KernelDistances(points, 1e9)
    torch.testing.assert_close(slow(z), plain(z), rtol=1e-10, atol=1e-12)
