"""What a report says in plain words, and when it has to say that something did not work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compress.evaluation import Evaluation
    from compress.reporting import Measured, Report

__all__ = [
    "QUANTITIES",
    "Row",
    "Sentence",
    "baselines",
    "byte_size",
    "percent",
    "quantity",
    "rivals",
    "rows",
    "sentences",
]

QUANTITIES = {
    "channels": "prunable channels",
    "macs": "multiply-adds (MACs)",
    "params": "parameters",
    "bytes": "bytes on disk",
    "latency_ms": "milliseconds per call",
}
_FASTER = 0.03  # a difference of medians below this share is none
_LEVEL = 0.05


class Sentence(NamedTuple):
    """One statement, and whether it is one the reader must not miss."""

    text: str
    warning: bool = False


# ---------------------------------------------------------------------- numbers


def percent(share: float, digits: int = 1) -> str:
    """A share as it is read; digits that say nothing are left out, and only all is 100 %.

    Examples
    --------
    >>> percent(0.5), percent(0.98222), percent(1.0), percent(0.9999)
    ('50 %', '98.2 %', '100 %', '> 99.9 %')
    """
    text = f"{100 * share:.{digits}f}"
    least = 10.0**-digits
    if share < 1 and float(text) == 100:
        return f"> {100 - least:.{digits}f} %"
    if share > 0 and float(text) == 0:
        return f"< {least:.{digits}f} %"
    return f"{text.rstrip('0').rstrip('.') if '.' in text else text} %"


def byte_size(count: float) -> str:
    """Bytes with a unit of a thousand.

    Examples
    --------
    >>> byte_size(812), byte_size(163_412), byte_size(44_600_000)
    ('812 bytes', '163 kB', '44.6 MB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            value = count / size
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{count:,.0f} bytes"


def quantity(kind: str, value: float) -> str:
    """A number of one of the quantities."""
    if kind == "latency_ms":
        return f"{value:.3g}"
    return f"{value:,.0f}"


def _counted(n: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{n:,} {noun if n == 1 else plural}"


def _listed(items: list[str], most: int = 3) -> str:
    shown, more = items[:most], len(items) - most
    if more > 0:
        return f"{', '.join(shown)} and {more} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


# ---------------------------------------------------------------------- what is said


def sentences(report: Report) -> list[Sentence]:
    """All that holds for a report, the most important first."""
    parts = (_target, _end, _accuracy, _classes, _speed, _size, _filters, _whole, baselines, rivals, _how, _notes)
    return [s for part in parts for s in part(report)]


def _target(r: Report) -> Iterator[Sentence]:
    kind = r.target.kind
    value = getattr(r.target, kind)
    asked = percent(value) + " of the" if isinstance(value, float) else str(value).strip()
    if isinstance(value, int):
        asked = f"{value:,}"
    elif isinstance(value, str) and value.strip().endswith("%"):
        asked = f"{value.strip().rstrip('%').strip()} % of the"
    start = f"Asked for at most {asked} {QUANTITIES[kind]}"
    if kind == "latency_ms" and asked.endswith("the"):
        start = f"Asked for at most {asked.removesuffix(' of the')} of the time per call"
    if r.reached is None:
        yield Sentence(f"{start}; what was reached is not measured here.", True)
        return
    before = _before(r)
    share = f"{percent(r.reached / before)} remain ({quantity(kind, r.reached)} of {quantity(kind, before)})"
    if not before:
        share = f"{quantity(kind, r.reached)} remain"
    if r.met:
        yield Sentence(f"{start}; {share}.")
    else:
        yield Sentence(f"{start}; this was not reached: {share}.", True)


def _before(r: Report) -> float:
    """The target's quantity of the original."""
    if r.target.kind == "bytes" and r.before.file_bytes is not None:
        return float(r.before.file_bytes)
    return float(getattr(r.before.costs, r.target.kind) or 0.0)


def _end(r: Report) -> Iterator[Sentence]:
    if not r.stopped:
        return
    if "rolled back" in r.stopped:
        last = f" The last step was undone; steps kept: {max(0, len(r.history) - 1)}." if r.history else ""
        yield Sentence(f"The accuracy floor ended the run: {r.stopped}.{last}", True)
    else:
        yield Sentence(f"The run ended early: {r.stopped}.", True)


def _accuracy(r: Report) -> Iterator[Sentence]:
    first, second = r.before.evaluation, r.after.evaluation
    if first is None or second is None:
        yield Sentence("Accuracy was not measured: there were no test samples.", True)
        return
    if not first.count:
        yield Sentence(f"The user's own measure went from {first.accuracy:.4g} to {second.accuracy:.4g}.")
        return
    told = f"On {_counted(first.count, 'test sample')} top-1 accuracy went from {_with_interval(first)} "
    told += f"to {_with_interval(second)}"
    yield Sentence(f"{told}; in brackets the 95 % intervals.")
    overlap = _overlap(first, second)
    paired = r.classes.overall if r.classes is not None and r.classes.overall.p_value is not None else None
    if paired is not None and paired.lost is not None and paired.gained is not None and paired.p_value is not None:
        changed = f"The smaller network loses {_counted(paired.lost, 'sample')} that the original gets right"
        changed += f" and gains {paired.gained:,}"
        p = f"p = {paired.p_value:.2g}"
        if paired.p_value > _LEVEL:
            same = "the intervals overlap, and " if overlap else ""
            yield Sentence(f"{changed}: {same}a difference like this can be chance (McNemar's test, {p}).")
        elif second.accuracy < first.accuracy:
            though = "; the intervals overlap, but both were asked about the same samples" if overlap else ""
            yield Sentence(f"{changed}: this loss is more than chance (McNemar's test, {p}){though}.", True)
        else:
            yield Sentence(f"{changed}: this gain is more than chance (McNemar's test, {p}).")
    elif overlap:
        yield Sentence("The intervals overlap: these samples do not tell the two networks apart.")
    else:
        yield Sentence(
            "The intervals do not overlap: the "
            + ("loss" if second.accuracy < first.accuracy else "gain")
            + " is more than chance.",
            second.accuracy < first.accuracy,
        )


def _with_interval(e: Evaluation) -> str:
    low, high = e.interval() or (0.0, 1.0)
    return f"{percent(e.accuracy)} ({percent(low).removesuffix(' %')} to {percent(high).removesuffix(' %')})"


def _overlap(first: Evaluation, second: Evaluation) -> bool:
    one, other = first.interval() or (0.0, 1.0), second.interval() or (0.0, 1.0)
    return one[0] <= other[1] and other[0] <= one[1]


def _classes(r: Report) -> Iterator[Sentence]:
    if r.classes is None or not len(r.classes):
        return
    hurt = r.classes.hurt()
    if hurt:
        named = _listed([f"{c.name} ({percent(c.before)} to {percent(c.after)})" for c in hurt])
        yield Sentence(f"Hurt more than chance explains, of {_counted(len(r.classes), 'class')}: {named}.", True)
        return
    worst = r.classes[0]
    if worst.difference >= 0:
        yield Sentence("No class lost accuracy.")
        return
    told = f"The class that lost most is {worst.name}: {percent(worst.before)} to {percent(worst.after)}"
    told += f" of {_counted(worst.count, 'sample')}"
    if worst.adjusted is None:
        yield Sentence(f"{told}.")
        return
    chance = f"among {_counted(len(r.classes), 'class')} a loss like this can be chance"
    yield Sentence(f"{told}; {chance} (p = {worst.adjusted:.2g} after Holm's correction).")


def _speed(r: Report) -> Iterator[Sentence]:
    first, second = r.before.latency, r.after.latency
    if second is None:
        yield Sentence("Latency was not measured.", True)
        return
    if first is None:
        yield Sentence(f"One call takes {second.median:.3g} ms ({second.meter}); the original was not timed.")
        return
    gone = 1 - r.after.costs.macs / r.before.costs.macs if r.before.costs.macs else 0.0
    times = f"{first.median:.3g} ms before, {second.median:.3g} ms after ({second.meter})"
    faster = second.median < (1 - _FASTER) * first.median and not first.overlaps(second)
    slower = second.median > (1 + _FASTER) * first.median and not first.overlaps(second)
    if faster:
        yield Sentence(f"It is {first.median / second.median:.2g} times as fast: {times}.")
        return
    what = "It became slower" if slower else "It did not get faster"
    though = f", although {percent(gone)} of the MACs are gone" if gone > 0.01 else ""
    spread = "" if slower else "; the difference is within the spread of the rounds"
    if not slower and not first.overlaps(second):
        spread = f"; the medians differ by less than {percent(_FASTER)}"
    why = " On this runtime the time goes elsewhere: into memory, into the overhead of every layer, or into widths"
    why += " that its kernels have to fill up (see round_to)." if gone > 0.01 else ""
    yield Sentence(f"{what}{though}: {times}{spread}.{why if gone > 0.01 else ''}", gone > 0.01 or slower)


def _size(r: Report) -> Iterator[Sentence]:
    first, second = r.before.file_bytes, r.after.file_bytes
    if second is None:
        yield Sentence("The size on disk was not measured.", True)
    elif first is None:
        yield Sentence(f"The file has {byte_size(second)} on disk, the plan included.")
    else:
        share = percent(second / first)
        yield Sentence(
            f"The file went from {byte_size(first)} to {byte_size(second)} on disk ({share}), plan included."
        )


def _filters(r: Report) -> Iterator[Sentence]:
    own, every = r.filters.get("prunable"), r.filters.get("all")
    if own is None or every is None:
        return
    yield Sentence(
        f"Removed were {percent(own['removed'])} of the prunable filters "
        f"({own['before'] - own['after']:,.0f} of {own['before']:,.0f}), which is {percent(every['removed'])} of all "
        f"({every['before']:,.0f})."
    )


def _whole(r: Report) -> Iterator[Sentence]:
    if r.unscored:
        named = _listed([f"{name} ({why})" for name, why in r.unscored.items()], 2)
        yield Sentence(
            f"{_counted(len(r.unscored), 'group')} got no score and "
            f"{'stays' if len(r.unscored) == 1 else 'stay'} whole, which does not mean unimportant: {named}.",
            True,
        )


def _how(r: Report) -> Iterator[Sentence]:
    criterion = r.settings.get("criterion") or {}
    name = criterion.get("name") if isinstance(criterion, dict) else criterion
    if not name:
        return
    told = f"Channels were ranked by {name}"
    samples = r.settings.get("samples")
    if samples:
        told += f" over {_counted(int(samples), 'reference sample')}, one draw of them"
    tuned = r.settings.get("fine_tune")
    if not tuned:
        told += "; there was no fine-tuning"
    elif isinstance(tuned, dict):
        rounds = len(r.history) or 1
        told += f"; fine-tuned for {_counted(int(tuned['epochs']), 'epoch')} after "
        told += "the cut" if rounds == 1 else f"each of {rounds} cuts"
        told += ", following the original's outputs" if tuned.get("distill") else ""
    else:
        told += f"; trained further by {tuned}"
    if r.settings.get("reestimate_batchnorm"):
        told += "; batch-norm statistics were re-estimated"
    yield Sentence(f"{told}.")


def _notes(r: Report) -> Iterator[Sentence]:
    for note in r.notes:
        yield Sentence(note, True)


def baselines(r: Report) -> list[Sentence]:
    """Whether relevance, or whatever ranked, did better than random, magnitude and activation at the same budget."""
    from compress.comparison import BASELINES, Comparison

    stored = r.sections.get("comparison")
    if stored is None:
        return [
            Sentence("There is no comparison with random, magnitude and activation criteria at equal budget.", True)
        ]
    found = Comparison.from_json(stored)
    gone = 1 - getattr(r.after.costs, found.quantity) / max(1, getattr(r.before.costs, found.quantity))
    k = min(range(len(found.rates)), key=lambda i: abs(found.rates[i] - gone))
    wanted = bool(r.settings.get("reestimate_batchnorm"))
    curves = [c for c in found.curves if c.batchnorm is wanted] or list(found.curves)
    own = [c for c in curves if c.criterion not in BASELINES]
    base = sorted((c for c in curves if c.criterion in BASELINES), key=lambda c: -c.mean[k])
    if not own or not base:
        return []
    mine = max(own, key=lambda c: c.mean[k])
    gaps = [one[k] - other[k] for one, other in zip(mine.accuracy, base[0].accuracy, strict=True)]
    gap = statistics.fmean(gaps)
    others = _listed([f"{c.name} {percent(c.mean[k])}" for c in base], len(base))
    what = {"macs": "MACs", "params": "parameters"}.get(found.quantity, found.quantity)
    start = f"With {percent(found.rates[k])} of the {what} removed and no training, {mine.name} gets "
    start += f"{percent(mine.mean[k])} of {f'{found.count:,} ' if found.count else 'the '}samples right; {others}."
    if len(gaps) > 1:
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        judged = 0 if abs(gap) <= 2 * error else 1 if gap > 0 else -1
        how = f"{100 * gap:+.1f} points, standard error {100 * error:.1f} over {len(gaps)} draws"
    else:
        judged = 0 if _alike(mine.mean[k], base[0].mean[k], found.count) else 1 if gap > 0 else -1
        how = f"{100 * gap:+.1f} points, from a single draw"
    if judged > 0:
        return [Sentence(f"{start} {mine.name} is better than the best baseline here ({how}).")]
    if judged < 0:
        return [Sentence(f"{start} {mine.name} lost against {base[0].name} at equal budget ({how}).", True)]
    return [Sentence(f"{start} {mine.name} and the best baseline are not told apart ({how}).", gap < 0)]


def rivals(r: Report) -> list[Sentence]:
    """How the same run ended with other criteria, training included."""
    stored = {name: row for name, row in r.sections.get("rivals", {}).items() if row["evaluation"] is not None}
    mine = r.after.evaluation
    if not stored or mine is None:
        return []
    order = sorted(stored, key=lambda name: -stored[name]["evaluation"]["accuracy"])
    best, total = stored[order[0]]["evaluation"]["accuracy"], max(1, r.before.costs.macs)
    parts = []
    for name in order:
        left = percent(stored[name]["reached"]["macs"] / total)
        parts.append(f"{name} {percent(stored[name]['evaluation']['accuracy'])} (with {left} of the MACs)")
    told = f"The same run, training included, with other criteria: {_listed(parts, len(parts))}; "
    told += f"here {percent(mine.accuracy)}."
    if _alike(mine.accuracy, best, mine.count):
        return [
            Sentence(f"{told} These samples do not tell it from the best of them, {order[0]}.", mine.accuracy < best)
        ]
    if mine.accuracy < best:
        return [Sentence(f"{told} It lost against {order[0]}.", True)]
    return [Sentence(f"{told} It is better than all of them.")]


def _alike(first: float, second: float, count: int) -> bool:
    """Whether the Wilson intervals of two accuracies overlap."""
    from compress.evaluation import wilson

    if not count:
        return first == second
    one, other = (wilson(round(a * count), count) for a in (first, second))
    return one[0] <= other[1] and other[0] <= one[1]


# ---------------------------------------------------------------------- the table


class Row(NamedTuple):
    """One quantity of both networks as it is read; ``share`` is what is left of a cost."""

    name: str
    before: str
    after: str
    left: str
    share: float | None


def rows(r: Report) -> list[Row]:
    """Accuracy, and every cost that was measured of one network at least."""
    out = [_accuracies(r)] if r.before.evaluation is not None or r.after.evaluation is not None else []

    def row(name: str, value: Callable[[Measured], float | None], shown: Callable[[float], str]) -> None:
        first, second = value(r.before), value(r.after)
        if first is None and second is None:
            return
        share = second / first if first and second is not None else None
        texts = ["-" if v is None else shown(v) for v in (first, second)]
        out.append(Row(name, texts[0], texts[1], "-" if share is None else percent(share), share))

    def whole(value: float) -> str:
        return f"{value:,.0f}"

    row("MACs", lambda m: m.costs.macs, whole)
    row("parameters", lambda m: m.costs.params, whole)
    row("prunable channels", lambda m: m.costs.channels, whole)
    row("filters, all layers", lambda m: m.costs.filters, whole)
    row("bytes on disk", lambda m: m.file_bytes, whole)
    row("bytes as ONNX", lambda m: m.onnx_bytes, whole)
    row("latency, ms", lambda m: None if m.latency is None else m.latency.median, lambda v: f"{v:.3g}")
    return out


def _accuracies(r: Report) -> Row:
    both = r.before.evaluation, r.after.evaluation
    counted = any(e is not None and e.count for e in both)
    texts = ["-" if e is None else percent(e.accuracy) if counted else f"{e.accuracy:.4g}" for e in both]
    change = "-"
    if both[0] is not None and both[1] is not None:
        difference = both[1].accuracy - both[0].accuracy
        change = f"{100 * difference:+.1f} points" if counted else f"{difference:+.4g}"
    return Row("top-1 accuracy" if counted else "own measure", texts[0], texts[1], change.replace("-", "−"), None)
