"""Sharing the batches of a sampler among ranks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from reidreg.errors import ConfigError, DataError
from reidreg.machine.world import World
from reidreg.parts.interfaces import SAMPLERS, Sampler


class SharedSampler(Sampler):
    """This rank's contiguous share of every batch of a sampler.

    Args:
        sampler: The sampler of the global batches, the same on every rank.
        world: This rank and the world size.
    """

    def __init__(self, sampler: Sampler, world: World) -> None:
        super().__init__()
        self.sampler = sampler
        self.world = world

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(epoch)
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.sampler:
            if len(batch) % self.world.size:
                raise DataError(
                    f"sampler: a batch of {len(batch)} images cannot be shared evenly by "
                    f"{self.world.size} processes; choose a --sampler.batch_size that is a "
                    "multiple of them and not larger than the train split"
                )
            yield batch[self.world.share(len(batch))]

    def __len__(self) -> int:
        return len(self.sampler)

    def state_dict(self) -> dict[str, Any]:
        return self.sampler.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        super().set_epoch(self.sampler.epoch)


def build_sampler(name: str, options: Mapping[str, Any], world: World, **facts: Any) -> Sampler:
    """Build a sampler that gives this rank's share of each batch.

    A sampler that takes `rank` and `world_size` shares its batches itself; any other is wrapped in
    a `SharedSampler`.

    Args:
        name: Its registered name.
        options: Its options; `batch_size` is that of all ranks together.
        world: This rank and the world size.
        facts: Further arguments: pids and camids of the train split, seed.

    Raises:
        ConfigError: The batch size is not a multiple of the world size.
    """
    size = options.get("batch_size")
    if isinstance(size, int) and size % world.size:
        below = size - size % world.size
        fitting = f"{below} or {below + world.size}" if below else str(world.size)
        raise ConfigError(
            f"sampler.batch_size: {size} images cannot be shared evenly by {world.size} processes; "
            f"use {fitting}"
        )
    sampler = SAMPLERS.build(name, **options, **facts, rank=world.rank, world_size=world.size)
    if world.size == 1 or "world_size" in inspect.signature(SAMPLERS[name]).parameters:
        return sampler
    return SharedSampler(sampler, world)
