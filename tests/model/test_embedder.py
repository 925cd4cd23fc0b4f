"""Features of images: mirror images, and checkpoints from before an option."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from conftest import small_run
from reidreg import (
    FeatureExtractor,
    Sample,
    evaluate,
    load_checkpoint,
    load_config,
)
from reidreg.config.sections import config_from_dict
from reidreg.model.checkpoint import save_checkpoint
from reidreg.model.restore import open_checkpoint, restore_embedder
from reidreg.training.resuming import changes_between
from reidreg.training.run import build_run
from reidreg.training.state import capture


@pytest.fixture(scope="module")
def model(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    config = load_config("aihub_kaist", small_run(aihub_root, path.parent))
    save_checkpoint(capture(build_run(config), resumable=False), path)
    return path


# --------------------------------------------------------------------- mirror images


def mirrored_pair(folder: Path) -> list[Sample]:
    """An image that is not symmetric, of the input's size, and its mirror image."""
    noise = np.random.default_rng(3).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    noise[:, :16] //= 3
    image = Image.fromarray(noise)
    image.save(folder / "a.png")
    ImageOps.mirror(image).save(folder / "b.png")
    return [Sample(str(folder / name), 1, camid) for camid, name in enumerate(("a.png", "b.png"))]


def test_an_image_and_its_mirror_image_have_one_feature(model: Path, tmp_path: Path) -> None:
    samples = mirrored_pair(tmp_path)
    plain = restore_embedder(*open_checkpoint(model)).embed(samples, "query").features
    flipped = restore_embedder(*open_checkpoint(model, {"input.flip_test": True}))
    both = flipped.embed(samples, "query").features
    scale = plain.abs().max()
    assert torch.allclose(both[0], both[1], atol=1e-6 * scale, rtol=0)
    assert (plain[0] - plain[1]).abs().max() > 1e-2 * scale
    assert torch.allclose(both[0], plain.mean(dim=0), atol=1e-6 * scale, rtol=0)


def test_the_extractor_averages_mirror_images_as_its_checkpoint_says(
    model: Path, tmp_path: Path
) -> None:
    samples = mirrored_pair(tmp_path)
    paths = [sample.path for sample in samples]
    plain = FeatureExtractor(model, device="cpu")(paths)
    checkpoint = load_checkpoint(model)
    checkpoint.config["input"]["flip_test"] = True
    save_checkpoint(checkpoint, tmp_path / "flip.ckpt")
    both = FeatureExtractor(tmp_path / "flip.ckpt", device="cpu")(paths)
    assert torch.allclose(both[0], both[1], atol=1e-6)
    assert torch.allclose(both.norm(dim=1), torch.ones(2), atol=1e-6)
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)


# --------------------------------------------------------------------- older checkpoints


def test_a_checkpoint_without_the_newer_options_gives_the_same_figures(
    model: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(model)
    assert checkpoint.config["input"].pop("flip_test") is False
    newer = set(checkpoint.config["evaluator"]) - {"name", "metric", "max_rank", "same_camera"}
    for option in newer:
        del checkpoint.config["evaluator"][option]
    save_checkpoint(checkpoint, tmp_path / "old.ckpt")
    assert evaluate(tmp_path / "old.ckpt") == evaluate(model)
    old = load_checkpoint(tmp_path / "old.ckpt").resolved_config()
    assert old.input.flip_test is False
    assert config_from_dict(old.as_dict()) == old
    # A resume reports options that changed, not those that did not exist yet.
    current = load_checkpoint(model).config
    assert changes_between(old.as_dict(), current) == []
    assert changes_between({**old.as_dict(), "gone": 1}, current)
    crops = [np.full((64, 32, 3), 90, np.uint8)]
    assert torch.equal(
        FeatureExtractor(tmp_path / "old.ckpt", "cpu")(crops),
        FeatureExtractor(model, "cpu")(crops),
    )
