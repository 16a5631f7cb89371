"""Linear operations: push (forward), pull (transposed), and the weight product.

Everything a rule needs of a linear layer. The weight is an argument, so that
any modified version of it runs through the same operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONV_T = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@dataclass(frozen=True)
class LinearOp:
    """A dense product over the last axis: x (..., I), weight (O, I)."""

    transpose_weight: bool = False  # x @ W with W (I, O)

    layer_type: type = nn.Linear

    @property
    def out_axis(self) -> int:
        return 1 if self.transpose_weight else 0

    def push(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        """The layer's output before any activation."""
        return F.linear(x, w.t() if self.transpose_weight else w, b)

    def pull(self, s: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        return torch.matmul(s, w.t() if self.transpose_weight else w)

    def wgrad(self, x: Tensor, s: Tensor, shape: torch.Size) -> Tensor:
        x2, s2 = x.reshape(-1, x.shape[-1]), s.reshape(-1, s.shape[-1])
        return x2.t() @ s2 if self.transpose_weight else s2.t() @ x2

    def pull_and_wgrad(self, x: Tensor, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Both products back; w is the weight of the pull."""
        return self.pull(s, w, x.shape), self.wgrad(x, s, w.shape)

    def spread(self, b: Tensor) -> Tensor:
        """A bias, shaped to broadcast over the layer's output."""
        return b

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        return w * (scale if self.transpose_weight else scale[:, None])

    def scale_inputs(self, w: Tensor, scale: Tensor) -> Tensor:
        return w * (scale[:, None] if self.transpose_weight else scale)

    def channel_axis(self, ndim: int) -> int:
        return ndim - 1


def _shaped(like: Tensor, shape: torch.Size) -> Tensor:
    """A tensor of which only the shape is read; on a CPU memory that nobody touches costs nothing."""
    if like.device.type == "cpu":
        return like.new_empty(shape)
    return like.new_empty(1).expand(shape)


@dataclass(frozen=True)
class ConvOp:
    """A convolution, transposed or not: x (N, C, ...)."""

    nd: int
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()  # more zero padding behind each axis ("same" with an odd total)

    @property
    def layer_type(self) -> type:
        return (_CONV_T if self.transposed else _CONV)[self.nd]

    @property
    def out_axis(self) -> int:
        return 1 if self.transposed else 0

    @property
    def cuts(self) -> bool:
        """Whether outputs at the border have fewer inputs than those inside."""
        return self.transposed or any(self.padding) or any(self.tail)

    def push(self, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        if b is not None and b.ndim > 1:  # a plane: one bias per output position
            return self.push(x, w).add_(b)
        out_pad = self.output_padding or (0,) * self.nd
        z: Tensor = torch.ops.aten.convolution.default(
            self._extend(x), w, b, self.stride, self.padding, self.dilation, self.transposed, out_pad, self.groups
        )
        return z

    def pull(self, s: Tensor, w: Tensor, shape: torch.Size) -> Tensor:
        full = torch.Size([*shape[:2], *(n + t for n, t in zip(shape[2:], self.tail or (0,) * self.nd, strict=True))])
        x = _shaped(s, full)
        out = self._backward(s, x, w, (True, False, False))[0]
        return out if full == shape else out[tuple(slice(n) for n in shape)]

    def _extend(self, x: Tensor) -> Tensor:
        if not any(self.tail):
            return x
        return F.pad(x, [p for t in reversed(self.tail) for p in (0, t)])

    def wgrad(self, x: Tensor, s: Tensor, shape: torch.Size) -> Tensor:
        w = _shaped(s, shape)
        return self._backward(s, self._extend(x), w, (False, True, False))[1]

    def pull_and_wgrad(self, x: Tensor, s: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Both products back in one call, which reads s once; w is the weight of the pull."""
        extended = self._extend(x)
        result, weights, _ = self._backward(s, extended, w, (True, True, False))
        return result if extended is x else result[tuple(slice(n) for n in x.shape)], weights

    def _backward(
        self, s: Tensor, x: Tensor, w: Tensor, mask: tuple[bool, bool, bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        out_pad = self.output_padding or (0,) * self.nd
        out: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward.default(
            s, x, w, None, self.stride, self.padding, self.dilation, self.transposed, out_pad, self.groups, mask
        )
        return out

    def spread(self, b: Tensor) -> Tensor:
        return b if b.ndim > 1 else b.reshape(-1, *(1,) * self.nd)

    def scale_outputs(self, w: Tensor, scale: Tensor) -> Tensor:
        if not self.transposed:
            return w * scale.reshape(-1, *(1,) * (w.ndim - 1))
        # weight is (I, O / groups, ...): output channel g * (O / groups) + o
        per_group = scale.reshape(self.groups, 1, w.shape[1], *(1,) * self.nd)
        return (w.reshape(self.groups, -1, *w.shape[1:]) * per_group).reshape(w.shape)

    def scale_inputs(self, w: Tensor, scale: Tensor) -> Tensor:
        if self.transposed:
            return w * scale.reshape(-1, *(1,) * (w.ndim - 1))
        # weight is (O, I / groups, ...): input channel g * (I / groups) + i
        per_group = scale.reshape(self.groups, 1, w.shape[1], *(1,) * self.nd)
        return (w.reshape(self.groups, -1, *w.shape[1:]) * per_group).reshape(w.shape)

    def channel_axis(self, ndim: int) -> int:
        return 1


LinearLike = LinearOp | ConvOp
