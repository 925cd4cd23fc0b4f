"""ResNets of timm with the last stride of re-identification models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from reidreg import BACKBONES, Backbone
from reidreg_plugins.backbones.hub import load_from_hub
from reidreg_plugins.backbones.untrained import draw_weights
from reidreg_plugins.backbones.weights import check_pretrained, is_file, load_weights_file


class ResNet(Backbone):
    """A ResNet of timm without its classifier.

    Args:
        pretrained: imagenet (torchvision's V1), none, or a file of torchvision's or timm's weights.
        last_stride: Stride of the last stage; 1 gives a 16 x 8 map for a 256 x 128 image.
        stem_relu: Whether the stem has its ReLU; the published reid-strong-baseline has none.
    """

    depth: ClassVar[int]

    def __init__(
        self,
        pretrained: str = "imagenet",
        last_stride: Literal[1, 2] = 1,
        stem_relu: bool = True,
    ) -> None:
        super().__init__()
        import timm

        self.pretrained = pretrained
        net: Any = timm.create_model(f"resnet{self.depth}", num_classes=0, global_pool="")
        if last_stride == 1:
            remove_last_stride(net)
        if not stem_relu:
            net.act1 = nn.Identity()
        if pretrained == "none":
            draw_weights(net)
        self.dim = net.num_features
        self.net = net

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise ValueError for a weights file that does not exist."""
        check_pretrained(options["pretrained"])

    def forward(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        net: Any = self.net
        features: Tensor = net.forward_features(images)
        return features

    def load_pretrained(self) -> str | None:
        if self.pretrained == "none":
            return None
        if is_file(self.pretrained):
            return load_weights_file(self.net, self.pretrained)
        return load_from_hub(self.net, f"resnet{self.depth}.tv_in1k")


def remove_last_stride(net: nn.Module) -> None:
    """Give layer4 stride 1, so that its map has the size of layer3's.

    timm's `output_stride=16` would also dilate the other convolutions of the layer.
    """
    for module in net.get_submodule("layer4.0").modules():
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2):
            module.stride = (1, 1)


@BACKBONES.register("resnet18")
class ResNet18(ResNet):
    """ResNet-18 of timm (He et al., CVPR 2016)."""

    depth = 18


@BACKBONES.register("resnet34")
class ResNet34(ResNet):
    """ResNet-34 of timm (He et al., CVPR 2016)."""

    depth = 34


@BACKBONES.register("resnet50")
class ResNet50(ResNet):
    """ResNet-50 of timm (He et al., CVPR 2016)."""

    depth = 50


@BACKBONES.register("resnet101")
class ResNet101(ResNet):
    """ResNet-101 of timm (He et al., CVPR 2016)."""

    depth = 101


@BACKBONES.register("resnet152")
class ResNet152(ResNet):
    """ResNet-152 of timm (He et al., CVPR 2016)."""

    depth = 152
