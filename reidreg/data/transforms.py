"""Pixels to a model's input, a batch at a time: the recipe of reid-strong-baseline (BoT).

Training: flip, pad and crop, normalise, erase. Evaluation: normalise. Images come decoded and
resized. Random parameters are drawn on the host for a whole batch, whatever the device, and
applied on the device of the images.
Source: Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, 2019;
random erasing after Zhong et al., 2020, with the bounds that BoT uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reidreg.config.sections import InputConfig
from reidreg.data.buffer_pool import BufferPool
from reidreg.parts.interfaces import IMAGENET_MEAN

Triple = tuple[float, float, float]
# (B, 7) int64, a row for each image: flipped or not; top and left of the crop in the padded image;
# top, left, height and width of the erased box, with height 0 for no box.
Views = NDArray[np.int64]

_ERASING_TRIES = 100


def draw_views(config: InputConfig, count: int, key: Sequence[int]) -> Views:
    """Draw the random views of a batch.

    Args:
        config: Size and probabilities.
        count: Images in the batch.
        key: The seed of the draw, such as seed, epoch and position of the batch; whole numbers.
    """
    rng = np.random.default_rng(np.random.SeedSequence(key))
    views = np.zeros((count, 7), dtype=np.int64)
    views[:, 0] = rng.random(count) < config.flip_prob
    # In the padded image all positions of the crop are equally likely.
    views[:, 1:3] = rng.integers(0, 2 * config.padding + 1, (count, 2))
    erased = np.flatnonzero(rng.random(count) < config.erasing_prob)
    views[erased, 3:] = draw_boxes(len(erased), config.size, rng)
    return views


def draw_boxes(count: int, size: tuple[int, int], rng: np.random.Generator) -> Views:
    """Draw boxes to erase: top, left, height and width, (count, 4).

    A box's area is uniform in (0.02, 0.4) of the image and its aspect ratio, height to width,
    uniform in (0.3, 3.33); torchvision draws the logarithm of the ratio instead. A box as high or
    as wide as the image is drawn again, at most 100 times; after that there is no box.
    """
    height, width = size
    boxes = np.zeros((count, 4), dtype=np.int64)
    pending = np.arange(count)
    for _ in range(_ERASING_TRIES):
        if not len(pending):
            break
        area = rng.uniform(0.02, 0.4, len(pending)) * height * width
        ratio = rng.uniform(0.3, 3.33, len(pending))
        h = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        w = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (h < height) & (w < width)
        h, w = h[fits], w[fits]
        top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
        boxes[pending[fits]] = np.stack([top, left, h, w], axis=1)
        pending = pending[~fits]
    return boxes


class Normalisation:
    """8-bit pixels to a network's input: scaled to 0..1, less the mean, divided by the std.

    Args:
        mean: Of the channels.
        std: Of the channels.
    """

    def __init__(self, mean: Triple, std: Triple) -> None:
        # (x / 255 - mean) / std as one product and one sum, rounded once.
        self._scale = torch.tensor([1 / (255 * s) for s in std])
        self._shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])
        self._fill = torch.tensor(IMAGENET_MEAN)
        self._tables: dict[tuple[torch.device, int], tuple[Tensor, Tensor, Tensor]] = {}

    def tables(self, device: torch.device, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, shift and fill of erased boxes for a row of RGB pixels, each (3 * width,) float32.

        They are kept: copying them to a CUDA device in each step would make the host wait.
        """
        key = (device, width)
        if key not in self._tables:
            scale, shift, fill = (
                channel.repeat(width).to(device)
                for channel in (self._scale, self._shift, self._fill)
            )
            self._tables[key] = (scale, shift, fill)
        return self._tables[key]

    def __call__(self, images: Tensor) -> Tensor:
        """Normalise images.

        Args:
            images: (B, 3, H, W) uint8, on any device; fastest in channels_last.

        Returns:
            (B, 3, H, W) float32 in channels_last.
        """
        rows = _rows(images)
        scale, shift, _ = self.tables(images.device, images.shape[-1])
        normalised = torch.empty(rows.shape, device=rows.device)
        # On a CPU one image at a time: it stays in the cache between the three operations.
        pairs = zip(rows, normalised, strict=True) if _on_cpu(rows) else [(rows, normalised)]
        for source, target in pairs:
            target.copy_(source).mul_(scale).add_(shift)
        return _images(normalised)


class Augmentation:
    """The random views of training, in batches.

    Args:
        config: Size and probabilities.
        normalisation: Applied after flip and crop, and before erasing.
    """

    def __init__(self, config: InputConfig, normalisation: Normalisation) -> None:
        self.config = config
        self.normalisation = normalisation
        self._pool = BufferPool()

    def draw(self, count: int, key: Sequence[int]) -> Views:
        """As `draw_views`, with this size and these probabilities."""
        return draw_views(self.config, count, key)

    def __call__(self, images: Tensor, views: Views) -> Tensor:
        """Flip, pad with black and crop, normalise, erase.

        Erased boxes are filled with the ImageNet mean in the normalised image, a light grey, as in
        the published results.

        Args:
            images: (B, 3, H, W) uint8 of the configured size, on any device; fastest in
                channels_last.
            views: (B, 7), as `draw` returns them.

        Returns:
            (B, 3, H, W) float32 in channels_last, on the images' device.
        """
        apply = self.apply_one_by_one if _on_cpu(images) else self.apply_together
        return apply(images, views)

    def apply_one_by_one(self, images: Tensor, views: Views) -> Tensor:
        """By copies of rectangles, image by image: fastest on a CPU."""
        rows = _rows(images)
        width = images.shape[-1]
        scale, shift, fill = self.normalisation.tables(images.device, width)
        augmented = self._pool.empty(*rows.shape)
        view = torch.empty(rows.shape[1:], dtype=torch.uint8)
        pixels = view.numpy().reshape(-1, width, 3)
        for source, target, (flipped, top, left, *box) in zip(
            _images(rows), augmented, views.tolist(), strict=True
        ):
            # torch flips images faster than rows of pixels.
            image = (source[None].flip(-1)[0] if flipped else source).permute(1, 2, 0)
            offset = (top - self.config.padding, left - self.config.padding)
            _shift_into(pixels, image.numpy(), *offset)
            target.copy_(view).mul_(scale).add_(shift)
            y, x, h, w = box
            target[y : y + h, 3 * x : 3 * (x + w)] = fill[: 3 * w]
        return _images(augmented)

    def apply_together(self, images: Tensor, views: Views) -> Tensor:
        """By index, the whole batch at once: for devices on which launching a kernel is the cost.

        The host never waits for the device.
        """
        device, (count, _, height, width) = images.device, images.shape
        table = torch.from_numpy(views)
        if device.type == "cuda":
            table = table.pin_memory()
        flipped, top, left, y, x, h, w = table.to(device, non_blocking=True).T.unsqueeze(-1)
        down, across = torch.arange(height, device=device), torch.arange(width, device=device)

        source_row = down + top - self.config.padding  # (B, H)
        source_column = across + left - self.config.padding  # (B, W), of the flipped image
        inside = _within(source_row, height)[:, :, None] & _within(source_column, width)[:, None]
        source_column = torch.where(flipped.bool(), width - 1 - source_column, source_column)
        first_row = torch.arange(count, device=device)[:, None] * height
        index = (first_row + source_row.clamp(0, height - 1))[:, :, None] * width
        index = index + source_column.clamp(0, width - 1)[:, None]
        pixels = _rows(images).view(-1, 3).index_select(0, index.flatten())
        pixels = pixels.view(count, height, width, 3) * inside[..., None]

        normalised = self.normalisation(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        _, _, fill = self.normalisation.tables(device, 1)
        erased = _between(down, y, h)[:, :, None] & _between(across, x, w)[:, None]
        return torch.where(erased[..., None], fill, normalised).permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) as rows of RGB pixels, (B, H, 3 * W); a view of channels_last ones."""
    return images.permute(0, 2, 3, 1).contiguous().flatten(2)


def _images(rows: Tensor) -> Tensor:
    """The inverse of `_rows`, (B, 3, H, W) in channels_last; always a view."""
    return rows.view(*rows.shape[:2], rows.shape[2] // 3, 3).permute(0, 3, 1, 2)


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _shift_into(
    target: NDArray[np.uint8], source: NDArray[np.uint8], down: int, across: int
) -> None:
    """Copy an image (H, W, 3) into one of its size, from (down, across) on, black outside."""
    height, width, _ = target.shape
    rows, columns = _overlap(height, down), _overlap(width, across)
    if len(rows) < height or len(columns) < width:
        target.fill(0)
    if len(rows) and len(columns):
        target[rows.start : rows.stop, columns.start : columns.stop] = source[
            rows.start + down : rows.stop + down, columns.start + across : columns.stop + across
        ]


def _overlap(length: int, offset: int) -> range:
    """The positions p in 0..length-1 for which p + offset is in it too."""
    return range(max(0, -offset), min(length, length - offset))


def _within(positions: Tensor, length: int) -> Tensor:
    return (positions >= 0) & (positions < length)


def _between(positions: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (positions >= start) & (positions < start + length)
