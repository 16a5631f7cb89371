"""Which tensors are quantized: chosen by name, with a reason for every one that is not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import compress
from compress.quantized_tensors import choose_tensors
from lrp.errors import InputError


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)
    )


def test_every_tensor_is_quantized_or_named_with_a_reason() -> None:
    """Traps 17 and 18: matched by name, nothing is left out in silence."""
    net = network()
    chosen, left_out = choose_tensors(net, 4, exclude=["3"])
    assert chosen == {"0.weight": 8, "6.weight": 8}
    floats = {n for n, t in net.state_dict().items() if t.is_floating_point()}
    assert not set(chosen) & set(left_out)
    assert set(chosen) | set(left_out) == floats
    assert left_out["3.weight"] == "excluded"
    assert left_out["1.running_mean"] == left_out["3.bias"] == "bias, norm or statistics"


def test_weights_of_other_layers_stay_and_are_told() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    chosen, left_out = choose_tensors(net, 4)
    assert list(chosen) == ["1.weight", "2.weight"]
    assert left_out["0.weight"] == "not the weight of a convolution or linear layer"


def test_bits_by_pattern() -> None:
    chosen, left_out = choose_tensors(network(), {"3": 2, "6.*": 5})
    assert chosen == {"3.weight": 2, "6.weight": 5}
    assert left_out["0.weight"] == "no pattern of bits fits"
    with pytest.raises(InputError, match="fits no layer"):
        choose_tensors(network(), {"layer9": 2})
    with pytest.raises(InputError, match="nothing to quantize"):
        choose_tensors(nn.Sequential(nn.BatchNorm2d(3)), 4)


@pytest.mark.parametrize("wrong", [1, 9, 0, -3, 3.5, True, "4", None, [4], {"0": 4, "3": 99}])
def test_bits_are_checked_also_where_the_ends_hide_them(wrong: Any) -> None:
    """First and last layer take 8: in a network of two layers no other number is ever asked for."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(InputError, match="bits is no number of bits"):
        choose_tensors(net, wrong)


def test_exclude_is_checked() -> None:
    for wrong in (5, [5], None):
        with pytest.raises(InputError, match="exclude names no layers"):
            choose_tensors(network(), 4, exclude=wrong)  # type: ignore[arg-type]  # that is the mistake


def test_names_that_look_like_patterns_fit_themselves() -> None:
    net = nn.ModuleDict({"a[0]": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 2)})
    assert choose_tensors(net, {"a[0].weight": 3, "*": 5})[0] == {"a[0].weight": 3, "b.weight": 5, "c.weight": 5}


def test_a_layer_that_is_an_embedding_elsewhere_stays_and_is_told() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.l, self.o = nn.Embedding(3, 4), nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
            self.o.weight = self.e.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.o(torch.relu(self.l(self.e(x)))).mean(1)  # type: ignore[no-any-return]  # a tensor

    chosen, left_out = choose_tensors(Tied(), 4)
    assert list(chosen) == ["l.weight"]
    assert "e.weight" in left_out["o.weight"]
    x = torch.randint(3, (64, 5))
    for options in (
        {"method": "rtn"},
        {"train": False},
        {"train": compress.FineTune((x, x[:, 0]), epochs=1, progress=False)},
    ):
        found = compress.quantize(Tied(), bits=4, progress=False, **options).model  # type: ignore[arg-type]  # of many kinds
        assert found.o.weight is found.e.weight
        assert len(found.l.weight.unique()) <= 16


def test_a_layer_without_entries_is_told() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: nothing to initialise
        net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    assert choose_tensors(net, 4)[1]["1.weight"] == "it has no entries"


def test_first_and_last() -> None:
    assert choose_tensors(network(), 4, first=None, last="float")[0] == {"0.weight": 4, "3.weight": 4}
    assert choose_tensors(network(), 4, first="float", last=None)[1]["0.weight"] == "first layer"
    assert choose_tensors(network(), 4, first=None, last="float")[1]["6.weight"] == "last layer"
    assert choose_tensors(network(), 8, first=4, last=4)[0]["0.weight"] == 8  # never fewer than the others
    assert choose_tensors(network(), 3, first=5, last=6)[0] == {"0.weight": 5, "3.weight": 3, "6.weight": 6}
    assert choose_tensors(nn.Linear(3, 3), 4, first="float", last=2)[0] == {"weight": 4}  # one layer is neither


@pytest.mark.parametrize("which", ["first", "last"])
@pytest.mark.parametrize("wrong", [1, 9, 0, -4, True, False, "int8", "", 4.5, (8,)])
def test_bits_of_the_ends_are_checked(which: str, wrong: Any) -> None:
    """Also where a mapping or a single layer leaves them unused."""
    for net, bits in ((network(), 4), (network(), {"3": 4}), (nn.Linear(3, 3), 4)):
        options: dict[str, Any] = {which: wrong}
        with pytest.raises(InputError, match=rf"{which} is no number of bits.*2 to 8, 'float', or None") as caught:
            choose_tensors(net, bits, **options)
        assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize("right", [*range(2, 9), "float", None])
def test_bits_of_the_ends(right: Any) -> None:
    for first, last in ((right, None), (None, right)):
        expected = {"0.weight": 2, "3.weight": 2, "6.weight": 2}
        end = "0.weight" if last is None else "6.weight"
        if right == "float":
            del expected[end]
        elif right is not None:
            expected[end] = right
        assert choose_tensors(network(), 2, first=first, last=last)[0] == expected


def test_one_pattern_may_stand_alone() -> None:
    """A string is one pattern, not its letters."""
    net = nn.ModuleDict({"body": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 2)})
    for pattern in ("body", "body.weight", "bo*"):
        assert choose_tensors(net, 4, exclude=pattern) == choose_tensors(net, 4, exclude=[pattern])
        assert list(choose_tensors(net, 4, exclude=pattern)[0]) == ["b.weight", "head.weight"]
    with pytest.raises(InputError, match="'neck' fits no layer"):
        choose_tensors(net, 4, exclude="neck")
    with pytest.raises(InputError, match="'neck' fits no layer"):
        choose_tensors(net, 4, exclude=("body", "neck"))


def test_shared_and_computed_weights() -> None:
    first = nn.Linear(4, 4)
    tied = nn.Sequential(first, nn.Linear(4, 4), first)
    assert list(choose_tensors(tied, 4)[0]) == ["0.weight", "1.weight"]
    normed = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    chosen, left_out = choose_tensors(normed, 4)
    assert list(chosen) == ["1.weight"]
    assert any("computed" in why for why in left_out.values())
