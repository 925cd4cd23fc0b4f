"""Runs for tests: started, killed, resumed, and compared bit by bit."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from reidreg import fit, load_checkpoint, load_config
from worlds import in_processes, started

Values = dict[str, Any]
# What differs between two runs of the same numbers.
_TIMES_AND_MEMORY = {"train/images_per_second", "train/data_wait", "train/peak_memory_gib"}


def trained(values: Values, resume: str | None = None) -> Values:
    """Train as `configs/aihub_kaist.yaml` with changes; returns the last evaluation's figures."""
    return fit(load_config("aihub_kaist", values), resume)


def killed_and_resumed(values: Values, size: int, step: str) -> None:
    """Kill all processes of a run once its log shows a step, and let others end it."""
    log = Path(values["output_dir"]) / "train.log"
    with started(size, trained, values) as processes:
        deadline = time.monotonic() + 60
        while not (log.exists() and step in log.read_text()):
            assert time.monotonic() < deadline and all(p.is_alive() for p, _ in processes)
            time.sleep(0.01)
        for process, _ in processes:
            process.kill()
    in_processes(size, trained, values, "auto")


def lines_of(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl, without times and memory."""
    text = (folder / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in _TIMES_AND_MEMORY} for line in lines]


def at_most_apart(one: list[dict[str, float]], other: list[dict[str, float]], rel: float) -> None:
    """Assert that two runs' lines are the same but for a relative error."""
    assert len(one) == len(other) > 0
    for line, same in zip(one, other, strict=True):
        assert line == pytest.approx(same, rel=rel, abs=1e-6)


def differing(one: Path, other: Path) -> list[str]:
    """The leaves in which two checkpoints are not the same bits."""
    trees = []
    for path in (one, other):
        checkpoint = load_checkpoint(path)
        config = {**checkpoint.config, "output_dir": "", "train": {}}
        trees.append(_flat({**vars(checkpoint), "config": config, "labels": None}))
    assert trees[0].keys() == trees[1].keys()
    return [
        key
        for key, value in trees[0].items()
        if not (
            torch.equal(value, trees[1][key])
            if isinstance(value, torch.Tensor)
            else value == trees[1][key]
        )
    ]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    """A tree as its leaves by path, for a comparison that names what differs."""
    if isinstance(tree, dict):
        return {k: v for key in tree for k, v in _flat(tree[key], f"{path}/{key}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, x in enumerate(tree) for k, v in _flat(x, f"{path}/{i}").items()}
    return {path: tree}
