"""Center loss."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from reidreg import LOSSES, Loss, Output
from reidreg_plugins.losses.precision import at_least_float32


@LOSSES.register("center")
class Center(Loss):
    """Squared distance of each feature before the neck to the learned centre of its identity.

    Sum over the batch of |x - c_y|^2, divided by the batch size (Wen et al., 2016, without its
    1/2). The centres have a separate SGD optimizer, with the gradient of the unweighted loss: at a
    learning rate of 0.5, c_j moves by the batch's sum of (x_i - c_j), divided by its size.

    Args:
        lr: Learning rate of the centres; no schedule applies to it.
    """

    def __init__(self, num_classes: int, dim: int, lr: Annotated[float, Gt(0)] = 0.5) -> None:
        super().__init__()
        self.lr = lr
        self.centers = nn.Parameter(torch.randn(num_classes, dim))

    def forward(self, output: Output, pids: Tensor) -> Tensor:
        difference = at_least_float32(output.features) - self.centers[pids]
        return difference.square().sum(dim=1).clamp(1e-12, 1e12).mean()

    def make_optimizer(self) -> Optimizer:
        # Fused: with any other, the gradient scaler of fp16 makes the host wait in every step.
        return SGD(self.parameters(), lr=self.lr, fused=True)
