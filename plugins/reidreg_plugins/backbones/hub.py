"""Pretrained weights from the hub that timm uses."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from reidreg import DataError


def load_from_hub(module: nn.Module, name: str, **options: Any) -> str:
    """Download weights, or take them from the hub's cache, and load them into a module.

    Args:
        module: A timm model without classifier.
        name: timm's name of the weights, such as `resnet50.tv_in1k`.
        options: Further options that the module was created with.

    Returns:
        A line that says what was loaded.

    Raises:
        DataError: The weights are not in the cache and the hub cannot be reached.
    """
    import timm

    # The hub's client logs every retry; the error below says what matters once.
    client = logging.getLogger("huggingface_hub")
    level = client.level
    client.setLevel(logging.ERROR)
    try:
        source = timm.create_model(name, pretrained=True, num_classes=0, **options)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"backbone.pretrained: cannot download {name} ({reason}); give a local file with "
            "--backbone.pretrained FILE, or none to start from random weights"
        ) from error
    finally:
        client.setLevel(level)
    module.load_state_dict(source.state_dict())
    return f"pretrained weights: {name}"
