"""How thoroughly an approximate index has to search to reach a recall."""

from __future__ import annotations

import numpy as np

from reidreg.errors import ConfigError
from reidreg.index.approximate import Settings, search_settings
from reidreg.index.records import Recall
from reidreg.index.search import IndexSearch
from reidreg.retrieval.arrays import FloatArray, IntArray

RECALL_AT = 10
_QUERIES = 1000  # items of the index that recall is measured with


def check_recall(recall: float) -> None:
    """Refuse a recall outside of (0, 1].

    Raises:
        ConfigError: It is outside.
    """
    if not 0 < recall <= 1:
        raise ConfigError(f"recall: {recall} is not a share above 0 and at most 1")


def tune(search: IndexSearch, wanted: float) -> tuple[Settings, Recall]:
    """The fastest settings that reach the recall, or the most thorough ones if none does.

    Args:
        search: An approximate one, of two items or more.
        wanted: The recall at 10, 0..1.

    Returns:
        The settings, and the recall that was measured with them.
    """
    count = len(search.vectors)
    rows = np.random.default_rng(0).permutation(count)[:_QUERIES]
    k = min(RECALL_AT, count - 1)
    raw = search.vectors.take(rows)
    queries = search.side("item", raw)
    # One neighbour more than k, as each item finds itself.
    farthest = _to_others(search.exact(queries, raw, k + 1), rows)[:, k - 1]
    chosen: Settings = {}
    reached = 0.0
    for settings in search_settings(search.candidates):
        found = search.approximate(queries, raw, k + 1, settings)
        near = _to_others(found, rows)[:, :k] <= farthest[:, None]
        chosen, reached = settings, float(near.mean())
        if reached >= wanted:
            break
    return chosen, Recall(wanted, reached, k, len(rows), count)


def _to_others(found: tuple[FloatArray, IntArray], rows: IntArray) -> FloatArray:
    """The distances (Q, k) to items other than the query itself, ascending; infinite for itself."""
    distances, items = found
    return np.sort(np.where(items == rows[:, None], np.inf, distances), axis=1)
