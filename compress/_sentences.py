"""What a report says in plain words, and when it has to say that something did not work."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from compress.comparison import Comparison
    from compress.evaluation import Evaluation
    from compress.reporting import Measured, Report

__all__ = [
    "QUANTITIES",
    "Row",
    "Sentence",
    "baselines",
    "budgets",
    "byte_size",
    "percent",
    "plain_name",
    "quantity",
    "rival_quantity",
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
_BELOW = 0.05  # a target that is missed by more of itself was rounded away
_UNEQUAL = 0.01  # budgets that differ by more are not equal


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


def plain_name(kind: str) -> str:
    """A quantity in the middle of a sentence, or beside an axis."""
    return {"macs": "MACs", "params": "parameters"}.get(kind, kind)


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
    measured = (_target, _below, _end, _accuracy, _classes, _speed, _size, _filters, _whole)
    parts = (*measured, baselines, rivals, _how, _notes)
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
    share = f"{quantity(kind, r.reached)} remain"
    if before:
        share = f"{percent(r.reached / before)} remain ({quantity(kind, r.reached)} of {quantity(kind, before)})"
    if r.met:
        yield Sentence(f"{start}; {share}.")
    else:
        yield Sentence(f"{start}; this was not reached: {share}.", True)


def _below(r: Report) -> Iterator[Sentence]:
    """That far less remains than might have, and why; times are measured, and differ for other reasons."""
    if not r.met or not r.limit or r.reached is None or r.target.kind == "latency_ms":
        return
    short, block, why = 1 - r.reached / r.limit, _block(r), ""
    if short <= _BELOW + 1e-9:
        return
    if r.settings.get("edits"):
        why = ": the plan was edited by hand"
    elif block > 1:
        why = f": widths go in blocks of up to {block} channels; round_to=1 comes closer, but may run slower"
    elif block and not r.stopped:
        why = ", although widths were not rounded: channels go as a whole"
    yield Sentence(f"What remains is {percent(short)} below the target{why}.", True)


def _block(r: Report) -> int:
    """The largest multiple that widths were rounded to; 0 where it is not known."""
    ranking = r.settings.get("ranking")
    step = ranking.get("round_to") if isinstance(ranking, Mapping) else None
    steps = list(step.values()) if isinstance(step, Mapping) else [step]
    if "auto" in steps:  # what it came to is seen in the widths; it is a power of 2, 16 at most
        cut = math.gcd(*(after for before, after in r.widths.values() if after < before))
        steps = [1 if cut % 2 else 16, *(s for s in steps if s != "auto")]
    return max((int(s) for s in steps if s is not None), default=0)


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
    if first.at_chance:
        named = f"can not be told from always naming one class ({percent(first.chance or 0.0)})"
        check = "check the scale of the samples (mean and std), the weights, and the order of the classes"
        yield Sentence(f"The original itself {named}: {check}.", True)
    elif second.at_chance:
        named = f"can not be told from always naming one class ({percent(second.chance or 0.0)})"
        yield Sentence(f"What is left {named}: ask for less, or train longer.", True)
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
        lost = second.accuracy < first.accuracy
        yield Sentence(f"The intervals do not overlap: the {'loss' if lost else 'gain'} is more than chance.", lost)


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
        sizes = f"{byte_size(first)} to {byte_size(second)} on disk ({percent(second / first)})"
        yield Sentence(f"The file went from {sizes}, plan included.")


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
    tuned = r.settings.get("fine_tune", "unknown")
    if tuned == "unknown":
        told += "; whether it was trained after the cut is not recorded"
    elif not tuned:
        told += "; there was no fine-tuning"
    elif isinstance(tuned, dict):
        rounds = int(r.settings.get("cuts") or len(r.history) or 1)
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
    k = min(range(len(found.rates)), key=lambda i: abs(statistics.fmean(c.removed[i] for c in found.curves) - gone))
    wanted = bool(r.settings.get("reestimate_batchnorm"))
    curves = [c for c in found.curves if c.batchnorm is wanted] or list(found.curves)
    own = [c for c in curves if c.criterion not in BASELINES]
    base = sorted((c for c in curves if c.criterion in BASELINES), key=lambda c: -c.mean[k])
    if not own or not base:
        return []
    mine = max(own, key=lambda c: c.mean[k])
    draws = max(len(mine.accuracy), len(base[0].accuracy))
    one, other = (c.accuracy * draws for c in (mine, base[0]))  # a single draw goes with every draw of the other
    gaps = [one[d][k] - other[d][k] for d in range(draws)]
    gap = statistics.fmean(gaps)
    shares = [c.removed[k] for c in (mine, *base)]
    even = max(shares) - min(shares) <= _UNEQUAL + 1e-9
    with_share = ["" if even else f" (with {percent(share)} removed)" for share in shares[1:]]
    named = [f"{c.name} {percent(c.mean[k])}{share}" for c, share in zip(base, with_share, strict=True)]
    others, what = _listed(named, len(base)), plain_name(found.quantity)
    start = f"With {percent(mine.removed[k])} of the {what} removed and no training, "
    samples = f"{found.count:,} samples" if found.count else "the samples"
    start += f"{mine.name} gets {percent(mine.mean[k])} of {samples} right; {others}."
    if len(gaps) > 1:
        error = statistics.stdev(gaps) / math.sqrt(len(gaps))
        judged = 0 if abs(gap) <= 2 * error else 1 if gap > 0 else -1
        how = f"{100 * gap:+z.1f} points, standard error {100 * error:.1f} over {len(gaps)} draws"
    else:
        judged = 0 if _alike(mine.mean[k], base[0].mean[k], found.count) else 1 if gap > 0 else -1
        how = f"{100 * gap:+z.1f} points, from a single draw"
    if judged > 0:
        said = Sentence(f"{start} {mine.name} is better than the best baseline here ({how}).")
    elif judged < 0:
        at = " at equal budget" if even else ""
        said = Sentence(f"{start} {mine.name} lost against {base[0].name}{at} ({how}).", True)
    else:
        said = Sentence(f"{start} {mine.name} and the best baseline are not told apart ({how}).", gap < 0)
    return [said, *budgets(found)]


def budgets(found: Comparison) -> list[Sentence]:
    """That criteria did not remove alike, if somewhere they differ by more than a percentage point.

    Examples
    --------
    >>> from compress.comparison import Comparison, Curve
    >>> curves = [Curve(name, "auto", False, ((0.9,),), (gone,)) for name, gone in (("lrp", 0.52), ("random", 0.58))]
    >>> for said in budgets(Comparison((0.5,), "macs", tuple(curves), 0.95)):
    ...     print(said.text)
    Budgets are not equal: asked for 50 %, random removed 58 % of the MACs and lrp 52 %, 6 points apart.
    """
    names = [c.name.removesuffix(" + BN") for c in found.curves]  # which removes nothing
    gone = [sorted(zip((c.removed[k] for c in found.curves), names, strict=True)) for k in range(len(found.rates))]
    k = max(range(len(gone)), key=lambda k: gone[k][-1][0] - gone[k][0][0])
    (low, least), (high, most) = gone[k][0], gone[k][-1]
    how = f"{'' if len(gone) == 1 else 'where they differ most, '}asked for {percent(found.rates[k])}, "
    how += f"{most} removed {percent(high)} of the {plain_name(found.quantity)} and {least} {percent(low)}"
    return _unequal(high - low, how)


def _unequal(span: float, how: str) -> list[Sentence]:
    if span <= _UNEQUAL + 1e-9:
        return []
    return [Sentence(f"Budgets are not equal: {how}, {100 * span:.2g} points apart.", True)]


def rival_quantity(r: Report) -> str:
    """What the budgets of runs with other criteria are compared in: that of the target, where it was counted."""
    return "macs" if r.target.kind == "latency_ms" else r.target.kind


def rivals(r: Report) -> list[Sentence]:
    """How the same run ended with other criteria, training included."""
    stored = {name: row for name, row in r.sections.get("rivals", {}).items() if row["evaluation"] is not None}
    mine = r.after.evaluation
    if not stored or mine is None:
        return []
    order = sorted(stored, key=lambda name: -stored[name]["evaluation"]["accuracy"])
    best, kind = stored[order[0]]["evaluation"]["accuracy"], rival_quantity(r)
    total, what = max(1, getattr(r.before.costs, kind)), plain_name(kind)
    left = {name: stored[name]["reached"][kind] / total for name in order}
    left["this run"] = getattr(r.after.costs, kind) / total
    with_left = {name: f"(with {percent(share)} of the {what})" for name, share in left.items()}
    parts = [f"{name} {percent(stored[name]['evaluation']['accuracy'])} {with_left[name]}" for name in order]
    told = f"The same run, training included, with other criteria: {_listed(parts, len(parts))}; "
    told += f"here {percent(mine.accuracy)} {with_left['this run']}."
    if _alike(mine.accuracy, best, mine.count):
        end, warning = f"These samples do not tell it from the best of them, {order[0]}.", mine.accuracy < best
    elif mine.accuracy < best:
        end, warning = f"It lost against {order[0]}.", True
    else:
        end, warning = "It is better than all of them.", False
    most, least = max(left, key=lambda n: left[n]), min(left, key=lambda n: left[n])
    how = f"{most} keeps {percent(left[most])} of the {what} and {least} {percent(left[least])}"
    return [Sentence(f"{told} {end}", warning), *_unequal(left[most] - left[least], how)]


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
        change = f"{100 * difference:+z.1f} points" if counted else f"{difference:+.4g}"
    return Row("top-1 accuracy" if counted else "own measure", texts[0], texts[1], change.replace("-", "−"), None)
