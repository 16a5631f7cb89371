"""A VGG-like network for CIFAR-10 and its training: ``python -m experiments.vgg train --data DIR -o FILE``.

Seven convolutions with batch norm and no residual sums, so that every filter can be cut: the setting in which the
paper's z+ scores have one sign. It learns from some of the first 45,000 training pictures; the other 5,000 are for
choices, and the test pictures are for the final numbers. A run that was stopped goes on from its last epoch.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

import compress
from experiments import data as sets
from experiments.models import IMAGENET_MEAN, IMAGENET_STD
from lrp.errors import FileFormatError

__all__ = ["VGG", "WIDTHS", "build", "correct", "folded", "load", "main", "save", "shifted", "train"]

#: filters of the convolutions in three stages, as wide as those of ResNet-20; a pooling ends each but the last
WIDTHS = ((16, 16), (32, 32), (64, 64, 64))
EPOCHS, RATE, BATCH, SEED = 6, 0.1, 125, 0
LEARNT = 25_000  # what two slow cores learn from within minutes; up to 45,000 serve nothing else


class VGG(nn.Module):
    """Stages of 3 x 3 convolutions with batch norm and ReLU, maximum pooling between them, mean, linear layer.

    Parameters
    ----------
    widths : sequence of sequence of int
        Filters of each convolution, by stage.
    classes : int
    """

    def __init__(self, widths: Sequence[Sequence[int]] = WIDTHS, classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for k, stage in enumerate(widths):
            layers += [nn.MaxPool2d(2)] if k else []
            for width in stage:
                layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                inputs = width
        self.features = nn.Sequential(*layers)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))
        return out


def build() -> VGG:
    """The network before training, for ``--model experiments.vgg:build``."""
    return VGG()


def shifted(x: Tensor) -> Tensor:
    """Every picture moved by up to four pixels and mirrored or not, by torch's global random state."""
    n, _, height, width = x.shape
    padded = F.pad(x, (4, 4, 4, 4))
    down, right = torch.randint(9, (2, n, 1))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


class _Moved(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches of moved pictures, asked for by lists of rows."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        return shifted(self.x[rows]).contiguous(memory_format=torch.channels_last), self.y[rows]


class _Batches(BatchSampler):
    """Rows in a new order in every epoch; the generator can be seen, so that a resumed training goes on with it."""

    def __init__(self, count: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        super().__init__(RandomSampler(range(count), generator=self.generator), BATCH, drop_last=True)


def train(
    x: Tensor,
    y: Tensor,
    *,
    widths: Sequence[Sequence[int]] = WIDTHS,
    epochs: int = EPOCHS,
    seed: int = SEED,
    device: torch.device | str = "cpu",
    resume: Path | None = None,
) -> VGG:
    """A network trained with a fixed seed, in evaluation mode.

    Products are in 16 bits, on a CPU too.

    Parameters
    ----------
    x, y : Tensor
        Normalised pictures (N, 3, H, W) and labels (N,).
    widths, epochs, seed, device
        Of the network and its training.
    resume : path, optional
        A file for the state after every epoch; it stays.
    """
    torch.manual_seed(seed)
    model = VGG(widths).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    loader = DataLoader(_Moved(x, y), sampler=_Batches(len(y), seed), batch_size=None)
    fit = compress.FineTune(loader, epochs=epochs, lr=RATE, weight_decay=5e-4, warmup=0.2, seed=seed)
    on_cpu = torch.device(device).type == "cpu"
    # no cache: casts of weights would outlive the steps that change them
    with torch.autocast("cpu", torch.bfloat16, enabled=on_cpu, cache_enabled=False):
        fit(model, resume=resume)
    trained: VGG = model.eval()
    return trained


def folded(model: VGG, dtype: torch.dtype = torch.float32) -> VGG:
    """A copy for fast passes: batch norms folded into the convolutions before them, channels last."""
    out = copy.deepcopy(model).eval()
    layers: list[Any] = []
    for layer in out.features:
        if isinstance(layer, nn.BatchNorm2d):
            layers[-1] = fuse_conv_bn_eval(layers[-1], layer)
        else:
            layers.append(nn.ReLU(inplace=True) if isinstance(layer, nn.ReLU) else layer)
    out.features = nn.Sequential(*layers)
    fast: VGG = out.to(dtype=dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fast


def correct(model: VGG, x: Tensor, y: Tensor, dtype: torch.dtype = torch.bfloat16, batch: int = 50) -> int:
    """How many of the pictures (N, 3, 32, 32) the model classifies as labelled."""
    fast = folded(model, dtype)
    device = model.linear.weight.device
    right = 0
    with torch.no_grad():
        for k in range(0, len(y), batch):
            given = x[k : k + batch].to(device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
            right += int((fast(given).float().argmax(1) == y[k : k + batch].to(device)).sum())
    return right


def save(model: VGG, path: Path, **about: object) -> None:
    """Weights as safetensors, with what is known about them; no pickle."""
    from safetensors.torch import save_file

    state = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    stages: list[list[int]] = [[]]
    for module in model.features:
        if isinstance(module, nn.MaxPool2d):
            stages.append([])
        elif isinstance(module, nn.Conv2d):
            stages[-1].append(module.out_channels)
    save_file(state, path, {"vgg": json.dumps({"widths": stages, "classes": model.linear.out_features, **about})})


def load(path: Path) -> VGG:
    """What :func:`save` wrote, in evaluation mode.

    Raises
    ------
    FileFormatError
        If the file is of something else.
    """
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        about = (file.metadata() or {}).get("vgg")
        if about is None:
            raise FileFormatError(
                f"{path} holds no VGG",
                expected="a file of experiments.vgg.save",
                got="safetensors without its description",
                fix="python -m experiments.vgg train -o FILE",
            )
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
    held = json.loads(about)
    model = VGG(held["widths"], held["classes"])
    model.load_state_dict(state)
    return model.eval()


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: ``python -m experiments.vgg train --data DIR -o FILE --device cuda``."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("stage", choices=("train",))
    parser.add_argument("--data", default=None)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--thousands", type=int, default=LEARNT // 1000, help="of pictures to learn from")
    parser.add_argument("--width", type=float, default=1.0, help="factor on the number of filters")
    args = parser.parse_args(arguments)
    widths = [[max(1, round(args.width * width)) for width in stage] for stage in WIDTHS]
    folder = sets.folder(args.data)

    def pictures(split: str, thousands: int) -> tuple[Tensor, Tensor]:
        raw, labels = sets.cifar10(folder, split, thousands)
        return sets.normalise(raw, IMAGENET_MEAN, IMAGENET_STD), torch.from_numpy(labels)

    x, y = pictures("train", args.thousands)
    state = args.output.with_name(f"{args.output.name}.state")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    model = train(x, y, widths=widths, epochs=args.epochs, seed=args.seed, device=args.device, resume=state)
    x, y = pictures("test", 10)
    share = correct(model, x, y) / len(y)
    save(model, args.output, epochs=args.epochs, seed=args.seed, pictures=1000 * args.thousands, test=share)
    state.unlink(missing_ok=True)
    print(f"{args.output}: {100 * share:.2f} % of the test pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
