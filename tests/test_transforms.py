"""Random views: how often, how large, where, and the same again from the same seed."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reidreg.config import InputConfig
from reidreg.transforms import RandomErasing, Transform, eval_transform, train_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Floats = NDArray[np.float64]


def plain(**options: object) -> InputConfig:
    """Nothing random but what is asked for."""
    values: dict[str, object] = {
        "size": (64, 32),
        "flip_prob": 0.0,
        "padding": 0,
        "erasing_prob": 0.0,
        **options,
    }
    return InputConfig(**values)  # type: ignore[arg-type]


def pixels(view: Tensor) -> Tensor:
    """A normalised view as 8-bit numbers again."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return ((view * std + mean) * 255).round()


def places(height: int = 64, width: int = 32) -> Image.Image:
    """An image whose red is 100 + its row, and whose green is 100 + its column."""
    rows, columns = np.mgrid[:height, :width]
    return Image.fromarray(np.dstack([100 + rows, 100 + columns, rows * 0]).astype(np.uint8))


def boxes(draws: int, height: int = 256, width: int = 128) -> list[tuple[int, int, int, int]]:
    """Top, left, height and width of the boxes that erasing cuts, read off the images."""
    erase = RandomErasing(1.0)
    image = torch.full((3, height, width), -9.0)
    found = []
    for _ in range(draws):
        rows, columns = (erase(image)[0] != -9).nonzero(as_tuple=True)
        top, left = int(rows.min()), int(columns.min())
        h, w = int(rows.max()) - top + 1, int(columns.max()) - left + 1
        assert len(rows) == h * w, "one solid box"
        found.append((top, left, h, w))
    return found


def reference_boxes(draws: int, ratio: Callable[[np.random.Generator], float]) -> Floats:
    """Heights and widths as the baseline draws them, with a ratio of one's own."""
    rng = np.random.default_rng(0)
    sizes: list[tuple[int, int]] = []
    while len(sizes) < draws:
        area, aspect = rng.uniform(0.02, 0.4) * 256 * 128, ratio(rng)
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w < 128 and h < 256:
            sizes.append((h, w))
    return np.array(sizes, dtype=float)


def distance(one: Floats, other: Floats) -> float:
    """Kolmogorov and Smirnov's: the largest gap between two distribution functions."""
    grid = np.sort(np.concatenate([one, other]))
    gaps = [np.searchsorted(np.sort(x), grid, side="right") / len(x) for x in (one, other)]
    return float(np.abs(gaps[0] - gaps[1]).max())


def test_erasing_happens_as_often_as_asked() -> None:
    torch.manual_seed(0)
    image = torch.full((3, 32, 16), -9.0)
    for probability in (0.0, 0.5, 1.0):
        erase = RandomErasing(probability)
        share = np.mean([bool((erase(image) != -9).any()) for _ in range(2000)])
        assert share == pytest.approx(probability, abs=0.045 if 0 < probability < 1 else 0)


def test_boxes_have_the_areas_and_the_uniform_ratios_of_the_baseline() -> None:
    torch.manual_seed(0)
    drawn = np.array(boxes(2500), dtype=float)[:, 2:]
    uniform = reference_boxes(20_000, lambda rng: rng.uniform(0.3, 3.33))
    logarithmic = reference_boxes(
        20_000, lambda rng: math.exp(rng.uniform(math.log(0.3), math.log(3.33)))
    )
    areas = drawn.prod(axis=1) / (256 * 128)
    assert areas.min() >= 0.019 and areas.max() <= 0.41
    assert areas.mean() == pytest.approx(uniform.prod(axis=1).mean() / (256 * 128), rel=0.04)
    assert distance(drawn.prod(axis=1), uniform.prod(axis=1)) < 0.04
    ratios = drawn[:, 0] / drawn[:, 1]
    assert distance(ratios, uniform[:, 0] / uniform[:, 1]) < 0.04
    assert distance(ratios, logarithmic[:, 0] / logarithmic[:, 1]) > 0.15


def test_boxes_lie_anywhere_and_may_touch_the_edges() -> None:
    torch.manual_seed(1)
    drawn = boxes(2500)
    # The share of the free room above and left of a box is uniform.
    down = np.array([top / (256 - h) for top, _, h, _ in drawn])
    across = np.array([left / (128 - w) for _, left, _, w in drawn])
    for shares in (down, across):
        assert shares.min() == 0 and shares.max() == 1
        assert distance(shares, np.linspace(0, 1, 5000)) < 0.05
    assert abs(np.corrcoef(down, across)[0, 1]) < 0.06


@pytest.mark.parametrize(("height", "width"), [(256, 128), (12, 200), (200, 12), (16, 16)])
def test_a_box_is_never_as_high_or_as_wide_as_the_image(height: int, width: int) -> None:
    torch.manual_seed(2)
    erase = RandomErasing(1.0)
    image = torch.full((3, height, width), -9.0)
    for _ in range(400):
        erased = (erase(image)[0] != -9).nonzero()
        if len(erased):
            spans = erased.max(dim=0).values - erased.min(dim=0).values + 1
            assert spans[0] < height and spans[1] < width


def test_the_fill_is_the_mean_in_the_normalised_image_and_the_input_is_kept() -> None:
    torch.manual_seed(3)
    image = torch.full((3, 64, 32), -9.0)
    erased = RandomErasing(1.0)(image)
    for channel, value in enumerate(MEAN):
        found = erased[channel][erased[channel] != -9]
        assert len(found) and (found == torch.tensor(value)).all()
    assert (image == -9).all()


def test_erasing_comes_last_in_training() -> None:
    torch.manual_seed(4)
    view = train_transform(plain(erasing_prob=1.0), MEAN, STD)(places())
    grey = (view == torch.tensor(MEAN).view(3, 1, 1)).all(dim=0)
    assert 0.01 < grey.float().mean() < 0.45


def test_flips_happen_as_often_as_asked() -> None:
    torch.manual_seed(0)
    for probability in (0.0, 0.5, 0.8, 1.0):
        transform = train_transform(plain(flip_prob=probability), MEAN, STD)
        image = places()
        flipped = [pixels(transform(image))[1, 0, 0].item() > 115 for _ in range(600)]
        assert np.mean(flipped) == pytest.approx(
            probability, abs=0.07 if 0 < probability < 1 else 0
        )


def test_a_flip_mirrors_left_and_right_only() -> None:
    view = pixels(train_transform(plain(flip_prob=1.0), MEAN, STD)(places()))
    assert torch.equal(view[1, 0], 100 + torch.arange(31.0, -1, -1))
    assert torch.equal(view[0, :, 0], 100 + torch.arange(64.0))


def test_crops_lie_uniformly_in_the_padded_image() -> None:
    torch.manual_seed(0)
    padding = 5
    transform, image = train_transform(plain(padding=padding), MEAN, STD), places()
    down: Counter[int] = Counter()
    across: Counter[int] = Counter()
    both: Counter[tuple[int, int]] = Counter()
    for _ in range(2200):
        row, column = pixels(transform(image))[:2, 32, 16].tolist()
        # The middle shows row 32 + offset - padding of the image.
        offset = (int(row) - 100 - 32 + padding, int(column) - 100 - 16 + padding)
        down[offset[0]] += 1
        across[offset[1]] += 1
        both[offset] += 1
    for counts in (down, across):
        assert set(counts) == set(range(2 * padding + 1))
        # 200 each; four standard deviations are 54.
        assert all(140 < count < 260 for count in counts.values())
    assert len(both) == (2 * padding + 1) ** 2


def test_what_a_crop_leaves_empty_is_black_before_normalising() -> None:
    torch.manual_seed(1)
    transform = train_transform(plain(padding=10), MEAN, STD)
    black = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
    white = Image.new("RGB", (32, 64), (255, 255, 255))
    empty = 0
    for _ in range(30):
        view = transform(white)
        assert view.shape == (3, 64, 32)
        colours = torch.unique(view.flatten(1), dim=1)
        assert colours.shape[1] <= 2
        if colours.shape[1] == 2:
            assert torch.allclose(colours[:, 0], black, atol=1e-6)
            empty += 1
    assert empty > 20


def test_an_evaluation_view_is_the_resized_normalised_image() -> None:
    source = Image.fromarray(np.random.default_rng(0).integers(0, 256, (91, 45, 3), dtype=np.uint8))
    view = eval_transform(plain(flip_prob=1.0, padding=9, erasing_prob=1.0), MEAN, STD)(source)
    small = np.asarray(source.resize((32, 64), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    expected = (small - np.array(MEAN)) / np.array(STD)
    assert view.dtype == torch.float32
    assert np.allclose(view.numpy(), expected.transpose(2, 0, 1), atol=1e-6)


def test_a_training_view_without_chance_is_the_evaluation_view() -> None:
    source = places(91, 45)
    train, evaluate = (make(plain(), MEAN, STD) for make in (train_transform, eval_transform))
    assert torch.equal(train(source), evaluate(source))


def test_the_backbones_normalisation_is_used() -> None:
    half = (0.5, 0.5, 0.5)
    view = eval_transform(plain(), half, half)(Image.new("RGB", (32, 64), (255, 0, 51)))
    assert torch.allclose(view[:, 0, 0], torch.tensor([1.0, -1.0, -0.6]), atol=1e-6)


def test_the_same_seed_gives_the_same_view_and_another_seed_another() -> None:
    config = plain(flip_prob=0.5, padding=5, erasing_prob=0.5)
    transform: Transform = train_transform(config, MEAN, STD)

    def views(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return torch.stack([transform(places()) for _ in range(8)])

    assert torch.equal(views(0), views(0))
    assert not torch.equal(views(0), views(1))


def test_no_generator_but_torchs_is_drawn_from() -> None:
    transform = train_transform(plain(flip_prob=0.5, padding=5, erasing_prob=1.0), MEAN, STD)
    before = random.getstate(), np.random.get_state(legacy=False)
    transform(places())
    assert random.getstate() == before[0]
    assert str(np.random.get_state(legacy=False)) == str(before[1])
