"""The choice of the default: what the page says of hand-made cells."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from compress.criteria import criterion_of
from compress.ranking import Ranking
from experiments.papers import default_criterion as chosen


def cells(folder: Path, name: str, best: str) -> None:
    """Everything leaves half, the named normalisation 0.8; chance 0.1."""
    rows = [{"key": f"{name}|unpruned", "net": name, "accuracy": 0.5}]
    for criterion, how, draw in itertools.product(
        (*chosen.CRITERIA, *chosen.DATA_FREE), chosen.NORMALISATIONS, range(2)
    ):
        if criterion.startswith("random") and how != "none":
            continue
        share = 0.1 if criterion.startswith("random") else 0.8 if how == best else 0.5
        share += 0.02 * draw  # two draws, of which the mean counts
        for reduction in chosen.REDUCTIONS if name == "digits" else ("mean",):
            row = {"criterion": criterion, "normalisation": how, "reduction": reduction, "rate": 0.3}
            key = f"{name}|macs|{'|'.join(map(str, row.values()))}|{draw}"
            rows.append({"key": key, "net": name, "quantity": "macs", **row, "draw": draw, "accuracy": share / 2})
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_page_follows_the_rule_and_tells_the_two_kinds_apart(tmp_path: Path) -> None:
    cells(tmp_path, "digits", "mean")
    cells(tmp_path, "squeezenet", "none")
    found = chosen.shares(tmp_path)
    assert found["taylor", "mean", "max"] == pytest.approx({"digits, macs": 0.81, "squeezenet, macs": 0.51})
    assert found["lrp:epsilon", "auto", "mean"] == pytest.approx({"digits, macs": 0.81, "squeezenet, macs": 0.81})
    text = chosen.markdown(tmp_path)
    assert "On those with batch norm the best normalisation of the 9 criteria is `mean` for 9." in text
    assert "On those without batch norm the best normalisation of the 9 criteria is `none` for 9." in text
    assert "normalisation `auto` (0.810; ahead of that single choice in 1 of 2 columns)" in text
    assert "| random | none | mean | 0.110 |" in text


def test_what_compress_ships_is_what_the_page_names() -> None:
    criterion, normalisation, reduction = chosen.DEFAULT
    assert criterion_of("lrp").settings == criterion_of(criterion).settings
    assert (Ranking.normalisation, Ranking.reduction) == (normalisation, reduction)
