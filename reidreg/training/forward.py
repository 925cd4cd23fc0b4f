"""The losses of a batch as training computes them: in every process of a run, with one gradient."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from reidreg.distributed.gradients import (
    average_gradients,
    count_true,
    gather_output,
    gather_rows,
)
from reidreg.distributed.group import world
from reidreg.logs.step_phases import NO_LISTENER, StepListener
from reidreg.machine.devices import autocast
from reidreg.model.model import Model
from reidreg.training.objective import Objective
from reidreg.values import Batch

Losses = tuple[Tensor, dict[str, Tensor], Tensor | None]


class Network:
    """A model and its losses; with several processes gradients come out as the mean of all.

    torch's DistributedDataParallel averages them while the backward pass still computes. It has to
    know beforehand whether some parameters get none, and to look for those in every step costs
    time: the first step, in which gradients are averaged afterwards, shows it.

    Args:
        model: The model, on its device, the same in every process.
        objective: The losses.
        dtype: In which arithmetic the backbone runs.
        gathered: Whether every loss sees the batch of all processes.
        compiled: Compile the model.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        dtype: torch.dtype,
        gathered: bool = False,
        compiled: bool = False,
    ) -> None:
        called: Any = torch.compile(model) if compiled else model
        self._losses = ModelWithLosses(called, objective, dtype, gathered)
        self._parallel: DistributedDataParallel | None = None
        self._trained: list[nn.Parameter] = []

    def hear(self, phases: StepListener) -> None:
        """Have the phases of a step told to somebody."""
        self._losses.phases = phases

    def begin(self) -> None:
        """Look at which parameters are trained, which may have changed."""
        trained = [p for p in self._losses.parameters() if p.requires_grad]
        if list(map(id, trained)) != list(map(id, self._trained)):
            self._trained, self._parallel = trained, None

    def __call__(self, batch: Batch) -> Losses:
        """Compute the weighted loss, every term without its weight, and the model's logits.

        Args:
            batch: This process's share, on the device.
        """
        losses: Losses = (self._parallel or self._losses)(batch.images, batch.pids, batch.camids)
        return losses

    @contextlib.contextmanager
    def averaging(self, now: bool) -> Iterator[None]:
        """Compute the forward and backward pass of a part of a step.

        Args:
            now: Average the gradients that have come together; False adds them up here.
        """
        parallel = self._parallel
        with contextlib.nullcontext() if parallel is None or now else parallel.no_sync():
            yield
        if self._parallel is None and now and world().size > 1 and self._trained:
            self._average_afterwards()

    def _average_afterwards(self) -> None:
        """Average the first step's gradients, and leave those of all others to torch."""
        users = count_true([parameter.grad is not None for parameter in self._trained])
        average_gradients(list(itertools.compress(self._trained, users)))
        self._parallel = DistributedDataParallel(
            self._losses,
            init_sync=False,
            find_unused_parameters=min(users) < world().size,
            gradient_as_bucket_view=True,
        )


class ModelWithLosses(nn.Module):
    """Images to losses in one module.

    What DistributedDataParallel wraps returns nothing differentiable but the loss: a parameter
    that only an output leads to, and no loss, would be taken for one with a gradient.

    Args:
        model: The model.
        objective: The losses.
        dtype: In which arithmetic the backbone runs.
        gathered: Whether every loss sees the batch of all processes.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, dtype: torch.dtype, gathered: bool
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.dtype = dtype
        self.gathered = gathered
        self.phases = NO_LISTENER

    def forward(self, images: Tensor, pids: Tensor, camids: Tensor) -> Losses:
        self.phases.begin("forward")
        with autocast(images.device, self.dtype):
            output = self.model(images, camids)
        self.phases.begin("loss")
        logits = output.logits
        if self.gathered:
            output, pids = gather_output(output), gather_rows(pids)
        loss, terms = self.objective(output, pids)
        detached = {name: term.detach() for name, term in terms.items()}
        return loss, detached, None if logits is None else logits.detach()
