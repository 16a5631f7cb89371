"""Registers every converter when it is imported."""

from neuralize.converters import clusterings, gaussian, kernels, linear, neighbours, own, regressions

__all__ = ["clusterings", "gaussian", "kernels", "linear", "neighbours", "own", "regressions"]
