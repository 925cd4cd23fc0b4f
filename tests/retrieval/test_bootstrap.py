"""Bootstrap intervals: their width against theory, and cases with a known result."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.bootstrap import bootstrap_intervals
from reidreg.retrieval.metrics import retrieval_figures
from reidreg.retrieval.ranking import MatchPositions

NAMES = ["mAP", "mINP", "rank1", "rank5", "rank10"]


def ragged(lists, num_gallery=100):
    offsets = np.cumsum([0, *(len(one) for one in lists)]).astype(np.int64)
    flat = [position for one in lists for position in one]
    return MatchPositions(np.array(flat, dtype=np.int64), offsets, num_gallery)


def hits_and_misses(hits):
    """A query with its match at 1 or at 20."""
    return ragged([[1 if hit else 20] for hit in hits])


def width(interval):
    return interval[1] - interval[0]


def test_queries_of_different_identities_give_the_interval_of_a_proportion():
    hits = np.arange(400) % 4 > 0
    found = bootstrap_intervals(hits_and_misses(hits), np.arange(400), resamples=4000)
    assert list(found) == NAMES
    error = 1.96 * np.sqrt(0.75 * 0.25 / 400)
    assert found["rank1"] == pytest.approx([0.75 - error, 0.75 + error], abs=0.006)


def test_queries_of_one_identity_count_as_one_draw():
    hits = np.repeat(np.arange(100) % 4 > 0, 4)  # an identity's four queries all hit or all miss
    identities = np.repeat(np.arange(100), 4)
    matches = hits_and_misses(hits)
    together = bootstrap_intervals(matches, identities, resamples=4000)["rank1"]
    apart = bootstrap_intervals(matches, np.arange(400), resamples=4000)["rank1"]
    assert width(together) == pytest.approx(2 * width(apart), rel=0.1)


def test_the_interval_covers_the_true_value_about_as_often_as_its_level():
    draw = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        identities = np.repeat(np.arange(60), draw.integers(1, 6, 60))
        chances = draw.beta(3, 1, 60)[identities]  # mean 3/4; some identities are harder
        matches = hits_and_misses(draw.random(len(identities)) < chances)
        low, high = bootstrap_intervals(matches, identities, resamples=300, seed=seed)["rank1"]
        covered += low <= 0.75 <= high
    assert 0.88 <= covered / 200 <= 0.99


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_intervals_lie_within_the_figures_of_single_identities(data):
    hits = st.sets(st.integers(1, 60), min_size=1, max_size=5).map(sorted)
    lists = data.draw(st.lists(hits, min_size=1, max_size=12))
    ids = st.lists(st.integers(0, 4), min_size=len(lists), max_size=len(lists))
    identities = np.array(data.draw(ids))
    found = bootstrap_intervals(ragged(lists), identities, resamples=40)
    alone = [
        retrieval_figures(
            ragged([one for one, pid in zip(lists, identities, strict=True) if pid == p])
        )
        for p in set(identities.tolist())
    ]
    for name, (low, high) in found.items():
        values = [figures[name] for figures in alone]
        assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12


def test_an_interval_contains_its_figure():
    draw = np.random.default_rng(1)
    lists = [sorted(draw.choice(50, 4, replace=False) + 1) for _ in range(200)]
    figures = retrieval_figures(ragged(lists))
    for name, (low, high) in bootstrap_intervals(ragged(lists), np.arange(200) // 3).items():
        assert low < figures[name] < high


@pytest.mark.parametrize("identities", [[5], [5, 5, 5], [1, 2, 3]])
def test_one_identity_or_equal_queries_give_an_interval_without_width(identities):
    found = bootstrap_intervals(ragged([[2, 5]] * len(identities)), identities)
    assert all(width(interval) == pytest.approx(0, abs=1e-12) for interval in found.values())
    assert found["mAP"] == pytest.approx([0.45, 0.45])


def test_queries_without_a_match_are_not_drawn():
    lists = [[1], [], [3], [], [9, 12]]
    expected = bootstrap_intervals(ragged([one for one in lists if one]), [1, 2, 3])
    assert bootstrap_intervals(ragged(lists), [1, 7, 2, 8, 3]) == expected


def test_intervals_depend_on_the_seed_and_not_on_the_chunks():
    matches = hits_and_misses(np.arange(50) % 3 > 0)
    found = bootstrap_intervals(matches, np.arange(50), seed=4)
    again = bootstrap_intervals(matches, np.arange(50), seed=4, chunk=7)
    assert again == {name: pytest.approx(interval) for name, interval in found.items()}
    assert bootstrap_intervals(matches, np.arange(50), seed=5) != found


def test_the_definition_of_ap_is_that_of_the_figure():
    matches = ragged([[2], [4]])
    low, high = bootstrap_intervals(matches, [1, 2], ap="trapezoid")["mAP"]
    assert (low, high) == (1 / 8, 1 / 4)


def test_wrong_input_is_one_line():
    with pytest.raises(ConfigError, match="resamples: 0 is too small"):
        bootstrap_intervals(ragged([[1]]), [1], resamples=0)
    with pytest.raises(ConfigError, match="chunk: 0 is too small"):
        bootstrap_intervals(ragged([[1]]), [1], chunk=0)
    with pytest.raises(DataError, match="there are 2 pids, but matches of 1 queries"):
        bootstrap_intervals(ragged([[1]]), [1, 2])
    with pytest.raises(DataError, match="no query has a match"):
        bootstrap_intervals(ragged([[]]), [1])
