"""What an experiment is: its question, its settings, its cells, and what it says in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.study import Study

__all__ = ["VERDICTS", "Claim", "Experiment", "Report", "Table", "Verdict"]

Verdict = Literal["confirmed", "partly", "null", "refuted", "not comparable"]
VERDICTS: tuple[Verdict, ...] = ("confirmed", "partly", "null", "refuted", "not comparable")


@dataclass(frozen=True)
class Table:
    """A table: numbers as they are, for the file of values; how they are read, for the page.

    Parameters
    ----------
    title : str
    columns : sequence of str
    rows : sequence of sequences
        Text or numbers; a pair is a mean and its standard error, None is not there.
    note : str
    digits : int
        After the point, on the page.

    Examples
    --------
    >>> rows = [["LRP", (0.7712, 0.004)], ["random", 0.5]]
    >>> print(Table("Accuracy", ["criterion", "10 %"], rows, digits=2).markdown())
    | criterion | 10 % |
    |---|---|
    | LRP | 0.77 ± 0.00 |
    | random | 0.50 |
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    digits: int = 1

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"'{self.title}' has {len(self.columns)} columns and a row of {len(wrong[0])}")

    def _told(self, value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, tuple):
            mean, error = value
            return self._told(mean) if error is None else f"{self._told(mean)} ± {self._told(error)}"
        if isinstance(value, float):
            return "-" if value != value else f"{value:.{self.digits}f}"
        return str(value)

    def markdown(self) -> str:
        """With a rule below the names of the columns."""
        lines = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(self._told(value) for value in row) + " |" for row in self.rows]
        return "\n".join(lines)

    def csv(self) -> str:
        """Values in full; a mean and its standard error take two columns."""
        import csv
        import io

        paired = [any(isinstance(row[k], tuple) for row in self.rows) for k in range(len(self.columns))]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names: list[str] = []
        for name, two in zip(self.columns, paired, strict=True):
            names += [name, f"{name} (standard error)"] if two else [name]
        writer.writerow(names)
        for row in self.rows:
            values: list[Any] = []
            for value, two in zip(row, paired, strict=True):
                pair = value if isinstance(value, tuple) else (value, None)
                values += list(pair) if two else [value]
            writer.writerow(["" if v is None else v for v in values])
        return out.getvalue()


@dataclass(frozen=True)
class Claim:
    """A published result beside ours.

    Parameters
    ----------
    claim, published, ours, why : str
        What was said, with which numbers; our numbers with their spread; why the verdict.
    verdict : {"confirmed", "partly", "null", "refuted", "not comparable"}
    """

    claim: str
    published: str
    ours: str
    verdict: Verdict
    why: str

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"'{self.verdict}' is none of {', '.join(VERDICTS)}")


@dataclass(frozen=True)
class Report:
    """What an experiment says in the end, all of it computed from its rows.

    Parameters
    ----------
    words : sequence of str
        Paragraphs: what was done, what was found.
    tables, figures : mapping
        By the names of their files.
    claims : sequence of Claim
    wins, losses : sequence of str
        Settings in which relevance beats every control, and in which it does not.
    summary : str
        Two to five sentences for RESULTS.md: what was done and found, with the numbers that matter.
    """

    words: Sequence[str]
    tables: Mapping[str, Table]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    claims: Sequence[Claim] = ()
    wins: Sequence[str] = ()
    losses: Sequence[str] = ()
    summary: str = ""


@dataclass(frozen=True)
class Experiment:
    """One published result, or one of our own.

    Parameters
    ----------
    name, paper, question : str
    full, quick : mapping
        Settings as JSON takes them: of the run that is committed, and of one that takes less than two minutes on two
        cores. "seeds" is the number of them.
    work : callable
        Computes cells through :meth:`Study.cell`; what is there already is not computed again.
    report : callable
        From the rows of a study alone, so that a page can be written again without the work.
    data : sequence of str
        Folders of ``--data`` that it reads.
    """

    name: str
    paper: str
    question: str
    full: Mapping[str, Any]
    quick: Mapping[str, Any]
    work: Callable[[Study], None]
    report: Callable[[Study], Report]
    data: Sequence[str] = ()
