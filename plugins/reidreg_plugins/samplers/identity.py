"""Batches of P identities with K images each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray

from reidreg import SAMPLERS, DataError, Sampler

Ints = NDArray[np.int64]


@SAMPLERS.register("identity")
class IdentitySampler(Sampler):
    """P x K batches: P different identities with K images each.

    Each epoch splits the shuffled images of every identity into chunks of K. The last chunk is
    filled up with the identity's first images, so no image repeats before all were used, and an
    identity of fewer than K images repeats them. The number of batches is known beforehand: the
    largest B with sum_i min(c_i, B) >= P B over the chunk counts c_i. Each batch draws identities
    by the chunks that they have left, so that the mix is the same from the first batch to the
    last. Left out are fewer than P chunks, and the chunks of an identity beyond B.

    Args:
        batch_size: Images in a batch over all processes, a multiple of instances.
        instances: K, images of each identity.
    """

    def __init__(
        self,
        pids: Sequence[int],
        batch_size: Annotated[int, Ge(2)] = 64,
        instances: Annotated[int, Ge(1)] = 4,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__()
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.instances = instances
        self.identities = batch_size // instances
        order = np.argsort(np.asarray(pids), kind="stable")
        _, counts = np.unique(np.asarray(pids), return_counts=True)
        self._images: list[Ints] = np.split(order, np.cumsum(counts)[:-1])
        if len(counts) < self.identities:
            raise DataError(
                f"sampler.batch_size: batches of {batch_size} with {instances} images an identity "
                f"need {self.identities} identities, the train split has {len(counts)}; use at "
                f"most {len(counts) * instances}"
            )
        if self.identities % world_size:
            raise DataError(
                f"sampler.batch_size: {self.identities} identities a batch cannot be shared "
                f"evenly by {world_size} processes"
            )
        self._chunks = -(-counts // instances)
        self._length = count_batches(self._chunks, self.identities)

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise ValueError unless a batch holds whole identities, and at least two."""
        size, instances = options["batch_size"], options["instances"]
        if size % instances:
            below = size - size % instances
            fitting = f"{below} or {below + instances}" if below else str(instances * 2)
            raise ValueError(
                f"batch_size: {size} is not a multiple of sampler.instances {instances}; "
                f"use {fitting}"
            )
        if size < 2 * instances:
            raise ValueError(
                f"batch_size: {size} holds one identity of {instances} images; "
                f"use at least {2 * instances}, so that a batch has images of others"
            )

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        rng = np.random.default_rng((self.seed, self.epoch))
        chunks = [self._cut(rng.permutation(images)) for images in self._images]
        left = self._usable(rng)
        share = self.identities // self.world_size
        for remaining in range(self._length, 0, -1):
            chosen = self._draw(rng, left, remaining)
            own = chosen[self.rank * share : (self.rank + 1) * share]
            batch = [chunks[identity][left[identity] - 1] for identity in own]
            left[chosen] -= 1
            yield np.concatenate(batch).tolist()

    def _cut(self, images: Ints) -> Ints:
        """An identity's images as chunks (c, K); the first is the one that was filled up."""
        total = -(-len(images) // self.instances) * self.instances
        # np.resize repeats from the beginning, and chunks are used from the last to the first: the
        # filled-up chunk comes last, and repeats nothing if the identity's first chunk is left out.
        return np.resize(images, total).reshape(-1, self.instances)[::-1]

    def _usable(self, rng: np.random.Generator) -> Ints:
        """How many chunks of each identity this epoch uses: P x B in all, at most B each."""
        usable = np.minimum(self._chunks, self._length)
        surplus = int(usable.sum()) - self.identities * self._length
        left_out = rng.choice(np.repeat(np.arange(len(usable)), usable), surplus, replace=False)
        np.subtract.at(usable, left_out, 1)
        return usable

    def _draw(self, rng: np.random.Generator, left: Ints, remaining: int) -> Ints:
        """P different identities, each with probability chunks left / batches remaining.

        Systematic sampling: identities in random order are segments of a line, as long as the
        chunks that they have left, P x remaining in all; marks at a distance of `remaining` choose
        segments. None is longer than that distance, so none is chosen twice, and one as long is in
        every batch. The expected share of each in what is left never changes.
        """
        order = rng.permutation(len(left))
        marks = rng.integers(remaining) + remaining * np.arange(self.identities)
        return order[np.searchsorted(np.cumsum(left[order]), marks, side="right")]


def count_batches(chunks: Ints, identities: int) -> int:
    """The number of batches of P identities: the largest B with sum_i min(c_i, B) >= P B.

    Args:
        chunks: c_i, how many chunks each identity has.
        identities: P.
    """
    length = int(chunks.sum()) // identities
    while int(np.minimum(chunks, length).sum()) < identities * length:
        length = int(np.minimum(chunks, length).sum()) // identities
    return length
