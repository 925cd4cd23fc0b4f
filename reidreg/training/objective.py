"""The sum of weighted losses, and the optimizers that some losses bring."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from reidreg.config.sections import Config
from reidreg.data.labels import Labels
from reidreg.parts.interfaces import LOSSES, Loss
from reidreg.values import Output


class Objective(nn.Module):
    """What training minimises: named losses, each with its weight.

    Args:
        terms: The losses; those of weight 0 are left out.
        weights: Their weights.
    """

    def __init__(self, terms: dict[str, Loss], weights: dict[str, float]) -> None:
        super().__init__()
        # Prefixed, since a term's name may be that of a method of ModuleDict.
        active = {f"term_{name}": terms[name] for name in terms if weights[name] > 0}
        self.terms = nn.ModuleDict(active)
        self.weights = weights
        made = {name: loss.make_optimizer() for name, loss in self.losses()}
        self.optimizers: dict[str, Optimizer] = {n: o for n, o in made.items() if o is not None}

    def losses(self) -> Iterator[tuple[str, Loss]]:
        """The active terms by name."""
        for key, loss in self.terms.items():
            assert isinstance(loss, Loss)
            yield key.removeprefix("term_"), loss

    def forward(self, output: Output, pids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the weighted sum, and every term without its weight.

        Args:
            output: The model's output.
            pids: (B,) labels.
        """
        values = {name: over_branches(loss, output, pids) for name, loss in self.losses()}
        total = torch.stack([self.weights[name] * values[name] for name in values]).sum()
        return total, values

    def shared_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The losses' parameters that the model's optimizer steps, by name."""
        return [
            (f"{name}.{key}", parameter)
            for name, loss in self.losses()
            if name not in self.optimizers
            for key, parameter in loss.named_parameters()
        ]

    def step(self, scaler: torch.amp.GradScaler) -> None:
        """Step the losses' own optimizers, with the gradients of the unweighted losses.

        Args:
            scaler: The scaler of the backward pass; it may be disabled.
        """
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.grad.div_(self.weights[name])
            scaler.step(optimizer)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the losses' own optimizers."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none)

    def optimizer_state(self) -> dict[str, Any]:
        """The states of the losses' own optimizers by term, for a resume."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}


def over_branches(loss: Loss, output: Output, pids: Tensor) -> Tensor:
    """A loss of an output: the weighted mean over its branches, if it has any."""
    if not output.branches:
        value: Tensor = loss(output, pids)
        return value
    total = sum(weight for _, weight in output.branches)
    values = [weight * over_branches(loss, branch, pids) for branch, weight in output.branches]
    return torch.stack(values).sum() / total


def build_objective(config: Config, labels: Labels, dim: int) -> Objective:
    """The objective of a configuration.

    Args:
        config: Its `losses`.
        labels: The training identities and cameras.
        dim: The width of `Output.features`.
    """
    facts = {"num_classes": len(labels.pids), "num_cameras": len(labels.camids), "dim": dim}
    terms = {
        term: LOSSES.build(loss.name, **loss.options, **facts)
        for term, loss in config.losses.items()
        if loss.weight > 0
    }
    return Objective(terms, {term: loss.weight for term, loss in config.losses.items()})
