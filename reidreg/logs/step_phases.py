"""Callbacks for the phases of a training step; `reidreg.training.profiling` times them."""

from __future__ import annotations

DATA = "data"  # waiting for a batch: the first phase of each step


class StepListener:
    """Called as each phase of a training step begins; this one does nothing."""

    def begin(self, phase: str) -> None:
        """End the current phase, and begin this one."""

    def end_step(self) -> None:
        """End the step, and begin to wait for the next batch."""

    def end_epoch(self) -> None:
        """End the epoch: the time until the next one belongs to no step."""

    def close(self) -> None:
        """End training."""


NO_LISTENER = StepListener()
