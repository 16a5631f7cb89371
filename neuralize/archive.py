"""The file of an explanation: one npz without pickle, checked array by array when it is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse

from lrp.errors import FileFormatError
from neuralize._files import replacing
from neuralize.explanation import ComputedLines, Explanation

__all__ = ["read", "write"]

VERSION = 2
_FORMAT = "neuralize.Explanation"
KINDS = ("cluster", "class", "outlier", "density", "value")
_REAL, _LABEL = "f", "biufUS"


_SPARSE = ("data", "indices", "indptr")


def _plain(labels: Any) -> Any:
    """Labels that are all strings, as an array of strings: objects would need pickle."""
    if labels.dtype == object and all(isinstance(label, str) for label in labels.tolist()):
        return labels.astype(np.str_)
    return labels


def _pack(entries: dict[str, Any]) -> dict[str, Any]:
    """CSR arrays as their three parts."""
    packed: dict[str, Any] = {}
    for name, array in entries.items():
        if scipy.sparse.issparse(array):
            packed |= {f"{name}.{part}": getattr(array.tocsr(), part) for part in _SPARSE}
            packed[f"{name}.shape"] = np.array(array.shape)
        else:
            packed[name] = array
    return packed


def _unpack(entries: dict[str, Any]) -> dict[str, Any]:
    """CSR arrays from their three parts, checked."""
    plain = {
        name: array for name, array in entries.items() if not name.endswith((*(f".{p}" for p in _SPARSE), ".shape"))
    }
    for name in {n.rsplit(".", 1)[0] for n in entries if n not in plain}:
        data, indices, pointer, shape = (entries[f"{name}.{part}"] for part in (*_SPARSE, "shape"))
        matrix = scipy.sparse.csr_array((data, indices, pointer), shape=tuple(map(int, shape)))
        matrix.check_format(full_check=True)
        plain[name] = matrix
    return plain


def write(explanation: Explanation, path: str | os.PathLike[str]) -> Path:
    """Write everything to one npz file; returns its path."""
    e = explanation
    labels, target, decided = map(_plain, (e.labels, e.target, e.decided))
    entries: dict[str, Any] = {
        "format": np.array(_FORMAT),
        "version": np.array(VERSION),
        "values": e.values,
        "output": e.output,
        "residual": e.residual,
        "target": target,
        "decided": decided,
        "divided": e.divided,
        "labels": labels,
        "data": e.data,
        "feature_names": np.array(e.feature_names, dtype=np.str_),
        "text": np.array(
            [e.rule, e.model, e.unit, e.kind, e.output_name, json.dumps([e.categories, e.grouped, e.level])],
            dtype=np.str_,
        ),
        "beta": np.array(np.nan if e.beta is None else e.beta),
        "competitors": e.competitors,
        "part_names": np.array(list(e.residual_parts), dtype=np.str_),
    }
    entries |= {f"part_{i}": part for i, part in enumerate(e.residual_parts.values())}
    entries["note_names"] = np.array(list(e.notes), dtype=np.str_)
    entries |= {f"note_{i}": note for i, note in enumerate(e.notes.values())}
    if e.contrast is not None:
        entries["contrast"] = _plain(e.contrast)
    if not scipy.sparse.issparse(e.values):
        # of sparse values there would be far more of these than of the values themselves
        entries |= {"slope": e.slope, "break_even": e.break_even}
    entries = _pack(entries)
    wrong = [name for name, a in entries.items() if np.asarray(a).dtype.kind == "O"]
    if wrong:
        raise FileFormatError(
            "labels can't be saved without pickle",
            expected="numbers or strings",
            got=f"objects in {wrong}",
            fix="fit with str labels",
        )
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **entries)
    return Path(path)


def _fault(e: dict[str, Any]) -> str | None:
    """The first array of a wrong shape or kind, in words."""
    if e["values"].ndim != 2 or e["labels"].ndim != 1:
        return f"values {e['values'].shape}, labels {e['labels'].shape}"
    (n, d), k = e["values"].shape, len(e["labels"])
    parts = len(e["part_names"]) if e["part_names"].ndim == 1 else -1
    notes = len(e["note_names"]) if e["note_names"].ndim == 1 else -1
    expected: dict[str, tuple[tuple[int, ...], str]] = {
        "values": ((n, d), _REAL),
        "data": ((n, d), "fiub"),
        "competitors": ((n, k), _REAL),
        "output": ((n,), _REAL),
        "residual": ((n,), _REAL),
        "divided": ((n,), "b"),
        "labels": ((k,), _LABEL),
        "target": ((n,), _LABEL),
        "decided": ((n,), _LABEL),
        "feature_names": ((d,), "U"),
        "text": ((6,), "U"),
        "note_names": ((notes,), "U"),
        "beta": ((), "fiu"),
        "part_names": ((parts,), "U"),
    }
    expected |= {f"part_{i}": ((n,), _REAL) for i in range(parts)}
    expected |= {f"note_{i}": ((n,), "b") for i in range(notes)}
    if not scipy.sparse.issparse(e["values"]):
        expected |= {"slope": ((n, d), _REAL), "break_even": ((n, d), _REAL)}
    if "contrast" in e:
        expected["contrast"] = (n,), _LABEL
    for name, (shape, kinds) in expected.items():
        if e[name].shape != shape or e[name].dtype.kind not in kinds:
            return f"{name} {e[name].dtype} {e[name].shape} beside values {(n, d)} and {k} labels"
    for name in ("target", "decided", "contrast"):
        if name in e and (e[name].dtype.kind == "U") != (e["labels"].dtype.kind == "U"):
            return f"{name} {e[name].dtype} beside labels {e['labels'].dtype}"
        if name in e and not np.isin(e[name], e["labels"]).all():
            return f"{name} beyond the labels"
    return None


def read(path: str | os.PathLike[str]) -> Explanation:
    """Read what :func:`write` wrote.

    Raises
    ------
    FileFormatError
        Damaged, of another kind, or written by a later version.
    FileNotFoundError
    """

    def bad(got: str) -> FileFormatError:
        return FileFormatError(
            f"{os.fspath(path)} is no explanation",
            expected=f"a file of {_FORMAT}, version {VERSION}",
            got=got,
            fix="save it again",
        )

    try:
        with open(path, "rb") as handle, np.load(handle, allow_pickle=False) as file:
            if isinstance(file, np.ndarray) or "format" not in file or str(file["format"]) != _FORMAT:
                raise bad("another kind of file")
            if int(file["version"]) != VERSION:
                raise bad(f"version {int(file['version'])}")
            e = _unpack({name: file[name] for name in file.files})
        fault = _fault(e)
        if fault is not None:
            raise bad(fault)
        rule, model, unit, kind, output_name, listed = map(str, e["text"])
        named, groups, level = json.loads(listed)
        categories = {str(k): tuple(map(str, v)) for k, v in named.items()}
        grouped, level, beta = tuple(map(str, groups)), float(level), float(e["beta"])
        if kind not in KINDS or len(set(e["part_names"].tolist())) != len(e["part_names"]):
            raise bad(f"kind {kind!r}, parts {e['part_names'].tolist()}")
    except (FileNotFoundError, FileFormatError):
        raise
    except Exception as error:  # damaged files fail anywhere in zip, zlib, numpy's header parser and json
        raise bad(str(error).split("\n")[0] or type(error).__name__) from error
    explanation = Explanation(
        values=e["values"],
        output=e["output"],
        residual=e["residual"],
        residual_parts={str(name): e[f"part_{i}"] for i, name in enumerate(e["part_names"])},
        target=e["target"],
        contrast=e.get("contrast"),
        decided=e["decided"],
        divided=e["divided"],
        feature_names=tuple(str(name) for name in e["feature_names"]),
        labels=e["labels"],
        data=e["data"],
        beta=None if np.isnan(beta) else beta,
        rule=rule,
        model=model,
        unit=unit,
        kind=kind,
        categories=categories,
        notes={str(name): e[f"note_{i}"] for i, name in enumerate(e["note_names"])},
        output_name=output_name,
        grouped=grouped,
        level=level,
    )
    shape = e["values"].shape
    # those of sparse values are not in the file; these take no memory
    explanation.__dict__["_computed"] = ComputedLines(
        e["competitors"],
        e["slope"] if "slope" in e else np.broadcast_to(0.0, shape),
        e["break_even"] if "break_even" in e else np.broadcast_to(np.nan, shape),
    )
    return explanation
