"""Triplet loss with the hardest pairs of a batch."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor
from torch.nn.functional import softplus

from reidreg import LOSSES, Loss, Output
from reidreg_plugins.losses.precision import at_least_float32


@LOSSES.register("triplet")
class Triplet(Loss):
    """Batch-hard triplet loss on the features before the neck, Euclidean and not normalised.

    Each image is an anchor; the farthest image of its identity should be nearer, by the margin,
    than the nearest image of another (Hermans et al., In Defense of the Triplet Loss, 2017).

    Args:
        margin: The margin; null takes the soft margin log(1 + exp(d_ap - d_an)).
    """

    compares_images = True

    def __init__(self, margin: Annotated[float, Ge(0)] | None = 0.3) -> None:
        super().__init__()
        self.margin = margin

    def forward(self, output: Output, pids: Tensor) -> Tensor:
        positive, negative = hardest(euclidean(at_least_float32(output.features)), pids)
        gap = positive - negative
        if self.margin is None:
            return softplus(gap).mean()
        return torch.relu(gap + self.margin).mean()


def euclidean(features: Tensor) -> Tensor:
    """Euclidean distances between all rows of (B, D), as (B, B).

    Squares are at least 1e-12: the gradient of the root at zero is infinite.
    """
    squares = features.square().sum(dim=1)
    product = features @ features.T
    return (squares[:, None] + squares[None, :] - 2 * product).clamp(min=1e-12).sqrt()


def hardest(distances: Tensor, pids: Tensor) -> tuple[Tensor, Tensor]:
    """The distances (B,) to the hardest positive and to the hardest negative of each anchor.

    The anchor is among its positives, so the only image of an identity has one at distance zero;
    in a batch of one identity the negative is infinitely far, and the loss is zero.
    """
    same = pids[:, None] == pids[None, :]
    positive = distances.masked_fill(~same, float("-inf")).amax(dim=1)
    negative = distances.masked_fill(same, float("inf")).amin(dim=1)
    return positive, negative
