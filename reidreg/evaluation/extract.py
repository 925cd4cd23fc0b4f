"""The features of a split or of a folder of images, by the model of a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from reidreg.config.layers import Layer
from reidreg.config.sections import Config
from reidreg.data.images import folder_samples
from reidreg.errors import ConfigError
from reidreg.model.checkpoint import Checkpoint
from reidreg.model.restore import caching_embedder, open_checkpoint, restore_embedder
from reidreg.parts.interfaces import DATASETS
from reidreg.values import Embeddings

SPLITS = ("train", "query", "gallery")


def extract(
    ckpt: str | Path,
    *layers: Layer,
    split: str | None = None,
    images: str | Path | None = None,
    flags: Sequence[str] = (),
) -> Embeddings:
    """The features of a split of the configured data set, or of a folder of images.

    Args:
        ckpt: The checkpoint's file.
        layers: Overrides of its configuration.
        split: train, query or gallery.
        images: A folder, searched with its sub-folders; pids and camids are then -1.
        flags: Overrides as flags.

    Raises:
        ConfigError: Not exactly one of split and images is given.
    """
    return extract_checkpoint(
        *open_checkpoint(ckpt, *layers, flags=flags), split=split, images=images
    )


def extract_checkpoint(
    checkpoint: Checkpoint,
    config: Config,
    *,
    split: str | None,
    images: str | Path | None,
    cache: Path | None = None,
) -> Embeddings:
    """As `extract`, of a loaded checkpoint and its resolved configuration.

    Args:
        checkpoint: The checkpoint.
        config: Its configuration, perhaps with overrides.
        split: As for `extract`.
        images: As for `extract`.
        cache: The folder of a feature cache, which is used for splits only; None for none.
    """
    if (split is None) == (images is None):
        raise ConfigError("extract: give either a split (train, query, gallery) or images DIR")
    if images is not None:
        samples = folder_samples(Path(images))
        return restore_embedder(checkpoint, config).embed(samples, str(images))
    if split not in SPLITS:
        raise ConfigError(f"extract: {split!r} is no split; it is train, query or gallery")
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    return caching_embedder(checkpoint, config, cache).embed(getattr(dataset, split), split)
