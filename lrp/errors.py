"""The error family of the whole distribution.

Every error says what was expected, what came, and what to do about it. All of
them derive from :class:`LRPError`; each also derives from the built-in type a
caller would expect (``ValueError``, ``TypeError``, ``KeyError``), so generic
handlers keep working.
"""

from __future__ import annotations

__all__ = [
    "BoundsError",
    "BudgetError",
    "ColumnError",
    "CompositeError",
    "ConvergenceError",
    "DataError",
    "DistributedError",
    "ExportError",
    "FileFormatError",
    "InputError",
    "LRPError",
    "MismatchError",
    "MissingDependencyError",
    "ModeError",
    "NonFiniteError",
    "NotFittedError",
    "OutputError",
    "PlanError",
    "RuleError",
    "StructureError",
    "TargetError",
    "UnsupportedEstimatorError",
    "UnsupportedOperationError",
    "UnverifiedError",
]


class LRPError(Exception):
    """Base class: a message in three parts.

    Parameters
    ----------
    what : str
        What is wrong, naming the thing.
    expected, got, fix : str, optional
        What was expected, what came instead, and what to do.
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", fix: str = "") -> None:
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        parts = [what.rstrip(".") + "."]
        if expected:
            parts.append(f"Expected: {expected}.")
        if got:
            parts.append(f"Got: {got}.")
        if fix:
            parts.append(f"What to do: {fix}.")
        super().__init__(" ".join(parts))

    def __str__(self) -> str:  # KeyError would show the repr
        return str(self.args[0])


class InputError(LRPError, ValueError):
    """An input tensor or table of the wrong shape, type or size."""


class NonFiniteError(InputError):
    """NaN or infinity where finite numbers are needed."""


class TargetError(LRPError, ValueError):
    """A target or start that does not fit the output."""


class BoundsError(LRPError, ValueError):
    """Missing or inverted bounds of the box rule."""


class OutputError(LRPError, TypeError):
    """A model whose output is not one floating-point tensor."""


class ModeError(LRPError, ValueError):
    """Batch normalisation or dropout in training mode."""


class ExportError(LRPError, ValueError):
    """A model whose graph can not be captured."""


class PlanError(LRPError, ValueError):
    """A plan that does not fit the model or input it is used with."""


class UnsupportedOperationError(LRPError, TypeError):
    """An operation on the path of relevance that has no rule."""


class RuleError(LRPError, ValueError):
    """A rule with impossible parameters, or used where it can not hold."""


class CompositeError(LRPError, ValueError):
    """An unknown composite, or one that leaves a layer without a rule."""


class UnsupportedEstimatorError(LRPError, TypeError):
    """An estimator or pipeline step without an exact network."""


class NotFittedError(LRPError, ValueError, AttributeError):
    """An estimator that has not been fitted."""


class ConvergenceError(LRPError, ValueError):
    """An estimator that is fitted but carries no usable solution."""


class ColumnError(LRPError, ValueError):
    """Missing, surplus or re-ordered columns."""


class DataError(LRPError, ValueError):
    """A table or file of data that can not be read."""


class UnverifiedError(LRPError, RuntimeError):
    """A promise that could not be checked on the user's data."""


class StructureError(LRPError, ValueError):
    """A network whose channels can not be removed as asked."""


class BudgetError(LRPError, ValueError):
    """A target that can not be met."""


class MismatchError(LRPError, ValueError):
    """Sums or saved states that do not belong together."""


class DistributedError(LRPError, RuntimeError):
    """Another process of a distributed run failed."""


class MissingDependencyError(LRPError, ImportError):
    """An optional package that is not installed."""


class FileFormatError(LRPError, ValueError):
    """A saved file that is damaged, unknown or not allowed."""
