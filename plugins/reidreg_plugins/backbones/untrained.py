"""How a network begins that no pretrained weights are loaded into."""

from __future__ import annotations

from torch import nn


def draw_weights(net: nn.Module) -> None:
    """Draw the weights of a network's convolutions and set its batch normalisations to identity.

    A weight is uniform in +-1/sqrt(fan-in), torch's default and the reference system's start; every
    gain is one. timm starts the last gain of each residual branch at zero, which suits hundreds of
    epochs of large batches (Goyal et al., Accurate, Large Minibatch SGD, 2017): in the few thousand
    steps of re-identification the branches then hardly take part. Its weights are also larger, and
    under normalisation a larger weight is one that the same learning rate changes less. See
    `benchmarks/README.md` for what each of the two costs.

    Args:
        net: Any network; modules of other kinds keep what they have.
    """
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            module.reset_parameters()


def has_silent_branches(net: nn.Module) -> bool:
    """Whether a batch normalisation of the network starts with a gain of zero."""
    norms = (module for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    return any(norm.affine and not norm.weight.any() for norm in norms)
