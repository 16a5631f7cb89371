"""The search for a latency: what is returned was within it, no block more is, and what was measured is said."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from pruned import EXAMPLE, Net, make_net

import compress
from compress import _latency_search
from compress._latency_search import _removed
from compress.plan import PruningPlan
from compress.ranking import Block, Ranking, group_scores, order_of

onnx = pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxscript", reason="needs the onnx extra")

ROUND = 4


class Board:
    """Times follow the weights, with something for the network itself; asked for whole networks, and for layers."""

    name = "board 7"

    def __init__(self, fails_at: int = 0) -> None:
        self.asked: list[str] = []
        self.fails_at = fails_at

    def __call__(self, path: Path) -> float:
        self.asked.append(path.name)
        if len(self.asked) == self.fails_at:
            raise TimeoutError("the board does not answer")
        return weights_in(path)


def weights_in(path: Path) -> float:
    return 0.2 + sum(math.prod(t.dims) for t in onnx.load(path).graph.initializer) / 1e3


@pytest.fixture(scope="module")
def net() -> Net:
    return make_net()


def plan_for(net: Net, target: str, board: Board) -> PruningPlan:
    return compress.plan_pruning(
        net, EXAMPLE, criterion="weight", target=compress.Target(latency_ms=target), meter=board, round_to=ROUND,
        floor=0.0, progress=False,
    )  # fmt: skip


def blocks_of(net: Net, plan: PruningPlan) -> list[Block]:
    ranking = Ranking.from_json(plan.settings["ranking"])
    scores = compress.score(net, EXAMPLE, criterion="weight", structure=plan.structure)
    return order_of(group_scores(scores, plan.structure, ranking), plan.structure, ranking)


def time_of(net: Net, plan: PruningPlan, tmp_path: Path) -> float:
    return Board()(compress.export_onnx(plan.apply(net), tmp_path / "net.onnx", EXAMPLE))


@pytest.mark.slow
def test_no_block_more_fits(net: Net, tmp_path: Path) -> None:
    whole = Board()(compress.export_onnx(net, tmp_path / "net.onnx", EXAMPLE))
    board = Board()
    plan = plan_for(net, f"{0.55 * whole:.4f}ms", board)
    told = plan.settings["latency_ms"]
    assert told["after"] == pytest.approx(time_of(net, plan, tmp_path))
    assert told["after"] <= told["limit"]
    assert told["groups_untried"] == 0
    gone = [b for b in blocks_of(net, plan) if set(b.channels) <= set(plan.removed.get(b.group, ()))]
    assert _removed(gone) == plan.removed
    for group in plan.removed:
        last = [b for b in gone if b.group == group][-1]
        more = plan.keep(group, last.channels)
        assert time_of(net, more, tmp_path) > told["limit"], group
    assert told["networks_measured"] == board.asked.count("model.onnx") <= 34
    assert told["layers_measured"] == board.asked.count("layer.onnx")


@pytest.mark.slow
def test_what_was_not_tried_is_said(net: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_latency_search, "_TRIED", 0)
    whole = Board()(compress.export_onnx(net, tmp_path / "net.onnx", EXAMPLE))
    plan = plan_for(net, f"{0.55 * whole:.4f}ms", Board())
    assert plan.settings["latency_ms"]["groups_untried"] == len(plan.removed) > 0


@pytest.mark.slow
def test_a_noisy_meter_does_not_exceed_what_it_said(net: Net, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    said: list[float] = []

    def meter(path: Path) -> float:
        said.append(weights_in(path) * float(1 + 0.1 * torch.rand((), generator=noise)))
        return said[-1]

    whole = Board()(compress.export_onnx(net, tmp_path / "net.onnx", EXAMPLE))
    options = {"criterion": "weight", "round_to": ROUND, "meter": meter, "progress": False}
    plan = compress.plan_pruning(net, EXAMPLE, target=compress.Target(latency_ms=f"{0.7 * whole:.4f}ms"), **options)
    told = plan.settings["latency_ms"]
    assert told["after"] in said
    assert told["after"] <= told["limit"]


@pytest.mark.parametrize(("call", "words"), [(1, "the whole network, after 0 networks"), (4, "the layer '")])
def test_a_meter_that_fails_says_at_what(net: Net, call: int, words: str) -> None:
    with pytest.raises(TimeoutError, match="the board does not answer") as caught:
        plan_for(net, "60%", Board(call))
    (note,) = caught.value.__notes__
    assert note.startswith("the meter 'board 7' was asked for ")
    assert words in note
