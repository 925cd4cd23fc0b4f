"""Options that may change on a resume, and resuming from damaged checkpoints."""

from __future__ import annotations

import copy
import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from reidreg import Config, load_config
from reidreg.config.sections import FIXED_SECTIONS, PART_SECTIONS, RunConfig
from reidreg.data.labels import Labels
from reidreg.errors import CheckpointError, DamagedError
from reidreg.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reidreg.training.resuming import ALLOWED, BETWEEN_EPOCHS, REFUSED, RULES, check_resume, rule_of
from reidreg.training.runfolder import RunFolder

# For every rule a change that it covers: a key and another value.
EXAMPLES: dict[str, tuple[str, Any]] = {
    "dataset.root": ("dataset.root", "elsewhere"),
    "dataset.query_folder": ("dataset.query_folder", "other"),
    "dataset.gallery_folder": ("dataset.gallery_folder", "other"),
    "dataset.**": ("dataset.train_folder", "bounding_box_train_2"),
    "input.flip_test": ("input.flip_test", True),
    "input.flip_prob": ("input.flip_prob", 0.1),
    "input.padding": ("input.padding", 3),
    "input.erasing_prob": ("input.erasing_prob", 0.1),
    "input.**": ("input.size", [384, 128]),
    "sampler.**": ("sampler.batch_size", 32),
    "backbone.pretrained": ("backbone.pretrained", "none"),
    "backbone.**": ("backbone.last_stride", 2),
    "head.feature": ("head.feature", "before"),
    "head.**": ("head.pooling", "gem"),
    "losses.*": ("losses.center", {"name": "center", "weight": 0.1}),
    "losses.*.name": ("losses.id.name", "triplet"),
    "losses.**": ("losses.triplet.margin", 0.5),
    "optimizer.name": ("optimizer.name", "sgd"),
    "optimizer.**": ("optimizer.lr", 0.01),
    "schedule.**": ("schedule.milestones", [3]),
    "evaluator.**": ("evaluator.rerank", True),
    "validation.**": ("validation.identities", 0.2),
    "train.seed": ("train.seed", 7),
    "train.epochs": ("train.epochs", 200),
    "train.eval_every": ("train.eval_every", 1),
    "train.eval_untrained": ("train.eval_untrained", True),
    "train.eval_batch_size": ("train.eval_batch_size", 3),
    "train.checkpoint_every": ("train.checkpoint_every", 3),
    "train.log_every": ("train.log_every", 3),
    "train.workers": ("train.workers", 3),
    "train.device": ("train.device", "cpu"),
    "train.precision": ("train.precision", "fp32"),
    "train.compile": ("train.compile", True),
    "train.accumulate": ("train.accumulate", 2),
    "train.ema_decay": ("train.ema_decay", 0.99),
    "train.freeze": ("train.freeze", ["backbone"]),
    "train.freeze_epochs": ("train.freeze_epochs", 2),
    "train.cache": ("train.cache", "none"),
    "train.gather": ("train.gather", True),
    "train.sync_batchnorm": ("train.sync_batchnorm", True),
    "train.rank_timeout": ("train.rank_timeout", 20.0),
    "train.preflight": ("train.preflight", False),
    "wandb.**": ("wandb.project", "other"),
    "init_from": ("init_from", "other.ckpt"),
    "output_dir": ("output_dir", "other"),
}
# Default rules, which cover no option that exists.
OPEN = {"train.**", "**"}


def config(**changes: Any) -> Config:
    return load_config("aihub_kaist", {key.replace("__", "."): v for key, v in changes.items()})


BASE = config()


def training(epoch: int = 2, batch: int = 0) -> dict[str, Any]:
    return {"progress": {"epoch": epoch, "batch": batch}}


def test_every_rule_has_an_example_that_it_decides() -> None:
    assert [rule.pattern for rule in RULES if rule.pattern not in OPEN] == list(EXAMPLES)
    assert {pattern: rule_of(key).pattern for pattern, (key, _) in EXAMPLES.items()} == {
        pattern: pattern for pattern in EXAMPLES
    }


@pytest.mark.parametrize(
    "rule", [r for r in RULES if r.pattern in EXAMPLES], ids=lambda r: r.pattern
)
@pytest.mark.parametrize("batch", [0, 5])
def test_a_rule_holds(rule: Any, batch: int) -> None:
    key, value = EXAMPLES[rule.pattern]
    old, new = BASE.as_dict(), load_config("aihub_kaist", {key: value})
    refusing = {REFUSED, BETWEEN_EPOCHS} if batch else {REFUSED}
    if rule.verdict in refusing:
        with pytest.raises(CheckpointError) as caught:
            check_resume(old, training(batch=batch), new)
        line = str(caught.value)
        assert key in line and rule.why in line and "--init_from" in line and "\n" not in line
        assert ("after step 5" in line) == (rule.verdict is BETWEEN_EPOCHS)
    else:
        changes = check_resume(old, training(batch=batch), new)
        assert [change.key for change in changes] == [key]


@pytest.mark.parametrize("section", FIXED_SECTIONS)
def test_the_default_for_an_unlisted_option_is_conservative(section: str) -> None:
    expected = {"input": REFUSED, "train": BETWEEN_EPOCHS, "validation": REFUSED}.get(
        section, ALLOWED
    )
    assert rule_of(f"{section}.not_there_yet").verdict is expected
    assert rule_of("not_there_yet.x").verdict is BETWEEN_EPOCHS


def test_every_rule_covers_a_key_that_exists() -> None:
    known = {f"{name}.{f.name}" for name, cls in FIXED_SECTIONS.items() for f in fields(cls)}
    known |= {f.name for f in fields(RunConfig)}
    for rule in RULES:
        section = rule.pattern.split(".")[0]
        if section not in (*PART_SECTIONS, "losses", "schedule") and "*" not in rule.pattern:
            assert rule.pattern in known


def test_all_refused_changes_are_named_in_one_line() -> None:
    new = config(optimizer__name="sgd", input__size=[64, 32], optimizer__lr=0.01, train__seed=3)
    with pytest.raises(CheckpointError) as caught:
        check_resume(BASE.as_dict(), training(), new)
    line = str(caught.value)
    assert "input.size: [256, 128] -> [64, 32]" in line
    assert "optimizer.name: adam -> sgd" in line
    assert "optimizer.lr" not in line and "train.seed" not in line


def test_a_weight_of_zero_removes_a_term() -> None:
    with pytest.raises(CheckpointError, match=r"losses\.triplet\.weight: 1\.0 -> 0\.0 \(a term"):
        check_resume(BASE.as_dict(), training(), config(losses__triplet__weight=0.0))
    assert check_resume(BASE.as_dict(), training(), config(losses__triplet__weight=0.5))


def test_a_run_cannot_have_fewer_epochs_than_it_has_made() -> None:
    old = BASE.as_dict()
    assert check_resume(old, training(epoch=5), config(train__epochs=5))
    for epoch, batch in ((6, 0), (5, 1)):
        with pytest.raises(CheckpointError, match=r"train\.epochs: 5 is less .* at least 6"):
            check_resume(old, training(epoch, batch), config(train__epochs=5))


def test_an_option_that_an_older_reidreg_did_not_have_is_unchanged() -> None:
    old = copy.deepcopy(BASE.as_dict())
    del old["train"]["preflight"], old["input"]["flip_test"]
    assert check_resume(old, training(), config()) == []


# --------------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run's folder with `last` of step 2 and `previous` of step 1."""
    folder = RunFolder(tmp_path)
    folder.open()
    for step in (1, 2):
        folder.save_last(checkpoint(step))
    return folder


def checkpoint(step: int) -> Checkpoint:
    return Checkpoint({}, {}, Labels((), ()), {}, epoch=0, step=step, training={})


def test_the_checkpoint_before_the_last_is_kept_as_a_link(folder: RunFolder) -> None:
    first = folder.last.stat().st_ino
    folder.save_last(checkpoint(3))
    assert folder.previous.stat().st_ino == first
    assert [load_checkpoint(p).step for p in (folder.last, folder.previous)] == [3, 2]
    assert not list(folder.checkpoints.glob(".*"))


@pytest.mark.parametrize("size", [0, 7, 100])
def test_a_damaged_last_is_replaced_by_the_one_before(
    folder: RunFolder, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(folder.last, size)
    opened = folder.open_resumable("auto")
    assert opened is not None and opened[0] == folder.last and opened[1].step == 1
    assert "last.ckpt is damaged" in caplog.text and "previous.ckpt" in caplog.text
    # The next save must not replace the undamaged one by the damaged one.
    assert load_checkpoint(folder.last).step == 1
    folder.save_last(checkpoint(3))
    assert load_checkpoint(folder.previous).step == 1


def test_if_every_checkpoint_is_damaged_the_error_says_what_to_do(folder: RunFolder) -> None:
    for path in (folder.last, folder.previous):
        os.truncate(path, 50)
    with pytest.raises(DamagedError, match=r"last\.ckpt is damaged.*--init_from") as caught:
        folder.open_resumable("auto")
    assert "\n" not in str(caught.value)
    folder.previous.unlink()
    with pytest.raises(DamagedError, match="--init_from"):
        folder.open_resumable("auto")


def test_a_given_path_is_never_replaced_by_another(folder: RunFolder) -> None:
    os.truncate(folder.last, 50)
    with pytest.raises(DamagedError, match="is damaged"):
        folder.open_resumable(str(folder.last))
    opened = folder.open_resumable(str(folder.previous))
    assert opened is not None and opened[1].step == 1
    with pytest.raises(CheckpointError, match="no such file"):
        folder.open_resumable("nowhere.ckpt")


def test_without_hard_links_there_is_no_previous(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*names: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    folder = RunFolder(tmp_path)
    folder.open()
    for step in (1, 2):
        folder.save_last(checkpoint(step))
    assert load_checkpoint(folder.last).step == 2 and not folder.previous.exists()


def test_a_checkpoint_of_a_newer_format_is_an_error(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reidreg.model.checkpoint.VERSION", 2)
    save_checkpoint(checkpoint(3), folder.last)
    monkeypatch.setattr("reidreg.model.checkpoint.VERSION", 1)
    with pytest.raises(CheckpointError, match="upgrade reidreg"):
        folder.open_resumable("auto")
