"""Evaluators, one a file."""

from reidreg_plugins.evaluators import retrieval

__all__ = ["retrieval"]
