"""What the shell sees of a command: an option once, errors in one line, advice in options."""

from __future__ import annotations

import json as _json
import re
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperCommand

if TYPE_CHECKING:
    from compress._commands import Done

__all__ = ["Command", "for_the_shell", "run"]

# no heavy imports: --help must answer at once


class Command(TyperCommand):
    """Refuses an option given twice, of which the parser would take the last without a word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for p in order:
            once = p.param_type_name == "option" and not getattr(p, "multiple", False)
            if once and not getattr(p, "is_flag", False) and order.count(p) > 1:
                ctx.fail(f"Option '{p.opts[0]}' is given more than once.")
        return super().parse_args(ctx, args)


def _stop(message: str, code: int) -> typer.Exit:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


_OPTION = re.compile(
    r"\b(target|criterion|normalisation|scope|round_to|floor|protect|accuracy_floor|device|seed|rates|criteria|data"
    r"|evaluate|steps|resume|original|meter|class_names)=('?)([\w.:*]*)\2"
)
_CALLS = {
    "pass a few samples, for example [(x, y)]": "name some with --data",
    "pass a few unlabelled batches": "name some with --data",
    ", or pass dynamic_batch=False for the batch size of the example alone": "",
    "reestimate_batchnorm=False": "--no-reestimate",
    "calibration=": "--data",
    "calibration data": "calibration samples (--data)",
    "force=True": "--force",
    "allow_collapse=True": "--allow-collapse",
    "rate=compress.Rate(zeros=0.9)": "--zeros 0.9",
    "train=False to assign once": "--epochs 0 to assign once",
    "method='ecq'": "--method ecq",
    "compress.Target(bytes=...)": "--target bytes=...",
    "form=": "--form ",
    "print(structure) lists the groups": "the command plan lists the groups",
    "a smaller per_class": "a smaller --samples-per-class",
}
_NAMED = {"evaluate": "--validation-data", "original": "--model", "class_names": "--classes"}


def for_the_shell(text: str) -> str:
    """Keyword arguments in advice, as options."""

    def option(match: re.Match[str]) -> str:
        name = _NAMED.get(match[1], f"--{match[1].replace('_', '-')}")
        return name + (f" {match[3]}" if match[3] and match[3] != "None" else "")

    for python, shell in _CALLS.items():
        text = text.replace(python, shell)
    return _OPTION.sub(option, re.sub(r"compress\.Target\((\w+)=([^)]*)\)", r"--target \1=\2", text))


def run(work: Callable[[], Done], json: bool, interrupted: str = "") -> None:
    """Do the work, and print what it found; every error is one line."""
    from lrp.errors import LRPError, UnverifiedError

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            from compress._parity import unheard
            from compress._sources import explaining

            with explaining(), unheard():
                done = work()
        except LRPError as error:
            what, expected, fix = (for_the_shell(part) for part in (error.what, error.expected, error.fix))
            got = "; ".join([error.got, *getattr(error, "__notes__", ())])
            told = LRPError(what, expected=expected, got=got, fix=fix)
            raise _stop(str(told), 1 if isinstance(error, UnverifiedError) else 2) from None
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            raise _stop(f"{where}{error.strerror or error}", 2) from None
        except KeyboardInterrupt:
            raise _stop(f"interrupted{interrupted}", 130) from None
    for text in dict.fromkeys(str(w.message) for w in caught if w.category is UserWarning):
        print(f"warning: {for_the_shell(' '.join(text.split()))}", file=sys.stderr)
    if json:
        print(_json.dumps(done.summary, indent=2))
    else:
        for line in done.lines:
            print(line)
    if done.broken:
        raise _stop(done.broken, 1)
