"""Stops a run whose loss or gradient is not finite, before that reaches a file."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from reidreg.errors import DivergedError


class Guard:
    """Looks at the loss and the gradient of every step.

    On the CPU it raises before the step is made. Elsewhere to look would mean to wait for the
    device, so that the figures of the first step that is not finite are kept there, and `check`
    raises when a line is due or something is to be saved: nothing that is saved has seen them.

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
        """Look at a step, before the optimizer makes it.

        Args:
            step: Its number, from 1.
            loss: The weighted sum.
            norm: The gradient's norm, or None where a gradient scaler sees to it.
            terms: Each term of the loss without its weight.

        Raises:
            DivergedError: On the CPU, the loss or the gradient is not finite.
        """
        shown = loss if norm is None else norm
        self._names = list(terms)
        # float64 holds every step's number exactly.
        values = [value.detach().double() for value in (loss, shown, *terms.values())]
        row = torch.stack([torch.full_like(values[0], step), *values])
        if self._first is None:
            self._first = torch.zeros_like(row)
        fine = torch.isfinite(row[1:3]).all() | (self._first[0] > 0)
        self._first = torch.where(fine, self._first, row)
        if self._at_once:
            self.check()

    def check(self) -> None:
        """Raise DivergedError if a step since the beginning was not finite."""
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
