"""Crops to normalised features, for trackers and notebooks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from reidreg.data.images import read_pixels, stack_resized
from reidreg.errors import DataError
from reidreg.model.restore import open_checkpoint, restore_embedder
from reidreg.model.thresholds import stored_threshold

Crop = str | Path | Image.Image | NDArray[np.uint8]


class FeatureExtractor:
    """A trained model as a function from crops to features.

    Args:
        ckpt: A checkpoint of reidreg; input size and normalisation come from it.
        device: auto, cpu, cuda, cuda:N or mps.
        batch_size: Crops in a batch.
    """

    def __init__(self, ckpt: str | Path, device: str = "auto", batch_size: int = 128) -> None:
        checkpoint, config = open_checkpoint(
            ckpt, {"train": {"device": device, "eval_batch_size": batch_size}}
        )
        self._embedder = restore_embedder(checkpoint, config)
        self._threshold = stored_threshold(checkpoint)
        self._embedder.model.eval()

    @property
    def threshold(self) -> float | None:
        """The cosine at and above which two crops show the same person; None if none is stored.

        `reidreg evaluate --ckpt FILE --evaluator.verification true --save_threshold` stores one.
        """
        return self._threshold

    @functools.cached_property
    def _width(self) -> int:
        """The length of a feature, found by extracting one: a head may concatenate several."""
        height, width = self._embedder.input.size
        return self([Image.new("RGB", (width, height))]).shape[1]

    def __call__(self, crops: Sequence[Crop]) -> Tensor:
        """Compute the features of crops.

        Args:
            crops: Paths, PIL images, or (H, W, 3) uint8 arrays in RGB; `crop[..., ::-1]` converts
                OpenCV's BGR.

        Returns:
            (N, D) float32 on the CPU, each row of norm 1; dot products are cosine similarities.

        Raises:
            DataError: A crop is empty, cannot be read, or is not an RGB image.
        """
        if not len(crops):
            return torch.empty(0, self._width)
        size, count = self._embedder.input.size, self._embedder.batch_size
        features = []
        for start in range(0, len(crops), count):
            batch = crops[start : start + count]
            images = stack_resized(map(_pixels, batch), len(batch), size)
            features.append(self._embedder.features(images.permute(0, 3, 1, 2)))
        return torch.nn.functional.normalize(torch.cat(features))


def _pixels(crop: Crop) -> Tensor:
    """A crop as (3, H, W) uint8 in RGB."""
    if isinstance(crop, (str, Path)):
        return read_pixels(str(crop))
    if isinstance(crop, Image.Image):
        crop = np.asarray(crop.convert("RGB"))
    if crop.dtype != np.uint8 or crop.ndim != 3 or crop.shape[2] != 3 or 0 in crop.shape:
        raise DataError(f"a crop is (H, W, 3) uint8 in RGB, got {crop.dtype} {crop.shape}")
    # A copy: a part of a frame may have any strides, and may be read-only.
    return torch.from_numpy(np.array(crop, order="C")).permute(2, 0, 1)
