"""Batch normalisation over the batches of all processes.

torch has one for CUDA tensors. On the CPU the same is computed here, by the formulas of Ioffe and
Szegedy, Batch Normalization, 2015, section 3, over the union of the processes' batches.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

from reidreg.distributed.group import stack_over_processes, world
from reidreg.errors import ConfigError


class SynchronisedBatchNorm(_BatchNorm):
    """Batch normalisation of CPU tensors over the batches of all processes."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected (B, C, ...), got {input.dim()} dimensions")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world().size == 1:
            return super().forward(input)
        self._check_input_dim(input)
        normalised, mean, variance, count = _Normalise.apply(
            input, self.weight, self.bias, self.eps
        )
        if self.track_running_stats:
            self._track(mean, variance * (count / (count - 1).clamp(min=1)))
        result: Tensor = normalised
        return result

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of a batch, as torch does."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        share = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, share)
        self.running_var.lerp_(variance, share)


class _SynchronisedBatchNormAct(SynchronisedBatchNorm):
    """As timm's BatchNormAct2d: a dropout and an activation behind the normalisation.

    Args:
        norm: The layer that it stands for.
    """

    def __init__(self, norm: Any) -> None:
        super().__init__(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
        self.drop, self.act = norm.drop, norm.act

    def forward(self, input: Tensor) -> Tensor:
        result: Tensor = self.act(self.drop(super().forward(input)))
        return result


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the batches of all processes.

    The variances of the processes' own batches, around their own means, are combined into that of
    all rows (Chan et al., 1979): a difference of large sums would lose digits.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = [d for d in range(rows.dim()) if d != 1]
        exact = rows.float()
        count = exact.new_tensor([rows.numel() / rows.shape[1]])
        variances, means = torch.var_mean(exact, dims, correction=0)
        own = torch.cat([means, variances, count])
        found = stack_over_processes(own)
        width = rows.shape[1]
        means, variances, counts = found[:, :width], found[:, width:-1], found[:, -1:]
        total = counts.sum()
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        ctx.save_for_backward(rows, weight, mean, (variance + eps).rsqrt(), total)
        normalised = batch_norm(rows, mean, variance, weight, bias, training=False, eps=eps)
        ctx.mark_non_differentiable(mean, variance, total)
        return normalised, mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows, weight, mean, scale, total = ctx.saved_tensors
        gradient = gradients[0].float()
        dims = [d for d in range(rows.dim()) if d != 1]
        shape = [1, -1, *[1] * (rows.dim() - 2)]
        centred = rows.float() - mean.view(shape)
        bias_gradient = gradient.sum(dims)
        weight_gradient = (gradient * centred).sum(dims) * scale
        # Those of the parameters stay this process's own: they are averaged with all others.
        sums = torch.stack([bias_gradient, weight_gradient])
        dist.all_reduce(sums)
        along, across = sums[0] / total, sums[1] / total * scale
        factor = scale if weight is None else scale * weight
        rows_gradient = gradient - along.view(shape) - centred * across.view(shape)
        return (
            (rows_gradient * factor.view(shape)).to(rows.dtype),
            None if weight is None else weight_gradient,
            None if weight is None else bias_gradient,
            None,
        )


def synchronise_batchnorm(module: nn.Module, device: torch.device) -> nn.Module:
    """Replace every batch normalisation by one over all processes; parameters and names stay.

    Args:
        module: A module, which is changed.
        device: Where it runs.

    Returns:
        The module, or what stands for it if it is a batch normalisation itself.

    Raises:
        ConfigError: It holds a kind of batch normalisation that is not known here.
    """
    if device.type == "cuda":
        layers: Any = importlib.import_module("timm.layers")  # knows timm's own kinds too
        converted: nn.Module = layers.convert_sync_batchnorm(module)
        return converted
    if isinstance(module, _BatchNorm):
        return _synchronised(module)
    for name, child in module.named_children():
        setattr(module, name, synchronise_batchnorm(child, device))
    return module


def _synchronised(norm: _BatchNorm) -> SynchronisedBatchNorm:
    new: SynchronisedBatchNorm
    if hasattr(norm, "drop") and hasattr(norm, "act"):
        new = _SynchronisedBatchNormAct(norm)
    elif type(norm) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        new = SynchronisedBatchNorm(
            norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats
        )
    else:
        raise ConfigError(
            f"train.sync_batchnorm: {type(norm).__name__} cannot be synchronised; set it to false"
        )
    for name, parameter in norm._parameters.items():
        new.register_parameter(name, parameter)
    for name, buffer in norm._buffers.items():
        new.register_buffer(name, buffer)
    new.train(norm.training)
    return new
