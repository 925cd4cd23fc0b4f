"""How much memory this process may still allocate, and sizes as text."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

GIB = 2**30
_UNLIMITED = 2**60  # cgroups v1 states a huge number where there is no limit


def size_in_text(size: float) -> str:
    """Bytes as text, in GiB, or in MiB below a tenth of one: `14.6 GiB`, `24.0 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be allocated without swapping, within the limits of a container or a job.

    Args:
        root: The folder with `proc` and `sys`.

    Returns:
        The bytes, or None on a system that does not say.
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        machine = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return _half_of_total()
    return min([machine, *_left_in_cgroups(root)])


def _half_of_total() -> int | None:
    """Half of the machine's memory: an estimate where the system does not say what is free."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _left_in_cgroups(root: Path) -> Iterator[int]:
    """Bytes left in each cgroup of this process, parents included, since their limits hold too."""
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
        # A container often sees its own cgroup as the root, although its path says otherwise.
        group = top / path.lstrip("/")
        for folder in {top, group, *(p for p in group.parents if top in p.parents)}:
            left = _left_in_cgroup(folder, *names)
            if left is not None:
                yield left


def _left_in_cgroup(folder: Path, limit: str, usage: str, reclaimable: str) -> int | None:
    try:
        allowed = (folder / limit).read_text().strip()
        if allowed == "max" or int(allowed) >= _UNLIMITED:
            return None
        used = int((folder / usage).read_text())
        counts = (folder / "memory.stat").read_text().splitlines()
        fields = dict(line.split(" ", 1) for line in counts)
        # The kernel frees these cached file pages as soon as memory is needed.
        used -= int(fields.get(reclaimable, 0))
    except (OSError, ValueError):
        return None
    return max(0, int(allowed) - used)
