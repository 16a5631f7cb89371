"""Deep k-means: its loss and steps against restatements, reproducibility, resumption, scikit-learn's checks."""

from __future__ import annotations

import copy
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits, make_blobs
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator
from torch import Tensor, nn

from lrp._files import read_tensors
from lrp.errors import ConvergenceError, DataError, FileFormatError, InputError, MismatchError, OutputError
from neuralize._autoencoders import convolutional
from neuralize._training import KIND, STATE, lloyd, nearest
from neuralize.deep_kmeans import DeepKMeans

ROOT = Path(__file__).parents[2]
# checks of check_estimator that fail, and why
EXPECTED_FAILED: dict[str, str] = {}


def blobs(n: int = 120, k: int = 3, d: int = 6) -> tuple[np.ndarray, np.ndarray]:
    X, y = make_blobs(n, d, centers=k, cluster_std=1.0, random_state=0)
    return StandardScaler().fit_transform(X), y


QUICK = {"n_clusters": 3, "hidden": (16,), "n_latent": 2, "pretrain_epochs": 4, "epochs": 4, "random_state": 0}


def quick(**options: Any) -> DeepKMeans:
    return DeepKMeans(**(QUICK | options))


def same(a: DeepKMeans, b: DeepKMeans) -> bool:
    nets = all(torch.equal(x, y) for x, y in zip(_tensors(a), _tensors(b), strict=True))
    return (
        nets
        and a.history_ == b.history_
        and np.array_equal(a.cluster_centers_, b.cluster_centers_)
        and np.array_equal(a.labels_, b.labels_)
        and a.inertia_ == b.inertia_
    )


def _tensors(fitted: DeepKMeans) -> list[Tensor]:
    return [*fitted.encoder_.state_dict().values(), *fitted.decoder_.state_dict().values()]


# ---------------------------------------------------------------- Lloyd's steps


def test_lloyd_is_kmeans() -> None:
    X, _ = blobs(200, 4)
    first = X[[0, 50, 100, 150]]
    ours = lloyd(torch.tensor(X), torch.tensor(first), 300)
    theirs = KMeans(4, init=first, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(X)
    assert np.allclose(ours[0], theirs.cluster_centers_)
    assert (ours[1].numpy() == theirs.labels_).all()
    assert float(ours[2].sum()) == pytest.approx(theirs.inertia_)
    assert ours[3] == 0


def test_an_empty_cluster_moves_to_the_farthest_row() -> None:
    z = torch.tensor([[0.0], [1.0], [2.0], [50.0]], dtype=torch.float64)
    centres, index, distance, moved = lloyd(z, torch.tensor([[1.0], [1e6], [2e6]], dtype=torch.float64), 300)
    assert moved == 2
    assert len(set(index.tolist())) == 3
    assert float(distance.sum()) == pytest.approx(0.5)
    assert sorted(centres[:, 0].tolist()) in ([0.0, 1.5, 50.0], [0.5, 2.0, 50.0])


def test_identical_codes_leave_clusters_empty() -> None:
    z = torch.ones(5, 2, dtype=torch.float64)
    centres, index, _, moved = lloyd(z, torch.ones(3, 2, dtype=torch.float64), 10)
    assert moved == 0
    assert not index.any()
    assert bool(centres.isfinite().all())


def test_nearest_far_from_the_origin_and_ties() -> None:
    z = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64) + 1e6
    index, distance = nearest(z, torch.tensor([[0.0], [2.0]], dtype=torch.float64) + 1e6)
    assert index.tolist() == [0, 0, 1]
    assert distance.tolist() == [0.0, 1.0, 0.0]


# ---------------------------------------------------------------- the loss


class Doubling(nn.Module):
    """One parameter: codes a x, reconstructions b z."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x


@pytest.mark.parametrize("balance", [0.75, 1.5])
def test_one_step_of_the_joint_loss(balance: float) -> None:
    """A single batch and epoch: history and Adam's first step from the loss restated in numpy.

    That step has the sign of the gradient, so lambda is set to where a factor of two would turn it.
    """
    X = np.array([[-3.0, 0.0], [-2.0, 0.0], [2.0, 1.0], [4.0, 0.0]])
    a, b, rate, h = 0.5, 1.0, 1e-2, 1e-6
    centres = a * np.array([X[:2].mean(0), X[2:].mean(0)])[[0, 0, 1, 1]]
    V_x = ((X - X.mean(0)) ** 2).sum(1).mean()
    V_z = a**2 * V_x

    def parts(a: float, b: float) -> np.ndarray:
        z = a * X
        return np.array([((X - b * z) ** 2).sum(1).mean() / V_x, ((z - centres) ** 2).sum(1).mean() / V_z])

    by_a = (parts(a + h, b) - parts(a - h, b)) / (2 * h)
    by_b = (parts(a, b + h) - parts(a, b - h)) / (2 * h)
    lambda_ = float(-2 * balance * by_a[0] / by_a[1])
    fitted = DeepKMeans(
        2, encoder=Doubling(a), decoder=Doubling(b), lambda_=lambda_, pretrain_epochs=0, epochs=1, batch_size=4,
        learning_rate=rate, random_state=0, dtype="float64",
    ).fit(X)  # fmt: skip
    weights = np.array([1.0, lambda_ / 2])
    entry = fitted.history_[0]
    assert [entry["reconstruction"], entry["within"]] == pytest.approx(parts(a, b))
    assert entry["loss"] == pytest.approx(weights @ parts(a, b))
    assert float(fitted.encoder_.a) == pytest.approx(a - rate * np.sign(weights @ by_a), abs=1e-7)
    assert float(fitted.decoder_.a) == pytest.approx(b - rate * np.sign(weights @ by_b), abs=1e-7)
    assert np.sign(weights @ by_a) == (1 if balance > 1 else -1)
    new = float(fitted.encoder_.a)
    assert np.allclose(sorted(fitted.cluster_centers_[:, 0]), [new * -2.5, new * 3.0])
    assert entry["spread"] == pytest.approx(new**2 / a**2)


SEEN: list[list[float]] = []


class Recorder(Doubling):
    """Notes the rows it is trained with."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            SEEN.append(x[:, 0].tolist())
        return super().forward(x)


def test_every_epoch_has_an_order_of_its_own() -> None:
    SEEN.clear()
    X = np.arange(34.0).reshape(17, 2)
    quick(encoder=Recorder(0.5), decoder=Doubling(1.0), pretrain_epochs=2, epochs=2, batch_size=8).fit(X)
    assert [len(rows) for rows in SEEN] == [6, 6, 5] * 4
    orders = [[v for rows in SEEN[i : i + 3] for v in rows] for i in range(0, 12, 3)]
    assert all(sorted(order) == X[:, 0].tolist() for order in orders)
    assert len({tuple(order) for order in orders}) == 4


def test_pretraining_alone_ignores_the_clusters() -> None:
    X, _ = blobs()
    a, b = (quick(epochs=0, n_clusters=k).fit(X) for k in (2, 5))
    assert a.history_ == b.history_
    assert a.loss_curve_ == [e["loss"] for e in a.history_]
    assert a.loss_curve_[-1] < a.loss_curve_[0]
    assert {e["phase"] for e in a.history_} == {"pretrain"}


def test_training_tightens_the_clusters() -> None:
    X, y = blobs()
    fitted = quick(pretrain_epochs=30, epochs=30, lambda_=10.0).fit(X)
    plain = quick(pretrain_epochs=30, epochs=30, lambda_=0.0).fit(X)

    def tightness(m: DeepKMeans) -> float:
        z = m.transform(X)
        return float(m.inertia_ / ((z - z.mean(0)) ** 2).sum())

    assert tightness(fitted) < 0.5 * tightness(plain)
    assert adjusted_rand_score(y, fitted.labels_) > 0.95


# ---------------------------------------------------------------- the estimator


def test_attributes_and_use(capsys: pytest.CaptureFixture[str]) -> None:
    X, _ = blobs()
    frame = pd.DataFrame(X, columns=[f"c{i}" for i in range(6)])
    before = frame.copy()
    m = quick().fit(frame)
    assert capsys.readouterr() == ("", "")  # a bar on terminals only
    pd.testing.assert_frame_equal(frame, before)
    assert m.cluster_centers_.shape == (3, 2)
    assert m.labels_.dtype == np.int32
    assert m.n_features_in_ == 6
    assert list(m.feature_names_in_) == list(frame.columns)
    assert m.n_iter_ == 4
    assert m.n_reseeded_ == 0
    assert not m.encoder_.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in m.encoder_.parameters())
    z = m.transform(frame)
    assert np.array_equal(z, m.encoder_(torch.tensor(X)).numpy())
    d = ((z[:, None] - m.cluster_centers_) ** 2).sum(2)
    assert (m.predict(frame) == d.argmin(1)).all()
    assert (m.labels_ == m.predict(frame)).all()
    assert m.inertia_ == pytest.approx(d.min(1).sum())
    assert np.allclose(m.cluster_centers_, [z[m.labels_ == k].mean(0) for k in range(3)])
    assert m.inverse_transform(m.cluster_centers_).shape == (3, 6)
    assert np.allclose(m.inverse_transform(z), m.decoder_(torch.tensor(z)).numpy())
    assert list(m.get_feature_names_out()) == ["deepkmeans0", "deepkmeans1"]
    assert list(m.set_output(transform="pandas").transform(frame).columns) == ["deepkmeans0", "deepkmeans1"]
    assert (quick().fit_predict(frame) == m.labels_).all()
    piped = make_pipeline(StandardScaler(), quick()).fit(frame)
    assert piped.predict(frame).shape == (120,)
    assert np.array_equal(pickle.loads(pickle.dumps(m)).predict(frame), m.labels_)
    with pytest.raises(NotFittedError):
        quick().predict(X)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 4, 8), (1, 7, 5)])
def test_convolutional_default(shape: tuple[int, ...]) -> None:
    encoder, decoder = convolutional(shape, 3, (4, 6, 8))
    x = torch.rand(2, *shape)
    assert encoder(x).shape == (2, 3)
    assert decoder(encoder(x)).shape == x.shape


def test_pictures() -> None:
    X, y = load_digits(return_X_y=True)
    X, y = X[:400] / 16, y[:400]
    m = DeepKMeans(10, input_shape=(1, 8, 8), pretrain_epochs=8, epochs=4, random_state=0).fit(X)
    assert (m.predict(X) == m.labels_).all()
    assert m.encoder_(torch.tensor(X[:2])).shape == (2, 10)
    assert m.inverse_transform(m.cluster_centers_).shape == (10, 64)
    assert adjusted_rand_score(y, m.labels_) > 0.3


def test_networks_of_the_user() -> None:
    X, _ = blobs()
    encoder = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.ReLU(), nn.Linear(8, 2))
    decoder = nn.Sequential(nn.Linear(2, 6), nn.Linear(6, 6).requires_grad_(False))
    state = copy.deepcopy((encoder.state_dict(), decoder.state_dict()))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    m = quick(encoder=encoder, decoder=decoder, batch_size=17).fit(X)
    assert torch.equal(torch.rand(3), expected)  # the global random numbers are left alone
    for network, held in zip((encoder, decoder), state, strict=True):
        assert all(torch.equal(v, held[n]) for n, v in network.state_dict().items())
    assert encoder.training
    assert not decoder[1].weight.requires_grad
    assert decoder[0].weight.requires_grad
    assert torch.equal(m.decoder_[1].weight.float(), decoder[1].weight)  # frozen by the user
    assert not torch.equal(m.decoder_[0].weight.float(), decoder[0].weight)
    assert same(m, quick(encoder=encoder, decoder=decoder, batch_size=17).fit(X))

    def build() -> nn.Module:
        return nn.Linear(6, 2)

    def back() -> nn.Module:
        return nn.LazyLinear(6)

    a = quick(encoder=build, decoder=back).fit(X)
    assert same(a, quick(encoder=build, decoder=back).fit(X))
    assert not same(a, quick(encoder=build, decoder=back, random_state=1).fit(X))


class Tied(nn.Module):
    """A decoder that uses the encoder's weight."""

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, z: Tensor) -> Tensor:
        return z @ self.encoder.weight


def test_shared_parameters_stay_shared(tmp_path: Path) -> None:
    X, _ = blobs()
    encoder = nn.Linear(6, 2)
    given = {"encoder": encoder, "decoder": Tied(encoder)}
    m = quick(**given).fit(X)
    assert m.decoder_.encoder.weight is m.encoder_.weight
    quick(**given, epochs=1, resume=tmp_path / "run").fit(X)
    assert same(m, quick(**given, resume=tmp_path / "run").fit(X))


def test_seeds() -> None:
    X, _ = blobs()
    assert same(quick().fit(X), quick().fit(X))
    assert not same(quick().fit(X), quick(random_state=1).fit(X))
    a, b = (quick(random_state=np.random.RandomState(3)).fit(X) for _ in range(2))
    assert same(a, b)
    assert same(clone(a).set_params(random_state=np.random.RandomState(3)).fit(X), a)


def test_mixed_precision() -> None:
    X, _ = blobs()
    m = quick(mixed_precision=True).fit(X)
    assert (m.predict(X) == m.labels_).all()
    assert not same(m, quick().fit(X))
    assert np.allclose(m.loss_curve_, quick().fit(X).loss_curve_, rtol=0.05)


def test_a_single_cluster_and_few_rows() -> None:
    X, _ = blobs()
    assert not quick(n_clusters=1).fit_predict(X).any()
    assert sorted(quick(n_clusters=3, pretrain_epochs=0).fit_predict(X[:3])) == [0, 1, 2]


def test_reports_of_collapse() -> None:
    X = np.repeat([[0.0, 1.0], [1.0, 0.0]], 10, 0)
    with pytest.warns(ConvergenceWarning, match="1 of 3 clusters are empty"):
        quick().fit(X)
    Z, _ = blobs()
    with pytest.warns(ConvergenceWarning, match="shrunk"):
        quick(encoder=Doubling(1.0), decoder=Doubling(1.0), lambda_=1e4, learning_rate=0.02, epochs=30).fit(Z)


def test_divergence_is_an_error() -> None:
    X, _ = blobs()
    with pytest.raises(ConvergenceError, match="diverged"):
        quick(encoder=Doubling(float("nan")), decoder=Doubling(1.0)).fit(X)


def test_errors(tmp_path: Path) -> None:
    X, _ = blobs()
    for wrong in (
        {"n_clusters": 0}, {"n_clusters": 2.5}, {"epochs": -1}, {"pretrain_epochs": "many"}, {"batch_size": 0},
        {"lambda_": -1}, {"lambda_": float("nan")}, {"learning_rate": 0}, {"n_init": 0}, {"n_latent": 0},
        {"hidden": (0,)}, {"dtype": "float16"}, {"device": "nowhere"}, {"input_shape": (1, 2, 2)},
        {"input_shape": (2, 3)}, {"encoder": nn.Linear(6, 2)}, {"decoder": nn.Linear(2, 6)},
        {"encoder": list, "decoder": list}, {"encoder": nn.Flatten(), "decoder": nn.Flatten()},
    ):  # fmt: skip
        with pytest.raises(InputError):
            quick(**wrong).fit(X)
    with pytest.raises(InputError, match="n_samples=2 is fewer than n_clusters=3"):
        quick().fit(X[:2])
    for encoder, decoder in (
        (nn.Linear(5, 2), nn.Linear(2, 6)),
        (nn.Linear(6, 2), nn.Linear(3, 6)),
        (nn.Linear(6, 2), nn.Linear(2, 5)),
        (nn.Sequential(nn.Linear(6, 6), nn.Unflatten(1, (2, 3))), nn.Flatten()),
    ):
        with pytest.raises(OutputError):
            quick(encoder=encoder, decoder=decoder).fit(X)
    m = quick().fit(X)
    with pytest.raises(InputError, match="no codes"):
        m.inverse_transform(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="features"):
        m.predict(X[:, :5])
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "no" / "folder"):
        with pytest.raises(DataError, match="names no folder"):
            quick(resume=place).fit(X)


# ---------------------------------------------------------------- resumption


def test_resume_goes_on_bit_for_bit(tmp_path: Path) -> None:
    X, _ = blobs()
    whole = quick().fit(X)
    quick(epochs=2, resume=tmp_path / "a").fit(X)
    assert [p.name for p in (tmp_path / "a").iterdir()] == [STATE]
    assert same(quick(resume=tmp_path / "a").fit(X), whole)
    assert same(quick(resume=tmp_path / "a").fit(X), whole)  # a finished run is not trained again
    # a seed that was drawn is kept
    first = quick(random_state=None, resume=tmp_path / "b").fit(X)
    assert same(quick(random_state=None, resume=tmp_path / "b").fit(X), first)


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    X, _ = blobs()
    quick(resume=tmp_path).fit(X)
    with pytest.raises(MismatchError, match="lambda_"):
        quick(resume=tmp_path, lambda_=0.5).fit(X)
    with pytest.raises(MismatchError, match="seed"):
        quick(resume=tmp_path, random_state=1).fit(X)
    with pytest.raises(MismatchError, match="rows"):
        quick(resume=tmp_path).fit(X + 1e-9)
    with pytest.raises(MismatchError, match="networks"):
        quick(resume=tmp_path, hidden=(8,)).fit(X)
    with pytest.raises(MismatchError, match="further on"):
        quick(resume=tmp_path, epochs=2).fit(X)
    with pytest.raises(MismatchError, match="further on"):
        quick(resume=tmp_path, pretrain_epochs=6).fit(X)
    path = tmp_path / STATE
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FileFormatError, match="can not be read"):
        quick(resume=tmp_path).fit(X)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import numpy as np
from neuralize import _training
from neuralize.deep_kmeans import DeepKMeans

kept, epoch = _training.write_tensors, []
def write(*args, **options):
    # killed with a part of the state on disk, before it takes the place of the last one
    epoch.append(1)
    if len(epoch) == {at}:
        (args[0].parent / ".state.safetensors.part").write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    kept(*args, **options)
_training.write_tensors = write
DeepKMeans(**{given!r}, resume={resume!r}).fit(np.load({rows!r}))
"""


@pytest.mark.slow
def test_resume_after_kill(tmp_path: Path) -> None:
    """Killed twice on the way: while pre-training, and in the first epoch of joint training."""
    X, _ = blobs()
    folder, rows = tmp_path / "run", tmp_path / "rows.npy"
    np.save(rows, X)
    for at, epochs in ((3, 2), (4, 4)):
        script = SCRIPT.format(root=str(ROOT), at=at, resume=str(folder), rows=str(rows), given=QUICK)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert len(read_tensors(folder / STATE, KIND)[1]["history"]) == epochs
    assert same(quick(resume=folder).fit(X), quick().fit(X))
    assert [p.name for p in folder.iterdir()] == [STATE]


# ---------------------------------------------------------------- accelerators


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    X, y = blobs()
    cpu, gpu = (quick(device=d, pretrain_epochs=30, epochs=10).fit(X) for d in ("cpu", "cuda"))
    assert next(gpu.encoder_.parameters()).device.type == "cuda"
    assert np.allclose(gpu.loss_curve_[:3], cpu.loss_curve_[:3], rtol=1e-3)
    assert (gpu.predict(X) == gpu.labels_).all()
    assert adjusted_rand_score(y, gpu.labels_) > 0.9


# ---------------------------------------------------------------- scikit-learn


def test_check_estimator() -> None:
    est = DeepKMeans(2, hidden=(8,), pretrain_epochs=2, epochs=2, n_init=1, random_state=0, learning_rate=1e-2)
    results = check_estimator(est, expected_failed_checks=EXPECTED_FAILED, on_skip=None, on_fail=None)
    failed = {r["check_name"]: r["exception"] for r in results if r["status"] == "failed"}
    assert not failed
    assert {r["check_name"] for r in results if r["status"] == "xfail"} == set(EXPECTED_FAILED)
