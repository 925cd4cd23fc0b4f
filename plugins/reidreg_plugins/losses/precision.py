"""The precision of losses."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(values: Tensor) -> Tensor:
    """Half-precision values as float32, in which sums over a batch are precise enough."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
