"""Parameters that are not trained in the first epochs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from reidreg.errors import ConfigError


class Freezer:
    """Freezes the parameters whose names match, for the first epochs.

    A frozen parameter gets neither a gradient nor weight decay. A module all of whose own
    parameters are frozen runs in evaluation mode: its running statistics stay as they are, and its
    dropout is off.

    Args:
        model: The model.
        patterns: Regular expressions, searched in the names of its parameters.
        epochs: The number of epochs.

    Raises:
        ConfigError: A pattern matches no parameter, or every parameter would be frozen.
    """

    def __init__(self, model: nn.Module, patterns: Sequence[str], epochs: int) -> None:
        self._model = model
        self._epochs = epochs
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in trained):
                raise ConfigError(
                    f"train.freeze: {pattern!r} matches no trained parameter; there are "
                    f"{', '.join(_examples(trained))}"
                )
        # Parameters that a part has frozen for good are not among them, and stay frozen.
        self._frozen = [
            parameter
            for name, parameter in trained.items()
            if any(re.search(pattern, name) for pattern in patterns)
        ]
        if epochs and len(self._frozen) == len(trained):
            raise ConfigError("train.freeze: every parameter is frozen, so nothing can be trained")

    def freezes(self, epoch: int) -> bool:
        """Whether anything is frozen in an epoch, from 0."""
        return bool(self._frozen) and epoch < self._epochs

    def begin(self, epoch: int) -> None:
        """Freeze or unfreeze at the beginning of an epoch, from 0, after `model.train()`."""
        frozen = self.freezes(epoch)
        for parameter in self._frozen:
            parameter.requires_grad_(not frozen)
            if frozen:
                parameter.grad = None
        if not frozen:
            return
        held = set(map(id, self._frozen))
        for module in self._model.modules():
            own = list(module.parameters(recurse=False))
            if own and all(id(p) in held or not p.requires_grad for p in own):
                module.eval()


def _examples(names: dict[str, nn.Parameter]) -> list[str]:
    """The first parameter of each top-level module, for an error message."""
    firsts: dict[str, str] = {}
    for name in names:
        firsts.setdefault(name.split(".")[0], name)
    return [*firsts.values(), "..."]
