"""Pooling and a plain classifier."""

from __future__ import annotations

from torch import Tensor, nn

from reidreg import HEADS, Head, Output
from reidreg_plugins.heads.pooling import Pool, Pooling


@HEADS.register("linear")
class LinearHead(Head):
    """Pooling and a linear classifier; retrieval uses the pooled feature.

    Args:
        pooling: How the positions of a map, or the tokens, become one feature.
    """

    def __init__(self, num_classes: int, dim: int, pooling: Pooling = "avg") -> None:
        super().__init__()
        self.dim = dim
        self.pool = Pool(pooling)
        self.classifier = nn.Linear(dim, num_classes)

    def forward(self, features: Tensor, camids: Tensor | None = None) -> Output:
        pooled = self.pool(features)
        return Output(pooled, pooled, self.classifier(pooled))
