"""Tensors that the ranks exchange in a training step: gradients, outputs, losses, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from reidreg.distributed.group import stack_over_processes, world
from reidreg.values import Output


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of parameters over all ranks, in one all-reduce.

    A rank in which a parameter has no gradient counts as one with zeros.
    """
    size = world().size
    if size == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat.div_(size))
    for parameter, mean in zip(
        parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True
    ):
        # In the parameter's memory format: fused optimizers index both alike, and on a GPU raise
        # an error where the formats differ.
        parameter.grad = torch.empty_like(parameter).copy_(mean.view_as(parameter))


def count_true(flags: Sequence[bool]) -> list[int]:
    """For each of several flags, the number of ranks in which it is set."""
    counts = torch.tensor(flags, dtype=torch.int64)
    if world().size > 1:
        dist.all_reduce(counts)
    found: list[int] = counts.tolist()
    return found


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of named scalars over all ranks; every rank has to give the same names."""
    if world().size == 1 or not values:
        return dict(values)
    flat = torch.stack(list(values.values())) / world().size
    dist.all_reduce(flat)
    return dict(zip(values, flat.unbind(), strict=True))


class _Gather(torch.autograd.Function):
    """Rows of all ranks, (B, ...) to (W B, ...), for a loss that each rank computes from all.

    Each rank computes the same loss from the same rows, so it has the gradient of its own rows
    already, and none is sent. It is multiplied by the world size W: `average_gradients` divides by
    W later, and what is needed is the sum over ranks.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank = world().rank
        ctx.own = slice(rank * len(rows), (rank + 1) * len(rows))
        return stack_over_processes(rows).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.own] * world().size


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks in order, (W B, ...), differentiable; B is the same in each rank."""
    if world().size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def gather_output(output: Output) -> Output:
    """The output for the batches of all ranks, as a single process would compute it."""
    if world().size == 1:
        return output
    return Output(
        features=gather_rows(output.features),
        embeddings=gather_rows(output.embeddings),
        logits=None if output.logits is None else gather_rows(output.logits),
        branches=tuple((gather_output(branch), weight) for branch, weight in output.branches),
    )
