"""What it costs to train in several processes, beside one process that uses all of the cores.

    python benchmarks/fit.py                       # ResNet-50, batches of 32: some minutes
    python benchmarks/fit.py --size 128 64 --processes 4 --threads 4
    python benchmarks/fit.py --backbone timm --model vit_tiny_patch16_224

One process with all threads, and several that share them and exchange gradients by gloo, make the
same steps of the same global batch on the CPU. All are there the whole time and take turns, so that
a machine which changes its speed changes it for both; the fastest turn of either counts.
"""

from __future__ import annotations

import argparse
import os
import socket
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from drawn import make_batch, make_run, start_process

from reidreg import Batch
from reidreg.distributed.group import joined, wait
from reidreg.machine.malloc import keep_freed_memory
from reidreg.training.loop import train_step
from reidreg.training.run import Run

CPU = torch.device("cpu")


def main() -> None:
    options = parse()
    keep_freed_memory()  # as `reidreg fit` does
    share = options.threads // options.processes
    with tempfile.TemporaryDirectory() as folder:
        alone = make_ready(options, Path(folder))
        workers = start(options, folder)
        batch = make_batch(options, alone)
        works = {
            "one process": lambda steps: turn(alone, batch, steps, options.threads),
            f"{options.processes} processes": lambda steps: together(workers, steps),
            # What one core makes of it alone, without waiting for anybody.
            "one process, its share of the threads": lambda steps: turn(alone, batch, steps, share),
        }
        for work in works.values():
            work(2)  # the first steps find out what a step uses, and what memory it needs
        costs = {name: (float("inf"), float("inf")) for name in works}
        for _ in range(options.repeats):
            for name, work in works.items():
                seconds = work(options.steps)
                costs[name] = min(costs[name][0], seconds[0]), min(costs[name][1], seconds[1])
        for connection in workers:
            connection.send(0)
    print(
        f"{options.model or options.backbone}, {options.size[0]} x {options.size[1]}, "
        f"batches of {options.batch}, "
        f"{options.threads} threads in all, {options.precision}, fastest of {options.repeats} turns"
    )
    print(f"{'work':<38}{'images/s':>9}{'ratio':>7}{'CPU s a step':>14}")
    for name, (seconds, used) in costs.items():
        speed = options.batch * options.steps / seconds
        ratio = costs["one process"][0] / seconds
        print(f"{name:<38}{speed:>9.2f}{ratio:>7.2f}{used / options.steps:>14.2f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--model", help="of the backbone timm")
    parser.add_argument("--size", type=int, nargs=2, default=[256, 128])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gather", action="store_true", help="losses see the global batch")
    return parser.parse_args()


def make_ready(options: argparse.Namespace, folder: Path) -> Run:
    """A run that is about to train."""
    keys: dict[str, Any] = {
        "train.gather": options.gather,
    }
    if options.model:
        keys |= {"backbone.model": options.model, "backbone.pretrained": "none"}
    run = make_run(options, folder, keys)
    run.model.train()
    run.forward.begin()
    return run


def turn(run: Run, batch: Batch, steps: int, threads: int) -> tuple[float, float]:
    """The seconds that steps take, on the clock and of the CPU."""
    torch.set_num_threads(threads)
    start, begun = time.perf_counter(), time.process_time()
    for _ in range(steps):
        train_step(run, batch)
    return time.perf_counter() - start, time.process_time() - begun


# --------------------------------------------------------------------- the other processes


def start(options: argparse.Namespace, folder: str) -> list[Connection]:
    """Start the processes, and wait until all are ready."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = range(options.processes)
    connections = [start_process(work, rank, port, options, folder) for rank in ranks]
    for connection in connections:
        connection.recv()
    return connections


def together(connections: list[Connection], steps: int) -> tuple[float, float]:
    """The seconds that steps take in all processes: of the slowest, and of all their CPUs."""
    for connection in connections:
        connection.send(steps)
    seconds, used = zip(*(connection.recv() for connection in connections), strict=True)
    return max(seconds), sum(used)


def work(
    connection: Connection, rank: int, port: int, options: argparse.Namespace, folder: str
) -> None:
    """Make steps as the first process says, in one of the others."""
    place = {"RANK": rank, "WORLD_SIZE": options.processes, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()}, MASTER_ADDR="localhost")
    share = options.threads // options.processes
    torch.set_num_threads(share)
    keep_freed_memory()
    with joined(CPU, 600.0):
        run = make_ready(options, Path(folder))
        batch = make_batch(options, run)
        connection.send("ready")
        while True:
            steps = connection.recv()
            if not steps:
                break
            wait()
            cost = turn(run, batch, steps, share)
            wait()
            connection.send(cost)


if __name__ == "__main__":
    main()
