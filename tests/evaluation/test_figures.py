"""Blocks of figures: the same ones in the log, the table and the report."""

from __future__ import annotations

import math
from typing import Any

import pytest

from reidreg.evaluation.figures import blocks, log_figures, numbers_of
from reidreg.evaluation.table import describe_evaluation, evaluation_table
from reidreg.report.figures import titled_blocks

COUNTS = {"num_queries": 4, "num_valid_queries": 4, "num_gallery": 9}


def with_block(block: Any) -> dict[str, Any]:
    return {"mAP": 0.5, "rank1": 0.75, **COUNTS, "mine": block}


@pytest.mark.parametrize(
    "block",
    [
        {"mAP": 0.25},
        {"rank1": 1},
        {"mAP": None, "rank5": 0.5},
        {"mAP": math.nan},
        {"mAP": 0.25, "intervals": {"mAP": [0.2, 0.3]}},
    ],
)
def test_a_block_has_a_number_among_its_figures(block: dict[str, Any]) -> None:
    figures = with_block(block)
    assert blocks(figures) == {"": figures, "mine": block}
    assert list(titled_blocks(figures)) == ["Raw", "mine"]
    assert evaluation_table(figures)[0].split() == ["figure", "raw", "mine"]
    (logged,) = {key for key in log_figures("val", figures) if "mine" in key}
    assert logged == f"val/mine/{next(iter(numbers_of(block)))}"
    assert "; mine " in describe_evaluation(figures, 1)


@pytest.mark.parametrize(
    "block",
    [{"mAP": [0.4, 0.6]}, {"mAP": None}, {"mAP": True}, {"mAP": "0.5"}, {"x": 0.5}, {}, 0.5, [1]],
)
def test_any_other_value_is_no_block(block: Any) -> None:
    figures = with_block(block)
    assert list(blocks(figures)) == [""] and list(titled_blocks(figures)) == ["Raw"]
    assert evaluation_table(figures)[0].split() == ["figure", "raw"]
    assert log_figures("val", figures) == {"val/mAP": 0.5, "val/rank1": 0.75}


def test_a_figure_that_is_none_is_left_out_or_a_dash() -> None:
    figures = {"mAP": 0.5, "rank1": None, **COUNTS, "mine": {"mAP": None, "rank1": 0.5}}
    assert log_figures("test", figures) == {"test/mAP": 0.5, "test/mine/rank1": 0.5}
    assert [line.split() for line in evaluation_table(figures)[:2]] == [
        ["figure", "raw", "mine"],
        ["mAP", "50.00%", "-"],
    ]
    assert describe_evaluation(figures, 0) == (
        "evaluation before training: mAP 50.00%; mine rank1 50.00%"
    )
