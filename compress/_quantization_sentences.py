"""What the report on a quantized network says in plain words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from compress._sentences import Sentence, _accuracy, _classes, _counted, _listed, byte_size, percent

if TYPE_CHECKING:
    from compress.quantization_report import QuantizationReport
    from compress.rate import Rate

__all__ = ["METHODS", "controls", "form_rows", "layer_rows", "rate_of", "sentences", "told_forms"]

METHODS = {
    "ecqx": "entropy-constrained training with relevance (ECQx)",
    "ecq": "entropy-constrained training (ECQ)",
    "magnitude": "entropy-constrained training with magnitudes in the place of relevance",
    "gradient": "entropy-constrained training with gradient times weight in the place of relevance",
    "random": "entropy-constrained training with relevance dealt to random weights",
    "rtn": "rounding to the nearest level",
    "rtn_per_channel": "rounding to the nearest level, a step per channel",
    "mse": "rounding with the step of the least squared error",
    "mse_per_channel": "rounding with the step of the least squared error, one per channel",
}
_FORMS = {
    "fp32": "fp32",
    "int8": "int8: weights alone",
    "int4": "int4: weights alone",
    "a8w8": "a8w8: weights and activations",
}


def rate_of(r: QuantizationReport) -> Rate | None:
    """What the training was to hold; None without."""
    from compress.rate import Rate

    stored = r.settings.get("rate")
    if not isinstance(stored, Mapping) or r.limit is not None:
        return None
    return Rate(zeros=stored.get("zeros"), bits_per_weight=stored.get("bits_per_weight"))


def sentences(r: QuantizationReport) -> list[Sentence]:
    """All that holds for a report, the most important first."""
    found: Any = r  # what is said of accuracies and classes only reads before, after and classes
    parts = (_size, _asked, _accuracy, _classes, _zeros, _speed, _relevance, _maps, controls, _how, _notes)
    return [s for part in parts for s in part(found)]


def _size(r: QuantizationReport) -> Iterator[Sentence]:
    first, second = r.before.file_bytes, r.after.file_bytes
    if second is None:
        yield Sentence("The size on disk was not measured.", True)
        return
    if first is None:
        yield Sentence(f"The file has {byte_size(second)} on disk, everything counted.")
    else:
        told = f"The file went from {byte_size(first)} to {byte_size(second)}"
        yield Sentence(f"{told}: {first / second:.1f} times smaller, everything counted.")
    own = r.parts.get("weights")
    if own:
        rest = second - own
        plain = 4 * r.reached.weights
        told = f"Of that, the quantized weights take {byte_size(own)}, {plain / own:.1f} times less than in 32 bits; "
        yield Sentence(f"{told}header and tensors that stay as they are take {byte_size(rest)}.")


def _asked(r: QuantizationReport) -> Iterator[Sentence]:
    if r.limit is not None:
        told = f"Asked for at most {r.limit:,} bytes"
        if r.met:
            yield Sentence(f"{told}; the file has {r.after.file_bytes:,}.")
        else:
            yield Sentence(f"{told}; this was not reached.", True)
        return
    rate = rate_of(r)
    if rate is None:
        return
    if rate.zeros is not None:
        told = f"Asked for at least {percent(rate.zeros)} zeros; there are {percent(r.reached.zeros)}"
    else:
        asked = f"{rate.bits_per_weight:g} bit{'' if rate.bits_per_weight == 1 else 's'} per weight"
        told = f"Asked for at most {asked}; they have {r.reached.bits_per_weight:.3f}"
    yield Sentence(f"{told}." if r.met else f"{told}: this was not reached.", not r.met)


def _zeros(r: QuantizationReport) -> Iterator[Sentence]:
    zeros, bits = percent(r.reached.zeros), r.reached.bits_per_weight
    yield Sentence(
        f"{_counted(r.reached.weights, 'weight')} are quantized: {zeros} of them are zero, and their levels have an "
        f"entropy of {bits:.3f} bits per weight."
    )
    if r.collapsed:
        yield Sentence(f"Zero throughout, so that the layer passes nothing on: {_listed(list(r.collapsed))}.", True)


def _speed(r: QuantizationReport) -> Iterator[Sentence]:
    if r.forms is None:
        yield Sentence("Forms for a runtime were not measured; zeros and few bits alone make nothing faster.", True)
        return
    yield Sentence(f"{r.forms['sentence']} Zeros and few bits alone make nothing faster.")
    s = r.forms["settings"]
    threads = _counted(int(s["threads"]), "thread")
    yield Sentence(f"Timed in {s['runtime']}, {threads}, batch {s['batch']}, {s['machine']}.")


def told_forms(name: str) -> str:
    """The name of a form as it is read."""
    form, _, how = name.partition(", ")
    return f"{_FORMS.get(form, form)}{f', {how}' if how else ''}"


def _relevance(r: QuantizationReport) -> Iterator[Sentence]:
    for state, told in (
        ("not_reached", "In these tensors no exponent up to 1 leaves the number of zeros that was asked for"),
        (
            "skipped",
            "These tensors had too few zeros for relevance to act, or relevance that is 0 everywhere: "
            "they are as without it",
        ),
    ):
        names = [layer.name for layer in r.layers if layer.relevance == state]
        if names:
            yield Sentence(f"{told}: {_listed(names)}.", True)


def _maps(r: QuantizationReport) -> Iterator[Sentence]:
    from compress.drift import Drift

    stored = r.sections.get("drift")
    if stored is None:
        return
    found = Drift.from_json(stored)
    parts = []
    for name, told in (("cosine", "cosine"), ("spearman", "rank correlation")):
        a = found.overall.get(name)
        if a is not None:
            chance = "" if a.chance is None else f", by chance {a.chance:.2f}"
            parts.append(f"{told} {a.mean:.3f} (95 % interval {a.low:.3f} to {a.high:.3f}{chance})")
    if parts:
        told = f"Heat maps before and after, on {_counted(len(found.samples), 'sample')}: {_listed(parts)}"
        yield Sentence(f"{told}; 1 is the same map.")


def controls(r: QuantizationReport) -> list[Sentence]:
    """Whether the method did better than its controls at equal bytes."""
    from compress.quantizer_comparison import QuantizerComparison

    stored = r.sections.get("comparison")
    if stored is None:
        if r.method not in ("ecq", "ecqx", "magnitude", "gradient", "random"):
            return []
        return [Sentence("There is no comparison with other methods at equal bytes.", True)]
    found = QuantizerComparison.from_json(stored)
    mine = found.mean(r.method) if r.method in found.methods else None
    shown = [(name, m) for name in found.methods if (m := found.mean(name)) is not None]
    listed = ", ".join(f"{name} {100 * m:.2f} %" for name, m in sorted(shown, key=lambda row: -row[1]))
    few = " (a pilot)" if found.pilot else ""
    out = [Sentence(f"At equal bytes ({found.goal}), mean of {_counted(len(found.seeds), 'seed')}{few}: {listed}.")]
    if mine is None:
        return out
    lost: list[str] = []
    won: list[str] = []
    even: list[str] = []
    for name in found.methods:
        d = None if name == r.method else found.difference(r.method, name)
        if d is not None:
            {"behind": lost, "ahead": won}.get(d.verdict, even).append(name)
    who = f"{'In this pilot ' if found.pilot else ''}{r.method}"
    parts = [f"lost against {_listed(lost, 4)}"] if lost else []
    parts += [f"was better than {_listed(won, 4)}"] if won else []
    parts += [f"is not told apart from {_listed(even, 4)}"] if even else []
    if parts:
        out.append(Sentence(f"{who} {', '.join(parts)}.", bool(lost) or not won))
    return out


def _how(r: QuantizationReport) -> Iterator[Sentence]:
    told = f"The method was {METHODS.get(r.method, r.method)}"
    train = r.settings.get("train")
    if isinstance(train, Mapping):
        told += f"; trained for {_counted(int(train['epochs']), 'epoch')} with {train.get('optimizer', '')}"
        if train.get("distill"):
            told += ", following another network's outputs"
        if r.training is not None and r.training.best:
            told += f"; the weights are those of epoch {r.training.best}, the best on validation samples"
            if r.limit is not None or rate_of(r) is not None:
                told += ", and were assigned to levels once more for what was asked"
    elif r.method in ("ecq", "ecqx", "magnitude", "random"):
        told += "; assigned once, without training"
    if r.gamma is not None:
        told += f"; gamma {r.gamma:.3g} at the end"
    if r.settings.get("seed") is not None:
        told += f"; seed {r.settings['seed']}"
    yield Sentence(f"{told}.")


def _notes(r: QuantizationReport) -> Iterator[Sentence]:
    for note in r.notes:
        yield Sentence(note, True)


# ---------------------------------------------------------------------- the tables


def layer_rows(r: QuantizationReport) -> list[tuple[str, ...]]:
    """Every quantized tensor, with a head."""
    head = ("tensor", "bits", "step", "weights", "zeros", "entropy", "bytes", "relevance")
    out: list[tuple[str, ...]] = [head]
    for layer in r.layers:
        relevance = layer.relevance if layer.beta is None else f"{layer.relevance}, beta {layer.beta:.2g}"
        size = "-" if layer.bytes is None else f"{layer.bytes:,}"
        shares = (percent(layer.zeros), f"{layer.entropy:.3f}")
        shown = "all zero" if layer.collapsed else "-" if relevance == "none" else relevance.replace("_", " ")
        out.append((layer.name, str(layer.bits), layer.step, f"{layer.weights:,}", *shares, size, shown))
    return out


def form_rows(r: QuantizationReport) -> list[dict[str, str]]:
    """Every form that was measured, and the file of compress.save first."""
    out = []
    size = r.after.file_bytes
    if size is not None:
        found = r.after.evaluation
        accuracy = percent(found.accuracy, 2) if found is not None and found.count else "-"
        name = "the file of compress.save"
        out.append({"name": name, "bytes": f"{size:,}", "ms": "-", "spread": "", "speed": "-", "accuracy": accuracy})
    for row in [] if r.forms is None else r.forms["rows"]:
        time, speed, accuracy = row.get("latency"), row.get("speed"), row.get("accuracy")
        spread = "" if time is None else f"({time['low']:.3g} to {time['high']:.3g})"
        out.append(
            {
                "name": told_forms(str(row["name"])),
                "bytes": f"{int(row['bytes']):,}",
                "ms": "-" if time is None else f"{time['median']:.3g}",
                "spread": spread,
                "speed": "-" if speed is None else f"{speed:.2f}x",
                "accuracy": "-" if accuracy is None else percent(accuracy, 2),
            }
        )
    return out
