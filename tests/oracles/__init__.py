"""Slow, independent references."""
