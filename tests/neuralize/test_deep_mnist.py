"""Deep k-means on real digits: decisions, books, and where the relevance lies."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from experiments.data import folder, mnist
from lrp.errors import DataError
from neuralize import DeepKMeans, Explanation, NeuralizedModel, neuralize

pytestmark = [
    pytest.mark.data,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::neuralize.explanation.CoverageWarning"),
]


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    try:
        pictures, labels = mnist(folder(), "train")
    except DataError as error:
        pytest.skip(str(error))
    return pictures[:4000].reshape(4000, -1) / 255, labels[:4000]


@pytest.fixture(scope="module")
def fitted(digits: tuple[np.ndarray, np.ndarray]) -> DeepKMeans:
    return DeepKMeans(10, input_shape=(1, 28, 28), pretrain_epochs=12, epochs=6, random_state=0).fit(digits[0])


@pytest.fixture(scope="module")
def net(fitted: DeepKMeans) -> NeuralizedModel:
    return neuralize(fitted)


def test_reader(digits: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    X, y = digits
    assert X.shape == (4000, 784)
    assert (X.min(), X.max()) == (0.0, 1.0)
    assert y[:5].tolist() == [5, 0, 4, 1, 9]
    (tmp_path / "mnist").mkdir()
    with gzip.open(tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz", "wb") as file:
        file.write(b"\x00\x00\x08\x01\x00\x00\x00\x03ab")
    with pytest.raises(DataError, match="no IDX file"):
        mnist(tmp_path)


def test_decisions(digits: tuple[np.ndarray, np.ndarray], fitted: DeepKMeans, net: NeuralizedModel) -> None:
    X, y = digits
    assert (fitted.predict(X) == fitted.labels_).all()
    assert (net.predict(X) == fitted.labels_).all()
    assert len(np.unique(fitted.labels_)) == 10
    assert adjusted_rand_score(y, fitted.labels_) > 0.25
    with torch.no_grad():
        logits = net(X[:500])
    assert bool(((logits > 0).sum(1) == 1).all())
    far = torch.tensor(np.random.default_rng(0).normal(0.5, 2, (200, 784)))
    assert (net.predict(far) == fitted.predict(far.numpy())).all()


def _closes(ex: Explanation) -> bool:
    parts = list(ex.residual_parts.values())
    size = np.abs(ex.values).sum(1) + sum(np.abs(p) for p in parts)
    return bool((np.abs(ex.values.sum(1) + sum(parts) - ex.output) <= 1e-9 * size).all())


@pytest.mark.parametrize("hand_over", ["relevance", "coefficient"])
def test_books_and_flipping(digits: tuple[np.ndarray, np.ndarray], net: NeuralizedModel, hand_over: str) -> None:
    """The most relevant tenth of the lit pixels, put out, costs more than the least relevant one or a random one."""
    X = torch.tensor(digits[0][:200])
    net.head.hand_over = hand_over
    ex = net.explain(X)
    assert _closes(ex)
    target = np.where(net.predict(X[:50]) == 3, 4, 3)
    net.head.composite = "epsilon_plus"
    other = net.explain(X[:50], target=target)
    net.head.composite = None
    assert _closes(other)
    assert (other.output < 0).all()
    values, output = torch.from_numpy(ex.values), torch.from_numpy(ex.output)
    chosen = torch.from_numpy(ex.target.astype(np.int64))
    assert not values[X == 0].any()  # a black pixel contributes nothing to a convolution without shift

    def left(score: torch.Tensor) -> float:
        score = torch.where(X > 0, score, -torch.inf)
        cut = score.sort(1, descending=True)
        count = (X > 0).sum(1, keepdim=True) // 10
        off = torch.zeros_like(X, dtype=torch.bool).scatter_(1, cut.indices, torch.arange(784) < count)
        with torch.no_grad():
            logit = net(torch.where(off, 0.0, X)).gather(1, chosen[:, None])[:, 0]
        return float((logit / output).median())

    most, least, chance = left(values), left(-values), left(torch.rand_like(X))
    assert most < chance < least
