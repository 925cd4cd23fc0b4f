"""Stops a run whose loss or gradient is not finite, before anything is saved."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reidreg.errors import DivergedError


class DivergenceCheck:
    """Checks that the loss and the gradient of every step are finite.

    On the CPU it raises before the optimizer steps. On other devices that would make the host wait
    in every step. There the values of the first step that is not finite stay on the device, and
    `check` raises when a line is logged or a checkpoint is due, so that none is written after it.

    Args:
        device: Where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._at_once = device.type == "cpu"
        self._names: list[str] = []
        self._first: Tensor | None = None  # step, loss, norm, terms of the first bad step

    def watch(
        self, step: int, loss: Tensor, norm: Tensor | None, terms: Mapping[str, Tensor]
    ) -> None:
        """Check a step before the optimizer makes it.

        Args:
            step: Its number, from 1.
            loss: The weighted sum.
            norm: The gradient's norm, or None where a gradient scaler skips steps that are not
                finite.
            terms: Each term of the loss without its weight.

        Raises:
            DivergedError: On the CPU, the loss or the gradient is not finite.
        """
        shown = loss if norm is None else norm
        self._names = list(terms)
        # float64 represents every step number exactly.
        values = [value.detach().double() for value in (loss, shown, *terms.values())]
        row = torch.stack([torch.full_like(values[0], step), *values])
        if self._first is None:
            self._first = torch.zeros_like(row)
        fine = torch.isfinite(row[1:3]).all() | (self._first[0] > 0)
        self._first = torch.where(fine, self._first, row)
        if self._at_once:
            self.check()

    def check(self) -> None:
        """Raise DivergedError if any step so far was not finite."""
        if self._first is None:
            return
        step, loss, norm, *terms = self._first.tolist()
        if not step:
            return
        what, value = ("the gradient", norm) if math.isfinite(loss) else ("the loss", loss)
        shown = ", ".join(f"{n} {t:.4g}" for n, t in zip(self._names, terms, strict=True))
        raise DivergedError(
            f"{what} is {value} at step {step:.0f} ({shown}); nothing was saved since: lower "
            "--optimizer.lr, limit --optimizer.clip_norm, or use --train.precision fp32"
        )
