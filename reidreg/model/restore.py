"""From a checkpoint to a model that is ready to extract features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from reidreg.config.layers import Layer
from reidreg.config.parsing import load_config
from reidreg.config.sections import Config
from reidreg.errors import CheckpointError
from reidreg.model.checkpoint import Checkpoint, load_checkpoint
from reidreg.model.embedder import Embedder, make_embedder
from reidreg.model.feature_cache import FeatureCache
from reidreg.model.model import build_model


def open_checkpoint(
    ckpt: str | Path, *layers: Layer, flags: Sequence[str] = ()
) -> tuple[Checkpoint, Config]:
    """Load a checkpoint, and resolve its configuration with the layers and flags over it."""
    checkpoint = load_checkpoint(ckpt)
    return checkpoint, load_config(checkpoint.config, *layers, flags=flags)


def restore_embedder(checkpoint: Checkpoint, config: Config) -> Embedder:
    """The embedder of a checkpoint's model.

    Raises:
        CheckpointError: The weights do not fit the configured model.
    """
    model = build_model(config, checkpoint.labels)
    load_weights(model, checkpoint.model)
    preprocessing = checkpoint.preprocessing
    input_config = replace(
        config.input,
        mean=config.input.mean or preprocessing["mean"],
        std=config.input.std or preprocessing["std"],
    )
    return make_embedder(model, checkpoint.labels, replace(config, input=input_config))


def caching_embedder(
    checkpoint: Checkpoint, config: Config, cache: Path | None
) -> Embedder | FeatureCache:
    """The embedder of a checkpoint's model, behind a feature cache if a folder for one is given.

    Raises:
        CheckpointError: The weights do not fit the configured model.
    """
    embedder = restore_embedder(checkpoint, config)
    if cache is None:
        return embedder
    parts = {"backbone": config.backbone.as_dict(), "head": config.head.as_dict()}
    return FeatureCache(embedder, parts, cache)


def load_weights(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Load a state dict that must fit exactly.

    Raises:
        CheckpointError: It does not; the message shows the first keys with their shapes.
    """
    own = model.state_dict()
    wrong = [
        f"{key} {tuple(state[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in state and state[key].shape != own[key].shape
    ]
    wrong += [f"{key} missing" for key in own if key not in state]
    wrong += [f"{key} unknown" for key in state if key not in own]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the checkpoint does not fit the configured model: {', '.join(wrong[:3])}{more}"
        )
    model.load_state_dict(state)
