"""The phases of a step, for whoever listens; see `reidreg.training.profiling`."""

from __future__ import annotations

DATA = "data"  # the wait for a batch, with which each step begins


class Phases:
    """Is told of each phase of a step as it begins; this one does nothing with it."""

    def begin(self, phase: str) -> None:
        """End the phase under way, and begin this one."""

    def end_step(self) -> None:
        """End the step, and begin to wait for data."""

    def end_epoch(self) -> None:
        """Begin nothing: what is between two epochs is no part of a step."""

    def close(self) -> None:
        """End the training."""


UNHEARD = Phases()
