"""Losses, one a file."""

from reidreg_plugins.losses import center, cross_entropy, triplet

__all__ = ["center", "cross_entropy", "triplet"]
