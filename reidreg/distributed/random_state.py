"""The global random generators: seeded, kept and set again, and the same in all processes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from reidreg.distributed.group import broadcast, world


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_process(seed: int, step: int = 0) -> None:
    """Have this process draw other numbers than all others, and than at any other step.

    Args:
        seed: Of the run.
        step: Where the numbers begin.
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


def draw_alike(device: torch.device) -> None:
    """Have every process draw on from where the first one stands.

    The first may have drawn alone meanwhile: as it loaded weights, or as an evaluator ranked.

    Args:
        device: Where this process trains; CUDA's generators are one for each device.
    """
    if world().size == 1:
        return
    state = random_state()
    state.pop("cuda", None)
    set_random_state(broadcast(state))
    if device.type == "cuda":
        torch.cuda.set_rng_state(broadcast(torch.cuda.get_rng_state(device)), device)
