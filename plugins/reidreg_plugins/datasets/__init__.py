"""Datasets, one a file."""

from reidreg_plugins.datasets import aihub_kaist, market1501, synthetic

__all__ = ["aihub_kaist", "market1501", "synthetic"]
