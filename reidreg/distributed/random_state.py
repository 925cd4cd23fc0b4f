"""The global random generators: seeded, for each rank differently, saved and restored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reidreg.distributed.group import world


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_process(seed: int, step: int = 0) -> None:
    """Seed every generator with a run's seed, this process's rank and a step.

    So each rank draws other numbers, and the same ones whenever the run is repeated.

    Args:
        seed: The run's seed.
        step: The step at which the numbers begin.
    """
    own = np.random.SeedSequence((seed, world().rank, step)).generate_state(1)
    seed_everything(int(own[0]))


def random_state() -> dict[str, Any]:
    """The state of every global generator."""
    name, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Restore every global generator; those of CUDA devices that this machine lacks are skipped."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    for index, saved in enumerate(state.get("cuda", [])):
        if index < torch.cuda.device_count():
            torch.cuda.set_rng_state(saved, index)
