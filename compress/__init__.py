"""Relevance-guided pruning and quantization of CNNs.

Holds no public name yet in 0.1.0; see CHANGELOG.md.
"""

__version__ = "0.1.0"
__all__: list[str] = []
