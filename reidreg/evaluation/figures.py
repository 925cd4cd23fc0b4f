"""The figures of an evaluation, whatever blocks an evaluator gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FIGURES = ("mAP", "mINP", "rank1", "rank5", "rank10")


def blocks(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The raw figures, under an empty name, and each post-processed block under its own.

    A block is a mapping in which at least one of FIGURES is a number. `intervals` is none: it has
    the same keys, but holds pairs.
    """
    named = {
        name: block
        for name, block in figures.items()
        if isinstance(block, Mapping) and numbers_of(block)
    }
    return {"": figures, **named}


def numbers_of(block: Mapping[str, Any]) -> dict[str, float]:
    """Those of FIGURES that are numbers in a block, NaN included; None is an undefined figure."""
    values = {key: block.get(key) for key in FIGURES}
    return {
        key: value
        for key, value in values.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def log_figures(prefix: str, figures: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's figures under the keys of metrics.jsonl and W&B.

    Args:
        prefix: `val`, or `test` for what is evaluated once, at the end.
        figures: What the evaluator returned.
    """
    found = {
        "/".join(filter(None, (prefix, name, key))): value
        for name, block in blocks(figures).items()
        for key, value in numbers_of(block).items()
    }
    verification = figures.get("verification")
    if verification:
        found[f"{prefix}/eer"] = verification["eer"]
        for kind in ("tar", "dir"):
            for entry in verification[f"{kind}_at_far"]:
                found[f"{prefix}/{kind}_at_far_{entry['far']:g}"] = entry[kind]
    return found
