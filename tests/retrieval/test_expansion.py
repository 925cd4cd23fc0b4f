"""Query expansion against the formula in plain loops, and cases with a known result."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg import EVALUATORS, load_plugins
from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.expansion import expand_queries
from reidreg.retrieval.metrics import retrieval_figures
from reidreg.retrieval.ranking import match_positions
from reidreg.values import Embeddings


def embeddings(features, pids=None, camid=0):
    features = torch.as_tensor(np.asarray(features, dtype=np.float32))
    pids = range(len(features)) if pids is None else pids
    ids = torch.tensor(list(pids), dtype=torch.int64)
    return Embeddings(features, ids, torch.full_like(ids, camid), ("q.jpg",) * len(ids))


def unit(vector):
    return [value / math.sqrt(sum(each * each for each in vector)) for value in vector]


def plain(query, gallery, k, alpha):
    """q' = normalise(q + sum of max(cos, 0)**alpha * g), a number at a time."""
    query, gallery = [[unit(row) for row in rows.tolist()] for rows in (query, gallery)]
    expanded = []
    for own in query:
        cosines = [sum(a * b for a, b in zip(own, item, strict=True)) for item in gallery]
        nearest = sorted(range(len(gallery)), key=lambda item: -cosines[item])[:k]
        total = list(own)
        for item in nearest:
            weight = max(cosines[item], 0.0) ** alpha
            total = [a + weight * b for a, b in zip(total, gallery[item], strict=True)]
        expanded.append(unit(total))
    return np.array(expanded)


def sides(seed=0, num_query=7, num_gallery=40, dim=5):
    draw = np.random.default_rng(seed)
    return [
        embeddings(draw.standard_normal((count, dim)) + 0.3) for count in (num_query, num_gallery)
    ]


@pytest.mark.parametrize("k", [1, 4, 40, 100])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 3.0])
def test_queries_move_as_the_formula_says(k, alpha):
    query, gallery = sides()
    found = expand_queries(query, gallery, k=k, alpha=alpha)
    expected = plain(query.features, gallery.features, k, alpha)
    assert found.features.dtype == torch.float32
    assert found.features.numpy() == pytest.approx(expected, abs=1e-6)
    assert found.pids is query.pids and found.camids is query.camids
    assert found.paths == query.paths


def test_moving_a_few_queries_at_a_time_changes_nothing():
    query, gallery = sides(num_query=23)
    whole = expand_queries(query, gallery, k=6).features
    assert torch.equal(expand_queries(query, gallery, k=6, chunk=3).features, whole)


def test_no_neighbours_leave_the_queries_unchanged():
    query, gallery = sides()
    assert expand_queries(query, gallery, k=0) is query


def test_a_large_alpha_leaves_the_queries_unchanged():
    query, gallery = sides()
    found = expand_queries(query, gallery, k=9, alpha=1e6).features
    lengths = query.features.norm(dim=1, keepdim=True)
    assert found.numpy() == pytest.approx((query.features / lengths).numpy(), abs=1e-6)


def test_an_alpha_of_zero_is_the_plain_mean_of_all_k():
    query, gallery = embeddings([[1, 0]]), embeddings([[0, 1], [-1, 1], [-1, -1]])
    for metric, total in [
        ("cosine", [1 - math.sqrt(0.5), 1 + math.sqrt(0.5)]),
        ("euclidean", [0, 2 / 3]),
    ]:
        found = expand_queries(query, gallery, k=2, alpha=0, metric=metric).features[0]
        expected = unit(total) if metric == "cosine" else total
        assert found.tolist() == pytest.approx(expected, abs=1e-6)


def test_items_with_a_negative_cosine_do_not_count():
    query, gallery = embeddings([[2, 0]]), embeddings([[-1, 0], [-1, 0.1]])
    for metric, expected in [("cosine", [1, 0]), ("euclidean", [2, 0])]:
        found = expand_queries(query, gallery, k=2, metric=metric).features
        assert found.tolist() == [pytest.approx(expected)]


def test_vectors_that_cancel_leave_the_query_unchanged():
    query, gallery = embeddings([[0.3, 0.4]]), embeddings([[-0.6, -0.8]])
    found = expand_queries(query, gallery, k=1, alpha=0).features[0]
    assert found.tolist() == pytest.approx([0.6, 0.8])


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_query_that_equals_its_neighbours_stays(metric):
    query = embeddings([[0.6, 0.8, 0.0], [0.0, 0.6, -0.8]])
    gallery = embeddings(query.features[[0, 1, 0, 1, 0, 1]])
    found = expand_queries(query, gallery, k=3, metric=metric).features
    assert found.numpy() == pytest.approx(query.features.numpy(), abs=1e-6)


def test_euclidean_queries_are_weighted_means():
    query, gallery = sides()
    found = expand_queries(query, gallery, k=4, alpha=2, metric="euclidean").features
    for own, moved in zip(query.features.numpy(), found.numpy(), strict=True):
        order = np.argsort(((gallery.features.numpy() - own) ** 2).sum(axis=1))[:4]
        near = gallery.features.numpy()[order]
        cosines = near @ own / np.linalg.norm(near, axis=1) / np.linalg.norm(own)
        weights = np.maximum(cosines, 0) ** 2
        expected = (own + weights @ near) / (1 + weights.sum())
        assert moved == pytest.approx(expected, abs=1e-6)


def test_a_zero_vector_has_no_direction_to_move_to():
    query, gallery = embeddings([[0, 0], [1, 1]]), embeddings([[0, 0], [3, 1]])
    found = expand_queries(query, gallery, k=2, metric="euclidean").features
    assert found[0].tolist() == [0, 0]
    assert bool(torch.isfinite(found).all())


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.sampled_from(["cosine", "euclidean"]),
    st.floats(1e-3, 1e3),
)
def test_the_gallery_order_and_the_scale_do_not_matter(seed, k, alpha, metric, scale):
    query, gallery = sides(seed, num_query=3, num_gallery=12)
    options = {"k": k, "alpha": alpha, "metric": metric}
    found = expand_queries(query, gallery, **options).features
    order = torch.from_numpy(np.random.default_rng(seed).permutation(12))
    shuffled = embeddings(gallery.features[order])
    assert torch.equal(expand_queries(query, shuffled, **options).features, found)
    scaled = [embeddings(side.features * scale) for side in (query, gallery)]
    again = expand_queries(*scaled, **options).features
    again = again if metric == "cosine" else again / scale
    assert again.numpy() == pytest.approx(found.numpy(), rel=1e-4, abs=1e-5)


def test_labels_do_not_matter_except_for_junk():
    query, gallery = sides()
    found = expand_queries(query, gallery, k=4).features
    for pids, camid in [([3] * 40, 0), (range(40, 0, -1), 1)]:
        other = embeddings(gallery.features, pids, camid)
        assert torch.equal(expand_queries(query, other, k=4).features, found)
    pids = torch.where(torch.arange(40) % 3 == 0, -1, gallery.pids)
    kept = embeddings(gallery.features[pids != -1])
    expected = expand_queries(query, kept, k=4).features
    assert torch.equal(expand_queries(query, replace(gallery, pids=pids), k=4).features, expected)
    assert not torch.equal(expected, found)


def test_a_gallery_of_junk_leaves_the_queries_unchanged():
    query, gallery = embeddings([[0.6, 0.8]]), embeddings([[1, 0]], [-1])
    found = expand_queries(query, gallery, k=3).features
    assert found.numpy() == pytest.approx(query.features.numpy())


def test_expansion_helps_where_an_identity_is_a_chain():
    # Each query is near to a third of its identity's images, which are near to the others.
    draw = np.random.default_rng(0)
    centres = draw.standard_normal((20, 24))
    pids = np.arange(200) % 20
    gallery = embeddings(centres[pids] + 0.9 * draw.standard_normal((200, 24)), pids, camid=1)
    query = embeddings(centres + 1.3 * draw.standard_normal((20, 24)), range(20))
    before = retrieval_figures(match_positions(query, gallery))["mAP"]
    after = retrieval_figures(match_positions(expand_queries(query, gallery, k=5), gallery))["mAP"]
    assert after > before + 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_types_are_computed_in_float32(dtype):
    query, gallery = sides()
    narrow = [replace(side, features=side.features.to(dtype)) for side in (query, gallery)]
    wide = [replace(side, features=side.features.float()) for side in narrow]
    found = expand_queries(*narrow, k=3).features
    assert found.dtype == torch.float32
    assert torch.equal(found, expand_queries(*wide, k=3).features)


def test_progress_ends_at_all_queries():
    query, gallery = sides(num_gallery=200)
    seen = []
    expand_queries(query, gallery, k=3, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (7, 7)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"k": -1}, "k: -1 is too small"),
        ({"k": 2, "chunk": 0}, "chunk: 0 is too small"),
        ({"k": 2, "alpha": -0.5}, "alpha: -0.5 is too small"),
        ({"k": 2, "alpha": math.nan}, "alpha: nan is too small"),
        ({"k": 2, "metric": "dot"}, "metric: 'dot' is unknown"),
    ],
)
def test_wrong_options_are_one_line(options, line):
    with pytest.raises(ConfigError, match=line) as error:
        expand_queries(*sides(), **options)
    assert "\n" not in str(error.value)


def test_bad_features_are_one_line():
    query, gallery = sides()
    bad = replace(query, features=torch.full_like(query.features, math.nan))
    with pytest.raises(DataError, match="query features: 7 of 7 are not finite") as error:
        expand_queries(bad, gallery, k=2)
    assert "\n" not in str(error.value)


def test_a_gpu_moves_queries_the_same_way(cuda):
    query, gallery = sides()
    moved = [replace(side, features=side.features.to(cuda)) for side in (query, gallery)]
    found = expand_queries(*moved, k=4).features
    assert found.is_cuda
    expected = expand_queries(query, gallery, k=4).features
    assert found.cpu().numpy() == pytest.approx(expected.numpy(), abs=1e-6)


def test_the_evaluator_gives_figures_after_expansion_and_the_raw_ones():
    load_plugins()
    query, gallery = [
        replace(side, pids=torch.arange(len(side.pids)) % 4, camids=torch.full_like(side.pids, nth))
        for nth, side in enumerate(sides())
    ]
    evaluator = EVALUATORS.build("retrieval", expansion=3, expansion_alpha=2.0)
    figures = evaluator.evaluate(query, gallery)
    moved = match_positions(expand_queries(query, gallery, k=3, alpha=2.0), gallery)
    assert figures["expanded"] == retrieval_figures(moved)
    assert figures["expanded"]["mAP"] != figures["mAP"]
    assert "expanded" not in EVALUATORS.build("retrieval").evaluate(query, gallery)
