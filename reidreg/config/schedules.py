"""Learning rate schedules: pure functions of the epoch, so that a resume needs no state.

Chosen by `schedule.name`; a schedule's fields are its options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from annotated_types import Ge, Interval

Warmup = Literal["linear", "constant"]


class Schedule(Protocol):
    """Gives the factor by which the base learning rate is multiplied."""

    def factor(self, epoch: int) -> float:
        """The factor for an epoch, counted from 1."""


def warmup(epoch: int, epochs: int, factor: float, method: Warmup) -> float:
    """The factor on the learning rate during warm-up.

    Args:
        epoch: From 1.
        epochs: W, the length of the warm-up; the full rate is reached in epoch W.
        factor: f, the factor that it starts from.
        method: linear, f (1 - e/W) + e/W, or constant, f.

    Returns:
        A number in (0, 1]; 1 from epoch W on.
    """
    if epoch >= epochs:
        return 1.0
    if method == "constant":
        return factor
    return factor * (1 - epoch / epochs) + epoch / epochs


@dataclass(frozen=True)
class MultiStep:
    """Decay by a factor at given epochs, after a warm-up (reid-strong-baseline's schedule).

    Args:
        milestones: Increasing epochs, from 1, from which on the rate is multiplied by gamma.
        gamma: The factor at each milestone.
        warmup_epochs: Epochs of warm-up; 0 for none.
        warmup_factor: Share of the rate that warm-up starts from.
        warmup_method: linear or constant.
    """

    milestones: tuple[Annotated[int, Ge(1)], ...] = (40, 70)
    gamma: Annotated[float, Interval(gt=0, le=1)] = 0.1
    warmup_epochs: Annotated[int, Ge(0)] = 10
    warmup_factor: Annotated[float, Interval(gt=0, le=1)] = 0.01
    warmup_method: Warmup = "linear"

    @staticmethod
    def check(options: dict[str, Any]) -> None:
        """Raise ValueError unless the milestones increase."""
        milestones = list(options["milestones"])
        if milestones != sorted(set(milestones)):
            raise ValueError(f"milestones: {milestones} are not increasing")

    def factor(self, epoch: int) -> float:
        decays = sum(epoch >= milestone for milestone in self.milestones)
        start = warmup(epoch, self.warmup_epochs, self.warmup_factor, self.warmup_method)
        return float(start * self.gamma**decays)


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from the full rate, at the end of the warm-up, to the final one.

    The rate of the last epoch is one step above the final factor, so that no epoch is lost to a
    rate of zero (Loshchilov and Hutter, SGDR, 2017, without restarts).

    Args:
        total_epochs: The run's epochs; the framework fills in `train.epochs` if left out.
        final_factor: Share of the rate that the cosine ends at.
        warmup_epochs: Epochs of warm-up; 0 for none.
        warmup_factor: Share of the rate that warm-up starts from.
        warmup_method: linear or constant.
    """

    total_epochs: Annotated[int, Ge(1)] | None = None
    final_factor: Annotated[float, Interval(ge=0, le=1)] = 0.0
    warmup_epochs: Annotated[int, Ge(0)] = 10
    warmup_factor: Annotated[float, Interval(gt=0, le=1)] = 0.01
    warmup_method: Warmup = "linear"

    def factor(self, epoch: int) -> float:
        if epoch < self.warmup_epochs:
            return warmup(epoch, self.warmup_epochs, self.warmup_factor, self.warmup_method)
        begin = max(self.warmup_epochs, 1)
        steps = max((self.total_epochs or begin) + 1 - begin, 1)
        progress = min((epoch - begin) / steps, 1.0)
        cosine = (1 + math.cos(math.pi * progress)) / 2
        return self.final_factor + (1 - self.final_factor) * cosine


SCHEDULES: dict[str, type[Schedule]] = {"multistep": MultiStep, "cosine": Cosine}
