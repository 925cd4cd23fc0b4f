"""Samplers, one a file."""

from reidreg_plugins.samplers import identity, random

__all__ = ["identity", "random"]
