"""Optimizers by name, from torch.optim and timm.optim, and learning rates by epoch."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from reidreg.config import Config, OptimizerConfig
from reidreg.errors import ConfigError, did_you_mean
from reidreg.schedules import SCHEDULES, Schedule

# They need what the loop does not give: a closure, sparse or second gradients, matrices alone.
_UNSUITED = {"lbfgs", "sparseadam", "adahessian", "muon", "optimizer"}
# These of timm's are other libraries', which it does not bring along.
_FOREIGN = ("bnb", "fused")


@functools.lru_cache(maxsize=1)
def torch_optimizers() -> dict[str, type[Optimizer]]:
    """torch.optim's optimizers by lower-case name."""
    found = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, Optimizer)
    }
    return {name: cls for name, cls in found.items() if name not in _UNSUITED}


def optimizer_class(name: str) -> type[Optimizer]:
    """The class of an optimizer's name; torch's where torch has it, else timm's.

    Raises:
        ConfigError: Neither has it.
    """
    known = torch_optimizers()
    if name in known:
        return known[name]
    timm: Any = importlib.import_module("timm.optim")
    others = [
        other
        for other in timm.list_optimizers()
        if other not in _UNSUITED and not other.startswith(_FOREIGN)
    ]
    if name in others:
        cls: type[Optimizer] = timm.get_optimizer_class(name, bind_defaults=False)
        return cls
    raise ConfigError(
        f"optimizer.name: no optimizer {name!r}{did_you_mean(name, [*known, *others])}"
    )


def check_optimizer(config: OptimizerConfig) -> None:
    """Raise ConfigError for an unknown optimizer, or an option that it does not have."""
    accepted = inspect.signature(optimizer_class(config.name)).parameters
    for option in ("momentum", "betas"):
        if getattr(config, option) is not None and option not in accepted:
            raise ConfigError(f"optimizer.{option}: {config.name} has no {option}; leave it out")
    if "weight_decay" not in accepted and (config.weight_decay or config.bias_weight_decay):
        raise ConfigError(f"optimizer.weight_decay: {config.name} has no weight decay; set it to 0")


def make_optimizer(
    config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> Optimizer:
    """The optimizer, with one group of parameters, or two where biases differ.

    Args:
        config: Its options.
        parameters: Names and parameters; those that need no gradient are left out.
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
    if "foreach" in accepted:
        # One kernel for many tensors; a parameter at a time costs a launch each.
        options["foreach"] = True
    optimizer: Optimizer = cls(parameter_groups(config, parameters), **options)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(
    config: OptimizerConfig, parameters: Iterable[tuple[str, nn.Parameter]]
) -> list[dict[str, Any]]:
    """As few groups as the options allow; a bias is a parameter with `bias` in its name."""
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    decay = config.weight_decay if config.bias_weight_decay is None else config.bias_weight_decay
    if config.bias_lr_factor == 1 and decay == config.weight_decay:
        return [{"params": [parameter for _, parameter in trained]}]
    weights = [parameter for name, parameter in trained if "bias" not in name]
    biases = [parameter for name, parameter in trained if "bias" in name]
    lr = config.lr * config.bias_lr_factor
    groups: list[dict[str, Any]] = [
        {"params": weights},
        {"params": biases, "lr": lr, "weight_decay": decay},
    ]
    return [group for group in groups if group["params"]]


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
