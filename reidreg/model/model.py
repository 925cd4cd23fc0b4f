"""The model: a backbone and a head, from images to Output."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from reidreg.config.sections import Config
from reidreg.data.labels import Labels
from reidreg.parts.interfaces import BACKBONES, HEADS, Backbone, Head
from reidreg.values import Output


class Model(nn.Module):
    """A backbone with a head.

    Args:
        backbone: Images to features, in the precision of the surrounding autocast.
        head: Features to Output, at least in float32, which pooling and distances need.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor, camids: Tensor | None = None) -> Output:
        """Compute features and logits.

        Args:
            images: (B, 3, H, W) float, normalised.
            camids: (B,) camera indices, -1 for a camera that training did not see; None for all -1.
        """
        if camids is None:
            camids = images.new_full((len(images),), -1, dtype=torch.int64)
        features = self.backbone(images, *([camids] if self.backbone.uses_camids else []))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        with torch.autocast(images.device.type, enabled=False):
            output: Output = self.head(features, *([camids] if self.head.uses_camids else []))
        return output


def build_model(config: Config, labels: Labels) -> Model:
    """Build the configured model for the identities and cameras of a training set."""
    facts = {"num_classes": len(labels.pids), "num_cameras": len(labels.camids)}
    backbone = BACKBONES.build(
        config.backbone.name,
        **config.backbone.options,
        **facts,
        input_size=tuple(config.input.size),
    )
    head = HEADS.build(config.head.name, **config.head.options, **facts, dim=backbone.dim)
    return Model(backbone, head)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """How many parameters a module has, and how many of them are trained."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)
