"""Callbacks for the phases of a training step; `reidreg.training.profiling` implements them."""

from __future__ import annotations

DATA = "data"  # waiting for a batch: the first phase of each step


class StepListener:
    """Is called at each phase of a training step; this base class does nothing."""

    def begin(self, phase: str) -> None:
        """End the current phase, and begin this one."""

    def end_step(self) -> None:
        """End the step, and begin to wait for data."""

    def end_epoch(self) -> None:
        """End the current phase without beginning another: epochs have pauses between them."""

    def close(self) -> None:
        """End the training."""


NO_LISTENER = StepListener()
