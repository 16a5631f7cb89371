"""Finished parts of an experiment on disk, so that it can be stopped and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["Cells"]


class Cells:
    """Finished cells, one JSON line each; a line cut off by a kill is dropped, with ``mend`` from the file, too."""

    def __init__(self, path: Path, mend: bool = True) -> None:
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self.rows[row["key"]] = row
        if lines and mend:  # without what a kill left half-written
            path.write_text("".join(json.dumps(row) + "\n" for row in self.rows.values()), encoding="utf-8")

    def add(self, key: str, **row: Any) -> None:
        self.rows[key] = {"key": key, **row}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
