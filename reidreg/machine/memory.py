"""How much memory a process may still take on this machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 2**60  # version 1 of control groups has a huge number where there is no limit


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping, within the limits of a container or a job.

    Args:
        root: Where `proc` and `sys` are.

    Returns:
        The bytes, or None on a system that does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        machine = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return _half_of_all()
    return min([machine, *_room_in_groups(root)])


def _half_of_all() -> int | None:
    """Half of the machine's memory, where the system does not say how much of it is free."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _room_in_groups(root: Path) -> Iterator[int]:
    """What each control group that this process is in has left: a parent's limit holds too."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # A container often sees its own group as the top one, under another path.
        group = top / path.lstrip("/")
        for folder in {top, group, *(p for p in group.parents if top in p.parents)}:
            room = _room_in_group(folder, *names)
            if room is not None:
                yield room


def _room_in_group(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max" or int(allowed) >= _UNLIMITED:
            return None
        used = int((folder / usage).read_text())
        counts = (folder / "memory.stat").read_text().splitlines()
        fields = dict(line.split(" ", 1) for line in counts)
        # Pages of files that were read once are given up for whoever needs memory.
        used -= int(fields.get(reclaimable, 0))
    except (OSError, ValueError):
        return None
    return max(0, int(allowed) - used)
