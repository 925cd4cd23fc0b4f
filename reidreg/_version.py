"""The version of reidreg: the build reads it here, and so does every module that reports it."""

__version__ = "0.1.0"
