"""Sizes of memory and files, in words."""

from __future__ import annotations

GIB = 2**30


def size_in_text(size: float) -> str:
    """Bytes in GiB, or in MiB below a tenth of one: `14.6 GiB`, `24.0 MiB`."""
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.1f} MiB"
