"""Images and labels to batches: decoding, its failures, and loading from any step on."""

from __future__ import annotations

import gc
import io
import multiprocessing
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reidreg import SAMPLERS, DataError, Dataset, Sample
from reidreg.config import InputConfig
from reidreg.data import (
    Labels,
    TrainLoader,
    count_workers,
    eval_loader,
    labels_of,
    read_image,
    statistics,
    training_samples,
)
from reidreg.transforms import eval_transform, train_transform
from reidreg.values import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NOISE = np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded(Image.fromarray(NOISE), "JPEG")


def decode(content: bytes, folder: Path, name: str = "image.jpg") -> Image.Image:
    (folder / name).write_bytes(content)
    return read_image(str(folder / name))


# --------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_images_are_read_as_they_are_whatever_their_suffix(
    kind: str, tmp_path: Path
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode(encoded(Image.fromarray(NOISE), kind, **options), tmp_path)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), NOISE)


def test_a_jpeg_is_nearly_what_was_saved(tmp_path: Path) -> None:
    smooth = Image.fromarray(np.full((24, 12, 3), (200, 100, 50), dtype=np.uint8))
    image = decode(encoded(smooth, "JPEG"), tmp_path)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth).astype(int)).max() <= 3


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 24 * 12).reshape(24, 12).astype(np.uint16)
    image = decode(encoded(Image.fromarray(ramp), "PNG"), tmp_path)
    expected = (ramp / 257).round()
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 1
    assert np.asarray(image).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    source = Image.fromarray(NOISE)
    if mode == "I;16":
        source = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    else:
        source = source.convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode(encoded(source, kind), tmp_path)
    assert image.mode == "RGB" and image.size == (12, 24)


def test_grey_has_three_equal_channels_and_alpha_is_dropped(tmp_path: Path) -> None:
    grey = np.asarray(decode(encoded(Image.fromarray(NOISE[..., 0]), "PNG"), tmp_path))
    assert all(np.array_equal(grey[..., channel], NOISE[..., 0]) for channel in range(3))
    alpha = np.dstack([NOISE, np.arange(288).reshape(24, 12).astype(np.uint8)])
    colours = decode(encoded(Image.fromarray(alpha), "PNG"), tmp_path)
    assert np.array_equal(np.asarray(colours), NOISE)


def test_a_palette_gives_its_colours_with_transparency_too(tmp_path: Path) -> None:
    source = Image.fromarray(NOISE).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(16))}):
        image = decode(encoded(source, "PNG", **options), tmp_path)
        assert np.array_equal(np.asarray(image), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        JPEG[:20],
        JPEG[: len(JPEG) // 2],
        JPEG[:-2],
        b"<!DOCTYPE html><html><body>403</body></html>",
        encoded(Image.fromarray(NOISE), "PNG")[:200],
        encoded(Image.fromarray(NOISE), "GIF"),
        encoded(Image.fromarray(NOISE), "TIFF"),
        bytes(1000),
    ],
    ids=["empty", "head", "half", "no-end", "html", "half-png", "gif", "tiff", "zeros"],
)
def test_what_cannot_be_decoded_is_an_error_that_names_the_file(
    content: bytes, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        decode(content, tmp_path, "0001_c02s31_000475.jpg")
    assert "0001_c02s31_000475.jpg" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(7_100, 7_100), (10_000, 10_000), (20_000, 20_000)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int, tmp_path: Path) -> None:
    content = encoded(Image.new("1", (width, height)), "PNG")
    assert len(content) < 100_000
    with pytest.raises(DataError, match="pixels") as caught:
        decode(content, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_image_and_a_folder_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: the image is gone"):
        read_image(str(tmp_path / "gone.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DataError, match=r"folder\.jpg: cannot be decoded"):
        read_image(str(tmp_path / "folder.jpg"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_random_damage_is_an_image_or_a_data_error_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    whole, rng, refused = encoded(Image.fromarray(NOISE), kind), random.Random(0), 0
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        try:
            assert decode(bytes(damaged), tmp_path).mode == "RGB"
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


# --------------------------------------------------------------------- labels


class Listed(Dataset):
    """A data set with the samples that it is given."""

    def __init__(self, train: list[Sample]) -> None:
        self._train = train

    @property
    def train(self) -> list[Sample]:
        return self._train

    @property
    def query(self) -> list[Sample]:
        return []

    @property
    def gallery(self) -> list[Sample]:
        return []


def test_labels_are_ranks_among_the_sorted_ids() -> None:
    samples = [Sample("a", 40, 16), Sample("b", 0, 2), Sample("c", 7, 16), Sample("d", 40, 3)]
    labels = labels_of(samples)
    assert labels == Labels(pids=(0, 7, 40), camids=(2, 3, 16))
    assert labels.pid_labels(samples) == [2, 0, 1, 2]
    assert labels.camera_indices([*samples, Sample("e", 9, 4)]) == [2, 0, 2, 1, -1]


def test_junk_is_not_trained_on_but_person_zero_is() -> None:
    samples = [Sample("a", -1, 1), Sample("b", 0, 1), Sample("c", 3, 2)]
    assert training_samples(Listed(samples)) == samples[1:]


@pytest.mark.parametrize("pids", [[], [-1, -1], [5, 5, 5]])
def test_training_needs_two_identities(pids: list[int]) -> None:
    samples = [Sample(str(i), pid, 1) for i, pid in enumerate(pids)]
    with pytest.raises(DataError, match="at least 2 identities"):
        training_samples(Listed(samples))


def test_statistics_count_junk_and_distractors_as_images_alone() -> None:
    samples = [Sample("a", -1, 1), Sample("b", 0, 1), Sample("c", 3, 2), Sample("d", 3, 5)]
    assert statistics(samples) == (2, 4, 3)
    assert statistics([]) == (0, 0, 0)


# --------------------------------------------------------------------- loaders


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Twelve images of four people; all of an image's pixels are ten times its number."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.new("RGB", (16, 32), (10 * number,) * 3).save(path)
        found.append(Sample(str(path), pid=100 + number % 4, camid=number % 3))
    return found


def loader_of(samples: list[Sample], workers: int = 0, seed: int = 0) -> TrainLoader:
    config = InputConfig(size=(32, 16), padding=2)
    sampler = SAMPLERS.build(
        "identity", pids=[s.pid for s in samples], batch_size=4, instances=2, seed=seed
    )
    transform = train_transform(config, MEAN, STD)
    return TrainLoader(
        samples, labels_of(samples), sampler, transform, seed=seed, workers=workers, pin=False
    )


def same(one: Iterator[Batch] | list[Batch], other: Iterator[Batch] | list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.pids, b.pids)
        and torch.equal(a.camids, b.camids)
        for a, b in pairs
    )


def test_a_batch_has_the_labels_and_cameras_of_its_images(samples: list[Sample]) -> None:
    sampler = SAMPLERS.build("random", pids=[s.pid for s in samples], batch_size=5, seed=0)
    transform = eval_transform(InputConfig(size=(32, 16)), (0.0,) * 3, (1.0,) * 3)
    loader = TrainLoader(
        samples, labels_of(samples), sampler, transform, seed=0, workers=0, pin=False
    )
    batches = list(loader.epoch(0))
    assert [batch.images.shape for batch in batches] == [(5, 3, 32, 16)] * 2
    for batch in batches:
        numbers = (batch.images[:, 0, 0, 0] * 25.5).round().long()
        assert torch.equal(batch.pids, numbers % 4) and torch.equal(batch.camids, numbers % 3)


def test_an_epoch_begun_in_its_middle_goes_on_as_the_whole_one(samples: list[Sample]) -> None:
    whole = list(loader_of(samples).epoch(3))
    assert len(whole) == 4
    for start in range(len(whole) + 1):
        torch.manual_seed(start)
        assert same(loader_of(samples).epoch(3, start=start), whole[start:])


def test_processes_give_the_batches_that_this_one_gives(samples: list[Sample]) -> None:
    alone, together = loader_of(samples), loader_of(samples, workers=2)
    for epoch in (0, 1):
        assert same(alone.epoch(epoch), together.epoch(epoch))


def test_views_differ_between_epochs_and_seeds_but_not_between_calls(
    samples: list[Sample],
) -> None:
    first = list(loader_of(samples).epoch(0))
    assert same(loader_of(samples).epoch(0), first)
    for other in (loader_of(samples).epoch(1), loader_of(samples, seed=1).epoch(0)):
        assert not same(other, first)


def test_loading_draws_nothing_from_the_global_generator(samples: list[Sample]) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(loader_of(samples).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_a_data_error_in_training_and_evaluation(
    samples: list[Sample], workers: int, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(JPEG[:100])
    damaged = [*samples, Sample(str(broken), 103, 1)]
    transform = eval_transform(InputConfig(size=(32, 16)), MEAN, STD)
    calls: list[Callable[[], object]] = [
        lambda: list(loader_of([Sample(str(broken), s.pid, 1) for s in samples], workers).epoch(0)),
        lambda: list(eval_loader(damaged, transform, batch_size=3, workers=workers, pin=False)),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"broken\.jpg: cannot be decoded") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 0), (5, 0), (5, 2), (12, 0), (12, 2), (100, 0)]
)
def test_evaluation_sees_every_image_once_and_in_order(
    samples: list[Sample], batch_size: int, workers: int
) -> None:
    transform = eval_transform(InputConfig(size=(32, 16)), (0.0,) * 3, (1.0,) * 3)
    batches = list(
        eval_loader(samples, transform, batch_size=batch_size, workers=workers, pin=False)
    )
    images = torch.cat(batches)
    assert (images[:, 0, 0, 0] * 25.5).round().tolist() == list(range(12))
    assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize("training", [True, False])
def test_no_loading_process_outlives_a_failure(
    training: bool, samples: list[Sample], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(JPEG[:100])
    damaged = [Sample(str(broken), sample.pid, 1) for sample in samples]
    transform = eval_transform(InputConfig(size=(32, 16)), MEAN, STD)
    gc.collect()
    before, failed = set(multiprocessing.active_children()), False
    gc.disable()  # the processes must not wait for it
    try:
        if training:
            list(loader_of(damaged, workers=2).epoch(0))
        else:
            list(eval_loader(damaged, transform, batch_size=3, workers=2, pin=False))
    except DataError:
        failed = True
    finally:
        gc.enable()
    assert failed and set(multiprocessing.active_children()) <= before


def test_no_images_are_no_batches() -> None:
    transform = eval_transform(InputConfig(size=(32, 16)), MEAN, STD)
    assert list(eval_loader([], transform, batch_size=4, workers=2, pin=False)) == []


def test_workers_are_counted() -> None:
    assert count_workers(3) == 3 and count_workers(0) == 0
    assert 1 <= count_workers("auto") <= 8
