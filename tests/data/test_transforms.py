"""Random views: their distributions, and that device, order and code path change nothing."""

from __future__ import annotations

import math
import random
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from reidreg.config.sections import InputConfig
from reidreg.data.transforms import Augmentation, Normalisation, Views, draw_boxes, draw_views

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMALISE = Normalisation(MEAN, STD)
Floats = NDArray[np.float64]
KEY = (0, 0, 0)


def plain(**options: object) -> InputConfig:
    """Nothing random except the given options."""
    values: dict[str, object] = {
        "size": (64, 32),
        "flip_prob": 0.0,
        "padding": 0,
        "erasing_prob": 0.0,
        **options,
    }
    return InputConfig(**values)  # type: ignore[arg-type]


def views_of(config: InputConfig, images: Tensor, key: tuple[int, ...] = KEY) -> Tensor:
    augmentation = Augmentation(config, NORMALISE)
    return augmentation(images, augmentation.draw(len(images), key))


def pixels(view: Tensor) -> Tensor:
    """Normalised views (B, 3, H, W) as 8-bit numbers again."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((view * std + mean) * 255).round()


def coordinates(count: int = 1, height: int = 64, width: int = 32) -> Tensor:
    """Images whose red is 100 + the row, and whose green is 100 + the column."""
    rows, columns = np.mgrid[:height, :width]
    image = np.dstack([100 + rows, 100 + columns, rows * 0]).astype(np.uint8)
    return torch.from_numpy(image).permute(2, 0, 1).expand(count, -1, -1, -1)


def noise(count: int, height: int, width: int) -> Tensor:
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def boxes(draws: int, seed: int = 0, size: tuple[int, int] = (256, 128)) -> Views:
    """Top, left, height and width of boxes to erase."""
    return draw_boxes(draws, size, np.random.default_rng(seed))


def reference_boxes(draws: int, ratio: Callable[[np.random.Generator], float]) -> Floats:
    """Heights and widths as reid-strong-baseline draws them, with another draw of the ratio."""
    rng = np.random.default_rng(0)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < draws:
        area, aspect = rng.uniform(0.02, 0.4) * 256 * 128, ratio(rng)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < 128 and h < 256:
            sizes.append((h, w))
    return np.array(sizes, dtype=float)


def distance(one: Floats, other: Floats) -> float:
    """The Kolmogorov-Smirnov statistic: the largest gap between two distribution functions."""
    grid = np.sort(np.concatenate([one, other]))
    gaps = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (one, other)]
    return float(np.abs(gaps[0] - gaps[1]).max())


# --------------------------------------------------------------------- erasing


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_erasing_happens_as_often_as_asked(probability: float) -> None:
    drawn = draw_views(plain(size=(256, 128), erasing_prob=probability), 20_000, KEY)
    # Four standard deviations are 0.014.
    share = (drawn[:, 5] > 0).mean()
    assert share == pytest.approx(probability, abs=0.014 if 0 < probability < 1 else 0)


def test_boxes_have_the_areas_and_the_uniform_ratios_of_the_baseline() -> None:
    drawn = boxes(20_000)[:, 2:].astype(float)
    uniform = reference_boxes(20_000, lambda rng: rng.uniform(0.3, 3.33))
    logarithmic = reference_boxes(
        20_000, lambda rng: math.exp(rng.uniform(math.log(0.3), math.log(3.33)))
    )
    areas = drawn.prod(axis=1) / (256 * 128)
    assert areas.min() >= 0.019 and areas.max() <= 0.41
    assert areas.mean() == pytest.approx(uniform.prod(axis=1).mean() / (256 * 128), rel=0.02)
    # 99.9 % of such distances are below 0.0195.
    assert distance(drawn.prod(axis=1), uniform.prod(axis=1)) < 0.02
    ratios = drawn[:, 0] / drawn[:, 1]
    assert distance(ratios, uniform[:, 0] / uniform[:, 1]) < 0.02
    assert distance(ratios, logarithmic[:, 0] / logarithmic[:, 1]) > 0.15


def test_boxes_lie_anywhere_and_may_touch_the_edges() -> None:
    top, left, height, width = boxes(20_000, seed=1).T
    # The share of the free space above a box and left of it is uniform.
    down, across = top / (256 - height), left / (128 - width)
    for shares in (down, across):
        assert shares.min() == 0 and shares.max() == 1
        assert distance(shares, np.linspace(0, 1, 5000)) < 0.03
    assert abs(np.corrcoef(down, across)[0, 1]) < 0.03


@pytest.mark.parametrize("size", [(256, 128), (12, 200), (200, 12), (16, 16), (2, 2), (1, 1)])
def test_a_box_is_never_as_high_or_as_wide_as_the_image(size: tuple[int, int]) -> None:
    top, left, height, width = boxes(2000, seed=2, size=size).T
    assert (height < size[0]).all() and (width < size[1]).all()
    assert (top >= 0).all() and (top + height <= size[0]).all()
    assert (left >= 0).all() and (left + width <= size[1]).all()


def test_the_fill_is_the_mean_in_the_normalised_image_and_comes_last() -> None:
    images = noise(16, 64, 32)
    augmentation = Augmentation(plain(erasing_prob=1.0, flip_prob=1.0), NORMALISE)
    drawn = augmentation.draw(16, KEY)
    erased, whole = augmentation(images, drawn), NORMALISE(images.flip(-1))
    for image, before, (top, left, height, width) in zip(
        erased, whole, drawn[:, 3:].tolist(), strict=True
    ):
        inside = torch.zeros(64, 32, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
        assert 0.01 < inside.float().mean() < 0.45
        assert (image[:, inside] == torch.tensor(MEAN)[:, None]).all()
        assert torch.equal(image[:, ~inside], before[:, ~inside])


# --------------------------------------------------------------------- flips and crops


@pytest.mark.parametrize("probability", [0.0, 0.5, 0.8, 1.0])
def test_flips_happen_as_often_as_asked(probability: float) -> None:
    drawn = pixels(views_of(plain(flip_prob=probability), coordinates(4000)))
    flipped = (drawn[:, 1, 0, 0] > 115).float().mean().item()
    assert flipped == pytest.approx(probability, abs=0.032 if 0 < probability < 1 else 0)


def test_a_flip_mirrors_left_and_right_only() -> None:
    view = pixels(views_of(plain(flip_prob=1.0), coordinates()))[0]
    assert torch.equal(view[1, 0], 100 + torch.arange(31.0, -1, -1))
    assert torch.equal(view[0, :, 0], 100 + torch.arange(64.0))


def test_crops_lie_uniformly_in_the_padded_image() -> None:
    padding, draws = 5, 12_100
    drawn = draw_views(plain(padding=padding), draws, KEY)[:, 1:3]
    side = 2 * padding + 1
    for offsets in drawn.T:
        counts = np.bincount(offsets, minlength=side)
        assert len(counts) == side
        # 1,100 each; four standard deviations are 127.
        assert (np.abs(counts - draws / side) < 127).all()
    # 100 each; the 99.9th percentile of chi square with 120 degrees of freedom is 173.
    both = np.array(list(Counter(map(tuple, drawn.tolist())).values()))
    assert len(both) == side**2 and ((both - 100) ** 2 / 100).sum() < 173


def test_a_crop_shows_the_padded_image_from_where_it_was_drawn() -> None:
    padding = 9
    config = plain(padding=padding, flip_prob=0.5)
    augmentation, images = Augmentation(config, NORMALISE), noise(40, 64, 32)
    drawn = augmentation.draw(40, KEY)
    views = augmentation(images, drawn)
    for image, view, (flipped, top, left, *_) in zip(images, views, drawn.tolist(), strict=True):
        image = image.flip(-1) if flipped else image
        padded = torch.nn.functional.pad(image, [padding] * 4)
        crop = padded[None, :, top : top + 64, left : left + 32]
        assert torch.equal(view, NORMALISE(crop)[0])


def test_padding_is_black_before_normalising() -> None:
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    white = torch.full((30, 3, 64, 32), 255, dtype=torch.uint8)
    empty = 0
    for view in views_of(plain(padding=10), white):
        colours = torch.unique(view.flatten(1), dim=1)
        assert colours.shape[1] <= 2
        if colours.shape[1] == 2:
            assert torch.allclose(colours[:, 0], black, atol=1e-6)
            empty += 1
    assert empty > 20


# --------------------------------------------------------------------- normalising


def test_normalising_follows_the_formula() -> None:
    images = noise(5, 64, 32)
    expected = images.permute(0, 2, 3, 1).double().numpy() / 255
    expected = (expected - np.array(MEAN)) / np.array(STD)
    found = NORMALISE(images)
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert np.abs(found.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-6


def test_a_training_view_with_nothing_random_is_the_evaluation_view() -> None:
    images = noise(3, 64, 32)
    assert torch.equal(views_of(plain(), images), NORMALISE(images))


def test_the_layout_of_the_images_does_not_matter() -> None:
    images, config = noise(8, 64, 32), InputConfig(size=(64, 32))
    planar = images.contiguous()
    assert planar.stride() != images.stride()
    assert torch.equal(NORMALISE(images), NORMALISE(planar))
    assert torch.equal(views_of(config, images), views_of(config, planar))


def test_no_images_are_no_views() -> None:
    assert NORMALISE(noise(0, 64, 32)).shape == (0, 3, 64, 32)
    assert views_of(InputConfig(size=(64, 32)), noise(0, 64, 32)).shape == (0, 3, 64, 32)


def test_the_backbones_normalisation_is_used() -> None:
    half = (0.5, 0.5, 0.5)
    image = torch.tensor([255, 0, 51], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 32)
    view = Normalisation(half, half)(image)[0]
    assert torch.allclose(view[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)


# --------------------------------------------------------------------- the same on any path


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 5),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    padding=st.integers(0, 60),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_cpu_path_and_the_device_path_are_bitwise_the_same(
    count: int, height: int, width: int, padding: int, seed: int
) -> None:
    config = plain(size=(height, width), padding=padding, flip_prob=0.5, erasing_prob=0.5)
    augmentation, images = Augmentation(config, NORMALISE), noise(count, height, width)
    before, drawn = images.clone(), augmentation.draw(count, (seed,))
    one = augmentation.apply_one_by_one(images, drawn)
    other = augmentation.apply_together(images, drawn)
    assert torch.equal(one, other)
    for result in (one, other):
        assert result.shape == (count, 3, height, width) and result.dtype == torch.float32
        assert result.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(images, before)


@pytest.mark.gpu
def test_a_cuda_device_gives_what_the_cpu_gives_and_the_host_does_not_wait() -> None:
    augmentation, images = Augmentation(InputConfig(), NORMALISE), noise(16, 256, 128)
    drawn = augmentation.draw(16, KEY)
    on_device = images.pin_memory().to("cuda", non_blocking=True)
    augmentation(on_device, drawn)  # copies the tables to the device once
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the mode may miss some waits
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = augmentation(on_device, drawn)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(found.cpu(), augmentation(images, drawn))


def test_the_same_key_gives_the_same_views_and_any_other_key_others() -> None:
    config = InputConfig(size=(64, 32))
    first = draw_views(config, 32, (1, 2, 3))
    assert np.array_equal(draw_views(config, 32, (1, 2, 3)), first)
    for key in ((0, 2, 3), (1, 0, 3), (1, 2, 0), (2, 1, 3), (3, 2, 1)):
        assert not np.array_equal(draw_views(config, 32, key), first)


def test_earlier_batches_do_not_change_when_later_ones_are_made() -> None:
    augmentation, images = Augmentation(InputConfig(size=(64, 32)), NORMALISE), noise(4, 64, 32)
    made = [augmentation(images, augmentation.draw(4, (i,))) for i in range(8)]
    kept = [batch.clone() for batch in made]
    view, copy = made[0][1:2, :, ::2], made[0][1:2, :, ::2].clone()
    assert all(torch.equal(a, b) for a, b in zip(made, kept, strict=True))
    del made
    for i in range(8):
        augmentation(images, augmentation.draw(4, (100 + i,)))
    assert torch.equal(view, copy)


def test_no_global_generator_is_drawn_from() -> None:
    before = random.getstate(), np.random.get_state(legacy=False), torch.get_rng_state()
    views_of(plain(flip_prob=0.5, padding=5, erasing_prob=1.0), noise(4, 64, 32))
    assert random.getstate() == before[0]
    assert str(np.random.get_state(legacy=False)) == str(before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
