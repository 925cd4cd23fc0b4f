"""Figures from match positions: worked examples, and plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.errors import ConfigError, DataError
from reidreg.retrieval.metrics import (
    average_precisions,
    cmc,
    inverse_negative_penalties,
    retrieval_figures,
)
from reidreg.retrieval.ranking import MatchPositions


def ragged(*lists: list[int], num_gallery: int = 100) -> MatchPositions:
    offsets = np.cumsum([0, *(len(one) for one in lists)])
    flat = [position for one in lists for position in one]
    return MatchPositions(np.array(flat, dtype=np.int64), offsets.astype(np.int64), num_gallery)


def walk(hits: list[int], trapezoid: bool) -> float:
    """Average precision as toolkits compute it, item by item."""
    found, area = 0, 0.0
    recall_before, precision_before = 0.0, 1.0
    for position in range(1, max(hits) + 1):
        found += position in hits
        recall, precision = found / len(hits), found / position
        height = (precision + precision_before) / 2 if trapezoid else precision
        area += (recall - recall_before) * height
        recall_before, precision_before = recall, precision
    return area


lists_of_hits = st.lists(
    st.sets(st.integers(1, 60), max_size=12).map(sorted), min_size=1, max_size=8
).filter(any)


def test_average_precision_of_a_worked_example():
    # Hits at 1, 3 and 6: precisions 1/1, 2/3, 3/6.
    assert average_precisions(ragged([1, 3, 6])) == pytest.approx([(1 + 2 / 3 + 1 / 2) / 3])


def test_trapezoid_of_a_worked_example():
    # Just before the hits the precisions are 1 (by definition), 1/2 and 2/5.
    expected = ((1 + 1) / 2 + (1 / 2 + 2 / 3) / 2 + (2 / 5 + 1 / 2) / 2) / 3
    assert average_precisions(ragged([1, 3, 6]), ap="trapezoid") == pytest.approx([expected])


def test_a_single_late_hit():
    assert average_precisions(ragged([4])) == pytest.approx([1 / 4])
    assert average_precisions(ragged([4]), ap="trapezoid") == pytest.approx([1 / 8])
    assert inverse_negative_penalties(ragged([4])) == pytest.approx([1 / 4])


def test_inverse_negative_penalty_depends_on_the_last_hit_only():
    assert inverse_negative_penalties(ragged([1, 2, 10], [5, 6])) == pytest.approx([0.3, 2 / 6])


def test_cmc_of_a_worked_example():
    curve = cmc(ragged([2, 3], [], [1], [2], [7]), ranks=5)
    assert curve.tolist() == [0.25, 0.75, 0.75, 0.75, 0.75]


def test_queries_without_a_match_are_counted_but_not_averaged():
    found = retrieval_figures(ragged([], [1], [], [2], []), ranks=3)
    assert found == {
        "mAP": 0.75,
        "mINP": 0.75,
        "rank1": 0.5,
        "rank5": 1.0,
        "rank10": 1.0,
        "cmc": [0.5, 1.0, 1.0],
        "num_queries": 5,
        "num_valid_queries": 2,
        "num_gallery": 100,
    }


def test_figures_are_plain_numbers():
    found = retrieval_figures(ragged([1, 4]))
    assert [type(value) for value in found.values()] == [float] * 5 + [list] + [int] * 3
    assert {type(value) for value in found["cmc"]} == {float}


def test_the_curve_may_be_longer_than_the_gallery():
    found = retrieval_figures(ragged([2], num_gallery=3), ranks=50)
    assert found["cmc"] == [0.0] + [1.0] * 49


@settings(deadline=None)
@given(lists_of_hits)
def test_average_precision_equals_a_walk_down_the_list(lists):
    for ap in ("rectangle", "trapezoid"):
        expected = [walk(hits, ap == "trapezoid") for hits in lists if hits]
        assert average_precisions(ragged(*lists), ap=ap) == pytest.approx(expected, abs=1e-12)


@settings(deadline=None)
@given(lists_of_hits, st.integers(1, 80))
def test_cmc_equals_counting_and_never_falls(lists, ranks):
    curve = cmc(ragged(*lists), ranks=ranks)
    firsts = [hits[0] for hits in lists if hits]
    expected = [sum(first <= k + 1 for first in firsts) / len(firsts) for k in range(ranks)]
    assert curve == pytest.approx(expected, abs=1e-12)
    assert (np.diff(curve) >= 0).all()
    assert curve[-1] <= 1


@settings(deadline=None)
@given(lists_of_hits)
def test_all_figures_are_fractions_and_1_for_a_perfect_list(lists):
    found = retrieval_figures(ragged(*lists))
    assert all(0 < found[key] <= 1 for key in ("mAP", "mINP"))
    perfect = retrieval_figures(ragged(*[list(range(1, len(hits) + 1)) for hits in lists]))
    assert all(math.isclose(perfect[key], 1) for key in ("mAP", "mINP", "rank1"))


def test_no_match_at_all_is_an_error():
    with pytest.raises(DataError, match="no query has a match"):
        retrieval_figures(ragged([], []))


@pytest.mark.parametrize(
    ("options", "line"),
    [({"ap": "trapezoidal"}, "did you mean 'trapezoid'"), ({"ranks": 0}, "ranks: 0 is too small")],
)
def test_wrong_options_are_one_line(options, line):
    with pytest.raises(ConfigError, match=line) as error:
        retrieval_figures(ragged([1]), **options)
    assert "\n" not in str(error.value)
