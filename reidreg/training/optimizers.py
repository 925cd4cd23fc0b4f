"""Optimizers with their parameter groups, and learning rates by epoch."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from reidreg.config.optimizers import optimizer_class
from reidreg.config.schedules import SCHEDULES, Schedule
from reidreg.config.sections import Config, OptimizerConfig
from reidreg.errors import ConfigError


def make_optimizer(
    config: OptimizerConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    scales: Mapping[str, float] | None = None,
) -> Optimizer:
    """The optimizer, with as few groups of parameters as its options allow.

    Args:
        config: Its options.
        parameters: Names and parameters; those that need no gradient are left out.
        scales: Factors on the learning rate by name, from `layer_scales`; others have 1.
    """
    cls = optimizer_class(config.name)
    accepted = inspect.signature(cls).parameters
    options: dict[str, Any] = {"lr": config.lr}
    if "weight_decay" in accepted:
        options["weight_decay"] = config.weight_decay
    momentum = 0.9 if config.momentum is None and config.name == "sgd" else config.momentum
    if momentum is not None:
        options["momentum"] = momentum
    if config.betas is not None:
        options["betas"] = tuple(config.betas)
    groups = parameter_groups(config, parameters, scales or {})
    # One pass over the memory instead of ten, on the CPU too. With scaled losses, a fused kernel
    # also decides on the device whether to skip a step; for others the host has to wait.
    if "fused" in accepted and groups and _runs_fused(cls, groups[0]["params"][0].device):
        options["fused"] = True
    elif "foreach" in accepted:
        options["foreach"] = True
    optimizer: Optimizer = cls(groups, **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    if isinstance(optimizer, torch.optim.SGD) and momentum:
        _begin_momentum(optimizer)
    return optimizer


def _runs_fused(cls: type[Optimizer], device: torch.device) -> bool:
    """Whether an optimizer has a fused kernel for a device; some raise only when they step."""
    parameter = nn.Parameter(torch.zeros(1, device=device))
    parameter.grad = torch.zeros_like(parameter)
    options: dict[str, Any] = {"lr": 1.0, "fused": True}
    try:
        cls([parameter], **options).step()
    except RuntimeError:
        return False
    return True


def _begin_momentum(optimizer: torch.optim.SGD) -> None:
    """Begin momentum at zero, so that the first step sets it to the gradient.

    torch allocates it in the first step. But if a scaler skips that step, the fused kernel leaves
    it uninitialised, and it fails when a parameter gets its first gradient later than others.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def parameter_groups(
    config: OptimizerConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    scales: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Group parameters by their options; those with `bias` in their name are biases."""
    bias_decay = config.bias_weight_decay
    decays = (config.weight_decay, config.weight_decay if bias_decay is None else bias_decay)
    factors = (1.0, config.bias_lr_factor)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        if parameter.requires_grad:
            is_bias = "bias" in name
            factor = factors[is_bias] * scales.get(name, 1.0)
            groups.setdefault((factor, decays[is_bias]), []).append(parameter)
    own = (1.0, config.weight_decay)  # the optimizer's own options
    return [
        {"params": members}
        if (factor, decay) == own
        else {"params": members, "lr": config.lr * factor, "weight_decay": decay}
        for (factor, decay), members in groups.items()
    ]


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Factors on the learning rate by name: decay^n for a layer with n others after it.

    The layers are those of the timm model inside the backbone, as timm numbers them; its last
    norm and all heads have the full rate (Clark et al., ELECTRA, 2020; Bao et al., BEiT, 2022).

    Args:
        model: The model.
        decay: The factor from each layer to the one before it.

    Raises:
        ConfigError: The backbone holds no timm model that knows its layers.
    """
    timm: Any = importlib.import_module("timm.models")
    for prefix, module in model.named_modules():
        matcher = getattr(module, "group_matcher", None)
        if matcher is not None:
            layers = timm.group_parameters(module, matcher(coarse=False), reverse=True)
            last = max(layers.values())
            return {f"{prefix}.{name}": decay ** (last - at) for name, at in layers.items()}
    raise ConfigError(
        "optimizer.layer_decay: this backbone has no layers that timm knows; use null"
    )


def make_schedule(config: Config) -> Schedule:
    """The schedule of a configuration."""
    options = dict(config.schedule.options)
    if "total_epochs" in options and options["total_epochs"] is None:
        options["total_epochs"] = config.train.epochs
    return SCHEDULES[config.schedule.name](**options)


def set_learning_rate(optimizer: Optimizer, factor: float) -> None:
    """Set every group to its own base rate times a factor."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
