"""Circle loss."""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt, Interval
from torch import Tensor
from torch.nn.functional import normalize, softplus

from reidreg import LOSSES, Loss, Output


@LOSSES.register("circle")
class Circle(Loss):
    """Circle loss over all pairs of a batch (Sun et al., CVPR 2020, equation 6).

    On cosine similarities of the features before the neck; each pair is weighted by its distance
    from the optimum.

    Args:
        margin: The relaxation m; similar pairs should be above 1 - m, others below m.
        gamma: The scale of the similarities.
    """

    def __init__(
        self,
        margin: Annotated[float, Interval(ge=0, lt=1)] = 0.25,
        gamma: Annotated[float, Gt(0)] = 64.0,
    ) -> None:
        super().__init__()
        self.margin = margin
        self.gamma = gamma

    def forward(self, output: Output, pids: Tensor) -> Tensor:
        features = normalize(output.features.float())
        similarity = features @ features.T
        same = pids[:, None] == pids[None, :]
        itself = torch.eye(len(pids), dtype=torch.bool, device=pids.device)
        alike = (1 + self.margin - similarity.detach()).relu()
        unlike = (similarity.detach() + self.margin).relu()
        positive = -self.gamma * alike * (similarity - 1 + self.margin)
        negative = self.gamma * unlike * (similarity - self.margin)
        pull = positive.masked_fill(~same | itself, float("-inf")).logsumexp(dim=1)
        push = negative.masked_fill(same, float("-inf")).logsumexp(dim=1)
        # An image without positives or without negatives adds nothing.
        return softplus(pull + push).mean()
