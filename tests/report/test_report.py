"""The report: its contents, and that its page is self-contained and safe."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image

from conftest import Command
from reidreg import EVALUATORS, Embeddings, Evaluator, load_plugins
from reidreg.config.layers import options_given
from reidreg.errors import DataError
from reidreg.evaluation.evaluate import Evaluation
from reidreg.parts.schema import options_of
from reidreg.report.cameras import camera_matrix
from reidreg.report.charts import Axis, cmc_chart, score_chart
from reidreg.report.figures import figure_table, skipped, titled_blocks
from reidreg.report.galleries import pick_queries, ranked_queries
from reidreg.report.options import with_report_figures
from reidreg.report.thumbnails import Thumbnails
from reidreg.report.write import write_report

DATE = datetime(2026, 3, 1, 12, 30, tzinfo=timezone.utc)
PRIVATE = ("index.html", "ranked.png")  # they show images of people


def draw_side(folder: Path, count: int, seed: int) -> Embeddings:
    """Features of `count` images of ten people by three cameras, with their files."""
    rng = np.random.default_rng(seed)
    pids, camids = rng.integers(0, 10, count), rng.integers(1, 4, count)
    people = np.random.default_rng(0).normal(size=(10, 8))
    features = people[pids] + 0.9 * rng.normal(size=(count, 8))
    folder.mkdir(parents=True)
    paths = []
    for number, pid in enumerate(pids):
        paths.append(str(folder / f"{pid:04}_c{camids[number]}_{number:06}.jpg"))
        colour = tuple(int(part) for part in np.random.default_rng(pid).integers(0, 255, 3))
        Image.new("RGB", (32, 64), colour).save(paths[-1])
    tensors = (torch.from_numpy(array) for array in (features.astype("f4"), pids, camids))
    return Embeddings(*tensors, tuple(paths))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    """An evaluation with every block of figures."""
    load_plugins()
    folder = tmp_path_factory.mktemp("images")
    query, gallery = draw_side(folder / "query", 40, 1), draw_side(folder / "gallery", 150, 2)
    gallery.pids[:5] = -1
    evaluator = EVALUATORS.build("retrieval")
    figures = evaluator.evaluate(query, gallery)
    keys = ("mAP", "mINP", "rank1", "rank5", "rank10")
    figures["intervals"] = {key: [figures[key] * 0.9, figures[key]] for key in keys}
    figures["skipped"] = {"without_gallery": 3, "same_camera_only": 0}
    better = {key: min(1.0, figures[key] * 1.1) for key in keys}
    figures["reranked"] = {**better, "cmc": [min(1.0, c * 1.1) for c in figures["cmc"]]}
    figures["cameras"] = [
        {"query_camera": a, "gallery_camera": b, "num_queries": 9, "mAP": 0.1 * a, "rank1": 0.5}
        for a in (1, 2, 3)
        for b in (1, 2, 10)
        if a != b
    ]
    figures["verification"] = verification_figures()
    about = {"Checkpoint": "log/run/checkpoints/best.ckpt", "Data set": "drawn squares"}
    options = {"name": "retrieval", "metric": "cosine", "rerank": True}
    return Evaluation(figures, query, gallery, evaluator, options, about)


def verification_figures() -> dict[str, Any]:
    return {
        "metric": "cosine",
        "num_genuine": 600,
        "num_impostor": 5400,
        "eer": 0.1234,
        "far": 1e-3,
        "threshold": 0.5,
        "tar_at_far": [{"far": 1e-3, "tar": 0.61, "threshold": 0.5}],
        "dir_at_far": [{"far": 1e-2, "dir": 0.42, "threshold": 0.6}],
        "histogram": {
            "edges": [-1.0, 0.0, 0.25, 1.0],
            "genuine": [0, 200, 400],
            "impostor": [5000, 400, 0],
        },
    }


# --------------------------------------------------------------------- what is shown


def test_queries_are_the_best_the_worst_and_some_of_the_rest() -> None:
    precision = torch.tensor([0.5, float("nan"), 0.9, 0.1, 0.7, 0.3])
    groups = dict(pick_queries(precision, 2))
    assert groups["best"] == [2, 4] and groups["worst"] == [3, 5]
    assert groups["random"] == [0]
    assert dict(pick_queries(precision[:1], 4)) == {"best": [0]}
    assert pick_queries(precision[1:2], 4) == []


def test_precisions_of_retrieval_equal_the_default_implementation(
    evaluation: Evaluation,
) -> None:
    sides = evaluation.query, evaluation.gallery
    precision = evaluation.evaluator.precisions(*sides)
    slow = Evaluator.precisions(evaluation.evaluator, *sides)
    assert torch.allclose(precision, slow, equal_nan=True)
    valid = precision[~precision.isnan()]
    assert len(valid) == evaluation.figures["num_valid_queries"]
    assert valid.mean().item() == pytest.approx(evaluation.figures["mAP"], abs=1e-6)


@pytest.mark.parametrize("k", [1, 4, 10, 60])
def test_ranked_galleries_show_left_out_images_in_their_place(
    evaluation: Evaluation, k: int
) -> None:
    query, gallery = evaluation.query, evaluation.gallery
    distances = 1 - (
        torch.nn.functional.normalize(query.features.double())
        @ torch.nn.functional.normalize(gallery.features.double()).T
    )
    shown = ranked_queries(evaluation, rows=5, k=k)
    assert [row.group for row in shown] == ["best"] * 5 + ["worst"] * 5 + ["random"] * 5
    assert len({row.path for row in shown}) == 15
    for row in shown:
        number = query.paths.index(row.path)
        expected, position = [], 0
        for item in torch.argsort(distances[number], stable=True).tolist():
            pid, camid = int(gallery.pids[item]), int(gallery.camids[item])
            out = pid == -1 or (pid == row.pid and camid == row.camid)
            position += not out
            if position > k:
                break
            verdict = "left out" if out else "match" if pid == row.pid else "miss"
            expected.append((gallery.paths[item], verdict, None if out else position))
        counted = [entry for entry in expected if entry[2]]
        got = [(image.path, image.verdict, image.position) for image in row.images]
        assert [entry for entry in got if entry[2]] == counted
        # A row has 2 k places, for counted and left-out images together.
        within = [entry for entry in expected[: 2 * k] if expected.index(entry) <= last(expected)]
        assert got[: len(within)] == within
        for image in row.images:
            item = gallery.paths.index(image.path)
            assert image.distance == pytest.approx(distances[number, item].item(), abs=1e-5)


def last(entries: list[tuple[str, str, int | None]]) -> int:
    """The index of the last counted entry."""
    return max(place for place, entry in enumerate(entries) if entry[2])


def test_galleries_need_a_path_for_each_feature(evaluation: Evaluation) -> None:
    short = dataclasses.replace(evaluation.query, paths=evaluation.query.paths[:-1])
    with pytest.raises(DataError, match="query has 39 paths for 40 features"):
        ranked_queries(dataclasses.replace(evaluation, query=short), rows=1, k=1)


def test_post_processed_figures_are_shown_with_their_gain_over_the_raw_ones() -> None:
    figures = {
        "mAP": 0.5,
        "rank1": 0.6,
        "intervals": {"mAP": [0.4, 0.55]},
        "reranked": {"mAP": 0.7, "rank1": float("nan")},
        "skipped": {"without_gallery": 1200},
        "mine": {"mAP": 0.4, "intervals": {"mAP": [0.3, 0.5]}},
        "verification": {"eer": 0.1},
    }
    assert list(titled_blocks(figures)) == ["Raw", "Re-ranked", "mine"]
    table = figure_table(figures)
    assert list(table) == ["mAP", "Rank-1"]
    raw, reranked, mine = table["mAP"]
    assert raw and (raw.value, raw.interval, raw.gain) == (0.5, (0.4, 0.55), None)
    assert reranked and reranked.gain == pytest.approx(0.2) and reranked.interval is None
    assert mine and mine.interval == (0.3, 0.5) and mine.gain == pytest.approx(-0.1)
    assert table["Rank-1"][1:] == [None, None]
    assert skipped(figures) == ["1,200 have no image of their person in the gallery"]


def test_the_camera_matrix_sorts_numbers_by_size_and_has_empty_cells() -> None:
    pairs = [
        {"query_camera": 10, "gallery_camera": 2, "num_queries": 3, "mAP": 1.0, "rank1": 1.0},
        {"query_camera": 2, "gallery_camera": 10, "num_queries": 3, "mAP": 0.26, "rank1": None},
        {"query_camera": 3, "gallery_camera": 2, "num_queries": 0, "mAP": None, "rank1": None},
        {"query_camera": "yard", "gallery_camera": 2, "num_queries": 1, "mAP": 0.0, "rank1": 0.0},
    ]
    matrix = camera_matrix(pairs)
    assert matrix is not None and matrix.columns == [2, 10]
    assert [row for row, _ in matrix.rows] == [2, 10, "yard"]
    heats = [[cell and cell.heat for cell in cells] for _, cells in matrix.rows]
    assert heats == [[None, 3], [10, None], [0, None]]
    assert camera_matrix(pairs[2:3]) is None and camera_matrix([]) is None


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
    st.integers(2, 8),
)
@example(1.0, 40041.0, 2)  # neither 0 nor 50,000 is on the axis
def test_ticks_are_evenly_spaced_and_on_the_axis(low: float, length: float, count: int) -> None:
    axis = Axis(low, low + length, 0, 100)
    ticks = axis.ticks(count)
    assert 1 <= len(ticks) <= count + 1
    values = [value for value, _ in ticks]
    steps = np.diff(values)
    assert np.allclose(steps, steps[0] if len(steps) else 0, rtol=1e-3)
    assert all(-0.2 <= place <= 100.2 for _, place in ticks)


def test_curves_have_the_points_of_the_figures(evaluation: Evaluation) -> None:
    chart = cmc_chart(evaluation.figures)
    assert chart is not None and [curve.name for curve in chart.curves] == ["Raw", "Re-ranked"]
    raw = chart.curves[0]
    cmc = evaluation.figures["cmc"]
    assert len(raw.points) == len(cmc) and raw.points[0][2] == f"Raw, rank 1: {cmc[0]:.1%}"
    # Better is higher, and every point is within the chart.
    heights = [y for _, y, _ in raw.points]
    assert heights == sorted(heights, reverse=True)
    assert all(chart.y.stop <= y <= chart.y.start for y in heights)
    assert len(raw.whiskers) == 3 and all(low >= high for _, low, high in raw.whiskers)
    assert cmc_chart({"mAP": 0.5}) is None
    assert cmc_chart({"cmc": [1.0]}) is not None


def test_the_score_chart_marks_the_threshold_only_if_it_is_on_the_axis() -> None:
    figures = verification_figures()
    chart = score_chart(figures)
    assert chart is not None and chart.mark == (chart.x.at(0.5), "threshold 0.500")
    assert chart.x_label == "Cosine similarity"
    assert "mean 0.46 of genuine pairs" in chart.summary
    beyond = score_chart({**figures, "threshold": 2.0})
    assert beyond is not None and beyond.mark is None
    empty = {"edges": [0.0, 1.0], "genuine": [0], "impostor": [0]}
    assert score_chart({"histogram": empty, "threshold": None}) is not None
    assert score_chart({"eer": 0.5}) is None


# --------------------------------------------------------------------- images


def test_a_thumbnail_is_stored_once_small_and_without_metadata(
    tmp_path: Path,
) -> None:
    exif = Image.Exif()
    exif[0x010E] = "where the camera hangs"
    image = Image.effect_noise((300, 900), 80).convert("RGB")
    image.save(tmp_path / "a.jpg", exif=exif, icc_profile=b"secret profile", comment=b"secret")
    thumbnails = Thumbnails()
    name = thumbnails.name(str(tmp_path / "a.jpg"))
    assert name == thumbnails.name(str(tmp_path / "a.jpg")) and len(thumbnails.images) == 1
    data = base64.b64decode(thumbnails.images[str(name)].partition(",")[2])
    assert b"camera" not in data and b"secret" not in data and b"EXIF" not in data
    with Image.open(io.BytesIO(data)) as small:
        assert small.format == "WEBP" and small.size == (64, 192)
    assert thumbnails.tile_height(64) == 160  # not beyond 2.5 times


def test_missing_and_damaged_images_are_listed_once(tmp_path: Path) -> None:
    (tmp_path / "b.jpg").write_text("<html>")
    thumbnails = Thumbnails()
    for name in ("a.jpg", "b.jpg", "a.jpg", "\0"):
        assert thumbnails.name(str(tmp_path / name)) is None
    assert len(thumbnails.missing) == 3 and thumbnails.images == {}
    assert thumbnails.tile_height(64) == 128


# --------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def report(evaluation: Evaluation, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of the whole evaluation."""
    return write_report(evaluation, tmp_path_factory.mktemp("report") / "new", date=DATE)


def test_the_same_evaluation_gives_the_same_bytes(
    evaluation: Evaluation, report: Path, tmp_path: Path
) -> None:
    write_report(evaluation, tmp_path, date=DATE)
    names = {path.name for path in tmp_path.iterdir()}
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in PRIVATE)
    assert names == {"index.html", "cmc.png", "scores.png", "ranked.png"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (report.parent / name).read_bytes(), name


def test_a_picture_is_written_for_each_available_figure(
    evaluation: Evaluation, report: Path, tmp_path: Path
) -> None:
    for name in ("cmc", "scores", "ranked"):
        with Image.open(report.parent / f"{name}.png") as image:
            assert image.format == "PNG" and image.width > 400
            colours = {colour[:3] for _, colour in image.convert("RGB").getcolors(1 << 24) or []}
            assert len(colours) > 8
    assert (179, 38, 30) in colours and (26, 127, 55) in colours  # a miss, and a match
    bare = {key: evaluation.figures[key] for key in ("mAP", "rank1")}
    page = write_report(dataclasses.replace(evaluation, figures=bare), tmp_path, date=DATE)
    assert {path.name for path in tmp_path.iterdir()} == {"index.html", "ranked.png"}
    assert 'id="cmc"' not in page.read_text() and 'id="scores"' not in page.read_text()


def test_the_page_is_self_contained(evaluation: Evaluation, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert len(text) < 3_000_000
    markup = re.sub(r"base64,[^\"]*", "", text)
    assert not re.search(r"//[a-z]|@import|<base|<iframe|<object|<link(?! rel=.icon)", markup)
    loads = re.findall(r"""(?:src|href|data|action|poster)\s*=\s*["']?([^"'\s>]{0,20})""", text)
    assert all(link.startswith(("#", "data:")) for link in loads) and len(loads) > 100
    shown = ranked_queries(evaluation, rows=10, k=10)
    paths = {row.path for row in shown} | {image.path for row in shown for image in row.images}
    assert text.count("data:image/webp") == len(paths)


def test_the_policy_allows_only_the_style_and_script_of_the_page(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    assert (
        len(policy) == 1 and "unsafe" not in policy[0] and "default-src &#39;none&#39;" in policy[0]
    )
    for tag in ("style", "script"):
        (body,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{digest}&#39;" in policy[0]


def test_without_image_paths_the_page_has_everything_but_galleries(
    evaluation: Evaluation, tmp_path: Path
) -> None:
    bare = dataclasses.replace(evaluation, query=dataclasses.replace(evaluation.query, paths=()))
    text = write_report(bare, tmp_path, date=DATE).read_text()
    assert "come without image paths" in text and 'id="cmc"' in text and "data:image" not in text
    assert not (tmp_path / "ranked.png").exists()


def test_missing_images_give_empty_tiles_and_a_warning(
    evaluation: Evaluation, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = tuple(f"{tmp_path}/gone-{number}\udcff.jpg" for number in range(150))
    gone = dataclasses.replace(
        evaluation, gallery=dataclasses.replace(evaluation.gallery, paths=names)
    )
    text = write_report(gone, tmp_path, date=DATE, rows=1, k=3).read_text()
    assert text.count("data:image/webp") == 3 and text.count('href="#gone"') >= 9
    assert re.search(r"report: \d+ images cannot be read, the first is .*gone-", caplog.text)


def test_an_evaluator_with_other_figures_has_a_page(evaluation: Evaluation, tmp_path: Path) -> None:
    other = dataclasses.replace(evaluation, figures={"accuracy": 0.5}, options={}, about={})
    assert "none of the usual figures" in write_report(other, tmp_path, rows=1).read_text()


def test_an_unwritable_folder_is_a_one_line_error(evaluation: Evaluation, tmp_path: Path) -> None:
    (tmp_path / "report").write_text("")
    with pytest.raises(DataError, match="cannot write .*below .*another --output"):
        write_report(evaluation, tmp_path / "report" / "below", rows=1)


# --------------------------------------------------------------------- the command line


def test_a_report_turns_on_figures_that_the_user_did_not_set() -> None:
    load_plugins()
    defaults = {name: o.default for name, o in options_of(EVALUATORS["retrieval"]).items()}
    more = with_report_figures("retrieval", defaults)
    assert (more["bootstrap"], more["cameras"], more["verification"]) == (1000, True, True)
    assert {**more, "bootstrap": 0, "cameras": False, "verification": False} == defaults
    # Options that were given stay, even at their default; so do values other than the default.
    given = with_report_figures("retrieval", {**defaults, "bootstrap": 50}, {"verification"})
    assert (given["bootstrap"], given["cameras"], given["verification"]) == (50, True, False)
    # Incompatible options are not turned on.
    cuhk03 = with_report_figures("retrieval", {**defaults, "protocol": "cuhk03"})
    assert (cuhk03["bootstrap"], cuhk03["cameras"], cuhk03["verification"]) == (1000, False, True)


def test_given_options_are_those_of_files_and_flags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("evaluator: {name: retrieval, bootstrap: 0}\n")
    layers = [tmp_path / "a.yaml", {"evaluator.metric": "cosine", "train.seed": 1}]
    flags = ["--evaluator.far=0.1", "--evaluator.cameras", "false", "--train.epochs", "2"]
    given = {"name", "bootstrap", "metric", "far", "cameras"}
    assert options_given("evaluator", layers, flags) == given
    assert options_given("evaluator", [], ["--report"]) == set()


def test_evaluate_writes_a_report_of_feature_files(
    evaluation: Evaluation,
    tmp_path: Path,
    reidreg_here: Command,
) -> None:
    for name in ("query", "gallery"):
        side: Embeddings = getattr(evaluation, name)
        arrays = {"features": side.features, "pids": side.pids, "camids": side.camids}
        np.savez(tmp_path / f"{name}.npz", **arrays, paths=np.array(side.paths))
    files = ["--query", "query.npz", "--gallery", "gallery.npz"]
    done = reidreg_here(
        "evaluate", *files, "--report", "--evaluator.cameras=false", "--output", "out"
    )
    assert done.returncode == 0, done.stderr
    assert "report, with images of people in it: out/report/index.html" in done.stdout
    figures = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "verification" in figures and "intervals" in figures and "cameras" not in figures
    text = (tmp_path / "out/report/index.html").read_text()
    assert "query.npz" in text and 'id="scores"' in text and 'class="row"' in text
    refused = reidreg_here("evaluate", *files, "--report")
    assert refused.returncode == 2 and "--report needs --output DIR" in refused.stderr
