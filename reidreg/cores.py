"""How many cores a process may use."""

from __future__ import annotations

import os


def count_cores() -> int:
    """The cores that this process may use: those that it is bound to, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
