r"""Training of deep k-means: pre-training, joint training, Lloyd's steps, and the state on disk.

One run is a sequence of epochs. Every epoch draws its random numbers from a
seed of its own, so what the state has to hold is the networks, the optimiser's
moments, the centres and the history.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sklearn.cluster import kmeans_plusplus
from torch import Tensor, nn

from lrp._files import digest, read_tensors, write_tensors
from lrp.errors import ConvergenceError, DataError, FileFormatError, MismatchError

__all__ = ["Training", "encode", "lloyd", "nearest", "open_folder", "seeded", "stored_seed"]

KIND = "neuralize.DeepKMeans"
STATE = "state.safetensors"
_OTHER_RUN = "name another folder to start again, or delete this one if its training is not needed"
_CHUNK = 65536


def nearest(z: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(positions (n,) of the nearest centres, the lowest on ties; squared distances (n,))."""
    middle = centres.mean(0)
    c, x = centres - middle, z - middle
    index = torch.addmm(c.square().sum(1), x, c.T, alpha=-2).argmin(1)
    return index, (x - c[index]).square().sum(1)


def _sums(z: Tensor, index: Tensor, k: int) -> Tensor:
    """Sums of rows per cluster (k, L), in an order that does not vary from run to run."""
    out = z.new_zeros(k, z.shape[1])
    for rows, at in zip(torch.split(z, _CHUNK), torch.split(index, _CHUNK), strict=True):
        out += (at == torch.arange(k, device=z.device)[:, None]).to(z.dtype) @ rows
    return out


def lloyd(z: Tensor, centres: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Lloyd's algorithm from given centres, until assignments are stable.

    Parameters
    ----------
    z : Tensor (n, L)
    centres : Tensor (K, L)
    iterations : int
        At most.

    Returns
    -------
    centres : Tensor (K, L)
    index : LongTensor (n,)
        Nearest of these centres.
    distance : Tensor (n,)
        Squared.
    reseeded : int
        How often an empty cluster was moved onto a row: one of those that are
        farthest from their centres.
    """
    k, reseeded = len(centres), 0
    index, distance = nearest(z, centres)
    for _ in range(iterations):
        member = index.clone()
        empty = torch.nonzero(torch.bincount(member, minlength=k) == 0)[:, 0]
        if len(empty):
            far = torch.sort(distance, descending=True, stable=True)
            rows = far.indices[: len(empty)][far.values[: len(empty)] > 0]
            member[rows] = empty[: len(rows)]
            reseeded += len(rows)
        count = torch.bincount(member, minlength=k)
        means = _sums(z, member, k) / count.clamp(min=1)[:, None]
        centres = torch.where(count[:, None] > 0, means, centres)
        before = index
        index, distance = nearest(z, centres)
        if torch.equal(before, index):
            break
    return centres, index, distance, reseeded


@contextlib.contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[int]:
    """torch's global random numbers from a seed of their own; afterwards they go on as if nothing had been."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield seed


def encode(
    encoder: nn.Module, X: npt.NDArray[Any], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Codes (n, L) of all rows, float64, batch by batch."""
    size = max(64, min(4096, 2**21 // max(1, X.shape[1])))
    out = []
    with torch.no_grad():
        for start in range(0, len(X), size):
            rows = torch.tensor(X[start : start + size]).to(device, dtype)
            out.append(encoder(rows.reshape(-1, *shape)).double())
    return torch.cat(out)


class Training:
    """One training run.

    Parameters
    ----------
    encoder, decoder : nn.Module
        Trained in place; they may share parameters.
    X : ndarray (n, D)
    shape : tuple of int
        Of one sample, as the encoder takes it.
    settings : dict
        All that the result depends on beside data and initial weights; JSON-able.
    device : torch.device
    folder : Path or None
        Where the state is kept.
    progress : bool
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        X: npt.NDArray[Any],
        shape: tuple[int, ...],
        settings: dict[str, Any],
        device: torch.device,
        folder: Path | None,
        progress: bool,
    ) -> None:
        self.X, self.shape, self.settings, self.device, self.progress = X, shape, settings, device, progress
        self.dtype = getattr(torch, settings["dtype"])
        self.identity = {
            "settings": settings,
            "data": _digest_rows(X) if folder is not None else "",
            "networks": _digest_networks(encoder, decoder) if folder is not None else "",
        }
        self.path = None if folder is None else folder / STATE
        self.encoder, self.decoder = encoder.to(device, self.dtype), decoder.to(device, self.dtype)
        self.nets = nn.ModuleDict({"encoder": self.encoder, "decoder": self.decoder})
        trained = [p for p in self.nets.parameters() if p.requires_grad]
        self.optimiser = torch.optim.Adam(trained, lr=settings["learning_rate"])
        self.size = _batch_size(settings["batch_size"], len(X))
        self.done = {"pretrain": 0, "joint": 0}
        self.centres: Tensor | None = None
        self.history: list[dict[str, Any]] = []
        # variances of rows and codes make the two losses comparable
        self.scales = {"rows": _total_variance(X) or 1.0, "codes": 1.0}
        # kept on an accelerator if it is no burden there
        resident = device.type != "cpu" and X.size * self.dtype.itemsize <= 2**30
        self.rows = torch.tensor(X).to(device, self.dtype) if resident else None

    # ------------------------------------------------------------------ the run

    def run(self, pretrain_epochs: int, epochs: int) -> None:
        """Train up to these numbers of epochs."""
        from tqdm import tqdm

        if self.path is not None and self.path.exists():
            self._load(pretrain_epochs, epochs)
        # None: hidden off a terminal
        hidden = None if self.progress else True
        with tqdm(total=pretrain_epochs + epochs, desc="deep k-means", unit="epoch", disable=hidden) as bar:
            bar.update(self.done["pretrain"] + self.done["joint"])
            while self.done["pretrain"] < pretrain_epochs:
                self._epoch("pretrain")
                bar.set_postfix(loss=f"{self.history[-1]['loss']:.4g}")
                bar.update()
            if self.centres is None:
                self._begin()
            while self.done["joint"] < epochs:
                self._epoch("joint")
                bar.set_postfix(loss=f"{self.history[-1]['loss']:.4g}")
                bar.update()

    def codes(self) -> Tensor:
        """Codes (n, L) of all rows as they are now, float64."""
        self.nets.eval()
        return encode(self.encoder, self.X, self.shape, self.dtype, self.device)

    def _begin(self) -> None:
        """Centres of the pre-trained codes: the best of several k-means++ starts."""
        z = self.codes()
        self.scales["codes"] = _variance(z) or 1.0
        k, best = self.settings["n_clusters"], math.inf
        for start in range(self.settings["n_init"]):
            seed = int(np.random.SeedSequence((self.settings["seed"], 2, start)).generate_state(1)[0])
            first, _ = kmeans_plusplus(z.cpu().numpy(), k, random_state=seed)
            centres, _, distance, _ = lloyd(z, torch.tensor(first).to(z), 300)
            inertia = float(distance.sum())
            if inertia < best:
                best, self.centres = inertia, centres
        if self.centres is None:
            raise self._diverged()
        self._save()

    def _batch(self, rows: npt.NDArray[Any]) -> Tensor:
        if self.rows is not None:
            x = self.rows[torch.from_numpy(rows).to(self.device)]
        else:
            x = torch.from_numpy(self.X[rows]).to(self.device, self.dtype)
        return x.reshape(-1, *self.shape)

    def _epoch(self, phase: str) -> None:
        number = self.done[phase]
        joint = phase == "joint"
        centres = None
        if joint:
            assert self.centres is not None
            centres = self.centres.to(self.dtype)
        lambda_ = self.settings["lambda_"]
        total = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.nets.train()
        with seeded(self.device, self.settings["seed"], int(joint), number) as seed:
            order = np.random.default_rng(seed).permutation(len(self.X))
            # batches of nearly equal size: a last batch of one row would break batch normalisation
            for rows in np.array_split(order, -(-len(order) // self.size)):
                x = self._batch(rows)
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings["mixed_precision"]):
                    z = self.encoder(x)
                    y = self.decoder(z)
                z, y = z.to(x.dtype), y.to(x.dtype)
                loss = reconstruction = (y.flatten(1) - x.flatten(1)).square().sum(1).mean() / self.scales["rows"]
                within = torch.zeros_like(loss)
                if centres is not None:
                    own = centres[nearest(z.detach(), centres)[0]]
                    within = (z - own).square().sum(1).mean() / self.scales["codes"]
                    loss = reconstruction + lambda_ / 2 * within
                self.optimiser.zero_grad()
                loss.backward()
                self.optimiser.step()
                total += len(rows) * torch.stack([reconstruction.detach(), within.detach()]).double()
        first, second = (total / len(order)).tolist()
        entry = {"phase": phase, "loss": first + (lambda_ / 2 * second if joint else 0.0), "reconstruction": first}
        if not math.isfinite(entry["loss"]):
            raise self._diverged()
        if joint:
            z = self.codes()
            self.centres, _, _, reseeded = lloyd(z, self.centres, 10)  # type: ignore[arg-type]
            entry |= {"within": second, "spread": _variance(z) / self.scales["codes"], "reseeded": reseeded}
        self.done[phase] += 1
        self.history.append(entry)
        self._save()

    def _diverged(self) -> ConvergenceError:
        return ConvergenceError(
            "training diverged: the loss is not finite",
            expected="a finite loss in every epoch",
            got=f"NaN or infinity in epoch {sum(self.done.values()) + 1}",
            fix="scale the columns, for example with StandardScaler, or lower learning_rate",
        )

    # ------------------------------------------------------------------ state on disk

    def _save(self) -> None:
        if self.path is None:
            return
        tensors = {f"networks.{n}": t.detach().clone() for n, t in self.nets.state_dict().items()}
        for i, held in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{n}": t.detach().clone() for n, t in held.items()}
        if self.centres is not None:
            tensors["centres"] = self.centres
        meta = {"identity": self.identity, "done": self.done, "history": self.history, "scales": self.scales}
        write_tensors(self.path, KIND, tensors, meta, alone=True)

    def _load(self, pretrain_epochs: int, epochs: int) -> None:
        assert self.path is not None
        tensors, meta = read_tensors(self.path, KIND)
        try:
            identity, done = meta["identity"], {p: int(meta["done"][p]) for p in ("pretrain", "joint")}
            self._same(identity)
            begun = "centres" in tensors
            if (
                done["joint"] > epochs
                or done["pretrain"] > pretrain_epochs
                or (begun and done["pretrain"] < pretrain_epochs)
            ):
                raise MismatchError(
                    f"{self.path} is further on than what is asked for",
                    expected=f"at most {epochs} joint epochs after {pretrain_epochs} of pre-training",
                    got=f"{done['joint']} after {done['pretrain']}",
                    fix=f"ask for at least as many joint epochs, after the same pre-training; {_OTHER_RUN}",
                )
            networks = {n.removeprefix("networks."): t for n, t in tensors.items() if n.startswith("networks.")}
            self.nets.load_state_dict(networks)
            held: dict[int, dict[str, Tensor]] = {}
            for name, t in tensors.items():
                if name.startswith("optimiser."):
                    _, i, key = name.split(".")
                    held.setdefault(int(i), {})[key] = t
            fresh = self.optimiser.state_dict()
            self.optimiser.load_state_dict({"state": held, "param_groups": fresh["param_groups"]})
            self.centres = tensors["centres"].to(self.device) if "centres" in tensors else None
            self.done, self.history, self.scales = done, list(meta["history"]), dict(meta["scales"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if isinstance(error, MismatchError):
                raise
            raise FileFormatError(
                f"{self.path} holds no state of this training",
                expected="a file that resume= wrote",
                got=f"{type(error).__name__}: {error}",
                fix=_OTHER_RUN,
            ) from error

    def _same(self, theirs: dict[str, Any]) -> None:
        words = {"data": "rows (SHA-256)", "networks": "initial networks (SHA-256)"}
        pairs = [(words[k], self.identity[k], theirs[k]) for k in words]
        pairs = [(n, self.settings[n], theirs["settings"].get(n)) for n in self.settings] + pairs
        for name, ours, other in pairs:
            if ours != other:
                raise MismatchError(
                    f"{self.path} was left by another training: it differs in its {name}",
                    expected=str(ours),
                    got=str(other),
                    fix=f"fit the same rows with the same settings; {_OTHER_RUN}",
                )


def stored_seed(folder: Path) -> int | None:
    """The seed of the run whose state is in the folder."""
    path = folder / STATE
    if not path.exists():
        return None
    meta = read_tensors(path, KIND)[1]
    try:
        return int(meta["identity"]["settings"]["seed"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(
            f"{path} holds no state of a training",
            expected="a file that resume= wrote",
            got=f"{type(error).__name__}: {error}",
            fix=_OTHER_RUN,
        ) from error


def open_folder(path: Any) -> Path:
    """The folder of the state, made if its parent exists."""
    folder = Path(path)
    if folder.is_file() or not folder.absolute().parent.is_dir():
        raise DataError(
            "resume names no folder",
            expected="a folder, or a name for a new one in an existing folder",
            got=str(folder),
            fix="name a folder for the state of this training alone",
        )
    folder.mkdir(exist_ok=True)
    return folder


def _batch_size(size: int | str, n: int) -> int:
    return max(16, min(256, n // 20)) if isinstance(size, str) else size


def _variance(z: Tensor) -> float:
    """Mean squared distance of rows to their mean."""
    return float((z - z.mean(0)).square().sum(1).mean())


def _total_variance(X: npt.NDArray[Any]) -> float:
    """Mean squared distance of rows to their mean, without a copy of the table."""
    step = max(1, 2**22 // max(1, X.shape[1]))
    parts = [X[i : i + step] for i in range(0, len(X), step)]
    mean = sum(p.sum(0, dtype=np.float64) for p in parts) / len(X)
    return float(sum(((p - mean) ** 2).sum() for p in parts) / len(X))


def _digest_rows(X: npt.NDArray[Any]) -> str:
    step = max(1, 2**22 // max(1, X.shape[1]))
    parts = [digest({"": torch.tensor(X[i : i + step])}) for i in range(0, len(X), step)]
    return digest({}, f"{X.dtype} {X.shape} {parts}")


def _digest_networks(encoder: nn.Module, decoder: nn.Module) -> str:
    tensors = {f"encoder.{n}": t for n, t in encoder.state_dict().items()}
    tensors |= {f"decoder.{n}": t for n, t in decoder.state_dict().items()}
    return digest(tensors, f"{encoder} {decoder}")
