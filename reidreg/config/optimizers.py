"""Optimizers of torch.optim and timm.optim by name, and the options that each has."""

from __future__ import annotations

import functools
import importlib
import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from reidreg.config.sections import OptimizerConfig
from reidreg.errors import ConfigError, did_you_mean

# These need what the training loop does not provide: a closure, sparse gradients, second-order
# gradients, or parameters that are all matrices.
_UNSUITED = {"lbfgs", "sparseadam", "adahessian", "muon", "optimizer"}

# Prefixes of those of timm's that need other libraries, which timm does not install.
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
    """The optimizer class of a name: torch's if torch has it, else timm's.

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
