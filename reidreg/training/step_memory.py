"""The memory that one training step takes, measured without changing the run."""

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
    """What measures a step; see `reidreg.machine.gpu_memory.CudaMemory`."""

    def reset(self) -> None: ...
    def peak(self) -> int: ...
    def available(self) -> int: ...


@dataclass(frozen=True)
class StepProbe:
    """Makes single steps of noise: forward pass, losses and backward pass.

    The model is not compiled for it: that takes minutes and seldom more memory.

    Args:
        model: The model, on its device.
        objective: The losses, on the same device.
        size: Height and width of the input.
        device: Where training runs.
        dtype: The precision of the backbone's arithmetic.
        state: Bytes of optimizer state that are not allocated yet.
    """

    model: Model
    objective: Objective
    size: tuple[int, int]
    device: torch.device
    dtype: torch.dtype
    state: int

    def need(self, pids: Tensor, memory: Memory) -> int:
        """Make a step, and return the bytes that this process needs at its peak, weights included.

        Args:
            pids: (B,) labels of the batch; the images are noise.
            memory: Measures the peak.

        Raises:
            torch.OutOfMemoryError: The step does not fit.
        """
        memory.reset()
        with restoring_state(self.model, self.objective):
            self.step(pids.to(self.device))
        return memory.peak() + self.state

    def step(self, pids: Tensor) -> None:
        """Make a step of this process's images alone, without the optimizer.

        Args:
            pids: (B,) labels, on the device.
        """
        self.model.train()
        images = torch.randn(len(pids), 3, *self.size, device=self.device)
        images = images.contiguous(memory_format=torch.channels_last)
        forward = ModelWithLosses(self.model, self.objective, self.dtype, gathered=False)
        loss, _, _ = forward(images, pids, torch.zeros_like(pids))
        loss.backward()

    def estimate(self, pids: Tensor, memory: Memory) -> int | None:
        """Estimate `need` for a step that does not fit, by a line through two smaller ones.

        None where those do not fit either.
        """
        small, large = len(pids) // 8, len(pids) // 4
        if small < 2:
            return None
        try:
            below, above = (self.need(pids[:size], memory) for size in (small, large))
        except Exception:  # out of memory again, or a loss that needs more images than these
            return None
        return above + (above - below) * (len(pids) - large) // (large - small)


@contextlib.contextmanager
def restoring_state(*modules: nn.Module) -> Iterator[None]:
    """Restore modules and random generators at the end of the block.

    That is buffers such as running statistics, training modes, and the global generators.
    Gradients are set to None. Parameters are not restored: the block must not step an optimizer.
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
    """The bytes of optimizer state that are not allocated yet.

    An optimizer allocates its state in its first step. A step of the same optimizer on one small
    parameter shows how many bytes that is for each byte of parameters.
    """
    own = [p for group in optimizer.param_groups for p in group["params"]]
    held = sum(_state_bytes(optimizer.state[p]) for p in own if p in optimizer.state)
    expected = _state_share(config) * sum(p.numel() * p.element_size() for p in own)
    return max(int(expected) - held, 0)


def _state_share(config: OptimizerConfig) -> float:
    """The bytes of state for each byte of a parameter."""
    state = random_state()  # some optimizers draw random numbers
    parameter = nn.Parameter(torch.zeros(64, 64))
    parameter.grad = torch.ones_like(parameter)
    optimizer = make_optimizer(config, [("weight", parameter)])
    optimizer.step()
    set_random_state(state)
    return _state_bytes(optimizer.state[parameter]) / (parameter.numel() * parameter.element_size())


def _state_bytes(state: dict[str, object]) -> int:
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
