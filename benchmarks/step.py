"""What a training step and an extraction cost, beside the same work in the reference's way.

    python benchmarks/step.py                      # ResNet-50, batches of 32: some minutes
    python benchmarks/step.py --backbone resnet18 --size 128 64 --threads 1

Both train the same network on the same drawn batch on the CPU. Each has a process of its own, since
one of `reidreg fit` sees to its memory; both are there the whole time and take turns, so that a
machine which changes its speed changes it for both, and the fastest step of either counts.
Floating-point operations are counted by torch on the model, and the floor is their number at the
speed of a plain matrix product in the same arithmetic, which is measured in between.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from drawn import make_batch, make_run, start_process
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from reidreg import Batch
from reidreg.machine.malloc import keep_freed_memory
from reidreg.training.loop import train_step
from reidreg.training.run import Run

PRODUCT = 2048  # rows of the square matrices whose product is the floor's measure


def main() -> None:
    options = parse()
    keep_freed_memory()  # as `reidreg fit` does
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(options, Path(folder), {"optimizer.lr": 3.5e-4})
        reference = start_process(serve, options, folder)
        reference.recv()  # it is ready
    batch = make_batch(options, run)
    arithmetic = str(run.embedder.dtype).removeprefix("torch.")
    print(
        f"{options.backbone}, {options.size[0]} x {options.size[1]}, batches of {options.batch}; "
        f"{options.threads} threads, {arithmetic}, fastest of {options.repeats}"
    )
    product = Product(run)
    flops = count(run, batch)
    works: dict[str, tuple[Callable[[], float], float, float]] = {
        # what is measured, floating-point operations, images
        "product": (lambda: timed(product), 2.0 * PRODUCT**3, 0),
        "reference step": (lambda: ask(reference, "step"), 3.0 * flops, options.batch),
        "step": (lambda: timed(lambda: train_step(run, batch)), 3.0 * flops, options.batch),
        "reference extraction": (lambda: ask(reference, "extract"), flops, options.batch),
        "extraction": (lambda: timed(lambda: extract(run, batch)), flops, options.batch),
    }
    seconds = {name: float("inf") for name in works}
    for _ in range(options.repeats):
        for name, (work, _, _) in works.items():
            run.model.train("step" in name)
            seconds[name] = min(seconds[name], work())
    reference.send("")
    speed = works["product"][1] / seconds["product"]
    print(f"a matrix product: {speed / 1e9:,.0f} GFLOP/s")
    print(f"{'work':<22}{'images/s':>10}{'GFLOP/image':>13}{'floor':>10}{'ratio':>8}")
    for name, (_, operations, images) in works.items():
        if images:
            ratio = seconds[f"reference {name.removeprefix('reference ')}"] / seconds[name]
            print(
                f"{name:<22}{images / seconds[name]:>10.1f}{operations / images / 1e9:>13.1f}"
                f"{images * speed / operations:>10.1f}{ratio:>8.2f}"
            )


def timed(work: Callable[[], None]) -> float:
    """The seconds that it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


def count(run: Run, batch: Batch) -> float:
    """Floating-point operations of one forward pass."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run.model(batch.images)
    return float(counter.get_total_flops())


class Product:
    """A product of two square matrices, in the run's arithmetic."""

    def __init__(self, run: Run) -> None:
        self._matrix = torch.randn(PRODUCT, PRODUCT).to(run.embedder.dtype)

    def __call__(self) -> None:
        _ = self._matrix @ self._matrix


@torch.inference_mode()
def extract(run: Run, batch: Batch) -> None:
    run.embedder.features(batch.images)


# --------------------------------------------------------------------- the reference's process


def ask(connection: Connection, work: str) -> float:
    """The seconds that the other process takes for a step or an extraction."""
    connection.send(work)
    return float(connection.recv())


def serve(connection: Connection, options: argparse.Namespace, folder: str) -> None:
    """Work as the first process says, in the other one."""
    torch.set_num_threads(options.threads)
    plain = argparse.Namespace(**{**vars(options), "precision": "fp32"})
    run = make_run(plain, Path(folder), {"optimizer.lr": 3.5e-4})
    reference, batch = Reference(run), make_batch(options, run)
    works = {"step": lambda: reference.step(batch), "extract": lambda: reference.extract(batch)}
    connection.send("ready")
    while work := connection.recv():
        connection.send(timed(works[work]))


class Reference:
    """The reference system's way, restated: what it computes, and how it goes about it.

    Images and weights lie channel by channel, arithmetic is float32, Adam has a group for each
    tensor, targets are smoothed by hand, and two figures are read off after each step.
    """

    def __init__(self, run: Run) -> None:
        self.model = run.model.to(memory_format=torch.contiguous_format)
        self.classes = len(run.embedder.labels.pids)
        groups = [
            {"params": [parameter], "lr": 3.5e-4, "weight_decay": 5e-4}
            for parameter in self.model.parameters()
            if parameter.requires_grad
        ]
        self.optimizer = torch.optim.Adam(groups)

    def step(self, batch: Batch) -> None:
        images = batch.images.contiguous()
        self.model.train()
        self.optimizer.zero_grad()
        output = self.model(images)
        assert output.logits is not None
        loss = self.smoothed(output.logits, batch.pids) + triplet(output.features, batch.pids)
        loss.backward()
        self.optimizer.step()
        loss.item()
        (output.logits.max(1)[1] == batch.pids).float().mean().item()

    def smoothed(self, logits: Tensor, pids: Tensor) -> Tensor:
        log_probs = nn.functional.log_softmax(logits, dim=1)
        targets = torch.zeros(log_probs.size()).scatter_(1, pids.unsqueeze(1), 1)
        targets = (1 - 0.1) * targets + 0.1 / self.classes
        return (-targets * log_probs).mean(0).sum()

    @torch.no_grad()
    def extract(self, batch: Batch) -> None:
        self.model.eval()
        _ = self.model(batch.images.contiguous()).embeddings


def triplet(features: Tensor, pids: Tensor) -> Tensor:
    """The batch-hard triplet loss as the reference has it."""
    count = len(features)
    squares = features.pow(2).sum(dim=1, keepdim=True).expand(count, count)
    distances = (squares + squares.t()).addmm(features, features.t(), beta=1, alpha=-2)
    distances = distances.clamp(min=1e-12).sqrt()
    same = pids.expand(count, count).eq(pids.expand(count, count).t())
    positive = distances[same].view(count, -1).max(1)[0]
    negative = distances[~same].view(count, -1).min(1)[0]
    return nn.functional.margin_ranking_loss(
        negative, positive, torch.ones_like(negative), margin=0.3
    )


if __name__ == "__main__":
    main()
