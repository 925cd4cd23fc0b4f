"""Checks of option values."""

from __future__ import annotations

from collections.abc import Sequence

from reidreg.errors import ConfigError, did_you_mean


def check_choice(key: str, value: str, known: Sequence[str]) -> None:
    """Raise a ConfigError unless the value is a known one."""
    if value not in known:
        raise ConfigError(f"{key}: {value!r} is unknown{did_you_mean(str(value), known)}")


def check_at_least(key: str, value: float, least: int) -> None:
    """Raise a ConfigError unless the value is at least `least`."""
    if not value >= least:
        raise ConfigError(f"{key}: {value} is too small; at least {least} is needed")
