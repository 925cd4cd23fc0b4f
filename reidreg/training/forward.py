"""Forward and backward passes of training, with gradients averaged over the processes of a run."""

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


class TrainingForward:
    """Computes the losses of a batch; with several processes, gradients are the mean over all.

    torch's DistributedDataParallel averages them during the backward pass. It has to be told
    whether some parameters get no gradient, because looking for those in every step costs time. So
    the first step averages its gradients afterwards, and shows which parameters have one.

    Args:
        model: The model, on its device, the same in every process.
        objective: The losses.
        dtype: The precision of the backbone's arithmetic.
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

    def set_listener(self, listener: StepListener) -> None:
        """Set the listener that is called as the phases `forward` and `loss` begin."""
        self._losses.listener = listener

    def begin(self) -> None:
        """Begin an epoch: find out which parameters are trained, since freezing may have ended."""
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
        """Run the forward and backward pass of one part of a batch inside this block.

        Args:
            now: Average the gradients accumulated so far; False only accumulates.
        """
        parallel = self._parallel
        with contextlib.nullcontext() if parallel is None or now else parallel.no_sync():
            yield
        if parallel is None and now and world().size > 1 and self._trained:
            self._average_first_step()

    def _average_first_step(self) -> None:
        """Average the first step's gradients; DistributedDataParallel does so in all others."""
        users = count_true([parameter.grad is not None for parameter in self._trained])
        average_gradients(list(itertools.compress(self._trained, users)))
        self._parallel = DistributedDataParallel(
            self._losses,
            init_sync=False,
            find_unused_parameters=min(users) < world().size,
            gradient_as_bucket_view=True,
        )


class ModelWithLosses(nn.Module):
    """From images to losses in one module, for DistributedDataParallel to wrap.

    The loss is the only differentiable value that it returns: DistributedDataParallel would expect
    gradients for all parameters behind any other one.

    Args:
        model: The model.
        objective: The losses.
        dtype: The precision of the backbone's arithmetic.
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
        self.listener = NO_LISTENER

    def forward(self, images: Tensor, pids: Tensor, camids: Tensor) -> Losses:
        self.listener.begin("forward")
        with autocast(images.device, self.dtype):
            output = self.model(images, camids)
        self.listener.begin("loss")
        logits = output.logits
        if self.gathered:
            output, pids = gather_output(output), gather_rows(pids)
        loss, terms = self.objective(output, pids)
        detached = {name: term.detach() for name, term in terms.items()}
        return loss, detached, None if logits is None else logits.detach()
