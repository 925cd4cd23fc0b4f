"""The BNNeck of reid-strong-baseline."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from reidreg import HEADS, Head, Output
from reidreg_plugins.heads.pooling import Pool, Pooling


@HEADS.register("bnneck")
class BNNeck(Head):
    """Pooling, batch normalisation between the metric losses and the classifier, a classifier.

    The normalisation's shift stays zero and the classifier has no bias, so that both kinds of loss
    see features around the same origin (Luo et al., Bag of Tricks, 2019, section 3.6).

    Args:
        pooling: How the positions of a map, or the tokens, become one feature.
        feature: Whether retrieval uses the feature after the normalisation or before it.
    """

    def __init__(
        self,
        num_classes: int,
        dim: int,
        pooling: Pooling = "avg",
        feature: Literal["after", "before"] = "after",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.feature = feature
        self.pool = Pool(pooling)
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, num_classes, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.001)

    def forward(self, features: Tensor, camids: Tensor | None = None) -> Output:
        pooled = self.pool(features)
        normalised = self.neck(pooled)
        embeddings = normalised if self.feature == "after" else pooled
        return Output(pooled, embeddings, self.classifier(normalised))
