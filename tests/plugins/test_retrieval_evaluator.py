"""The retrieval evaluator: the figures that each option adds, and the table that shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from reidreg import EVALUATORS, DataError, Embeddings, Sample, load_config
from reidreg.errors import ConfigError
from reidreg.evaluation.figures import log_figures
from reidreg.evaluation.table import describe_evaluation, evaluation_table
from reidreg.retrieval.bootstrap import bootstrap_intervals
from reidreg.retrieval.ranking import match_positions
from reidreg.retrieval.singleshot import single_shot_positions

FIGURES = {"mAP", "mINP", "rank1", "rank5", "rank10", "cmc"}
COUNTS = {"num_queries", "num_valid_queries", "num_gallery"}


def random_sides(num_query: int = 40, num_gallery: int = 150) -> tuple[Embeddings, Embeddings]:
    """Ten identities, three cameras; two queries without a match, one of them same-camera only."""
    draw = np.random.default_rng(0)
    people = draw.standard_normal((12, 8))
    sides = []
    for count in (num_query, num_gallery):
        pids, camids = draw.integers(0, 10, count), draw.integers(0, 3, count)
        if count == num_query:
            pids[:2], camids[:2] = (10, 11), (0, 1)
        else:
            pids[0], camids[0] = 11, 1
        features = people[pids] + draw.standard_normal((count, 8))
        values = torch.tensor(features, dtype=torch.float32)
        sides.append(Embeddings(values, torch.tensor(pids), torch.tensor(camids)))
    return sides[0], sides[1]


def evaluate(**options: Any) -> dict[str, Any]:
    return EVALUATORS.build("retrieval", **options).evaluate(*random_sides())


def test_figures_are_those_of_the_contract_and_skipped_queries_have_reasons() -> None:
    found = evaluate()
    assert set(found) == FIGURES | COUNTS | {"skipped"}
    assert found["skipped"] == {"without_gallery": 1, "same_camera_only": 1}
    assert found["num_queries"] == 40 and found["num_valid_queries"] == 38
    kept = evaluate(same_camera="keep")
    assert kept["skipped"] == {"without_gallery": 1, "same_camera_only": 0}


def test_every_option_adds_its_own_figures_and_changes_no_others() -> None:
    plain = evaluate()
    for options, key in (
        ({"bootstrap": 50}, "intervals"),
        ({"cameras": True}, "cameras"),
        ({"verification": True}, "verification"),
        ({"rerank": True, "k1": 5}, "reranked"),
        ({"expansion": 3}, "expanded"),
    ):
        more = evaluate(**options)
        assert {k: v for k, v in more.items() if k != key} == plain
        assert json.loads(json.dumps(more, allow_nan=False)) == more


@pytest.mark.parametrize("protocol", ["market1501", "cuhk03"])
def test_no_figure_depends_on_the_memory_budget(protocol: str) -> None:
    options = {"protocol": protocol, "verification": True, "rerank": True, "k1": 5, "expansion": 3}
    assert evaluate(**options, budget_mib=1) == evaluate(**options)


def test_every_block_has_intervals() -> None:
    found = evaluate(bootstrap=60, rerank=True, k1=5)
    query, gallery = random_sides()
    expected = bootstrap_intervals(match_positions(query, gallery), query.pids, resamples=60)
    assert found["intervals"] == expected
    assert set(found["reranked"]["intervals"]) == set(expected) and (
        found["reranked"]["intervals"] != expected
    )


def test_the_threshold_belongs_to_the_given_rate() -> None:
    strict, loose = (evaluate(verification=True, far=far)["verification"] for far in (0.01, 0.2))
    assert (strict["far"], loose["far"]) == (0.01, 0.2)
    assert strict["threshold"] > loose["threshold"]
    assert [entry["far"] for entry in loose["tar_at_far"]] == [1e-4, 1e-3, 1e-2, 0.2]


def test_single_shot_figures_count_queries_and_not_their_repeats() -> None:
    found = evaluate(protocol="cuhk03", repeats=6, bootstrap=50)
    query, gallery = random_sides()
    positions = single_shot_positions(query, gallery, repeats=6).positions
    assert found["num_queries"] == 40 and found["num_valid_queries"] == 38
    assert found["mAP"] == pytest.approx((1 / positions).mean())
    assert found["rank1"] == pytest.approx((positions == 1).mean())
    low, high = found["intervals"]["mAP"]
    assert low < found["mAP"] < high
    assert found == evaluate(protocol="cuhk03", repeats=6, bootstrap=50)


def test_single_shot_works_with_re_ranking_and_verification() -> None:
    plain = evaluate(verification=True)
    found = evaluate(protocol="cuhk03", verification=True, rerank=True, k1=5)
    assert found["verification"] == plain["verification"]
    assert found["reranked"]["num_queries"] == 40
    assert found["reranked"]["mAP"] != found["mAP"]
    # With a weight of 1 the distance is the original one: nothing is re-ranked.
    same = evaluate(protocol="cuhk03", rerank=True, k1=5, lambda_value=1.0)
    assert same["reranked"]["mAP"] == pytest.approx(same["mAP"], abs=1e-3)


def test_precisions_are_those_that_the_figure_averages() -> None:
    query, gallery = random_sides()
    for options in ({}, {"protocol": "cuhk03"}, {"ap": "trapezoid"}):
        evaluator = EVALUATORS.build("retrieval", **options)
        values = evaluator.precisions(query, gallery)
        assert values.shape == (40,) and values.isnan().tolist() == [True] * 2 + [False] * 38
        found = evaluator.evaluate(query, gallery)
        assert values.nanmean().item() == pytest.approx(found["mAP"])


def test_a_side_without_matches_is_refused_before_any_distance(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, gallery = random_sides()
    alone = replace(gallery, pids=gallery.pids + 100)

    def refuse(*arguments: object) -> None:
        raise AssertionError("a distance was computed")

    for name in ("ranking", "singleshot", "pair_histogram"):
        monkeypatch.setattr(f"reidreg.retrieval.{name}.Distances", refuse)
    for protocol in ("market1501", "cuhk03"):
        evaluator = EVALUATORS.build("retrieval", protocol=protocol, verification=True)
        with pytest.raises(DataError, match="no query has a match in the gallery"):
            evaluator.evaluate(query, alone)


def test_labels_are_checked_beforehand() -> None:
    query = [Sample("q", 1, 0), Sample("q", 9, 0), Sample("q", 2, 0)]
    gallery = [Sample("g", 1, 1), Sample("g", 2, 0)]
    notes = EVALUATORS.build("retrieval", verification=True).check_ids(query, gallery)
    assert len(notes) == 2 and notes[0].startswith("1 of 3 queries have no image of their person")
    one = [Sample("g", 1, 1)]
    EVALUATORS.build("retrieval").check_ids(query[:1], one)
    with pytest.raises(DataError, match="images of different people"):
        EVALUATORS.build("retrieval", verification=True).check_ids(query[:1], one)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--evaluator.protocol=cuhk03", "--evaluator.cameras=true"], "evaluator.cameras"),
        (["--evaluator.protocol=cuhk3"], "expected 'market1501' or 'cuhk03', got cuhk3"),
        (["--evaluator.far=0"], "evaluator.far"),
        (["--evaluator.far=1"], "evaluator.far"),
        (["--evaluator.bootstrap=-1"], "evaluator.bootstrap"),
        (["--evaluator.repeats=0"], "evaluator.repeats"),
    ],
)
def test_options_that_make_no_sense_are_one_line(flags: list[str], line: str) -> None:
    with pytest.raises(ConfigError, match=line) as caught:
        load_config("aihub_kaist", flags=flags)
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------- the table and the log


def test_the_table_has_a_column_for_each_block_and_an_interval_for_each_figure() -> None:
    found = evaluate(bootstrap=40, rerank=True, k1=5)
    lines = evaluation_table(found)
    assert lines[0].split() == ["figure", "raw", "reranked"]
    assert [line.split()[0] for line in lines[1:6]] == ["mAP", "mINP", "rank1", "rank5", "rank10"]
    low, high = found["intervals"]["mAP"]
    for text in (f"{found['mAP']:.2%}", f"{low * 100:.2f}", f"{high * 100:.2f}"):
        assert text in lines[1]
    assert f"{found['reranked']['mAP']:.2%}" in lines[1]
    assert len({len(line) for line in lines[:6]}) == 1
    assert lines[-1].startswith("38 of 40 queries against 150 gallery images; 2 are not counted")
    assert "1 without an image of their person" in lines[-1] and "own camera alone" in lines[-1]


def test_a_table_without_intervals_has_none() -> None:
    text = "\n".join(evaluation_table(evaluate()))
    assert "[" not in text and "verification" not in text and "camera of the query" not in text


def test_the_table_shows_verification_and_cameras() -> None:
    found = evaluate(verification=True, far=0.05, cameras=True)
    text = "\n".join(evaluation_table(found))
    verification = found["verification"]
    assert f"EER {verification['eer']:.2%}" in text
    for entry in verification["tar_at_far"]:
        assert f"{entry['far'] * 100:g} %" in text and f"{entry['tar']:.2%}" in text
    assert f"a cosine of at least {verification['threshold']:.4f}" in text
    square = text.partition("mAP from the camera of the query to that of the gallery")[2]
    for pair in found["cameras"]:
        (line,) = [x for x in square.splitlines() if x.split()[:1] == [str(pair["query_camera"])]]
        assert f"{pair['mAP']:.2%}" in line
    distance = evaluate(verification=True, metric="euclidean")
    assert "a squared distance of at most" in "\n".join(evaluation_table(distance))


def test_a_camera_matrix_that_is_too_wide_becomes_a_list_of_the_worst_pairs() -> None:
    found = evaluate()
    found["cameras"] = [
        {"query_camera": q, "gallery_camera": g, "num_queries": 5, "mAP": q / 20, "rank1": 0.5}
        for q in range(5)
        for g in range(20)
    ]
    lines = evaluation_table(found)
    assert "the worst of 100 pairs of cameras" in lines
    assert len(lines) < 30 and lines[-1].split()[:2] == ["0", "11"]


def test_figures_of_another_evaluator_are_shown_as_they_are() -> None:
    other = {"mAP": 0.5, "rank1": 0.25, "num_queries": 4, "num_valid_queries": 3, "num_gallery": 9}
    lines = evaluation_table({**other, "camera 2": {"mAP": 0.125}, "notes": {"x": 1}})
    assert lines[0].split() == ["figure", "raw", "camera", "2"]
    assert lines[1].split() == ["mAP", "50.00%", "12.50%"]
    assert lines[2].split() == ["rank1", "25.00%", "-"]
    assert lines[-1].endswith("1 are not counted: no match")


def test_the_log_has_verification_only_if_it_is_on() -> None:
    plain, more = evaluate(bootstrap=20), evaluate(verification=True, rerank=True, k1=5)
    assert set(log_figures("val", plain)) == {f"val/{key}" for key in FIGURES - {"cmc"}}
    logged = log_figures("val", more)
    assert logged["val/eer"] == more["verification"]["eer"]
    assert logged["val/tar_at_far_0.001"] == more["verification"]["tar_at_far"][1]["tar"]
    assert logged["val/reranked/mAP"] == more["reranked"]["mAP"]
    assert {type(value) for value in logged.values()} == {float}
    assert "; reranked mAP" in describe_evaluation(more, 3)
    assert "reranked" not in describe_evaluation(plain, 0)
