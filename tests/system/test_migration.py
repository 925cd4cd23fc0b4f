"""Every command of the guide to the reference system, as ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision

from conftest import Command, as_flags
from reidreg import fit, load_checkpoint, load_config

# What the guide does, and what is typed for it beside `reidreg fit --config aihub_kaist`.
ROWS: dict[str, list[str]] = {
    "as it stands": [],
    "another training folder": ["--dataset.train_folder", "bounding_box_train_2"],
    "several training folders": [
        "--dataset.train_folder",
        "[bounding_box_train_1, bounding_box_train_3]",
    ],
    "batch size": ["--sampler.batch_size", "4"],
    "learning rate": ["--optimizer.lr", "0.0005"],
    "epochs": ["--train.epochs", "2"],
    "name of the W&B run": ["--wandb.name", "aihub-train2-exp1"],
    "center loss": ["--losses.center.name", "center", "--losses.center.weight", "0.0005"],
    "center loss as an overlay": ["--config", "configs/overlays/center.yaml"],
    "softmax alone": ["--config", "configs/overlays/softmax.yaml"],
    "triplet alone": ["--config", "configs/overlays/triplet.yaml"],
    "larger input": ["--input.size", "[96, 32]"],
    "smaller input": ["--input.size", "[48, 24]"],
    "from scratch": ["--backbone.pretrained", "none"],
    "warm-up": [
        *("--schedule.warmup_epochs", "10"),
        *("--schedule.warmup_method", "linear"),
        *("--schedule.warmup_factor", "0.01"),
    ],
    "workers": ["--train.workers", "2"],
    "evaluation period": ["--train.eval_every", "60"],
    "no W&B": ["--wandb.mode", "disabled"],
    "another optimizer": ["--optimizer.name", "sgd"],
}


@pytest.mark.parametrize("row", ROWS)
def test_the_guides_command_runs(
    row: str, tiny: dict[str, Any], reidreg: Command, reidreg_here: Command
) -> None:
    if row == "softmax alone":
        del tiny["sampler.instances"]  # shuffled batches know no identities
    # What is typed differs in its options alone, so that one process of its own stands for all.
    run = reidreg_here if ROWS[row] else reidreg
    result = run("fit", "--config", "configs/aihub_kaist.yaml", *as_flags(tiny), *ROWS[row])
    assert result.returncode == 0, result.stderr
    assert "mAP" in result.stdout
    folder = Path(tiny["output_dir"])
    figures = json.loads((folder / "metrics.json").read_text())
    assert 0 < figures["mAP"] <= 1
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = {key for line in lines for key in line if key.startswith("train/")}
    assert ("train/center" in terms) == ("center" in row)
    assert ("train/triplet" in terms) == (row != "softmax alone")
    assert ("train/id" in terms) == (row != "triplet alone")
    if row == "epochs":
        assert lines[-1]["epoch"] == 2
    if row == "warm-up":
        assert lines[0]["train/lr"] == pytest.approx(3.5e-4 * (0.01 * 0.9 + 0.1))


def test_a_local_file_of_pretrained_weights_starts_the_backbone(
    tiny: dict[str, Any], reidreg_here: Command, tmp_path: Path
) -> None:
    del tiny["backbone.model"]
    weights = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    flags = as_flags({**tiny, "backbone.name": "resnet18", "backbone.pretrained": weights})
    result = reidreg_here("fit", "--config", "aihub_kaist", *flags)
    assert result.returncode == 0, result.stderr
    assert "pretrained weights: 100 of 100 tensors" in result.stdout


@pytest.fixture
def trained(tiny: dict[str, Any]) -> Path:
    fit(load_config("aihub_kaist", tiny))
    return Path(tiny["output_dir"]) / "checkpoints/best.ckpt"


def test_a_model_of_ours_starts_a_new_run(
    tiny: dict[str, Any], trained: Path, reidreg_here: Command, tmp_path: Path
) -> None:
    flags = as_flags({**tiny, "output_dir": tmp_path / "tuned"})
    result = reidreg_here("fit", "--config", "aihub_kaist", *flags, "--init_from", str(trained))
    assert result.returncode == 0, result.stderr
    assert "weights of a checkpoint of epoch 1" in result.stdout


def test_a_run_goes_on(tiny: dict[str, Any], trained: Path, reidreg_here: Command) -> None:
    flags = as_flags({**tiny, "train.epochs": 2})
    result = reidreg_here("fit", "--config", "aihub_kaist", *flags, "--resume", "auto")
    assert result.returncode == 0, result.stderr
    assert "resumed from" in result.stdout
    assert load_checkpoint(trained.with_name("last.ckpt")).epoch == 2


def test_evaluating_a_checkpoint_with_other_options(trained: Path, reidreg_here: Command) -> None:
    result = reidreg_here(
        "evaluate",
        *("--ckpt", str(trained)),
        *("--head.feature", "before"),
        *("--evaluator.metric", "euclidean"),
        *("--evaluator.rerank", "true"),
    )
    assert result.returncode == 0, result.stderr
    assert "reranked" in result.stdout
    figures = json.loads((trained.parent.parent / "metrics.json").read_text())
    assert figures["reranked"].keys() >= {"mAP", "mINP", "rank1", "rank5", "rank10", "cmc"}


def test_a_configuration_of_the_reference_is_translated(reidreg: Command, tmp_path: Path) -> None:
    old = tmp_path / "old.yml"
    old.write_text("DATASETS:\n  NAMES: 'aihub_kaist'\nSOLVER:\n  BASE_LR: 0.0007\n")
    result = reidreg("import-config", str(old))
    assert result.returncode == 0, result.stderr
    (tmp_path / "new.yaml").write_text(result.stdout)
    assert load_config(tmp_path / "new.yaml").optimizer.lr == 0.0007


def test_weights_that_cannot_be_downloaded_are_one_line_with_two_ways_out(
    tiny: dict[str, Any], reidreg: Command, tmp_path: Path
) -> None:
    del tiny["backbone.model"]
    flags = as_flags({**tiny, "backbone.name": "resnet18", "backbone.pretrained": "imagenet"})
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")}
    result = reidreg("fit", "--config", "aihub_kaist", *flags, **offline)
    assert result.returncode == 2
    (line,) = result.stderr.strip().splitlines()
    assert "resnet18.tv_in1k" in line
    assert "--backbone.pretrained FILE" in line and "none" in line
