"""The threshold stored with a checkpoint: what stores it, and what refuses to."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Command, as_flags
from reidreg import FeatureExtractor, fit, load_checkpoint, load_config
from reidreg.cli.main import main
from reidreg.data.labels import Labels
from reidreg.errors import CheckpointError, ConfigError
from reidreg.model.checkpoint import Checkpoint, save_checkpoint
from reidreg.model.thresholds import check_threshold_wanted, store_threshold, stored_threshold

VERIFICATION = {
    "metric": "cosine",
    "far": 0.001,
    "threshold": 0.625,
    "eer": 0.1,
    "histogram": {"edges": [0.0, 1.0], "genuine": [1], "impostor": [2]},
}


def a_checkpoint(**metrics: Any) -> Checkpoint:
    """Like `last.ckpt`: with a training state, numbers as keys, and several kinds of tensor."""
    config = load_config(
        "aihub_kaist", {"dataset.root": "data", "backbone": {"name": "resnet18"}}
    ).as_dict()
    return Checkpoint(
        model={"w": torch.randn(3, 2), "n": torch.tensor(7), "h": torch.ones(2).bfloat16()},
        config=config,
        labels=Labels((3, 5), (1, 2)),
        preprocessing={"size": [64, 32], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]},
        epoch=4,
        step=90,
        metrics={"mAP": 0.1 + 0.2, "cmc": [0.5, 1.0], **metrics},
        training={"optimizer": {0: {"m": torch.randn(2)}, "lr": 1e-3}, "random": [1, None, "a"]},
    )


def same(one: Any, other: Any) -> bool:
    """Whether two trees have equal types and values; tensors are compared bit by bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and bool(one == other)


def test_storing_changes_nothing_but_the_threshold(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    save_checkpoint(a_checkpoint(), path)
    before = load_checkpoint(path)
    store_threshold(path, before, {"mAP": 0.9, "verification": VERIFICATION})
    after = load_checkpoint(path)
    stored = after.metrics.pop("verification")
    assert stored == {key: VERIFICATION[key] for key in ("metric", "far", "threshold", "eer")}
    assert same(vars(before), vars(after))
    assert list(tmp_path.iterdir()) == [path]


def test_a_threshold_is_that_of_the_last_evaluation_by_cosine() -> None:
    assert stored_threshold(a_checkpoint()) is None
    assert stored_threshold(a_checkpoint(verification=VERIFICATION)) == 0.625
    squared = {**VERIFICATION, "metric": "euclidean"}
    assert stored_threshold(a_checkpoint(verification=squared)) is None


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "best.ckpt"
    evaluated = a_checkpoint()
    save_checkpoint(replace(evaluated, step=91), path)
    content = path.read_bytes()
    with pytest.raises(
        CheckpointError, match="has changed during the evaluation; evaluate it again"
    ):
        store_threshold(path, evaluated, {"verification": VERIFICATION})
    assert path.read_bytes() == content


def test_without_verification_there_is_nothing_to_store(tmp_path: Path) -> None:
    save_checkpoint(a_checkpoint(), tmp_path / "a.ckpt")
    with pytest.raises(ConfigError, match="no verification figures"):
        store_threshold(tmp_path / "a.ckpt", a_checkpoint(), {"mAP": 1.0})


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ({"evaluator.verification": False}, "add --evaluator.verification true"),
        ({"head.feature": "before"}, "head differs from the checkpoint's"),
        ({"input.size": [32, 32]}, "input differs from the checkpoint's"),
    ],
)
def test_a_threshold_for_other_features_is_refused_beforehand(
    override: dict[str, Any], line: str
) -> None:
    checkpoint = a_checkpoint()
    wanted = {"evaluator.verification": True, "evaluator.far": 0.01, "train.workers": 0}
    check_threshold_wanted(checkpoint, load_config(checkpoint.config, wanted))
    with pytest.raises(ConfigError, match=line) as caught:
        check_threshold_wanted(checkpoint, load_config(checkpoint.config, wanted, override))
    assert "\n" not in str(caught.value)


def test_fit_and_evaluate_store_a_threshold_and_the_extractor_has_it(
    tiny: dict[str, Any], reidreg_here: Command
) -> None:
    fit(load_config("aihub_kaist", tiny))
    ckpt = Path(tiny["output_dir"]) / "checkpoints/best.ckpt"
    assert FeatureExtractor(ckpt, device="cpu").threshold is None
    evaluate = ["evaluate", "--ckpt", str(ckpt), "--save_threshold", "--output", "out"]
    refused = reidreg_here(*evaluate)
    assert refused.returncode == 2 and "add --evaluator.verification true" in refused.stderr
    done = reidreg_here(
        *evaluate, *as_flags({"evaluator.verification": True, "evaluator.far": 0.1})
    )
    assert done.returncode == 0, done.stderr
    assert f"threshold stored: {ckpt}" in done.stdout
    stored = load_checkpoint(ckpt).metrics["verification"]
    assert stored["far"] == 0.1 and "histogram" not in stored
    assert FeatureExtractor(ckpt, device="cpu").threshold == stored["threshold"]
    assert f"{stored['threshold']:.4f}" in done.stdout


def test_a_threshold_of_feature_files_cannot_be_stored(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "--query=q.npz", "--gallery=g.npz", "--save_threshold"]) == 2
    assert "give --ckpt FILE" in capsys.readouterr().err
