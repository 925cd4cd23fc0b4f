"""The memory of a training step, estimated from the sizes of its tensors: no GPU is needed.

    python benchmarks/memory.py                          # the guide's: batches of 64 and 256, fp16
    python benchmarks/memory.py --check --batch 16 --size 128 64 --precision bf16

A step is made with tensors that have sizes and no content, and each block of memory is followed
from when it is made until nothing refers to it any more. Not in the figure, since only a GPU shows
it: the driver's context, the workspaces of convolutions, and what the allocator cannot use.

With --check a step is made in earnest, on the CPU, and the peak of the process stands beside the
estimated one; that has its own workspaces.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reidreg import Batch, load_config, load_plugins
from reidreg.data.labels import Labels
from reidreg.data.transforms import Augmentation
from reidreg.training.divergence import DivergenceCheck
from reidreg.training.forward import TrainingForward
from reidreg.training.loop import train_step
from reidreg.training.meter import Meter
from reidreg.training.run import Progress
from reidreg.training.trainable import build_trainable

MIB = 2**20
BLOCK = 512  # bytes: what torch rounds every tensor's memory on a GPU up to
PEOPLE, CAMERAS = 188, 11  # of the guide's training set, for the size of the classifier


class Blocks(TorchDispatchMode):
    """Follows the blocks of memory that operations make: how much is held, and the peak of it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = {id(tensor.untyped_storage()) for tensor in given}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in own:
                self._follow(tensor.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[storage] = size
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.held -= size


def main() -> None:
    options = parse()
    print(f"{options.backbone}, {options.size[0]} x {options.size[1]}, {options.precision}; MiB")
    print("".join(f"{title:>12}" for title in ("batch", "weights", "step", "batches", "in all")))
    for size in options.batch:
        run = make_run(options)
        weights = sum(part.nbytes for part in run.parts)
        step = estimate(run, size, options)
        batches = estimate_batches(run, size)
        figures = (weights, weights + step, batches, weights + step + batches)
        print(f"{size:>12}" + "".join(f"{figure / MIB:>12.0f}" for figure in figures))
        if options.check:
            check(make_run(options), size, options, weights + step)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128])
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--check", action="store_true", help="make a step in earnest as well")
    return parser.parse_args()


def make_run(options: argparse.Namespace) -> Any:
    """What a step is made with, for the guide's people, without their images."""
    load_plugins()
    changes = {
        "backbone": {"name": options.backbone, "pretrained": "none"},
        "input.size": options.size,
        "train": {"device": "cpu", "precision": options.precision},
    }
    config = load_config("aihub_kaist", changes)
    labels = Labels(tuple(range(PEOPLE)), tuple(range(CAMERAS)))
    model, embedder, objective, optimizer = build_trainable(config, labels)
    model.train()
    return SimpleNamespace(
        config=config,
        forward=TrainingForward(model, objective, embedder.dtype),
        embedder=embedder,
        objective=objective,
        optimizer=optimizer,
        parameters=[p for group in optimizer.param_groups for p in group["params"]],
        parts=[*model.parameters(), *model.buffers()],
        ema=None,
        scaler=torch.amp.GradScaler("cpu", enabled=embedder.dtype == torch.float16),
        divergence=DivergenceCheck(torch.device("meta")),  # as on a GPU
        meter=Meter(),
        progress=Progress(),
    )


def make_batch(size: int, options: argparse.Namespace) -> Batch:
    """A batch of noise in channels_last, as the loader gives it."""
    images = torch.randn(size, 3, *options.size).contiguous(memory_format=torch.channels_last)
    return Batch(images, torch.arange(size) // 4, torch.zeros(size, dtype=torch.int64))


def estimate(run: Any, size: int, options: argparse.Namespace) -> int:
    """The peak of two steps in bytes, without weights; the second one has Adam's moments.

    The run is of no use for anything else after that.
    """
    blocks = Blocks()
    with FakeTensorMode(allow_non_fake_inputs=True), blocks:
        for _ in range(2):
            train_step(run, make_batch(size, options))
    return blocks.peak


def estimate_batches(run: Any, size: int) -> int:
    """What the batches take that are made beside a step: one that waits, and one under way."""
    augmentation = Augmentation(run.embedder.input, run.embedder.normalisation)
    images = torch.zeros(size, *run.embedder.input.size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    views = augmentation.draw(size, (0,))
    with Blocks() as blocks:
        batch = augmentation.apply_together(images, views)
    return batch.nbytes + images.nbytes + blocks.peak


def check(run: Any, size: int, options: argparse.Namespace, estimated: int) -> None:
    """Make two steps in earnest, and say by how much the process grew."""
    gc.collect()
    before = memory_of_process("VmRSS") - sum(part.nbytes for part in run.parts)
    for _ in range(2):
        train_step(run, make_batch(size, options))
    grown = memory_of_process("VmHWM") - before
    print(
        f"{size:>12} in earnest: the process grew by {grown / MIB:.0f} MiB, "
        f"{grown / estimated:.2f} of the estimate"
    )


def memory_of_process(name: str) -> int:
    """Bytes of this process's memory, by Linux: VmRSS, what it is now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
