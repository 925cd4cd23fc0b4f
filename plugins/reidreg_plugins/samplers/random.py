"""Every image once an epoch, in random order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import numpy as np
from annotated_types import Ge

from reidreg import SAMPLERS, Sampler


@SAMPLERS.register("random")
class RandomSampler(Sampler):
    """Shuffled batches: every image once an epoch, of any identities.

    The images of an incomplete last batch are left out of the epoch: batch normalisation does not
    work on a batch of one.

    Args:
        batch_size: Images in a batch.
    """

    def __init__(
        self, pids: Sequence[int], batch_size: Annotated[int, Ge(2)] = 64, seed: int = 0
    ) -> None:
        super().__init__()
        self.size = len(pids)
        self.batch_size = min(batch_size, self.size)
        self.seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.size)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield order[start : start + self.batch_size].tolist()

    def __len__(self) -> int:
        return self.size // self.batch_size
