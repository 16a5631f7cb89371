"""One page over all benchmarks: every figure beside its peer or floor, its budget, and whether that is met."""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.benchmarks import coder_sizes as coders
from experiments.benchmarks import pruning_speed as pruning
from experiments.benchmarks import quantizing_speed as quantizing
from experiments.benchmarks import runtime_forms as forms
from experiments.benchmarks.explain_memory import WAYS
from experiments.benchmarks.explain_pairs import RULES
from experiments.benchmarks.explain_report import FASTER, OUT, RETURNED, duration
from experiments.benchmarks.lrp_methods import FULL, MEMORY_BUDGET, PLAIN, Method, budget
from experiments.benchmarks.lrp_peers import NAMES as PEERS
from experiments.study import whole
from lrp.errors import DataError, FileFormatError

__all__ = ["BENCHMARKS", "KEPT", "PAGE", "Figure", "Limit", "Run", "page", "stored", "write"]

PAGE, KEPT = "BENCHMARKS.md", "run.json"
Verdict = Literal["met", "missed", "no budget", "no figure"]
_SIGNS: dict[str, Callable[[float, float], bool]] = {"<": operator.lt, "<=": operator.le, ">=": operator.ge}


@dataclass(frozen=True)
class Limit:
    """What a figure may be.

    Parameters
    ----------
    sign : {"<", "<=", ">="}
    bound : float
    unit : str, optional

    Examples
    --------
    >>> str(Limit("<", 60, "s")), Limit("<=", 1.15).holds(1.16)
    ('< 60 s', False)
    """

    sign: str
    bound: float
    unit: str = ""

    def holds(self, value: float) -> bool:
        """Whether the value is within."""
        return _SIGNS[self.sign](value, self.bound)

    def __str__(self) -> str:
        return f"{self.sign} {self.bound:g} {self.unit}".rstrip()


@dataclass(frozen=True)
class Figure:
    """A row: what was measured, ours, what it is compared with, how much that is.

    Parameters
    ----------
    what : str
        Figures of one name and one limit stand for one pledge.
    case : str
        On what.
    ours, other : str
        Both sides, with units; ``other`` names the peer or the floor.
    value : float, optional
        What is judged: a ratio, or seconds if the limit has that unit.
    spread : tuple of float
        As stored: low, high, and the ratio of the shortest times; empty if the result holds none.
    limit : Limit, optional
        Where the project states one.
    peers : str
        The same of peers, where ``other`` is a floor.
    """

    what: str
    case: str
    ours: str
    other: str
    value: float | None = None
    spread: tuple[float, ...] = ()
    limit: Limit | None = None
    peers: str = ""

    @property
    def verdict(self) -> Verdict:
        """Met, missed, or why neither."""
        if self.limit is None:
            return "no budget"
        if self.value is None:
            return "no figure"
        return "met" if self.limit.holds(self.value) else "missed"

    @property
    def ratio(self) -> str:
        """The value with its spread; as many digits as it takes to see on which side of the limit it is.

        Examples
        --------
        >>> Figure("", "", "", "", 1.1502, (1.1, 1.2, 1.14), Limit("<=", 1.15)).ratio
        '1.1502 [1.10, 1.20; 1.14]'
        """
        if self.value is None:
            return "–"
        text = number(self.value)
        for digits in range(4, 9):
            if self.limit is None or self.limit.holds(float(text.replace(",", ""))) == self.limit.holds(self.value):
                break
            text = number(self.value, digits)
        unit = "" if self.limit is None else f" {self.limit.unit}".rstrip()
        return text + unit + brackets(self.spread)


@dataclass(frozen=True)
class Run:
    """What one stored result says.

    Parameters
    ----------
    about : str
        Machine, threads, versions.
    figures : list of Figure
    notes : list of str
        What is missing, and why; what bears on all figures.
    """

    about: str
    figures: list[Figure]
    notes: list[str]


def number(value: float, digits: int = 3) -> str:
    """So many digits, or all before the point.

    Examples
    --------
    >>> number(1), number(123.4), number(12345.6)
    ('1.00', '123', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.{digits}g}".rstrip(".")


def brackets(spread: Sequence[float]) -> str:
    """`` [low, high; best]``."""
    if not spread:
        return ""
    low, high, best = spread
    return f" [{number(low)}, {number(high)}; {number(best)}]"


def _spread(r: Mapping[str, float]) -> tuple[float, ...]:
    return (r["low"], r["high"], r["best"]) if "low" in r else ()


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}{'' if n == 1 else 's'}"


def _about(machine: str | None, threads: int | None, versions: Mapping[str, str], *further: str) -> str:
    parts = [
        machine or "machine not recorded",
        "threads not recorded" if threads is None else _count(threads, "thread"),
    ]
    return ", ".join([*parts, *further]) + "; " + ", ".join(f"{k} {v}" for k, v in versions.items())


def _median(rounds: Sequence[Mapping[str, float]], name: str) -> str:
    return duration(statistics.median(r[name] for r in rounds))


def _refusals(cases: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """Who refused what, once per reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for label, refused in cases:
        for name, why in refused.items():
            groups.setdefault((label, why), []).append(name)
    merged: dict[tuple[str, str], list[str]] = {}
    for (label, why), names in groups.items():
        merged.setdefault((", ".join(names), why), []).append(label)
    return [f"Refused: {names} on {', '.join(labels)}: {why}" for (names, why), labels in merged.items()]


def _others(find: Callable[[str], Mapping[str, Any]], value: str, composite: str, variant: str) -> str:
    """The same composite of the peers, as far as they have it."""
    found = {} if variant else {peer: find(f"{peer} {composite}") for peer in PEERS}
    told = {peer: r for peer, r in found.items() if value in r}
    return "; ".join(f"{peer} {number(r[value])}{brackets(_spread(r))}" for peer, r in told.items())


def _lrp_case(case: Mapping[str, Any], methods: Sequence[str]) -> list[Figure]:
    shown = {"": "", "ledger": " with its books", "weights": " and of weights", "compiled": ", compiled"}
    kind = next((f for f in ("VGG", "ResNet") if case["net"].startswith(f.lower())), case["net"])
    label, figures = case["label"], []
    for name in methods:
        composite, variant = (*name.split()[1:], "")[:2]
        over = FULL if variant == "weights" else PLAIN
        title = f"time of {composite}{shown[variant]}, {kind}"
        if name in case["ratios"]:
            r = case["ratios"][name]
            limit = None if r["budget"] is None else Limit("<=", r["budget"])
            sides = _median(case["rounds"], name), f"{over}, {_median(case['rounds'], over)}"
            peers = _others(lambda n: case["ratios"].get(n, {}), "median", composite, variant)
            figures.append(Figure(title, label, *sides, r["median"], _spread(r), limit, peers))
        elif name in case["refused"]:
            allowed = budget(Method("lrp", composite, variant), case["net"])
            limit = None if allowed is None else Limit("<=", allowed)
            figures.append(Figure(title, label, "refused", over, limit=limit))
        entry = case["memory"].get(name)
        if entry is not None:
            limit = Limit("<=", entry.get("budget", MEMORY_BUDGET)) if variant != "ledger" else None
            base = case["memory"].get(over, {}).get("mib")
            sides = (
                f"{entry['mib']:.0f} MiB" if "mib" in entry else "refused",
                over if base is None else f"{over}, {base:.0f} MiB",
            )
            peers = _others(lambda n: case["memory"].get(n, {}), "ratio", composite, variant)
            of = f"{composite}{shown[variant]}, {label}"
            figures.append(Figure(f"peak memory, {kind}", of, *sides, entry.get("ratio"), (), limit, peers))
    return figures


def lrp_speed(result: Mapping[str, Any]) -> Run:
    """Time and memory of relevance over those of the plain gradient, zennit and captum beside them."""
    settings, ours = result["settings"], [n for n in result["methods"] if n.startswith("lrp ")]
    figures = [f for case in result["cases"] for f in _lrp_case(case, ours)]
    refused = [
        (c["label"], c["refused"] | {f"memory of {n}": e["refused"] for n, e in c["memory"].items() if "refused" in e})
        for c in result["cases"]
    ]
    notes, absent = _refusals(refused), [p for p in PEERS if p not in result["versions"]]
    if absent:
        reason = "not installed" if settings["peers"] else "not asked for"
        notes.append(f"Peers that were not measured, since {reason}: {', '.join(absent)}")
    rounds = _count(settings["rounds"], "round")
    about = _about(result["machine"], settings["threads"], result["versions"], result["clock"], rounds)
    return Run(about, figures, notes)


def _kmeans(entries: Sequence[Mapping[str, Any]]) -> list[Figure]:
    jobs = (
        ("out", "into `out=`", OUT),
        ("returned", "returned", RETURNED),
        ("as it comes", "returned, memory as it comes", None),
    )
    figures = []
    for e in entries:
        for job, shown, allowed in jobs:
            for clock, key, unit in (("wall", "rounds", "wall time"), ("cpu", "cpu_rounds", "CPU time")):
                r = e[clock][job]
                figures.append(
                    Figure(
                        f"K-means, explain {shown}, {unit}",
                        e["name"],
                        _median(e[key], job),
                        f"predict, {_median(e[key], 'predict')}",
                        r["median"],
                        _spread(r),
                        None if allowed is None else Limit("<=", allowed),
                    )
                )
    return figures


def _models(entries: Sequence[Mapping[str, Any]]) -> list[Figure]:
    figures = []
    for e in entries:
        case = f"{e['name']} ({e['note']})"
        for clock, key, unit in (("wall", "rounds", "wall time"), ("cpu", "cpu_rounds", "CPU time")):
            r, ours, other = e[clock]["explain"], _median(e[key], "explain"), _median(e[key], "predict")
            what = f"other models, explain, {unit}"
            figures.append(Figure(what, case, ours, f"predict, {other}", r["median"], _spread(r)))
        for name, r in e["rivals"].items():
            figures.append(
                Figure(
                    f"times faster than {name}, per row",
                    case,
                    duration(e["seconds"]["explain"] / e["rows"]),
                    f"{name}, {duration(e['seconds'][name] / e['rival_rows'])}",
                    r["median"],
                    _spread(r),
                    Limit(">=", FASTER) if name.startswith("shap ") else None,
                )
            )
    return figures


def _pairs(part: Mapping[str, Any]) -> list[Figure]:
    figures = []
    for rule in RULES:
        for e in part["cases"]:
            r = e["ratio"][rule]
            ours, other = duration(e["seconds"][rule] / e["rows"]), duration(e["seconds"][f"{rule} pairs"])
            what, case = f"kernel k-means, {rule}: times faster than its pairs", f"{e['members']} members"
            figures.append(Figure(what, case, ours, f"pair network, {other}", r["median"], _spread(r)))
        grown = [part["exponents"][name] for name in (rule, f"{rule} pairs")]
        what = f"kernel k-means, {rule}: exponent of time in members"
        figures.append(Figure(what, "", f"{grown[0]:.2f}", f"pair network, {grown[1]:.2f}"))
    return figures


def explain_speed(result: Mapping[str, Any]) -> Run:
    """Explanations over predict, against Shapley values and against the pair network."""
    notes = [f"K-means: {e['note']}, {e['name']}" for e in result.get("kmeans", [])]
    figures = [*_kmeans(result.get("kmeans", [])), *_models(result.get("models", []))]
    if "memory" in result:
        part = result["memory"]
        row = part["columns"] * (8 if part["dtype"] == "float64" else 4)
        for way in WAYS:
            entry = part["ways"][way]
            if "failed" in entry:
                notes.append(f"No memory of {way}: {entry['failed']}")
                continue
            more = (entry["mib"][-1] - entry["mib"][0]) * 2**20 / max(1, part["rows"][-1] - part["rows"][0])
            grown = max(0, round(more))
            ours, other = f"{grown} bytes", f"a row of values, {row} bytes"
            figures.append(Figure("memory per further row", way, ours, other, grown / row))
    if "pairs" in result:
        figures += _pairs(result["pairs"])
    s = result["settings"]
    load = f"load {result['load'][0]:.1f} to {result['load'][1]:.1f}"
    waiting = f"OMP_WAIT_POLICY {result['waiting']}"
    about = _about(result["machine"], s["threads"], result["versions"], waiting, _count(s["rounds"], "round"), load)
    refused = [(e["name"], e["refused"]) for e in result.get("models", [])]
    return Run(about, figures, notes + _refusals(refused))


def pruning_speed(result: Mapping[str, Any]) -> Run:
    """Scoring over gradient scoring; seconds of planning and cutting."""
    figures = []
    for case in result["scoring"]:
        label = f"{case['net']}, {case['pixels']} pixels, {case['pictures']} pictures"
        for name, r in case["ratios"].items():
            allowed = pruning.BUDGET.get(case["net"]) if name == pruning.BUDGETED else None
            figures.append(
                Figure(
                    f"scoring by {name}",
                    label,
                    _median(case["rounds"], name),
                    f"{pruning.BASE}, {_median(case['rounds'], pruning.BASE)}",
                    r["median"],
                    _spread(r),
                    None if allowed is None else Limit("<=", allowed),
                )
            )
    for net, row in result["planning"].items():
        parts = ", ".join(f"{k} {row[k]:.2f}" for k in ("structure", "plan", "cut"))
        limit = Limit("<", pruning.PLANNING, "s") if net == "resnet50" else None
        what = "planning and cutting beyond scoring"
        figures.append(Figure(what, net, f"{row['total']:.2f} s ({parts})", "–", row["total"], (), limit))
    rounds = {len(case["rounds"]) for case in result["scoring"]}
    versions = {"python": result["python"], **result["versions"]}
    counted = ", ".join(_count(n, "round") for n in sorted(rounds))
    about = _about(result.get("machine"), result["threads"], versions, "process CPU time", counted)
    return Run(about, figures, [])


def quantizing_speed(result: Mapping[str, Any]) -> Run:
    """Training steps at low precision over plain ones."""
    figures = []
    for case in result["cases"]:
        for method, r in case["ratios"].items():
            figures.append(
                Figure(
                    f"{quantizing.STEPS} steps of {method}",
                    f"{case['net']}, {case['pixels']} pixels, batch {case['batch']}",
                    _median(case["rounds"], method),
                    f"{quantizing.PLAIN}, {_median(case['rounds'], quantizing.PLAIN)}",
                    r["median"],
                    _spread(r),
                    Limit("<=", quantizing.BUDGET),
                )
            )
    versions = {"python": result["python"], "torch": result["torch"]}
    counted = ", ".join(_count(n, "round") for n in sorted({len(c["rounds"]) for c in result["cases"]}))
    return Run(_about(result.get("machine"), result["threads"], versions, "process CPU time", counted), figures, [])


def coder_sizes(result: Mapping[str, Any]) -> Run:
    """Bytes of the container over those of NNC and zstd; seconds of reading."""
    figures, general = [], ("packed", "zlib9", "lzma")
    less = Limit("<", coders.BOUND)
    for row in result["sizes"]:
        case = f"{row['bits']} bit, gamma {row['gamma']}"
        ours, others = f"{row['file']:,} bytes", ", ".join(f"{g} {row[g]:,}" for g in general)
        ratio = row["file"] / row["nnc"]
        figures.append(Figure("file over NNC", case, ours, f"NNC (cited), {row['nnc']:,}", ratio, (), less, others))
        if "zstd19" in row:
            best = min(row["zstd19"], row["zstd19 of packed"])
            other = f"zstd-19, the smaller of plain and packed, {best:,}"
            figures.append(Figure("file over zstd-19", case, ours, other, row["file"] / best, (), less))
    for row in result["times"]:
        case = f"{row['weights']:,} weights, {row['zeros']:.0%} zeros"
        ours, slow = row["decode_seconds"], row["slow_seconds"]
        other = f"our decoder in plain Python, {duration(slow)}"
        figures.append(Figure("decoding, CPU time", case, duration(ours), other, ours / slow))
        figures.append(Figure("encoding, CPU time", case, duration(row["encode_seconds"]), "–"))
    missing = (
        [] if any("zstd19" in row for row in result["sizes"]) else ["zstandard is not installed: no figures of zstd"]
    )
    versions = {"python": result["python"], **result["versions"]}
    threads = result.get("threads", 1)  # main() has always set one
    return Run(_about(result.get("machine"), threads, versions, f"best of {result['rounds']}"), figures, missing)


def runtime_forms(result: Mapping[str, Any]) -> Run:
    """Speed of the ONNX forms over fp32, in onnxruntime."""
    figures, s = [], result["settings"]
    for case in result["nets"]:
        for threads, rows in case["times"].items():
            fp32 = f"fp32, {rows['fp32']['ms']:.3g} ms, {case['bytes']['fp32']:,} bytes"
            for form, row in rows.items():
                if form == "fp32":
                    continue
                pledged = forms.PLEDGED.get(case["net"]) if form == "a8w8" and threads == "2" and s["vnni"] else None
                figures.append(
                    Figure(
                        f"speed of {form} over fp32, {_count(int(threads), 'thread')}",
                        f"{case['net']}, {case['weights']} weights".replace("trained, CIFAR-10", "trained"),
                        f"{row['ms']:.3g} ms, {case['bytes'][form.partition(',')[0]]:,} bytes",
                        fp32,
                        row["speed"],
                        (row["speed_low"], row["speed_high"], row["speed_best"]),
                        None if pledged is None else Limit(">=", pledged),
                    )
                )
    versions = {"python": s["python"], **s["versions"]}
    vnni = "with VNNI" if s["vnni"] else "without VNNI, so that nothing is pledged"
    asked = ", ".join(_count(int(t), "thread") for t in dict.fromkeys(t for c in result["nets"] for t in c["times"]))
    load = f"load {s['load'][0]:.1f} to {s['load'][1]:.1f}"
    parts = [s["machine"], vnni, asked, "wall time", _count(s["rounds"], "round"), load]
    busy = ["Other work ran on this machine: not to be quoted"] if s["load"][0] > forms.BUSY else []
    return Run(", ".join(parts) + "; " + ", ".join(f"{k} {v}" for k, v in versions.items()), figures, busy)


_ROUNDS = "[smallest, largest over the rounds; ratio of the shortest times]"
BENCHMARKS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Run]]] = {
    "lrp_speed": (f"Relevance over the plain gradient, time and memory. {_ROUNDS}.", lrp_speed),
    "explain_speed": (
        f"Explanations over the model's own predict, and how much faster than rivals. {_ROUNDS}.",
        explain_speed,
    ),
    "pruning_speed": (f"Scoring over gradient scoring; planning. {_ROUNDS}.", pruning_speed),
    "quantizing_speed": (f"Training steps at low precision over plain ones. {_ROUNDS}.", quantizing_speed),
    "coder_sizes": ("Bytes of the container over those of other coders. Sizes have no spread.", coder_sizes),
    "runtime_forms": (
        "Speed of the ONNX forms over fp32 in onnxruntime. [quartiles over the rounds; ratio of the shortest times].",
        runtime_forms,
    ),
}


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Name of a benchmark -> name of a file of ``folder/NAME/`` -> what it holds; every benchmark is a key.

    Raises
    ------
    FileFormatError
        If a file is no JSON.
    """
    found: dict[str, dict[str, Any]] = {}
    for name in BENCHMARKS:
        found[name] = {}
        for path in sorted((folder / name).glob("*.json")):
            found[name][path.stem] = _read(path)
    return found


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileFormatError(
            f"{path} cannot be read",
            expected="JSON, as a benchmark writes it",
            got=str(error),
            fix="run the benchmark again, or remove the file",
        ) from error


def _told(name: str, run: str, result: Any) -> Run:
    try:
        return BENCHMARKS[name][1](result)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FileFormatError(
            f"{name}/{run}.json is no result of this benchmark",
            expected=f"what experiments.benchmarks.{name} writes",
            got=f"{type(error).__name__}: {error}",
            fix="run the benchmark again, or remove the file",
        ) from error


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table, without columns that are empty."""
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    cells = [[row[i].replace("|", "\\|") for i in kept] for row in rows]
    lines = [[header[i] for i in kept], ["---"] * len(kept), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def _verdict(verdict: Verdict) -> str:
    return verdict if verdict in ("met", "no budget") else f"**{verdict}**"


def _row(run: str, f: Figure) -> list[str]:
    limit = "" if f.limit is None else str(f.limit)
    return [run, f.what, f.case, f.ours, f.other, f.ratio, f.peers, limit, _verdict(f.verdict)]


_HEADER = ["run", "what", "of", "ours", "compared with", "ratio", "peers, the same", "budget", "verdict"]


def _pledges(told: Mapping[str, Mapping[str, Run]]) -> list[str]:
    """A line per pledge: how often it is met, and the worst figure."""
    groups: dict[tuple[str, str, Limit], list[tuple[str, Figure]]] = {}
    for name, runs in told.items():
        for run, result in runs.items():
            for f in result.figures:
                if f.limit is not None:
                    groups.setdefault((name, f.what, f.limit), []).append((run, f))
    rows = []
    for (name, what, limit), figures in groups.items():
        known = [(run, f, f.value) for run, f in figures if f.value is not None]
        verdicts = [f.verdict for _, f in figures]
        bad = verdicts.count("missed")
        worst = "–"
        if known:
            pick = min if limit.sign == ">=" else max
            run, f, _ = pick(known, key=lambda entry: entry[2])
            worst = f"{f.ratio}: {', '.join(part for part in (f.case, run if len(told[name]) > 1 else '') if part)}"
        verdict = f"**missed** ({bad} of {len(figures)})" if bad else _verdict("met" if known else "no figure")
        rows.append([name, what, str(limit), str(len(figures)), worst, verdict])
    return _table(["benchmark", "what", "budget", "figures", "the worst of them", "verdict"], rows)


def page(found: Mapping[str, Mapping[str, Any]], said: Mapping[str, str] | None = None) -> str:
    """The text, from what was stored.

    Parameters
    ----------
    found : dict
        What :func:`stored` returns.
    said : dict, optional
        Name of a benchmark -> a sentence on its last run: that it was skipped and why, that it was a short one.

    Raises
    ------
    FileFormatError
        If a result lacks what its benchmark writes.
    """
    said = said or {}
    told = {name: {run: _told(name, run, r) for run, r in runs.items()} for name, runs in found.items()}
    figures = [(name, run, f) for name, runs in told.items() for run, result in runs.items() for f in result.figures]
    counts = {v: sum(f.verdict == v for *_, f in figures) for v in ("met", "missed", "no budget", "no figure")}
    lines = [
        "# Benchmarks",
        "",
        "Written by `python -m experiments.benchmarks table` from the stored results; each run is described below, "
        "with its machine, threads and versions. Figures of different runs come from different machines: compare "
        "ratios, within a line. What has neither a budget nor a counterpart (first calls, for one) stands in the "
        f"reports only. {len(figures)} figures: {', '.join(f'{n} {verdict}' for verdict, n in counts.items() if n)}.",
        "",
    ]
    known = {name: said.get(name, "" if found[name] else "no result is stored here") for name in found}
    absent = [f"- {name}: {text}" for name, text in known.items() if text]
    if absent:
        lines += ["## Not measured, or not in full", "", *absent, ""]
    if any(f.limit is not None for *_, f in figures):
        lines += ["## Budgets", "", *_pledges(told), ""]
    missed = [[name, *_row(run, f)] for name, run, f in figures if f.verdict in ("missed", "no figure")]
    if missed:
        lines += ["## Every figure that misses its budget", "", *_table(["benchmark", *_HEADER], missed), ""]
    lines += ["## Every figure", ""]
    for name, runs in told.items():
        if not runs:
            continue
        lines += [f"### {name}", "", BENCHMARKS[name][0], ""]
        if name in said:
            lines += [f"**{said[name]}**", ""]
        for run, result in runs.items():
            lines.append(f"- [{run}]({name}/{run}.md): {result.about}.")
            lines += [f"  - {note}." for note in result.notes]
        many = len(runs) > 1
        rows = [_row(run if many else "", f) for run, result in runs.items() for f in result.figures]
        lines += ["", *_table(_HEADER, rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def write(folder: Path) -> Path:
    """Write ``BENCHMARKS.md`` of the results in a folder there.

    Raises
    ------
    DataError
        If there is none.
    FileFormatError
        If a file is no result of its benchmark.
    """
    found, kept = stored(folder), folder / KEPT
    said = _read(kept) if kept.is_file() else {}
    if not any(found.values()):
        raise DataError(
            f"{folder} holds no results",
            expected=f"folders with JSON files, of {', '.join(BENCHMARKS)}",
            got="; ".join(f"{name}: {why}" for name, why in said.items()) or "none of them",
            fix=f"python -m experiments.benchmarks --quick -o {folder}",
        )
    text, out = page(found, said), folder / PAGE
    with whole(out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return out
