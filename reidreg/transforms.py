"""Images to tensors: the recipe of reid-strong-baseline (BoT), in torchvision's transforms v2.

Training: resize, flip, pad and crop, normalise, erase. Evaluation: resize, normalise.
Source: Luo et al., Bag of Tricks and a Strong Baseline for Deep Person Re-identification, 2019;
random erasing after Zhong et al., 2020, with the bounds that BoT uses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from reidreg.config import InputConfig
from reidreg.interfaces import IMAGENET_MEAN

Transform = Callable[[Image.Image], Tensor]
Triple = tuple[float, float, float]


class RandomErasing(v2.Transform):  # type: ignore[misc]  # torchvision ships no types
    """Erase one random box of a normalised image.

    The box's area is uniform in (0.02, 0.4) of the image and its aspect ratio, height to width,
    uniform in (0.3, 3.33); torchvision's own draws the logarithm of the ratio instead. A box as
    large as the image in either direction is drawn again, at most 100 times. The fill is the
    ImageNet mean in the normalised image, a light grey, as the published results have it.

    Args:
        probability: How often an image is erased at all.
    """

    tries = 100

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        """Draw the box: top, left, height and width in pixels, or None for no erasing."""
        height, width = flat_inputs[0].shape[-2:]
        if torch.rand(()).item() >= self.probability:
            return {"box": None}
        for _ in range(self.tries):
            area = (0.02 + 0.38 * torch.rand(()).item()) * height * width
            ratio = 0.3 + 3.03 * torch.rand(()).item()
            h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if h < height and w < width:
                top = int(torch.randint(0, height - h + 1, ()))
                left = int(torch.randint(0, width - w + 1, ()))
                return {"box": (top, left, h, w)}
        return {"box": None}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        """Fill the box."""
        if params["box"] is None:
            return inpt
        top, left, h, w = params["box"]
        fill = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
        erased = inpt.clone()
        erased[..., top : top + h, left : left + w] = fill
        return erased


def train_transform(config: InputConfig, mean: Triple, std: Triple) -> Transform:
    """A random view of an image, (3, H, W) float32, normalised.

    Args:
        config: Size and probabilities.
        mean: Of the normalisation.
        std: Of the normalisation.
    """
    steps: list[Any] = [
        *_resized(config),
        v2.RandomHorizontalFlip(config.flip_prob),
        # Of the padded image, so that all of the crop's places are equally likely.
        v2.Pad(config.padding, fill=0),
        v2.RandomCrop(list(config.size)),
        *_normalised(mean, std),
        RandomErasing(config.erasing_prob),
    ]
    compose: Transform = v2.Compose(steps)
    return compose


def eval_transform(config: InputConfig, mean: Triple, std: Triple) -> Transform:
    """The one view of an image that evaluation uses, (3, H, W) float32, normalised."""
    compose: Transform = v2.Compose([*_resized(config), *_normalised(mean, std)])
    return compose


def _resized(config: InputConfig) -> list[Any]:
    # Pillow's resize works on eight bits and always filters; uint8 tensors are a quarter of the
    # work of float ones in the geometric steps that follow.
    resize = v2.Resize(list(config.size), interpolation=InterpolationMode.BILINEAR, antialias=True)
    return [resize, v2.PILToTensor()]


def _normalised(mean: Triple, std: Triple) -> list[Any]:
    return [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
