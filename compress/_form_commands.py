"""The commands export and measure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from compress._commands import Done, writing
from compress._options import Network
from compress._sources import builder, opened, read_model
from compress.exporting import export_onnx
from compress.measurement import form_of
from compress.measurement import measure as measure_forms
from compress.storage import load
from lrp._files import replacing
from lrp.errors import DataError, FileFormatError, InputError

if TYPE_CHECKING:
    from compress._options import Samples

__all__ = ["export", "measure"]


def export(network: Network, samples: Samples, form: str, force: bool, place: Path) -> Done:
    """Write an ONNX file of the network in a file."""
    held = _InFile(network.model, network.weights, network.input_shape)
    with writing(place.parent):
        model, example = opened(held, samples)
        calibration = None if samples.pictures is None else samples.reference
        export_onnx(model, place, example, form, calibration, force=force)
    import onnx

    props = {p.key.removeprefix("compress."): p.value for p in onnx.load(place).metadata_props}
    props.pop("plan", None)
    told = {"file": str(place), "bytes": place.stat().st_size, **props}
    shown = [f"{key.replace('_', ' ')}: {value}" for key, value in props.items() if key != "version"]
    return Done([f"Written to {place}: {told['bytes']:,} bytes", *shown], told)


def measure(
    files: Sequence[Path],
    network: Network | None,
    weights: Path | None,
    samples: Samples,
    settings: Mapping[str, Any],
    place: Path | None,
) -> Done:
    """Forms side by side."""
    onnx_files = [file for file in files if file.suffix.lower() == ".onnx"]
    if len(onnx_files) < len(files) and (len(files) > 1 or network is None):
        raise InputError(
            "these files can not be measured together",
            expected="one file of compress.save with --model, or .onnx files",
            got=", ".join(file.name for file in files) + ("" if network else ", without --model"),
            fix="name one file and --model MODULE:CALLABLE",
        )
    test = None if samples.testing is None else samples.testing.batches(samples.batch_size)
    if onnx_files:
        if network is not None or weights is not None or samples.data is not None:
            raise InputError(
                "an .onnx file is measured as it is",
                expected="neither --model nor --weights nor --data beside it",
                got="some",
                fix="leave them out, or name the file of compress.save",
            )
        what: Any = files[0] if len(files) == 1 else _named(files)
        found = measure_forms(what, data=test, **settings)
    else:
        assert network is not None
        held = _InFile(network.model, files[0], network.input_shape)
        model, example = opened(held, samples)
        original = None if weights is None else read_model(network.model, weights)
        found = measure_forms(
            model,
            example_inputs=example,
            original=original,
            data=test,
            calibration=samples.reference,
            container=files[0],
            **settings,
        )
    lines = str(found).splitlines()
    if place is not None:
        with writing(place.parent), replacing(place) as temporary:
            temporary.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
        lines.append(f"Written to {place}")
    return Done(lines, found.to_json())


def _named(files: Sequence[Path]) -> dict[str, Path]:
    """By form, where each has another one; else by file name."""
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is not there", expected="a file", got="none", fix="check the path")
    forms = [form_of(path) for path in files]
    plain = all(forms) and len(set(forms)) == len(forms)
    return dict(zip(forms, files, strict=True)) if plain else {path.name: path for path in files}


class _InFile(Network):
    """A network whose weights may be a container."""

    def read(self) -> nn.Module:
        assert self.weights is not None
        if not self.weights.is_file():
            raise DataError(f"{self.weights} is not there", expected="a file", got="none", fix="check the path")
        try:
            return load(self.weights, builder(self.model)).eval()
        except FileFormatError:
            return read_model(self.model, self.weights, self.device)
