"""Features and figures from a checkpoint; only the file and the data are needed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import small_run
from reidreg import (
    FeatureExtractor,
    evaluate,
    extract,
    fit,
    load_checkpoint,
    load_config,
)
from reidreg.errors import CheckpointError, ConfigError, DataError
from reidreg.evaluation.evaluate import evaluate_features
from reidreg.model.checkpoint import save_checkpoint
from reidreg.model.feature_files import save_features
from reidreg.parts.interfaces import EVALUATORS


@pytest.fixture(scope="module")
def trained(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The best checkpoint of a run of one epoch."""
    folder = tmp_path_factory.mktemp("trained")
    config = load_config("aihub_kaist", small_run(aihub_root, folder))
    fit(config)
    return folder / "checkpoints/best.ckpt"


def test_evaluating_a_checkpoint_gives_the_figures_of_training(trained: Path) -> None:
    stored = json.loads((trained.parent.parent / "metrics.json").read_text())
    assert evaluate(trained) == stored


def test_evaluation_needs_no_training_images(
    trained: Path, aihub_root: Path, tmp_path: Path
) -> None:
    for name in ("query", "bounding_box_test"):
        shutil.copytree(aihub_root / "aihub_kaist" / name, tmp_path / "aihub_kaist" / name)
    moved = tmp_path / "elsewhere.ckpt"
    shutil.copy(trained, moved)
    assert evaluate(moved, {"dataset.root": str(tmp_path)}) == evaluate(trained)


@pytest.mark.parametrize("batch_size", [1, 7, 500])
def test_figures_do_not_depend_on_the_batch_size(trained: Path, batch_size: int) -> None:
    figures = evaluate(trained, {"train.eval_batch_size": batch_size})
    assert figures["mAP"] == pytest.approx(evaluate(trained)["mAP"], abs=1e-6)


def test_options_of_the_evaluation_can_be_overridden(trained: Path) -> None:
    before = evaluate(trained, {"head.feature": "before", "evaluator.metric": "euclidean"})
    assert before["mAP"] != evaluate(trained)["mAP"]
    assert "reranked" in evaluate(trained, flags=["--evaluator.rerank=true"])


def test_weights_that_do_not_fit_are_named_with_their_shapes(trained: Path) -> None:
    with pytest.raises(CheckpointError, match=r"bn1\.weight \(32,\) for \(64,\)") as caught:
        evaluate(trained, {"backbone.name": "resnet18"})
    assert "\n" not in str(caught.value)


def test_weights_that_are_missing_are_named(trained: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(trained)
    del checkpoint.model["backbone.net.layer4.0.conv2.weight"]
    save_checkpoint(checkpoint, tmp_path / "short.ckpt")
    with pytest.raises(CheckpointError, match=r"layer4\.0\.conv2\.weight missing") as caught:
        evaluate(tmp_path / "short.ckpt")
    assert "\n" not in str(caught.value)


def test_extracted_features_give_the_same_figures(trained: Path, tmp_path: Path) -> None:
    for split in ("query", "gallery"):
        save_features(extract(trained, split=split), tmp_path / f"{split}.npz")
    evaluator = EVALUATORS.build("retrieval")
    result = evaluate_features(tmp_path / "query.npz", tmp_path / "gallery.npz", evaluator)
    assert result.figures == evaluate(trained)


def test_features_of_a_folder_come_in_the_order_of_its_names(
    trained: Path, aihub_root: Path
) -> None:
    embeddings = extract(trained, images=aihub_root / "aihub_kaist/query")
    names = [Path(path).name for path in embeddings.paths]
    assert names == sorted(names)
    assert embeddings.features.dtype == torch.float32
    assert torch.equal(embeddings.features, extract(trained, split="query").features)


def test_extraction_needs_either_a_split_or_a_folder(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="either a split"):
        extract(trained)
    with pytest.raises(ConfigError, match="no split"):
        extract(trained, split="test")
    with pytest.raises(DataError, match="no images"):
        extract(trained, images=tmp_path)


def test_the_extractor_gives_unit_vectors_for_every_kind_of_crop(
    trained: Path, aihub_root: Path
) -> None:
    paths = sorted((aihub_root / "aihub_kaist/query").glob("*.jpg"))[:3]
    extractor = FeatureExtractor(trained, device="cpu", batch_size=2)
    by_path = extractor(paths)
    images = [Image.open(path) for path in paths]
    assert torch.equal(by_path, extractor(images))
    assert torch.equal(by_path, extractor([np.asarray(image) for image in images]))
    assert torch.allclose(by_path.norm(dim=1), torch.ones(3), atol=1e-6)
    expected = torch.nn.functional.normalize(extract(trained, split="query").features[:3])
    assert torch.allclose(by_path, expected, atol=1e-6)
    assert extractor([]).shape == (0, by_path.shape[1])


@pytest.mark.parametrize(
    "crop", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), "u1")]
)
def test_the_extractor_refuses_an_array_that_is_not_a_crop(trained: Path, crop: Any) -> None:
    with pytest.raises(DataError, match="a crop is"):
        FeatureExtractor(trained)([crop])


def test_loading_a_checkpoint_gives_its_configuration(trained: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint.resolved_config().backbone.options["model"] == "test_resnet"
    assert checkpoint.preprocessing["size"] == [64, 32]
    assert checkpoint.training is None
