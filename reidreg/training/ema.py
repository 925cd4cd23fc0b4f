"""The exponential moving average of the weights, with which a run is evaluated."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from reidreg.model.model import Model


class WeightEMA:
    """The exponential moving average of a model's weights and running statistics.

    After each step w <- d w + (1 - d) w_model, with d = min(decay, 1 - (1 + step)^(-2/3)): the
    first steps, far from where training ends, are soon forgotten (timm's ModelEmaV3).

    Args:
        model: The model, on its device.
        decay: What d rises to, such as 0.999.
    """

    def __init__(self, model: Model, decay: float) -> None:
        from timm.utils.model_ema import ModelEmaV3

        self._ema: Any = ModelEmaV3(model, decay=decay, use_warmup=True)

    @property
    def model(self) -> Model:
        """The averaged model, in evaluation mode."""
        averaged: Model = self._ema.module
        return averaged

    def update(self, model: nn.Module, step: int) -> None:
        """Add the weights after a step, counted from 1."""
        self._ema.update(model, step=step)

    def load(self, state: dict[str, Tensor]) -> None:
        """Replace the average by these weights."""
        self.model.load_state_dict(state)
