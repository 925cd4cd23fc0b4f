"""What exact figures cost beside the matrix product that they need.

    python benchmarks/ranking.py                      # as large as Market-1501
    python benchmarks/ranking.py --case aihub         # as large as AIHub KAIST
    python benchmarks/ranking.py --case msmt          # as large as MSMT17: a minute
    python benchmarks/ranking.py --case million       # 1,000 queries in a million: two minutes
    python benchmarks/ranking.py --query 500 --gallery 5000 --dim 256 --identities 100

From features to mAP, mINP and CMC, against a plain float32 product of all query with all gallery
vectors, which makes the whole matrix and nothing else, and (--sorting) against the usual way: that
matrix, each row sorted, each query walked in Python. All are run in turn in one process; the
fastest run of each counts, and all runs are shown. Memory is the kernel's high-water mark (VmHWM,
so on Linux only) above what was resident when the features were loaded.

Features are drawn: a direction for each identity, a shift for each camera, and noise, as much as
makes mAP what trained models have. `--noise` tells how much: the deeper the last matches lie, the
more items have to be placed between them; at 100 the features are nothing but noise.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
import torch

from reidreg import Embeddings, match_positions, retrieval_figures


class Case(NamedTuple):
    """How large a set is, and how much noise hides its identities."""

    query: int
    gallery: int
    dim: int
    identities: int
    cameras: int
    noise: float


CASES = {
    "market": Case(3_368, 19_732, 2_048, 751, 6, 1.9),
    "aihub": Case(1_065, 15_385, 2_048, 145, 16, 2.2),
    "msmt": Case(11_659, 82_161, 512, 3_060, 15, 1.6),
    "million": Case(1_000, 1_000_000, 512, 5_000, 20, 1.6),
}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    sizes = {name: value for name in Case._fields if (value := getattr(options, name)) is not None}
    case = CASES[options.case]._replace(**sizes)
    print(
        f"{case.query:,} queries, {case.gallery:,} gallery images, {case.dim:,} numbers each; "
        f"{options.threads} threads, {options.repeats} runs"
    )
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((case.identities, case.dim), dtype=np.float32)
    shifts = draw.standard_normal((case.cameras, case.dim), dtype=np.float32)
    query, gallery = (
        draw_side(count, case, centres, shifts, draw) for count in (case.query, case.gallery)
    )
    ways: dict[str, Callable[[], dict[str, Any] | None]] = {
        "product": lambda: product(query, gallery),
        "figures": lambda: figures(query, gallery, options.budget_mib),
    }
    if options.sorting:
        ways["sorting"] = lambda: sorting(query, gallery)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    memory, found = {}, {}
    for _ in range(options.repeats):
        for name, way in ways.items():
            before = high_water(reset=True)
            start = time.perf_counter()
            found[name] = way()
            seconds[name].append(time.perf_counter() - start)
            memory[name] = high_water() - before
    print(f"{'':<10}{'fastest':>10}{'ratio':>8}{'memory':>12}   runs")
    for name, runs in seconds.items():
        ratio = min(runs) / min(seconds["product"])
        shown = " ".join(f"{run:.2f}" for run in runs)
        print(f"{name:<10}{min(runs):>8.2f} s{ratio:>8.2f}{memory[name]:>8.0f} MiB   {shown}")
    for name, values in found.items():
        if values:
            print(f"{name}: mAP {values['mAP']:.6f}, rank-1 {values['rank1']:.6f}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="market")
    for name, kind in get_type_hints(Case).items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--budget_mib", type=float, default=256)
    parser.add_argument("--sorting", action="store_true", help="also the usual way, by sorting")
    return parser.parse_args()


def draw_side(
    count: int, case: Case, centres: Any, shifts: Any, draw: np.random.Generator
) -> Embeddings:
    """Unit features (count, dim) of random identities and cameras."""
    pids, camids = draw.integers(0, case.identities, count), draw.integers(0, case.cameras, count)
    features = np.empty((count, case.dim), dtype=np.float32)
    for start in range(0, count, 8192):
        some = slice(start, start + 8192)
        values = draw.standard_normal((len(pids[some]), case.dim), dtype=np.float32)
        values *= case.noise * draw.uniform(0.5, 1.5, (len(values), 1)).astype(np.float32)
        values += centres[pids[some]] + 0.35 * case.noise * shifts[camids[some]]
        features[some] = values / np.linalg.norm(values, axis=1, keepdims=True)
    tensors = (torch.from_numpy(array) for array in (features, pids, camids))
    return Embeddings(*tensors)


def product(query: Embeddings, gallery: Embeddings) -> None:
    """The plain matrix product, whole."""
    torch.mm(query.features, gallery.features.T)


def figures(query: Embeddings, gallery: Embeddings, budget_mib: float) -> dict[str, Any]:
    """The figures as we compute them."""
    return retrieval_figures(match_positions(query, gallery, budget_mib=budget_mib))


def sorting(query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
    """The figures as they are usually computed: a matrix, sorted rows, a walk along each."""
    distances = (1 - torch.mm(query.features, gallery.features.T)).numpy()
    orders = np.argsort(distances, axis=1)
    pids, camids = gallery.pids.numpy(), gallery.camids.numpy()
    precisions, firsts = [], []
    for order, pid, camid in zip(orders, query.pids.tolist(), query.camids.tolist(), strict=True):
        kept = order[(pids[order] != pid) | (camids[order] != camid)]
        hits = np.flatnonzero(pids[kept] == pid) + 1
        if len(hits):
            precisions.append(float(np.mean(np.arange(1, len(hits) + 1) / hits)))
            firsts.append(hits[0] == 1)
    return {"mAP": float(np.mean(precisions)), "rank1": float(np.mean(firsts))}


def high_water(reset: bool = False) -> float:
    """The most memory that was resident, in MiB; `reset` starts again from the current size."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


if __name__ == "__main__":
    main()
