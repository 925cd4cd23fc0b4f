"""The initial weights of a network without pretrained ones."""

from __future__ import annotations

from torch import nn


def draw_weights(net: nn.Module) -> None:
    """Initialise the convolutions of a network at random, and its batch normalisations as identity.

    Weights are uniform in +-1/sqrt(fan-in), torch's default, as in reid-strong-baseline; every gain
    is one. timm sets the last gain of each residual branch to zero, which suits hundreds of epochs
    of large batches (Goyal et al., Accurate, Large Minibatch SGD, 2017): in the few thousand steps
    of re-identification the branches then contribute little. Its weights are also larger, and under
    normalisation the same learning rate changes larger weights less. `benchmarks/README.md` has the
    cost of each.

    Args:
        net: Any network; other modules keep their weights.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()


def has_silent_branches(net: nn.Module) -> bool:
    """Whether a batch normalisation of the network starts with a gain of zero."""
    norms = (module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    return any(norm.affine and not norm.weight.any() for norm in norms)
