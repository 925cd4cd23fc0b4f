"""Held-out identities: the choice of them, and that the test set is evaluated once, at the end."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from conftest import small_run
from reidreg import (
    DATASETS,
    Config,
    Sample,
    evaluate,
    fit,
    load_checkpoint,
    load_config,
)
from reidreg.config.sections import ValidationConfig
from reidreg.data.holdout import HeldOut, hold_out
from reidreg.errors import CheckpointError, ConfigError, DataError
from reidreg.model.checkpoint import save_checkpoint
from reidreg.training import loop

Values = dict[str, Any]
Counts = dict[int, dict[int, int]]


def images(counts: Counts) -> list[Sample]:
    """The given number of images of each person by each camera."""
    return [
        Sample(f"{pid}_{camid}_{n}.jpg", pid, camid)
        for pid, cameras in counts.items()
        for camid, count in cameras.items()
        for n in range(count)
    ]


def people(count: int) -> list[Sample]:
    """People with ids that have gaps, two images by each of three cameras."""
    return images({10 + 3 * n: {1: 2, 2: 2, 5: 2} for n in range(count)})


def hold(samples: list[Sample], share: float, seed: int = 0) -> tuple[list[Sample], HeldOut]:
    return hold_out(samples, ValidationConfig(share, seed), across_cameras=True)


def pids(samples: Any) -> set[int]:
    return {sample.pid for sample in samples}


# --------------------------------------------------------------------- the choice


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_of_whole_identities_leaves_the_train_split(share: float) -> None:
    samples = people(40)
    rest, held = hold(samples, share)
    out = [*held.query, *held.gallery]
    assert len(pids(out)) == round(share * 40)
    assert not pids(rest) & pids(out)
    assert sorted([*rest, *out], key=lambda s: s.path) == sorted(samples, key=lambda s: s.path)
    assert rest == [sample for sample in samples if sample in set(rest)], "in order"
    assert not held.train


def test_the_choice_depends_on_the_seed_and_the_identities_alone() -> None:
    samples = people(40)
    out = [pids(hold(samples, 0.25, seed)[1].gallery) for seed in (0, 0, 1)]
    assert out[0] == out[1] != out[2]
    assert pids(hold(samples[::-1], 0.25)[1].gallery) == out[0]
    assert pids(hold(samples, 0.1)[1].gallery) < out[0]


def test_every_identity_is_held_out_as_often_as_any_other() -> None:
    samples, draws = people(20), 400
    counts = Counter(
        pid for seed in range(draws) for pid in pids(hold(samples, 0.25, seed)[1].gallery)
    )
    # Binomial: 100 expected, a standard deviation of 8.7.
    assert len(counts) == 20 and all(abs(count - 100) < 5 * 8.7 for count in counts.values())


def test_each_person_and_camera_gives_one_query() -> None:
    _, held = hold(people(40), 0.25)
    assert Counter((s.pid, s.camid) for s in held.query) == {
        (pid, camid): 1 for pid in pids(held.gallery) for camid in (1, 2, 5)
    }
    assert not set(held.query) & set(held.gallery)
    assert len({s.path.split("_")[2] for s in held.query}) == 2, "not always the first image"


ODD: dict[str, tuple[Counts, bool, dict[int, int]]] = {
    "one camera gives no query": ({1: {1: 9}, 2: {1: 2, 2: 2}}, True, {2: 2}),
    "one camera gives one if its own matches count": (
        {1: {1: 9}, 2: {1: 2, 2: 2}},
        False,
        {1: 1, 2: 2},
    ),
    "a camera's only image stays in the gallery": (
        {1: {1: 1, 2: 3}, 2: {1: 2, 2: 2}},
        True,
        {1: 1, 2: 2},
    ),
    "of single images one is a query": (
        {1: {1: 1, 2: 1, 3: 1}, 2: {1: 1, 2: 1}},
        True,
        {1: 1, 2: 1},
    ),
    "a single image is a distractor": ({1: {1: 1}, 2: {1: 2, 2: 1}}, False, {2: 1}),
}


@pytest.mark.parametrize(("counts", "across", "queries"), ODD.values(), ids=ODD)
def test_every_query_has_a_match(counts: Counts, across: bool, queries: dict[int, int]) -> None:
    # As many regular ones, so that both of the odd ones are held out in some draw.
    samples = images({**counts, 8: {1: 2, 2: 2}, 9: {1: 2, 2: 2}})
    seen = set()
    for seed in range(20):
        _, held = hold_out(samples, ValidationConfig(0.5, seed), across_cameras=across)
        found = Counter(s.pid for s in held.query)
        for pid in pids([*held.query, *held.gallery]) & counts.keys():
            assert found[pid] == queries.get(pid, 0)
            seen.add(pid)
        for one in held.query:
            matches = [s for s in held.gallery if s.pid == one.pid]
            assert [s for s in matches if s.camid != one.camid] if across else matches
    assert seen == counts.keys()


@pytest.mark.parametrize(
    ("identities", "share", "said"),
    [
        (24, 0.01, "0.01 of 24 training identities is 0; at least 2 are needed, use at least 0.09"),
        (24, 0.06, "0.06 of 24 training identities is 1; at least 2 are needed, use at least 0.09"),
        (24, 0.97, "0.97 of 24 training identities is 23; training needs 2, use at most 0.91"),
        (3, 0.5, "0.5 of 3 training identities is 2; too few to hold any out, use 0"),
    ],
)  # fmt: skip
def test_too_few_on_one_side_is_one_line(identities: int, share: float, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        hold(people(identities), share)
    assert str(raised.value) == f"validation.identities: {said}"
    if "too few to hold any out" not in said:  # the proposed share works
        hold(people(identities), float(said.rsplit(" ", 1)[1]))


@pytest.mark.parametrize("share", [-0.1, 1.0, 1.5])
def test_a_share_is_a_fraction(share: float) -> None:
    with pytest.raises(ConfigError, match=r"^validation\.identities: "):
        load_config("aihub_kaist", {"validation.identities": share})


# --------------------------------------------------------------------- a run


def configure(aihub_root: Path, output: Path, **changes: Any) -> Config:
    on = {"validation.identities": 0.25, "train.epochs": 2, "train.eval_every": 1}
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load_config("aihub_kaist", small_run(aihub_root, output), on, changes)


def lines_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lines_on_the_test_set(folder: Path) -> list[dict[str, float]]:
    return [line for line in lines_of(folder) if "test/mAP" in line]


@pytest.fixture(scope="module")
def finished(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs with held-out people."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fit(configure(aihub_root, folder))
    return folder


def test_the_test_set_is_evaluated_once_by_the_best_model(finished: Path) -> None:
    best = load_checkpoint(finished / "checkpoints/best.ckpt")
    last = load_checkpoint(finished / "checkpoints/last.ckpt")
    figures = json.loads((finished / "metrics.json").read_text())
    validated = [line for line in lines_of(finished) if "val/mAP" in line]
    (tested,) = lines_on_the_test_set(finished)
    assert [line["epoch"] for line in validated] == [1, 2]
    assert tested == lines_of(finished)[-1] and tested["epoch"] == 2
    assert tested.keys() >= {"test/mINP", "test/rank1", "test/rank5", "test/rank10"}

    assert figures == last.metrics
    assert figures["evaluated"] == "test" and figures["mAP"] == tested["test/mAP"]
    assert figures["validation"] == best.metrics
    assert best.metrics["evaluated"] == "validation"
    assert best.metrics["mAP"] == max(line["val/mAP"] for line in validated)
    assert best.metrics["num_gallery"] < figures["num_gallery"]
    again = evaluate(finished / "checkpoints/best.ckpt")
    assert {key: figures[key] for key in again} == again
    assert "test of the best model after epoch" in (finished / "train.log").read_text()


def test_held_out_people_have_no_labels(finished: Path, aihub_root: Path) -> None:
    labels = load_checkpoint(finished / "checkpoints/last.ckpt").labels
    options = load_config("aihub_kaist", {"dataset.root": str(aihub_root)}).dataset.options
    everyone = pids(DATASETS.build("aihub_kaist", **options).train)
    count = round(0.25 * len(everyone))
    assert set(labels.pids) < everyone and len(labels.pids) == len(everyone) - count
    log = (finished / "train.log").read_text()
    assert f"held out of training for validation: {count} identities" in log


@pytest.mark.parametrize("logged", [False, True], ids=["before", "in"])
def test_a_run_that_stopped_at_the_test_set_evaluates_it_when_resumed(
    logged: bool, finished: Path, aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configure(aihub_root, tmp_path / "run")

    real = loop.evaluate_best

    def stop(*arguments: Any) -> None:
        if logged:  # but no checkpoint was saved after it
            real(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate_best", stop)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert len(lines_on_the_test_set(tmp_path / "run")) == logged
    figures = fit(config, resume="auto")
    one, other = (
        load_checkpoint(folder / "checkpoints/last.ckpt") for folder in (finished, tmp_path / "run")
    )
    assert figures == one.metrics == other.metrics
    assert one.training is not None and other.training is not None
    assert one.training["progress"] == other.training["progress"]
    assert all((one.model[key] == other.model[key]).all() for key in one.model)
    assert lines_on_the_test_set(finished) == lines_on_the_test_set(tmp_path / "run")


def test_a_finished_run_that_is_extended_evaluates_the_test_set_again(
    finished: Path, aihub_root: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    longer = configure(aihub_root, folder, train__epochs=3)
    for _ in range(2):  # the second time nothing is left to do
        assert fit(longer, resume="auto")["evaluated"] == "test"
    assert [line["epoch"] for line in lines_on_the_test_set(folder)] == [2, 3]


def test_the_last_model_is_tested_where_there_is_no_best_one(
    finished: Path, aihub_root: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    (folder / "checkpoints/best.ckpt").unlink()
    last = load_checkpoint(folder / "checkpoints/last.ckpt")
    assert last.training is not None
    last.training["progress"].update(tested=-1, best=2.0)
    save_checkpoint(last, folder / "checkpoints/last.ckpt")
    assert fit(configure(aihub_root, folder), resume="auto")["evaluated"] == "test"
    assert "test of the best model after epoch 2" in (folder / "train.log").read_text()


@pytest.mark.parametrize("changed", [{"validation__identities": 0}, {"validation__seed": 1}])
def test_other_people_held_out_cannot_be_resumed(
    finished: Path, aihub_root: Path, tmp_path: Path, changed: Values
) -> None:
    config = configure(aihub_root, tmp_path / "run", **changed)
    with pytest.raises(CheckpointError, match="identities"):
        fit(config, resume=str(finished / "checkpoints/last.ckpt"))


def test_held_out_people_without_a_query_are_an_error_before_training(
    tmp_path: Path, aihub_root: Path
) -> None:
    # Training images by one camera: the held-out people would give no query.
    folder, source = tmp_path / "data/aihub_kaist", aihub_root / "aihub_kaist"
    (folder / "bounding_box_train_1").mkdir(parents=True)
    for split in ("query", "bounding_box_test"):
        (folder / split).symlink_to(source / split)
    for image in (source / "bounding_box_train_1").glob("*_c01s*.jpg"):
        (folder / "bounding_box_train_1" / image.name).symlink_to(image)
    config = configure(tmp_path / "data", tmp_path / "run", validation__identities=0.5)
    with pytest.raises(DataError) as raised:
        fit(config)
    assert str(raised.value) == (
        "validation.identities: none of the held-out people was seen by two cameras, so there is "
        "no query with a match; hold out more people, or others with another validation.seed"
    )


def test_a_checkpoint_from_before_the_section_can_be_read(finished: Path) -> None:
    last = load_checkpoint(finished / "checkpoints/last.ckpt")
    del last.config["validation"]
    assert last.resolved_config().validation == ValidationConfig()
