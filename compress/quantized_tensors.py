"""Which tensors of a network are quantized, to how many bits, and why the others are not."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from compress.codebook import BITS
from lrp.errors import InputError

__all__ = ["choose_tensors"]


def choose_tensors(
    model: nn.Module,
    bits: int | Mapping[str, int] = 4,
    *,
    first: int | str | None = 8,
    last: int | str | None = 8,
    exclude: Iterable[str] | str = (),
) -> tuple[dict[str, int], dict[str, str]]:
    """Which tensors are quantized to how many bits, and why the others are not.

    Parameters
    ----------
    model : nn.Module
    bits : int or mapping
        For all, or by shell patterns of the tensor's or the layer's name: the
        first that fits decides, and what fits none stays.
    first, last : int, "float" or None
        Bits of the first and of the last layer, in the order in which the model
        holds them; None: as all others. A mapping of ``bits`` goes before.
    exclude : iterable of str, or str
        Shell patterns of tensors or layers that stay as they are.

    Returns
    -------
    bits, left_out : dict
        By parameter name, every floating-point tensor of the state in one of
        the two.

    Raises
    ------
    InputError
        If nothing is left to quantize, a pattern fits nothing, or ``bits``,
        ``first`` or ``last`` is none of these.

    Examples
    --------
    >>> import torch
    >>> from compress.quantized_tensors import choose_tensors
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.Conv2d(4, 4, 3), torch.nn.Linear(4, 2))
    >>> choose_tensors(net, 4)[0]
    {'0.weight': 8, '1.weight': 4, '2.weight': 8}
    """
    for which, end in (("first", first), ("last", last)):
        if end is not None and end != "float" and not _is_bits(end):
            raise InputError(
                f"{which} is no number of bits",
                expected=f"{BITS[0]} to {BITS[-1]}, 'float', or None for as many as all others",
                got=repr(end),
                fix="change it",
            )
    wrong = [n for n in (bits.values() if isinstance(bits, Mapping) else (bits,)) if not _is_bits(n)]
    if wrong:
        raise InputError(
            "bits is no number of bits",
            expected=f"{BITS[0]} to {BITS[-1]}, or such numbers by shell patterns of layers",
            got=repr(wrong[0]),
            fix="change it",
        )
    if not isinstance(exclude, (str, Iterable)) or not all(isinstance(p, str) for p in exclude):
        raise InputError(
            "exclude names no layers",
            expected="a shell pattern, or several",
            got=repr(exclude),
            fix="exclude='head.*'",
        )
    layers = {}
    seen: dict[int, str] = {}
    left_out = {}
    computed = set()
    first_names = {id(p): name for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if not isinstance(module, (_ConvNd, nn.Linear)):
            continue
        name = f"{path}.weight" if path else "weight"
        weight = module._parameters.get("weight")
        if parametrize.is_parametrized(module, "weight") or not isinstance(weight, Tensor):
            computed.add(path)
        elif not weight.numel():
            left_out[name] = "it has no entries"
        elif first_names[id(weight)] not in (name, seen.get(id(weight))):
            left_out[name] = f"it is {first_names[id(weight)]}, of no convolution or linear layer"
        elif seen.setdefault(id(weight), name) == name:
            layers[name] = path
    order = list(layers)
    patterns = (exclude,) if isinstance(exclude, str) else tuple(exclude)
    chosen: dict[str, int] = {}
    used = set()

    def fits(name: str, pattern: str) -> bool:
        hit = any(own == pattern or fnmatch.fnmatchcase(own, pattern) for own in (name, layers[name]))
        if hit:
            used.add(pattern)
        return hit

    ends = {order[0]: first, order[-1]: last} if len(order) > 1 else {}
    for name in order:
        if sum(fits(name, p) for p in patterns):  # every pattern is tried
            left_out[name] = "excluded"
        elif isinstance(bits, Mapping):
            hits = [n for p, n in bits.items() if fits(name, p)]
            if hits:
                chosen[name] = hits[0]
            else:
                left_out[name] = "no pattern of bits fits"
        elif ends.get(name) == "float":
            left_out[name] = "first layer" if name == order[0] else "last layer"
        else:
            end = ends.get(name)
            chosen[name] = bits if end is None else max(int(end), bits)
    unused = [p for p in (*patterns, *(bits if isinstance(bits, Mapping) else ())) if p not in used]
    if unused:
        raise InputError(
            f"the pattern '{unused[0]}' fits no layer",
            expected=f"names such as {', '.join(order[:3])}",
            got=repr(unused[0]),
            fix="use shell patterns, 'layer1.*', of convolutions and linear layers",
        )
    if not chosen:
        raise InputError(
            "there is nothing to quantize",
            expected="at least one weight of a convolution or linear layer",
            got=f"{len(order)} such weights, {len(left_out)} of them left out, {len(computed)} computed from others",
            fix="exclude less; torch.nn.utils.parametrize.remove_parametrizations makes computed weights plain",
        )
    for name, t in model.state_dict().items():
        if name not in chosen and isinstance(t, Tensor) and t.is_floating_point():
            left_out.setdefault(name, _why(name, t, computed))
    return chosen, left_out


def _is_bits(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in BITS


def _why(name: str, t: Tensor, computed: set[str]) -> str:
    if any(path and name.startswith(f"{path}.") for path in computed):
        return "the layer's weight is computed from it"
    if t.dim() <= 1:
        return "bias, norm or statistics"
    return "not the weight of a convolution or linear layer"
