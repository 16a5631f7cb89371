"""Files that are either whole or not there."""

from lrp._files import replacing

__all__ = ["replacing"]
