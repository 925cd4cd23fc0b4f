"""One step of training as a trial: what memory it takes, with nothing left behind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reidreg.config.sections import OptimizerConfig
from reidreg.distributed.random_state import random_state, set_random_state
from reidreg.model.model import Model
from reidreg.training.forward import ModelWithLosses
from reidreg.training.objective import Objective
from reidreg.training.optimizers import make_optimizer


class Memory(Protocol):
    """The memory that a trial is measured by; see `reidreg.machine.gpu_memory.CudaMemory`."""

    def reset(self) -> None: ...
    def peak(self) -> int: ...
    def available(self) -> int: ...


@dataclass(frozen=True)
class Trial:
    """What a step needs: forward, loss, backward, and room for what the optimizer will keep.

    The model is tried as it is, not compiled, which takes minutes and seldom more memory.

    Args:
        model: The model, on its device.
        objective: The loss, on the same device.
        size: Height and width of the input.
        device: Where training runs.
        dtype: In which arithmetic.
        state: Bytes that the optimizer's state will take and does not take yet.
    """

    model: Model
    objective: Objective
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    state: int

    def need(self, pids: Tensor, memory: Memory) -> int:
        """The bytes that this process holds at the peak of a step, weights and all.

        Args:
            pids: (B,) labels of the batch; the images are noise.
            memory: What is measured by.

        Raises:
            torch.OutOfMemoryError: There are not as many.
        """
        memory.reset()
        with undisturbed(self.model, self.objective):
            self._step(pids.to(self.device))
        return memory.peak() + self.state

    def _step(self, pids: Tensor) -> None:
        self.model.train()
        images = torch.randn(len(pids), 3, *self.size, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        # With this process's images alone, also where losses see the batch of all processes.
        step = ModelWithLosses(self.model, self.objective, self.dtype, gathered=False)
        loss, _, _ = step(images, pids, torch.zeros_like(pids))
        loss.backward()

    def reckon(self, pids: Tensor, memory: Memory) -> int | None:
        """What `need` would be where a whole step cannot be made: a line through two smaller ones.

        None where those cannot be made either.
        """
        small, large = len(pids) // 8, len(pids) // 4
        if small < 2:
            return None
        try:
            below, above = (self.need(pids[:size], memory) for size in (small, large))
        except Exception:  # out of memory again, or a loss that wants more images than these
            return None
        return above + (above - below) * (len(pids) - large) // (large - small)


@contextlib.contextmanager
def undisturbed(*modules: nn.Module) -> Iterator[None]:
    """Leave modules as they were, but for what steps of an optimizer change, and all randomness.

    Kept are buffers such as the statistics of batch normalisation, the modes, and the states of
    the global generators; gradients are forgotten.
    """
    buffers = [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    state = random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, kept in buffers:
                buffer.copy_(kept)
        for part, training in modes:
            part.training = training
        for module in modules:
            for parameter in module.parameters():
                parameter.grad = None
        set_random_state(state)


def missing_state(optimizer: Optimizer, config: OptimizerConfig) -> int:
    """The bytes that an optimizer's state will take and does not take yet.

    An optimizer makes its state in its first step. How much that is for a byte of parameters shows
    on one small parameter, without a word of how the optimizer works.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    held = sum(_state_bytes(optimizer.state[p]) for p in own if p in optimizer.state)
    expected = _state_share(config) * sum(p.numel() * p.element_size() for p in own)
    return max(int(expected) - held, 0)


def _state_share(config: OptimizerConfig) -> float:
    state = random_state()  # some optimizers draw noise
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.ones_like(parameter)
    twin = make_optimizer(config, [("weight", parameter)])
    twin.step()
    set_random_state(state)
    return _state_bytes(twin.state[parameter]) / (parameter.numel() * parameter.element_size())


def _state_bytes(state: dict[str, object]) -> int:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
