"""Default autoencoders of :class:`neuralize.DeepKMeans`: fully connected for tables, convolutional for pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from lrp.errors import InputError

__all__ = ["convolutional", "fully_connected"]


def fully_connected(columns: int, latent: int, hidden: Sequence[int]) -> tuple[nn.Sequential, nn.Sequential]:
    """(encoder, decoder) of dense layers with ReLUs between them; codes and reconstructions are linear."""

    def stack(sizes: list[int]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for a, b in pairwise(sizes):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    sizes = [columns, *hidden, latent]
    return stack(sizes), stack(sizes[::-1])


def convolutional(shape: tuple[int, ...], latent: int, channels: Sequence[int]) -> tuple[nn.Sequential, nn.Sequential]:
    """(encoder, decoder) of 3 x 3 convolutions with stride 2 and one dense layer.

    The decoder mirrors the encoder with transposed convolutions, whose output
    padding restores odd sizes.

    Raises
    ------
    InputError
        If the shape is not (channels, height, width).
    """
    if len(shape) != 3:
        raise InputError(
            "the default network for pictures needs three axes",
            expected="input_shape=(channels, height, width)",
            got=str(shape),
            fix="pass such a shape, or an encoder and a decoder of your own",
        )
    depth, height, width = shape
    down: list[nn.Module] = []
    up: list[nn.Module] = []
    for wide in channels:
        half = ((height + 1) // 2, (width + 1) // 2)
        # a transposed convolution turns s into 2 s - 1
        odd = (height - (2 * half[0] - 1), width - (2 * half[1] - 1))
        down += [nn.Conv2d(depth, wide, 3, stride=2, padding=1), nn.ReLU()]
        up = [nn.ReLU(), nn.ConvTranspose2d(wide, depth, 3, stride=2, padding=1, output_padding=odd), *up]
        depth, (height, width) = wide, half
    inner = (depth, height, width)
    size = math.prod(inner)
    encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(size, latent))
    return encoder, nn.Sequential(nn.Linear(latent, size), nn.Unflatten(1, inner), *up)
