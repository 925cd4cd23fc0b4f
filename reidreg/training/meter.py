"""Averages of losses and accuracy from one log line to the next, and the speed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from reidreg.distributed.gradients import mean_over_processes
from reidreg.distributed.group import world
from reidreg.machine.gpu_memory import peak_memory
from reidreg.machine.memory import GIB

T = TypeVar("T")


class Meter:
    """Sums figures on the device, and copies them to the host when a line is logged.

    `.item()` in every step would make the host wait for the GPU.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0
        self._images = 0
        self._waited = 0.0
        self._losses: list[str] = []
        self._start = time.perf_counter()
        self.short = ""

    def resume_clock(self) -> None:
        """Restart the clock if no step was added since the last line: that time was no training."""
        if self._steps == 0:
            self._start, self._waited = time.perf_counter(), 0.0

    def watching(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield batches, and sum the seconds that the loop waits for each.

        On the host's clock: a CUDA device may be computing queued steps in that time.
        """
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    @torch.no_grad()
    def add(
        self, loss: Tensor, terms: Mapping[str, Tensor], logits: Tensor | None, pids: Tensor
    ) -> None:
        """Add a step.

        Args:
            loss: The weighted sum.
            terms: Each term without its weight.
            logits: (B, C), or None without a classifier.
            pids: (B,) labels.
        """
        figures = {"train/loss": loss, **{f"train/{name}": term for name, term in terms.items()}}
        self._losses = list(figures)
        if logits is not None:
            figures["train/accuracy"] = (logits.argmax(dim=1) == pids).float().mean()
        for key, value in figures.items():
            value = value.detach().float()
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        self._steps += 1
        self._images += len(pids)

    def take(self, lr: float, device: torch.device) -> dict[str, float]:
        """The averages since the last call, over all processes; all sums are reset.

        Args:
            lr: The current learning rate.
            device: Where training runs, for its peak memory.
        """
        sums = mean_over_processes(self._sums)
        figures = {key: value.item() / self._steps for key, value in sums.items()}
        seconds = time.perf_counter() - self._start
        figures["train/lr"] = lr
        figures["train/images_per_second"] = world().size * self._images / max(seconds, 1e-9)
        figures["train/data_wait"] = self._waited / max(seconds, 1e-9)
        peak = peak_memory(device)
        if peak is not None:
            figures["train/peak_memory_gib"] = peak / GIB
        losses = [f"{key.removeprefix('train/')} {figures[key]:.2f}" for key in self._losses]
        speed = f"{figures['train/images_per_second']:.0f} images/s"
        self.short = " ".join([*losses, speed])
        self._sums, self._steps, self._images = {}, 0, 0
        self._start, self._waited = time.perf_counter(), 0.0
        return figures

    def state_dict(self) -> dict[str, Any]:
        """The sums so far, for an exact resume between two lines."""
        sums = {key: value.cpu() for key, value in self._sums.items()}
        return {"sums": sums, "steps": self._steps, "images": self._images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load the sums of an interrupted run; its seconds were not saved."""
        self._sums = dict(state["sums"])
        self._steps, self._images = state["steps"], state["images"]
        self._start, self._waited = time.perf_counter(), 0.0
