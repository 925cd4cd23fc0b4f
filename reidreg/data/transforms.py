"""Pixels to a model's input, a batch at a time: the recipe of reid-strong-baseline (BoT).

Training: flip, pad and crop, normalise, erase. Evaluation: normalise. Images come decoded and
resized; the chances are drawn on the host, for a whole batch and independent of the device, and
applied where the images are.
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
# top, left, height and width of the erased box, whose height is 0 where there is none.
Views = NDArray[np.int64]

_ERASING_TRIES = 100


def draw_views(config: InputConfig, count: int, key: Sequence[int]) -> Views:
    """Draw how to look at the images of a batch.

    Args:
        config: Size and probabilities.
        count: Images in the batch.
        key: What the views depend on, as seed, epoch and the batch's position; whole numbers.
    """
    draw = np.random.default_rng(np.random.SeedSequence(key))
    views = np.zeros((count, 7), dtype=np.int64)
    views[:, 0] = draw.random(count) < config.flip_prob
    # Of the padded image, so that all of the crop's places are equally likely.
    views[:, 1:3] = draw.integers(0, 2 * config.padding + 1, (count, 2))
    erased = np.flatnonzero(draw.random(count) < config.erasing_prob)
    views[erased, 3:] = draw_boxes(len(erased), config.size, draw)
    return views


def draw_boxes(count: int, size: tuple[int, int], draw: np.random.Generator) -> Views:
    """Draw boxes to erase: top, left, height and width, (count, 4).

    A box's area is uniform in (0.02, 0.4) of the image and its aspect ratio, height to width,
    uniform in (0.3, 3.33); torchvision's own draws the logarithm of the ratio instead. A box as
    large as the image in either direction is drawn again, at most 100 times, and is then none.
    """
    height, width = size
    boxes = np.zeros((count, 4), dtype=np.int64)
    pending = np.arange(count)
    for _ in range(_ERASING_TRIES):
        if not len(pending):
            break
        area = draw.uniform(0.02, 0.4, len(pending)) * height * width
        ratio = draw.uniform(0.3, 3.33, len(pending))
        h = np.rint(np.sqrt(area * ratio)).astype(np.int64)
        w = np.rint(np.sqrt(area / ratio)).astype(np.int64)
        fits = (h < height) & (w < width)
        h, w = h[fits], w[fits]
        top, left = draw.integers(0, height - h + 1), draw.integers(0, width - w + 1)
        boxes[pending[fits]] = np.stack([top, left, h, w], axis=1)
        pending = pending[~fits]
    return boxes


class Normalisation:
    """8-bit pixels to what a network was trained on: scaled to 0..1, less the mean, by the std.

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
        """Scale, shift and erasing's fill, each (3 * width,) float32: for a row of RGB pixels.

        They are kept, since bringing them to a CUDA device would make the host wait for it.
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
        # On a CPU an image at a time: it stays in the core's cache between the three passes.
        pairs = zip(rows, normalised, strict=True) if _on_cpu(rows) else [(rows, normalised)]
        for source, target in pairs:
            target.copy_(source).mul_(scale).add_(shift)
        return _images(normalised)


class Augmentation:
    """The random views of training, in batches.

    Args:
        config: Size and probabilities.
        normalisation: What comes after flip and crop, and before erasing.
    """

    def __init__(self, config: InputConfig, normalisation: Normalisation) -> None:
        self.config = config
        self.normalisation = normalisation
        self._pool = BufferPool()

    def draw(self, count: int, key: Sequence[int]) -> Views:
        """As `draw_views`, with this one's size and probabilities."""
        return draw_views(self.config, count, key)

    def __call__(self, images: Tensor, views: Views) -> Tensor:
        """Flip, pad with black and crop, normalise, erase.

        The fill of erased boxes is the ImageNet mean in the normalised image, a light grey, as the
        published results have it.

        Args:
            images: (B, 3, H, W) uint8 of the configured size, on any device; fastest in
                channels_last.
            views: How to look at them, (B, 7), as `draw` gives them.

        Returns:
            (B, 3, H, W) float32 in channels_last, on the images' device.
        """
        apply = self.apply_one_by_one if _on_cpu(images) else self.apply_together
        return apply(images, views)

    def apply_one_by_one(self, images: Tensor, views: Views) -> Tensor:
        """Copies of rectangles, image by image: what a CPU does fastest."""
        rows = _rows(images)
        width = images.shape[-1]
        scale, shift, fill = self.normalisation.tables(images.device, width)
        augmented = self._pool.empty(*rows.shape)
        view = torch.empty(rows.shape[1:], dtype=torch.uint8)
        places = view.numpy().reshape(-1, width, 3)
        for source, target, (flipped, top, left, *box) in zip(
            _images(rows), augmented, views.tolist(), strict=True
        ):
            # torch has a fast flip of images, and a slow one of rows of pixels.
            image = (source[None].flip(-1)[0] if flipped else source).permute(1, 2, 0)
            offset = (top - self.config.padding, left - self.config.padding)
            _shift_into(places, image.numpy(), *offset)
            target.copy_(view).mul_(scale).add_(shift)
            y, x, h, w = box
            target[y : y + h, 3 * x : 3 * (x + w)] = fill[: 3 * w]
        return _images(augmented)

    def apply_together(self, images: Tensor, views: Views) -> Tensor:
        """All at once by index, for devices where an operation costs more to begin than to do.

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
    """Fill (H, W, 3) with what an image as large shows from (down, across) on, black outside."""
    height, width, _ = target.shape
    rows, columns = _overlap(height, down), _overlap(width, across)
    if len(rows) < height or len(columns) < width:
        target.fill(0)
    if len(rows) and len(columns):
        target[rows.start : rows.stop, columns.start : columns.stop] = source[
            rows.start + down : rows.stop + down, columns.start + across : columns.stop + across
        ]


def _overlap(length: int, offset: int) -> range:
    """The places p of 0..length-1 with p + offset among 0..length-1 too."""
    return range(max(0, -offset), min(length, length - offset))


def _within(places: Tensor, length: int) -> Tensor:
    return (places >= 0) & (places < length)


def _between(places: Tensor, start: Tensor, length: Tensor) -> Tensor:
    return (places >= start) & (places < start + length)
