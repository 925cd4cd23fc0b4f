"""What re-ranking costs beside the neighbour search that it needs, and whether it is right.

    python benchmarks/reranking.py                # as large as AIHub KAIST: some minutes
    python benchmarks/reranking.py --case msmt    # as large as MSMT17: a quarter of an hour
    python benchmarks/reranking.py --query 200 --gallery 2000 --dim 256

The neighbour search is a plain `faiss.knn` of all images against all, in float32, for k1 + 1 = 21
neighbours. It and the re-ranking are run in turn, each time in a fresh process, and the fastest run
of either counts. CPU time is that of all threads; it suffers less than wall time from whatever else
is running. Memory is the kernel's high-water mark of resident memory (VmHWM, so on Linux only), of
the whole process and above what was resident when the libraries and features were loaded.

Features are drawn: a direction for each identity, a shift for each camera, and noise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

K1, K2, LAMBDA = 20, 6, 0.3
CAMERAS = 6


class Case(NamedTuple):
    """How large a set is, and how much noise hides its identities."""

    query: int
    gallery: int
    dim: int
    identities: int
    noise: float


CASES = {
    "aihub": Case(1_065, 15_385, 2_048, 1_065, 2.7),
    "msmt": Case(11_659, 82_161, 512, 3_060, 1.7),
}


def main() -> None:
    options = parse()
    case = CASES[options.case]._replace(
        **{size: value for size in Case._fields if (value := getattr(options, size)) is not None}
    )
    if options.work:
        print(json.dumps(WORK[options.work](case, options.features)))
        return
    print(
        f"{case.query:,} queries, {case.gallery:,} gallery images, {case.dim:,} numbers each; "
        f"{options.threads} threads, fastest of {options.repeats}"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "features.npy"
        np.save(file, draw_features(case, *draw_labels(case)))
        print_costs(*measure(options, file))
    if options.dense:
        print_equality(case, options.dense)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--case", choices=CASES, default="aihub")
    for name, kind in get_type_hints(Case).items():
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dense", type=int, default=2_000, help="images of that comparison, or 0")
    parser.add_argument("--work", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--features", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# --------------------------------------------------------------------- data


def draw_labels(case: Case) -> tuple[Array, Array]:
    """The pids and camids (N,) of the queries and then of the gallery."""
    pids = [np.arange(side) % case.identities for side in (case.query, case.gallery)]
    camids = np.random.default_rng(0).integers(0, CAMERAS, case.query + case.gallery)
    return np.concatenate(pids), camids


def draw_features(case: Case, pids: Array, camids: Array) -> Array:
    """Unit features (N, D) float32."""
    chance = np.random.default_rng(1)
    centres = chance.standard_normal((case.identities, case.dim), dtype=np.float32)
    shifts = 0.6 * chance.standard_normal((CAMERAS, case.dim), dtype=np.float32)
    features = np.empty((len(pids), case.dim), dtype=np.float32)
    for start in range(0, len(pids), 4_096):
        piece = features[start : start + 4_096]
        chance.standard_normal(out=piece, dtype=np.float32)
        piece *= case.noise
        piece += centres[pids[start : start + 4_096]] + shifts[camids[start : start + 4_096]]
        piece /= np.linalg.norm(piece, axis=1, keepdims=True)
    return features


# --------------------------------------------------------------------- one measurement, one process


class Watch:
    """The time of what runs within it, added up, and the memory since it was made."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self._loaded = resident("VmRSS")

    def __enter__(self) -> None:
        self._since = time.perf_counter(), time.process_time()

    def __exit__(self, *exception: object) -> None:
        self.wall += time.perf_counter() - self._since[0]
        self.cpu += time.process_time() - self._since[1]

    def costs(self) -> dict[str, float]:
        peak = resident("VmHWM")
        return {"wall": self.wall, "cpu": self.cpu, "extra": peak - self._loaded, "peak": peak}


def resident(key: str) -> float:
    """MiB of this process's memory: VmRSS now, VmHWM at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) / 1024


def search(case: Case, file: Path) -> dict[str, float]:
    import faiss

    features = np.load(file, allow_pickle=False)
    watch = Watch()
    with watch:
        faiss.knn(features, features, K1 + 1)
    return watch.costs()


def rerank(case: Case, file: Path) -> dict[str, float]:
    import faiss  # noqa: F401  # loaded here, as beside the search
    import torch

    from reidreg import Embeddings, match_positions, match_positions_of_rows, retrieval_figures

    features = torch.from_numpy(np.load(file, allow_pickle=False))
    pids, camids = map(torch.from_numpy, draw_labels(case))
    query, gallery = (
        Embeddings(features[side], pids[side], camids[side])
        for side in (slice(0, case.query), slice(case.query, None))
    )
    watch = Watch()
    ids = query.pids, query.camids, gallery.pids, gallery.camids
    matches = match_positions_of_rows(timed_rows(watch, query.features, gallery.features), *ids)
    return {
        **watch.costs(),
        "reranked": retrieval_figures(matches)["mAP"],
        "mAP": retrieval_figures(match_positions(query, gallery))["mAP"],
    }


def timed_rows(watch: Watch, *features: Any) -> Iterator[tuple[int, Any]]:
    """The rows of re-ranking; the watch runs while they are made, not while they are used."""
    from reidreg import rerank_rows

    with watch:
        rows = rerank_rows(*features, k1=K1, k2=K2, lam=LAMBDA)
    while True:
        with watch:
            row = next(rows, None)
        if row is None:
            return
        yield row


WORK = {"search": search, "rerank": rerank}


def measure(options: argparse.Namespace, file: Path) -> list[dict[str, float]]:
    """The costs of the search and of the re-ranking: the least of each over the runs."""
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in WORK}
    for _ in range(options.repeats):
        for name, found in runs.items():
            found.append(in_a_process(name, options.threads, file))
    return [{key: min(run[key] for run in found) for key in found[0]} for found in runs.values()]


def in_a_process(name: str, threads: int, file: Path) -> dict[str, float]:
    command = [sys.executable, __file__, *sys.argv[1:], "--work", name, "--features", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def print_costs(searched: dict[str, float], reranked: dict[str, float]) -> None:
    print(f"{'':24}{'wall s':>9}{'ratio':>7}{'CPU s':>9}{'ratio':>7}{'MiB more':>10}{'in all':>8}")
    for name, found in (("faiss.knn, all x all", searched), ("re-ranking, whole", reranked)):
        print(
            f"{name:24}{found['wall']:9.2f}{found['wall'] / searched['wall']:7.2f}"
            f"{found['cpu']:9.2f}{found['cpu'] / searched['cpu']:7.2f}"
            f"{found['extra']:10.0f}{found['peak']:8.0f}"
        )
    print(f"mAP {reranked['mAP']:.3f}, re-ranked {reranked['reranked']:.3f}")


# --------------------------------------------------------------------- the definition


def print_equality(case: Case, images: int) -> None:
    """Ours against the definition on a small set: the largest difference, and the time."""
    import torch

    from reidreg import rerank_rows

    identities = max(1, images // 15)
    small = case._replace(query=images // 10, gallery=images - images // 10, identities=identities)
    features = draw_features(small, *draw_labels(small))
    query, gallery = torch.from_numpy(features).split([small.query, small.gallery])
    start = time.process_time()
    rows = rerank_rows(query, gallery, k1=K1, k2=K2, lam=LAMBDA)
    ours = torch.cat([row for _, row in rows]).numpy()
    middle = time.process_time()
    dense = definition(features.astype(np.float64), small.query)
    end = time.process_time()
    print(
        f"at {images:,} images: {middle - start:.2f} CPU s, the dense definition "
        f"{end - middle:.2f}; largest difference {np.abs(ours - dense).max():.1e}"
    )


def definition(features: Array, num_query: int) -> Array:
    """k-reciprocal re-ranking as Zhong et al. (CVPR 2017) define it, with N x N arrays."""
    squares = (features**2).sum(axis=1)
    distances = np.maximum(squares[:, None] + squares - 2 * features @ features.T, 0)
    distances /= distances.max(axis=1, keepdims=True)
    order = np.argsort(distances, axis=1, kind="stable")
    near, half = reciprocal(order, K1 + 1), reciprocal(order, round(K1 / 2) + 1)
    codes = np.zeros_like(distances)
    for image, members in enumerate(near):
        grown = members.copy()
        for other in np.flatnonzero(members):
            if 3 * (half[other] & members).sum() > 2 * half[other].sum():
                grown |= half[other]
        codes[image, grown] = np.exp(-distances[image, grown])
    codes /= codes.sum(axis=1, keepdims=True)
    codes = np.stack([codes[nearest].mean(axis=0) for nearest in order[:, :K2]])
    gallery = codes[num_query:]
    shared = np.stack([np.minimum(code, gallery).sum(axis=1) for code in codes[:num_query]])
    jaccard = 1 - shared / (2 - shared)
    return (1 - LAMBDA) * jaccard + LAMBDA * distances[:num_query, num_query:]


def reciprocal(order: Array, length: int) -> Array:
    """(N, N) Whether two images are both among the other's `length` nearest."""
    listed = np.zeros(order.shape, dtype=np.bool_)
    np.put_along_axis(listed, order[:, :length], True, axis=1)
    return listed & listed.T


if __name__ == "__main__":
    main()
