"""Pooling: a feature map or tokens to one feature for each image."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Pooling = Literal["avg", "max", "gem"]


class GeM(nn.Module):
    """Generalised mean over positions, (mean x^p)^(1/p), with a learned p.

    Source: Radenović et al., Fine-tuning CNN Image Retrieval with No Human Annotation, 2018.

    Args:
        p: The initial p.
        eps: Smaller values are raised to it.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p]))
        self.eps = eps

    def forward(self, features: Tensor) -> Tensor:
        """Pool (B, C, N) to (B, C)."""
        return features.clamp(min=self.eps).pow(self.p).mean(dim=2).pow(1 / self.p)


class Pool(nn.Module):
    """One feature (B, C) from a map (B, C, h, w), or from tokens (B, N, C).

    Tokens are pooled like the positions of a map, including a class token.

    Args:
        kind: avg, max or gem.
    """

    def __init__(self, kind: Pooling) -> None:
        super().__init__()
        self.kind = kind
        self.gem = GeM() if kind == "gem" else None

    def forward(self, features: Tensor) -> Tensor:
        """Pool features of either shape."""
        # (B, C, N)
        features = features.flatten(2) if features.dim() == 4 else features.transpose(1, 2)
        if self.gem is not None:
            pooled: Tensor = self.gem(features)
            return pooled
        return features.amax(dim=2) if self.kind == "max" else features.mean(dim=2)
