"""The k-nearest-neighbour graph against a stable sort of all exact distances."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.retrieval.distances import Distances
from reidreg.retrieval.knn_graph import neighbour_graph
from reidreg.retrieval.ranked_lists import ExactLists


def distances_of(features, metric="cosine"):
    features = torch.as_tensor(np.asarray(features, dtype=np.float32))
    return Distances(features, features, metric)


def check(distances, k, **options):
    """The graph is that of a stable sort of all exact distances."""
    whole = slice(0, len(distances.query))
    exact = distances.exact(whole, whole).numpy()
    order = np.argsort(exact, axis=1, kind="stable")[:, :k]
    found = neighbour_graph(distances, k, **options)
    assert found.items.tolist() == order.tolist()
    apart = np.abs(found.values - np.take_along_axis(exact, order, axis=1))
    assert apart.max() <= distances.slack
    # The farthest image is chosen by float32 scores.
    scale = distances.weight * distances.query.longest**2
    assert np.abs(found.farthest - exact.max(axis=1)).max() <= 1e-6 * scale


def clustered(count, dim=12, seed=0):
    draw = np.random.default_rng(seed)
    centres = draw.standard_normal((max(1, count // 12), dim))
    return centres[draw.integers(0, len(centres), count)] + 0.5 * draw.standard_normal((count, dim))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("count", "tile"), [(700, 2048), (700, 64), (200, 7), (129, 128)])
def test_every_size_of_tile_gives_the_same_graph(metric, count, tile):
    distances = distances_of(clustered(count), metric)
    whole = neighbour_graph(distances, 10)
    check(distances, 10, tile=tile)
    assert all(map(np.array_equal, neighbour_graph(distances, 10, tile=tile), whole))


@pytest.mark.parametrize("count", [1, 2, 5, 16, 17])
@pytest.mark.parametrize("k", [1, 4, 100])
def test_lists_are_cut_to_small_sets(count, k):
    check(distances_of(clustered(count)), k)
    assert neighbour_graph(distances_of(clustered(count)), k).items.shape == (count, min(k, count))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 8),
    st.integers(1, 150),
    st.sampled_from([1, 3, 21]),
    st.sampled_from([0.0, 1e-8, 1e-4, 0.3]),
    st.sampled_from(["cosine", "euclidean"]),
    st.sampled_from([5, 32, 2048]),
)
def test_sets_full_of_duplicates_and_near_ties(seed, size, count, k, spread, metric, tile):
    draw = np.random.default_rng(seed)
    pool = draw.standard_normal((size, 6))
    features = pool[draw.integers(0, size, count)] + spread * draw.standard_normal((count, 6))
    check(distances_of(features, metric), k, tile=tile)


def test_a_cluster_that_float32_cannot_order_is_searched_again(monkeypatch):
    searched = []
    original = ExactLists.complete

    def counting(self, queries, *rest):
        searched.append(len(queries))
        original(self, queries, *rest)

    monkeypatch.setattr(ExactLists, "complete", counting)
    draw = np.random.default_rng(0)
    features = draw.standard_normal((400, 12))
    features[100:180] = features[0] + 1e-6 * draw.standard_normal((80, 12))
    check(distances_of(features), 5)
    # The cluster's 81 images, and those with the cluster at the end of their lists.
    assert 81 <= searched[0] < 100


@pytest.mark.parametrize("falling", [True, False])
def test_tiles_that_are_each_nearer_than_the_one_before(falling):
    # On a line, each further tile in the rows of the last images has nearer images than all before.
    line = np.arange(300.0)[:, None] ** 1.3
    check(distances_of(line[::-1] if falling else line, "euclidean"), 7, tile=60)


@pytest.mark.parametrize("length", [1e-20, 1e20])
def test_lengths_near_the_ends_of_float32(length):
    check(distances_of(clustered(90) * length), 6)
    check(distances_of(clustered(90) * length * 1e-3, "euclidean"), 6)


def test_a_zero_vector_is_fine_for_euclidean_distances():
    features = clustered(60)
    features[7] = 0
    check(distances_of(features, "euclidean"), 6)
    check(distances_of(np.zeros((50, 3)), "euclidean"), 6)


def test_precision_settings_of_the_process_change_nothing():
    distances = distances_of(clustered(300))
    expected = neighbour_graph(distances, 10)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = neighbour_graph(distances, 10)
    finally:
        torch.set_float32_matmul_precision(before)
    assert all(map(np.array_equal, found, expected))


def test_progress_ends_at_all_tiles():
    seen = []
    distances = distances_of(clustered(100))
    neighbour_graph(distances, 5, tile=30, progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 10) for done in range(1, 11)]
