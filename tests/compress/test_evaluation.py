"""Accuracy, its interval, and who was hurt."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from compress.class_comparison import compare_classes, mcnemar
from compress.evaluation import Evaluation, evaluate, evaluator_of, wilson
from lrp import errors


class Table(nn.Module):
    """Logits looked up by the sample's number; notes in which mode it was asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.dropout = nn.Dropout(0.9)
        self.asked_in_training: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.asked_in_training.append(self.training or torch.is_grad_enabled())
        return self.dropout(self.logits[x])


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(4, (50,))


def batches(y: Tensor, size: int = 7) -> list[tuple[Tensor, Tensor]]:
    rows = torch.arange(len(y))
    return list(zip(rows.split(size), y.split(size), strict=True))


def test_equals_a_loop_over_samples(labels: Tensor) -> None:
    model = Table(torch.randn(50, 5)).train()
    model.dropout.eval()
    found = evaluate(model, batches(labels))
    right, loss, counts = 0, 0.0, np.zeros((5, 5), dtype=int)
    for z, y in zip(model.logits.tolist(), labels.tolist(), strict=True):
        k = z.index(max(z))
        right += k == y
        counts[y, k] += 1
        loss += math.log(sum(math.exp(v - z[y]) for v in z))
    assert (found.accuracy, found.count) == (right / 50, 50)
    assert found.loss == pytest.approx(loss / 50, rel=1e-12)
    assert found.confusion is not None
    assert found.confusion.tolist() == counts.tolist()
    assert {c.label: (c.correct, c.count) for c in found.per_class} == {
        k: (counts[k, k], counts[k].sum()) for k in range(5) if counts[k].sum()
    }
    assert len(found.per_class) == 4  # class 4 has no samples
    assert not any(model.asked_in_training)
    assert model.training
    assert not model.dropout.training


def test_does_not_depend_on_the_batches(labels: Tensor) -> None:
    model = Table(torch.randn(50, 4))
    one, many = evaluate(model, batches(labels, 50)), evaluate(model, batches(labels, 3))
    assert one.per_class == many.per_class
    assert one.loss == pytest.approx(many.loss, rel=1e-12)
    assert one.predictions is not None
    assert many.predictions is not None
    assert torch.equal(one.predictions, many.predictions)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (7, 20), (20, 20), (9178, 10000)])
@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
def test_wilson_is_scipys(k: int, n: int, level: float) -> None:
    reference = binomtest(k, n).proportion_ci(level, method="wilson")
    assert wilson(k, n, level) == pytest.approx((reference.low, reference.high), abs=1e-12)


def test_mcnemar_is_the_binomial_test() -> None:
    for lost in range(0, 60, 7):
        for gained in range(0, 60, 11):
            expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
            assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9)
    assert mcnemar(3000, 0) == 0.0  # no overflow


def test_who_was_hurt() -> None:
    y = torch.tensor([0] * 12 + [1] * 12 + [2] * 12)
    logits = 5 * torch.eye(3)[y]
    first = evaluate(Table(logits.clone()), batches(y), classes=["ash", "beech", "cedar"])
    worse = logits.clone()
    worse[12:22] = torch.tensor([5.0, 0.0, 0.0])  # ten beeches are taken for ashes
    worse[24] = torch.tensor([5.0, 0.0, 0.0])
    second = evaluate(Table(worse), batches(y), classes=["ash", "beech", "cedar"])
    found = compare_classes(first, second)
    assert [r.name for r in found] == ["beech", "cedar", "ash"]
    assert [(r.lost, r.gained) for r in found] == [(10, 0), (1, 0), (0, 0)]
    assert found[0].p_value == 2 / 2**10
    assert found[0].adjusted == 3 * 2 / 2**10  # Holm: the smallest of three
    assert [r.name for r in found.hurt()] == ["beech"]
    assert (found.overall.lost, found.overall.count) == (11, 36)
    assert str(found).splitlines()[1].split() == ["beech", "12", "1.0000", "0.1667", "-0.8333", "10", "0", "0.00586"]
    json.dumps(found.to_json())
    # the other way round nobody is hurt
    back = compare_classes(second, first)
    assert back.hurt() == ()
    assert back.overall.gained == 11


def test_holm_is_monotone_and_no_smaller_than_the_single_p_values(labels: Tensor) -> None:
    first, second = (evaluate(Table(torch.randn(50, 4)), batches(labels)) for _ in range(2))
    rows = compare_classes(first, second).rows
    pairs = sorted((r.p_value, r.adjusted) for r in rows)
    assert all(a >= p for p, a in pairs)
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)
    assert pairs[0][1] == min(1.0, len(rows) * pairs[0][0])


def test_comparing_different_samples_is_refused(labels: Tensor) -> None:
    model = Table(torch.randn(50, 4))
    first = evaluate(model, batches(labels))
    with pytest.raises(errors.MismatchError, match="different samples"):
        compare_classes(first, evaluate(model, batches(labels)[1:]))
    shuffled = batches(labels)[::-1]
    with pytest.raises(errors.MismatchError, match="without shuffling"):
        compare_classes(first, evaluate(model, shuffled))
    rows = compare_classes(first, evaluate(model, shuffled), paired=False)
    assert [(r.difference, r.p_value) for r in rows] == [(0.0, None)] * 4
    with pytest.raises(errors.InputError, match="no classes"):
        compare_classes(first, Evaluation(0.5))


def test_json(labels: Tensor) -> None:
    found = evaluate(Table(torch.randn(50, 4)), batches(labels))
    again = Evaluation.from_json(json.loads(json.dumps(found.to_json())))
    assert again == found
    assert again.correct is None
    assert again.confusion is None
    assert again.interval() == found.interval()
    rows = compare_classes(again, again)
    assert rows.overall.p_value is None
    assert "-" in str(rows)
    assert Evaluation.from_json(json.loads(json.dumps(Evaluation(0.25).to_json()))) == Evaluation(0.25)


def test_wrong_data_and_models(labels: Tensor) -> None:
    model = Table(torch.randn(50, 4))
    with pytest.raises(errors.TargetError, match=r"batch 3.*0 to 3.*7"):
        evaluate(model, [*batches(labels)[:3], (torch.arange(2), torch.tensor([0, 7]))])
    with pytest.raises(errors.InputError, match="labels"):
        evaluate(model, [torch.arange(3)])
    with pytest.raises(errors.InputError, match="no sample"):
        evaluate(model, [])
    with pytest.raises(errors.OutputError, match="classifier"):
        evaluate(Table(torch.randn(50, 1)), batches(labels))
    with pytest.raises(errors.OutputError, match="classifier"):
        evaluate(Table(torch.randn(50, 4, 2)), batches(labels))
    bad = torch.randn(50, 4)
    bad[30, 2] = math.nan
    with pytest.raises(errors.NonFiniteError, match=r"batch 4.*1 of 28"):
        evaluate(Table(bad), batches(labels))
    with pytest.raises(errors.InputError, match="4 names"):
        evaluate(model, batches(labels), classes=["a", "b"])
    assert model.training  # put back after an error too
    with pytest.raises(errors.InputError, match=r"Linear does not run on.*\(3, 5\)"):
        evaluate(nn.Linear(4, 2), [(torch.randn(3, 5), torch.tensor([0, 1, 0]))])


def test_class_names_by_label(labels: Tensor) -> None:
    found = evaluate(Table(torch.randn(50, 4)), batches(labels), classes={2: "two"})
    assert [c.name for c in found.per_class] == ["0", "1", "two", "3"]


def test_evaluator_of(labels: Tensor) -> None:
    model = Table(torch.randn(50, 4))
    assert evaluator_of(None) is None
    by_data = evaluator_of(batches(labels))
    assert by_data is not None
    assert by_data(model) == evaluate(model, batches(labels))
    modes = []

    def share(net: nn.Module) -> Any:
        modes.append(net.training)
        return answers.pop()

    ask = evaluator_of(share)
    assert ask is not None
    full = evaluate(model, batches(labels))
    answers: list[Any] = ["high", math.nan, True, full, torch.tensor(0.5), np.float32(0.25), 1]
    assert ask(model.train()) == Evaluation(1.0)
    assert ask(model) == Evaluation(0.25)
    assert ask(model) == Evaluation(0.5)
    assert ask(model) is full
    with pytest.raises(errors.InputError, match="bool"):
        ask(model)
    with pytest.raises(errors.NonFiniteError, match="nan"):
        ask(model)
    with pytest.raises(errors.InputError, match="str"):
        ask(model)
    assert modes == [False] * 7
    assert model.training
    for wrong in (0.5, (x for x in batches(labels))):
        with pytest.raises(errors.InputError):
            evaluator_of(wrong)
