"""Heads, one a file."""

from reidreg_plugins.heads import bnneck, linear

__all__ = ["bnneck", "linear"]
