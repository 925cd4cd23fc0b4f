"""Any model of timm."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from reidreg import BACKBONES, Backbone, ReidregError
from reidreg_plugins.backbones.hub import load_from_hub
from reidreg_plugins.backbones.untrained import draw_weights, has_silent_branches
from reidreg_plugins.backbones.weights import (
    Weights,
    check_pretrained,
    is_file,
    load_weights_file,
)


@BACKBONES.register("timm")
class TimmBackbone(Backbone):
    """Any model of timm by its name, convolutional or transformer, at any input size.

    Normalisation, position embeddings and windows follow the model and `input.size`. Untrained, a
    model of ResNet's kind (also SE, RegNet) starts as the part `resnet50` does, others as in timm.

    Args:
        model: timm's name, such as convnext_tiny.fb_in22k or vit_small_patch16_224.augreg_in21k.
        pretrained: imagenet for timm's weights of that name, none, or a file.
        tokens: Which tokens of a transformer the head pools; auto is the model's default.
        drop_path: Rate of stochastic depth.
    """

    def __init__(
        self,
        model: str,
        input_size: tuple[int, int] = (256, 128),
        pretrained: str = "imagenet",
        tokens: Literal["auto", "class", "patch"] = "auto",
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        import timm

        self.model = model
        self.pretrained = pretrained
        self._options: dict[str, Any] = {"drop_path_rate": drop_path} if drop_path else {}
        sized = {**self._options, "img_size": input_size}
        try:
            # Transformers need the size; convolutional models do not accept it.
            self.net: Any = timm.create_model(model, num_classes=0, **sized)
            self._options = sized
        except TypeError:
            self.net = timm.create_model(model, num_classes=0, **self._options)
        if pretrained == "none" and has_silent_branches(self.net):
            draw_weights(self.net)  # as the parts `resnet18` and the like do
        self.dim = self.net.num_features
        self.mean = tuple(self.net.pretrained_cfg.get("mean") or self.mean)
        self.std = tuple(self.net.pretrained_cfg.get("std") or self.std)
        self._prefix = getattr(self.net, "num_prefix_tokens", 0)
        own = "class" if getattr(self.net, "global_pool", "avg") == "token" else "patch"
        self.tokens = own if tokens == "auto" else tokens
        if self.tokens == "class" and not self._prefix:
            raise ReidregError(f"backbone.tokens: {model} has no class token; use patch")

    @staticmethod
    def check(options: Mapping[str, Any]) -> None:
        """Raise ValueError for a model that timm does not have, or a missing weights file."""
        import difflib

        import timm

        name = options["model"]
        if not timm.is_model(name):
            near = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise ValueError(f"model: timm has no model {name!r}{hint}")
        check_pretrained(options["pretrained"])

    def forward(self, images: Tensor, camids: Tensor | None = None) -> Tensor:
        features: Tensor = self.net.forward_features(images)
        if features.dim() == 3:
            return features[:, :1] if self.tokens == "class" else features[:, self._prefix :]
        if features.dim() == 4 and getattr(self.net, "output_fmt", "NCHW") == "NHWC":
            return features.permute(0, 3, 1, 2)
        return features

    def load_pretrained(self) -> str | None:
        if self.pretrained == "none":
            return None
        if is_file(self.pretrained):
            return load_weights_file(self.net, self.pretrained, self._converted)
        return load_from_hub(self.net, self.model, **self._options)

    def _converted(self, weights: Weights) -> Weights:
        """Weights as timm converts them for a model: position embeddings resized, keys renamed."""
        import timm

        family = importlib.import_module(timm.model_entrypoint(self.model).__module__)
        convert: Any = getattr(family, "checkpoint_filter_fn", None)
        if convert is None:
            return weights
        with warnings.catch_warnings():
            # timm's resizing triggers warnings of torch that users can do nothing about.
            warnings.simplefilter("ignore")
            return dict(convert(weights, self.net))
