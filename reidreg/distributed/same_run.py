"""Check before a run that all ranks have the same configuration and the same data."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

from reidreg.distributed.group import gather, world
from reidreg.errors import RankError
from reidreg.values import Sample


def check_same_run(config: Mapping[str, Any], splits: Mapping[str, Sequence[Sample]]) -> None:
    """Compare configuration and data of all ranks with those of rank 0.

    Args:
        config: The configuration, as plain values.
        splits: The samples by split; the folders of their files may differ between machines.

    Raises:
        RankError: A rank has another configuration, or sees other data.
    """
    if world().size == 1:
        return
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "config": config,
        "splits": {split: (len(samples), _digest(samples)) for split, samples in splits.items()},
    }
    first, *others = gather(own)
    for rank, other in enumerate(others, start=1):
        who = f"rank {rank} on {other['host']}"
        for split, (count, digest) in other["splits"].items():
            expected, expected_digest = first["splits"][split]
            if digest != expected_digest:
                raise RankError(
                    f"{who} sees another {split} split than rank 0 on {first['host']}: {count:,} "
                    f"images, not {expected:,}, or others; give every machine the same data"
                )
        if other["config"] != first["config"]:
            change = _first_difference(first["config"], other["config"])
            raise RankError(
                f"{who} has another configuration than rank 0 on {first['host']}: {change}; start "
                "all processes with the same files and flags"
            )


def _digest(samples: Sequence[Sample]) -> str:
    text = json.dumps([[os.path.basename(s.path), s.pid, s.camid] for s in samples])
    return hashlib.sha256(text.encode()).hexdigest()


def _first_difference(one: Any, other: Any, path: str = "") -> str:
    """The first key in which two nested mappings differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
    return f"{path} is {other}, not {one}"
