"""What an index costs, and what it finds: each type, for one gallery.

    python benchmarks/index.py                                    # 100,000 items of 512 numbers
    python benchmarks/index.py --gallery 1000000 --types flat ivf # half an hour
    python benchmarks/index.py --recall 0.99 --noise 3

Recall@10 is stated twice: as the index states it, over 1,000 of its own items, and over queries
that are not in it. A search is timed for one query at a time, as a tracker asks, and for all of
them at once. Memory is what is held beside the features, which are mapped from the disk: the
float32 vectors of `flat`, and the faiss index of the others.

Features are drawn: a direction for each identity, a shift for each camera, and noise.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from reidreg import Embeddings, GalleryIndex

TOP = 10


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((options.gallery // 20, options.dim), dtype=np.float32)
    shifts = draw.standard_normal((options.cameras, options.dim), dtype=np.float32)
    gallery, query = (
        draw_side(count, centres, shifts, options.noise, draw)
        for count in (options.gallery, options.query)
    )
    print(
        f"{options.gallery:,} items of {options.dim:,} numbers, {options.query:,} queries, "
        f"wanted recall@{TOP} {options.recall:g}; {options.threads} threads"
    )
    print(
        "type  build s  load s  memory MiB  disk MiB  stated  held out  one query ms  "
        "of many ms  settings"
    )
    truth, _ = GalleryIndex.build(gallery, index_type="flat").search(query.features, TOP)
    for name in options.types:
        print(measure(name, gallery, query, truth, options.recall), flush=True)


def measure(
    name: str, gallery: Embeddings, query: Embeddings, truth: torch.Tensor, recall: float
) -> str:
    """One line of the table."""
    start = time.perf_counter()
    built = GalleryIndex.build(gallery, index_type=name, recall=recall)
    build = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        built.save(folder)
        del built
        sizes = {path.suffix: path.stat().st_size / 2**20 for path in Path(folder).iterdir()}
        start = time.perf_counter()
        index = GalleryIndex.load(folder)
        index.search(query.features[:1], TOP)
        load = time.perf_counter() - start
        start = time.perf_counter()
        for row in range(min(100, len(query.features))):
            index.search(query.features[row : row + 1], TOP)
        one = (time.perf_counter() - start) / min(100, len(query.features))
        start = time.perf_counter()
        found, _ = index.search(query.features, TOP)
        many = (time.perf_counter() - start) / len(query.features)
    shared = (found[:, :, None] == truth[:, None, :]).any(dim=2).float().mean().item()
    stated = f"{index.recall.reached:.4f}" if index.recall else "exact"
    memory = sizes.get(".faiss", sizes[".npy"])
    settings = ", ".join(f"{key} {value}" for key, value in index.settings.items())
    return (
        f"{name:<5} {build:7.1f} {load:7.2f} {memory:11.0f} {sum(sizes.values()):9.0f}  {stated:>6}"
        f"  {shared:8.4f}  {one * 1e3:12.2f}  {many * 1e3:10.3f}  {settings}"
    )


def draw_side(
    count: int,
    centres: np.ndarray,
    shifts: np.ndarray,
    noise: float,
    draw: np.random.Generator,
) -> Embeddings:
    pids = draw.integers(0, len(centres), count)
    camids = draw.integers(0, len(shifts), count)
    features = np.empty((count, centres.shape[1]), dtype=np.float32)
    for start in range(0, count, 8192):  # nothing of the whole size but the features
        rows = slice(start, start + 8192)
        part = centres[pids[rows]] + 0.5 * shifts[camids[rows]]
        part += noise * draw.standard_normal(part.shape, dtype=np.float32)
        features[rows] = part
    return Embeddings(torch.from_numpy(features), torch.from_numpy(pids), torch.from_numpy(camids))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gallery", type=int, default=100_000)
    parser.add_argument("--query", type=int, default=1_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--cameras", type=int, default=15)
    parser.add_argument("--noise", type=float, default=1.6)
    parser.add_argument("--recall", type=float, default=0.95)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--types", nargs="+", default=["flat", "ivf", "hnsw", "pq"])
    return parser.parse_args()


if __name__ == "__main__":
    main()
