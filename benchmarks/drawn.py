"""What the benchmarks of training share: a run on drawn people, a batch of noise, a process."""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from reidreg import Batch, load_config, load_plugins
from reidreg.distributed.group import world
from reidreg.training.run import Run, build_run

PEOPLE = 64
INSTANCES = 4


def make_run(options: argparse.Namespace, folder: Path, changes: dict[str, Any]) -> Run:
    """A run as `reidreg fit` builds it, on drawn people.

    Args:
        options: Of the command line: backbone, size, batch and precision.
        folder: Where the data set is drawn.
        changes: Further options, by dotted key.
    """
    load_plugins()
    config = load_config(
        "quickstart",
        {
            "dataset": {"root": str(folder), "identities": PEOPLE, "cameras": 2},
            "dataset.images_per_camera": 2,
            "input.size": options.size,
            "sampler": {"batch_size": options.batch, "instances": INSTANCES},
            "backbone": {"name": options.backbone},
            "train": {"device": "cpu", "precision": options.precision, "workers": 0},
        },
        changes,
    )
    return build_run(config)


def make_batch(options: argparse.Namespace, run: Run) -> Batch:
    """This process's share of a batch as the loader gives it, of noise."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(options.batch, 3, *options.size, generator=generator)
    people = len(run.embedder.labels.pids)
    pids = torch.arange(options.batch) // INSTANCES % people
    own = world().share(options.batch)
    images = images[own].to(memory_format=torch.channels_last)
    return Batch(images, pids[own], torch.zeros_like(pids[own]))


def start_process(work: Callable[..., None], *arguments: object) -> Connection:
    """Start a fresh process that calls `work` with its end of a pipe and the arguments.

    Returns:
        Our end of the pipe; the process ends with this one, if not before.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=work, args=(theirs, *arguments), daemon=True).start()
    theirs.close()
    return ours
