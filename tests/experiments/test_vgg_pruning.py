"""The VGG-like network and how few pictures a criterion needs: training, passes, tiny runs, verdicts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from experiments import vgg
from experiments.papers import vgg_pruning as runs
from experiments.papers import vgg_report as report
from experiments.papers.few_shot_pruning import Pictures
from experiments.study import Study
from lrp.errors import FileFormatError

TINY: dict[str, Any] = {
    **runs.EXPERIMENT.quick,
    "vgg": {"widths": [[6], [8]], "epochs": 2, "thousands": 1, "seed": 0},
    "per_class": [1, 3],
    "nets": {"vgg": {"criteria": ["random", "weight L1", "LRP z+"], "rates": [0.3], "draws_per_seed": 1.0}},
    "validation": {"draws": 1, "per_class": 2, "pictures": 60},
    "test_pictures": 100,
}


def synthetic(count: int, seed: int = 0) -> Pictures:
    """The class is a colour and a pattern under noise."""
    generator = torch.Generator().manual_seed(seed)
    marks = torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(7)).expand(-1, -1, 32, 32)
    y = torch.arange(count) % 10
    return Pictures(marks[y] + 0.3 * torch.randn(count, 3, 32, 32, generator=generator), y)


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Synthetic pictures in place of CIFAR-10: 1,000 to learn from, 100 for validation."""
    made = {"train": synthetic(1100), "test": synthetic(200, 1)}
    monkeypatch.setattr(runs, "pictures", lambda folder, split: made[split])
    monkeypatch.setattr(runs, "REFERENCE", slice(0, 1000))
    monkeypatch.setattr(runs, "VALIDATION", slice(1000, 1100))


def trembling(widths: list[list[int]]) -> vgg.VGG:
    """Batch norms that do something, some of whose biases are positive."""
    torch.manual_seed(0)
    model = vgg.VGG(widths).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight, module.bias):
                assert tensor is not None
                nn.init.normal_(tensor)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model


def test_moved_pictures_by_single_pixels() -> None:
    x = torch.arange(2.0 * 6 * 5).reshape(2, 1, 6, 5) + 1
    torch.manual_seed(3)
    got = vgg.shifted(x)
    torch.manual_seed(3)
    down, right = torch.randint(9, (2, 2, 1))
    kept = torch.rand(2, 1) < 0.5
    for n in range(2):
        for i in range(6):
            for j in range(5):
                column = j if bool(kept[n]) else 4 - j
                a, b = int(down[n]) + i - 4, int(right[n]) + column - 4
                inside = 0 <= a < 6 and 0 <= b < 5
                assert got[n, 0, i, j] == (x[n, 0, a, b] if inside else 0)
    assert got.shape == x.shape


def test_folded_passes_equal_torch() -> None:
    model = trembling([[5, 6], [7]])
    x = torch.randn(30, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        got = vgg.folded(model)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in vgg.folded(model).modules())
    assert vgg.correct(model, x, expected.argmax(1), torch.float32, batch=7) == 30
    assert vgg.correct(model, x, (expected.argmax(1) + 1) % 10, torch.float32) == 0


def test_training_learns_and_a_stop_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = synthetic(500)
    how: dict[str, Any] = {"widths": [[8], [8]], "epochs": 4}
    whole = vgg.train(part.x, part.y, **how)
    settled: Any = compress.reestimate(whole, [(part.x, part.y)])  # 16 batches are few for running means
    assert vgg.correct(settled, part.x, part.y) > 250  # chance gives 50
    calls = []
    moved = vgg.shifted

    def stopped(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 6:  # in the second of four epochs of four batches
            raise KeyboardInterrupt
        return moved(x)

    state = tmp_path / "state"
    monkeypatch.setattr(vgg, "shifted", stopped)
    with pytest.raises(KeyboardInterrupt):
        vgg.train(part.x, part.y, **how, resume=state)
    again = vgg.train(part.x, part.y, **how, resume=state)
    assert len(calls) == 6 + 12
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    vgg.save(whole, tmp_path / "vgg.safetensors", test=0.5)
    loaded = vgg.load(tmp_path / "vgg.safetensors")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in whole.state_dict().items())
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(FileFormatError):
        vgg.load(tmp_path / "other.safetensors")


def test_published_mask_leaves_constants_and_the_exact_one_is_the_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "REFERENCE", slice(0, 40))
    model, data = trembling([[5], [6]]), synthetic(40)
    bench = runs.Bench.of(model, vgg.correct, data)
    plan = bench.plan(bench.score("weight:l1", []), "mean", 0.4)
    # by hand: the smallest sums of magnitudes, over the mean of their layer
    convs = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    sums = {n: [float(w.detach().abs().sum()) for w in m.weight] for n, m in convs.items()}
    order = sorted((v / (sum(own) / len(own)), n, k) for n, own in sums.items() for k, v in enumerate(own))
    gone = sorted((n, k) for _, n, k in order[:5])  # 4.4 of 11 asked for
    assert sorted((n, k) for n, ks in plan.removed.items() for k in ks) == gone
    mask = runs.published_mask(model, plan.removed, {n: n for n in convs})
    name, k = gone[0]
    features = list(model.features)
    at = features.index(convs[name])
    norm: Any = features[at + 1]
    with torch.no_grad():
        scale = norm.weight[k] / (norm.running_var[k] + norm.eps) ** 0.5
        constant = float(norm.bias[k] - scale * norm.running_mean[k])
        seen: Any = mask.features[: at + 2](data.x[:3])[:, k]
        torch.testing.assert_close(seen, torch.full_like(seen, constant))
    row = runs._mask("vgg", "weight L1", 0.4, lambda net: bench, lambda: data)
    assert row["exact"] < 1e-5 * row["largest_logit"]
    assert row["published"] > 1e-3 * row["largest_logit"]


def test_a_tiny_run_goes_on_and_counts_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    experiment = dataclasses.replace(runs.EXPERIMENT, quick={**TINY, "seeds": 1})
    assert Study(experiment, tmp_path, quick=True, data=tmp_path).run()
    first = Study(experiment, tmp_path, quick=True, data=tmp_path)
    # validation: random, and 2 criteria under 4 normalisations, in 2 modes; test: 2 sizes with and without statistics
    # but for what no picture changes; 2 rules of signs at 2 sizes; one cut against masks; unpruned
    assert len(first.rows) == (1 + 2 * 4) * 2 + (2 * 3 + 4) + 4 + 1 + 1
    assert Study(experiment, tmp_path, quick=True, seeds=2, data=tmp_path).run()
    study = Study(experiment, tmp_path, quick=True, seeds=2, data=tmp_path)
    assert study.rows[: len(first.rows)] == first.rows
    assert len(study.rows) == len(first.rows) + (2 + 1) + 2 + 4 + 4  # random, weight, relevance, signs of another draw
    signs = {r["rule"]: r["difference"] for r in study.rows if r.get("stage") == "signs"}
    assert signs["z+"] < 1e-6 < 0.01 < signs["epsilon"]
    chosen = {r["criterion"]: r for r in study.rows if r.get("stage") == "test" and not r["reestimated"]}["LRP z+"]
    model = vgg.VGG(TINY["vgg"]["widths"])
    model.load_state_dict(study.weights("vgg", dict))
    train, test = runs.pictures(Path(), "train"), runs.pictures(Path(), "test").take(slice(0, 100))
    bench = runs.Bench.of(model.eval(), vgg.correct, train)
    batches = runs.nested(train, chosen["draw"], chosen["per_class"])
    plan = bench.plan(bench.score("lrp:zplus", batches), chosen["normalisation"], 0.3)
    with torch.no_grad():
        right = int((plan.mask(model)(test.x).argmax(1) == test.y).sum())
    assert abs(right - chosen["correct"]) <= 2  # 16 bits may move single pictures
    assert chosen["macs"] < 1


def test_draws_are_nested_and_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    offline(monkeypatch)
    train = runs.pictures(Path(), "train")
    ((few, y),) = runs.nested(train, 3, 2)
    ((more, _),) = runs.nested(train, 3, 5)
    assert torch.bincount(y).tolist() == [2] * 10
    assert all(any(torch.equal(a, b) for b in more) for a in few)
    assert not torch.equal(few, runs.nested(train, 4, 2)[0][0])


# -- the page, on rows made by hand ------------------------------------------------------------------------------
def made(zplus: dict[int, int], taylor: dict[int, int], draws: int = 5) -> list[dict[str, Any]]:
    """Size to accuracy in per cent of two criteria, weight at 40 and random at 20, with a spread over draws."""
    rows: list[dict[str, Any]] = []
    for name, by in (("LRP z+", zplus), ("Taylor, published", taylor), ("weight L1", {}), ("random", {})):
        base = {"net": "vgg", "criterion": name, "normalisation": "none", "rate": 0.3, "count": 100}
        rows.append({**base, "stage": "validate", "draw": 0, "per_class": 10, "reestimated": True, "correct": 50})
        for size in (1, 20):
            for draw in range(draws):
                for again in (False, True):
                    if name in runs.NO_PICTURES and not again and (size > 1 or (draw and name != "random")):
                        continue
                    right = by.get(size, 40 if name == "weight L1" else 20) + draw % 2 * (name != "weight L1")
                    row = {**base, "stage": "test", "draw": draw, "per_class": size, "reestimated": again}
                    rows.append({**row, "correct": right})
    return rows


def told(rows: list[dict[str, Any]]) -> tuple[dict[str, str], Any]:
    own = {"criteria": ["random", "weight L1", "Taylor, published", "LRP z+"], "rates": [0.3], "draws_per_seed": 1.0}
    settings = {**TINY, "nets": {"vgg": own}, "per_class": [1, 20]}
    study: Any = SimpleNamespace(settings=settings, rows=rows)
    found = report.report(study)
    return {c.claim: c.verdict for c in found.claims}, found


def test_verdicts_follow_the_numbers() -> None:
    verdicts, found = told(made({1: 70, 20: 80}, {1: 30, 20: 78}))
    shrinks = "VGG-like: the lead of LRP over Taylor is largest where there are few pictures"
    ahead = [v for c, v in verdicts.items() if "z+ is ahead" in c]
    assert ahead == ["confirmed"] * 2
    assert verdicts[shrinks] == "confirmed"  # 40 points with one picture, 2 with twenty
    assert len(found.wins) == 2
    assert not found.losses
    verdicts, found = told(made({1: 30, 20: 80}, {1: 28, 20: 30}))
    assert [v for c, v in verdicts.items() if "z+ is ahead" in c] == ["refuted"] * 2  # as often ahead as behind
    assert verdicts[shrinks] == "refuted"
    assert len(found.losses) == 2  # weight is ahead with one picture
    assert "in 1 of 2 settings and behind one in 1." in found.summary
    verdicts, found = told(made({1: 70, 20: 80}, {1: 30, 20: 78}, draws=2))
    assert set(verdicts.values()) == {"not comparable"}
    assert not found.wins
    assert told([])[0] == {}


def test_signs_and_masks_are_judged() -> None:
    rows = [{"net": "vgg", "stage": "signs", "rule": "z+", "difference": 1e-7}]
    rows += [{"net": "resnet20", "stage": "signs", "rule": "z+", "difference": 0.3}]
    mask = {"net": "vgg", "stage": "mask", "criterion": "weight L1", "rate": 0.3, "correct": 5, "correct_published": 4}
    mask |= {"count": 10, "largest_logit": 10.0}
    verdicts, _ = told([*rows, {**mask, "exact": 1e-5, "published": 2.0}])
    assert list(verdicts.values()) == ["confirmed"] * 3
    rows[0]["difference"], rows[1]["difference"] = 0.1, 1e-4
    verdicts, _ = told([*rows, {**mask, "exact": 1.0, "published": 2.0}])
    assert list(verdicts.values()) == ["refuted"] * 3
