"""Reference samples: fingerprints that know data from other data, and draws that are random and reproducible."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from compress._reference import asked_with, digests_of, fingerprint, pool_of, refuse_shared
from lrp.errors import InputError


def samples(n: int = 30, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 5, 5, generator=generator), torch.arange(n) % 3


def batches(x: Tensor, y: Tensor, size: int) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


def test_a_fingerprint_does_not_depend_on_order_or_batches() -> None:
    x, y = samples()
    first = fingerprint(batches(x, y, 30))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert first[0] == 30
    assert fingerprint(batches(x, y, 7)) == first
    assert fingerprint(batches(x[order], y[order], 4)) == first
    assert fingerprint(DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)) == first


@pytest.mark.parametrize("change", ["value", "label", "swap of labels", "one more", "one twice", "dtype", "no labels"])
def test_a_fingerprint_tells_other_data(change: str) -> None:
    x, y = samples()
    first = fingerprint([(x, y)])
    x, y = x.clone(), y.clone()
    other: Any = [(x, y)]
    if change == "value":
        x[3, 1, 2, 2] += 1e-6
    elif change == "label":
        y[3] += 1
    elif change == "swap of labels":
        y[[0, 1]] = y[[1, 0]]
    elif change == "one more":
        other = [(x, y), (torch.zeros(1, 2, 5, 5), y[:1])]
    elif change == "one twice":
        x[1], y[1] = x[0], y[0]
    elif change == "dtype":
        other = [(x.double(), y)]
    else:
        other = [x]
    assert fingerprint(other) != first


def test_large_samples_are_told_by_values_spread_over_them() -> None:
    x = torch.zeros(2, 3, 100, 100)
    first = digests_of([x])
    assert first[0] == first[1]
    x[1] += torch.linspace(0, 1, 100)[:, None]
    assert digests_of([x])[0] == first[0] != digests_of([x])[1]


def test_functions_are_told_by_what_they_do() -> None:
    def by(threshold: float) -> Any:
        return lambda model: threshold

    assert asked_with(by(0.5)) == asked_with(by(0.5))
    assert asked_with(by(0.5)) != asked_with(by(0.6))
    assert asked_with([samples()]) == fingerprint([samples()])


class Counted(Dataset[tuple[Tensor, int]]):
    """A map-style data set that counts what is read."""

    def __init__(self, targets: bool) -> None:
        self.x, y = samples()
        self.y = y.tolist()
        if targets:
            self.targets = self.y
        self.reads: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.reads[i] += 1
        return self.x[i], self.y[i]


def test_pools_of_all_forms_hold_the_same_samples() -> None:
    x, y = samples()
    rows = [4, 17, 0, 29]
    for pool in (pool_of((x, y)), pool_of(batches(x, y, 7)), pool_of(Counted(True)), pool_of(Counted(False))):
        assert pool.count == 30
        assert pool.labels is not None
        assert pool.labels.tolist() == y.tolist()
        found = pool.batches(rows, 3)
        assert [len(b[1]) for b in found] == [3, 1]
        assert torch.equal(torch.cat([b[0] for b in found]), x[rows])
        assert torch.equal(torch.cat([b[1] for b in found]), y[rows])


def test_a_data_set_with_targets_is_only_read_where_it_is_drawn() -> None:
    data = Counted(True)
    pool = pool_of(data)
    pool.batches([2, 5])
    assert dict(data.reads) == {2: 1, 5: 1}


def test_several_inputs_and_no_labels() -> None:
    x, y = samples()
    pool = pool_of(((x, 2 * x), y))
    (a, b), labels = pool.batches([3, 4])[0]
    assert torch.equal(b, 2 * a)
    assert labels.tolist() == [0, 1]
    bare = pool_of([x[:20], x[20:]])
    assert bare.labels is None
    assert torch.equal(bare.batches([25])[0], x[[25]])
    assert len(set(bare.draw(8, (0, 1), True).tolist())) == 8


def test_draws_are_stratified_without_replacement_and_reproducible() -> None:
    y = torch.tensor([0] * 5 + [1] * 20 + [2] * 7)
    pool = pool_of((torch.randn(32, 3), y))
    seen = []
    for draw in range(50):
        rows = pool.draw(4, (7, 4, draw), True)
        assert len(set(rows.tolist())) == 12
        assert Counter(y[rows].tolist()) == {0: 4, 1: 4, 2: 4}
        assert rows.tolist() == pool.draw(4, (7, 4, draw), True).tolist()
        seen.append(frozenset(rows.tolist()))
    assert len(set(seen)) == 50
    assert frozenset(pool.draw(4, (8, 4, 0), True).tolist()) != seen[0]


def test_every_sample_is_drawn_equally_often() -> None:
    pool = pool_of((torch.randn(24, 3), torch.arange(24) % 2))
    counts = np.zeros(24)
    for draw in range(3000):
        counts[pool.draw(3, (0, draw), True)] += 1
    expected = 3000 * 3 / 12
    statistic = ((counts - expected) ** 2 / (expected * (1 - 3 / 12))).sum()  # near chi-square with 22 degrees
    assert statistic < 48.3  # its 99.9 % quantile


def test_common_is_the_expected_overlap_of_two_draws() -> None:
    y = torch.tensor([0] * 5 + [1] * 20)
    pool = pool_of((torch.randn(25, 3), y))
    shares = []
    for draw in range(2000):
        a, b = (set(pool.draw(3, (0, draw, k), True).tolist()) for k in range(2))
        shares.append(len(a & b) / 6)
    assert pool.common(3, True) == pytest.approx((3 / 5 + 3 / 20) / 2)
    assert np.mean(shares) == pytest.approx(pool.common(3, True), abs=4 * np.std(shares) / 2000**0.5)


def test_what_can_not_be_drawn_is_refused() -> None:
    pool = pool_of((torch.randn(8, 3), torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])))
    with pytest.raises(InputError, match="3 in class 0"):
        pool.check([2, 4], True)
    pool.check([2, 8], False)
    with pytest.raises(InputError, match="8 in all"):
        pool.check([9], False)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InputError, match="int >= 1"):
            pool.check([wrong], False)  # type: ignore[list-item]
    with pytest.raises(InputError, match="need labels"):
        pool_of([torch.randn(4, 2)]).check([1], True)
    with pytest.raises(InputError, match="labels throughout"):
        pool_of([(torch.randn(2, 2), torch.zeros(2, dtype=torch.int64)), torch.randn(2, 2)])


def test_labels_that_are_no_classes_are_refused() -> None:
    data = Counted(False)
    data.targets = [[0, 1]] * 30  # type: ignore[assignment]
    with pytest.raises(InputError, match="no classes"):
        pool_of(data)


def test_sets_that_share_samples_are_refused() -> None:
    x, y = samples(200)
    first, second = [(x[:100], y[:100])], [(x[100:], y[100:])]
    refuse_shared({"data": first, "validation": second, "test": None})
    refuse_shared({"data": first, "validation": lambda model: 1.0})
    with pytest.raises(InputError, match=r"validation and data are not apart.*the same object"):
        refuse_shared({"data": first, "validation": first})
    with pytest.raises(InputError, match=r"test and validation are not apart.*100 samples"):
        refuse_shared({"data": first, "validation": second, "test": batches(x[100:].clone(), y[100:], 9)})
    with pytest.raises(InputError, match="2 samples in common"):
        refuse_shared({"data": first, "validation": [(x[98:], y[98:])]})
    refuse_shared({"data": first, "validation": [(x[99:], y[99:])]})  # one duplicate in a hundred
