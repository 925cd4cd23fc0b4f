"""How good an untrained network becomes in five epochs of Market-1501, beside the reference.

    python benchmarks/parity.py --root data                        # 5 epochs with our sampler
    python benchmarks/parity.py --root data --sampler reference    # 917 steps with the reference's

The data are the user's own: `--root` is the folder that holds `Market-1501-v15.09.15`. What the
reference system reaches with the same options is printed beside it; it was measured once, with its
own modules (reid-strong-baseline, Luo et al., 2019).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge

from reidreg import SAMPLERS, Sampler, fit, load_config, load_plugins
from reidreg.logs.console import log_to_console
from reidreg.machine.malloc import keep_freed_memory

REFERENCE = "reference, 917 steps: mAP 19.8 %, rank-1 35.6 %, loss 6.92 5.85 5.12 4.97 4.94"
LOG_EVERY = 20


@SAMPLERS.register("reference")
class ReferenceSampler(Sampler):
    """The reference's P x K batches, which leave a part of the images out of each epoch.

    Every identity's shuffled images are cut into chunks of K, and an incomplete last one is left
    out. P identities are drawn at random among those that have chunks left, until there are fewer
    than P: mostly those with many images are seen in an epoch's last batches.

    Args:
        batch_size: Images in a batch.
        instances: K, images of each identity.
    """

    def __init__(
        self,
        pids: Sequence[int],
        batch_size: Annotated[int, Ge(2)] = 64,
        instances: Annotated[int, Ge(1)] = 4,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.seed, self.instances, self.identities = seed, instances, batch_size // instances
        self._images = [np.flatnonzero(np.asarray(pids) == pid) for pid in np.unique(pids)]
        # Epochs differ by a batch or two; as many as each of the first hundred has are used.
        self._length = 2**62
        self._length = min(sum(1 for _ in self._batches(epoch)) for epoch in range(100))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[int]]:
        for number, batch in enumerate(self._batches(self.epoch)):
            if number < self._length:
                yield batch

    def _batches(self, epoch: int) -> Iterator[list[int]]:
        draw = np.random.default_rng((self.seed, epoch))
        size = self.instances
        chunks = []
        for images in self._images:
            few = len(images) < size
            images = draw.choice(images, size) if few else draw.permutation(images)
            chunks.append([images[i : i + size] for i in range(0, len(images) - size + 1, size)])
        left = [number for number, own in enumerate(chunks) if own]
        while len(left) >= self.identities:
            chosen = draw.choice(left, self.identities, replace=False)
            yield np.concatenate([chunks[number].pop() for number in chosen]).tolist()
            left = [number for number in left if chunks[number]]


def main() -> None:
    options = parse()
    load_plugins()
    config = load_config(
        "market1501",
        {
            "dataset.root": options.root,
            "input": {"size": options.size, "padding": 5},
            "sampler.name": options.sampler,
            "backbone": {"name": "resnet18", "pretrained": "none"},
            "schedule": {"milestones": [3, 4], "warmup_epochs": 1},
            "train": {"epochs": options.epochs, "eval_every": options.epochs, "workers": 0},
            "train.precision": "fp32",
            "train.log_every": LOG_EVERY,
            "train.cache": "memory",
            "train.seed": options.seed,
            "output_dir": options.output,
        },
    )
    keep_freed_memory()  # as `reidreg fit` does
    log_to_console()
    figures = fit(config, resume="auto" if options.resume else None)
    steps, losses = loss_by_epoch(Path(options.output) / "metrics.jsonl")
    print(
        f"reidreg, {steps} steps: mAP {figures['mAP']:.1%}, rank-1 {figures['rank1']:.1%}, "
        f"loss {' '.join(f'{loss:.2f}' for loss in losses)}"
    )
    print(REFERENCE)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", required=True, help="the folder of Market-1501-v15.09.15")
    parser.add_argument("--sampler", choices=["identity", "reference"], default="identity")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=[128, 64])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="log/parity")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    return parser.parse_args()


def loss_by_epoch(log: Path) -> tuple[int, list[float]]:
    """How many steps a run made, and the mean loss of each epoch's."""
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    sums: dict[int, list[float]] = {}
    before = 0
    for row in rows:
        if "train/loss" in row:
            total = sums.setdefault(row["epoch"], [0.0, 0.0])
            total[0] += row["train/loss"] * (row["step"] - before)
            total[1] += row["step"] - before
            before = row["step"]
    return before, [total / steps for total, steps in sums.values()]


if __name__ == "__main__":
    main()
