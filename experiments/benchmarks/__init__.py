"""Ratios to a peer or a floor, each taken in one run."""
