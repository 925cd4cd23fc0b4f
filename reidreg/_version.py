"""The version of reidreg, below every module that reports it; equal to that of pyproject.toml."""

__version__ = "0.1.0"
