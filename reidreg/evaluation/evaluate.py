"""Features of a split, and the figures that follow from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reidreg.config.parsing import Layer
from reidreg.config.sections import Config
from reidreg.distributed.group import broadcast, world
from reidreg.errors import ConfigError, DataError
from reidreg.files import replacing
from reidreg.logs.console import logger
from reidreg.model.checkpoint import Checkpoint
from reidreg.model.embedder import Embedder
from reidreg.model.feature_cache import FeatureCache
from reidreg.model.feature_files import load_features
from reidreg.model.restore import open_checkpoint, restore_embedder
from reidreg.parts.interfaces import DATASETS, EVALUATORS, Dataset, Evaluator
from reidreg.values import Embeddings, Sample

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


def evaluate_dataset(
    embedder: Embedder | FeatureCache, evaluator: Evaluator, dataset: Dataset
) -> tuple[dict[str, Any], Embeddings, Embeddings]:
    """The figures of a model on a data set, with the query's and the gallery's features.

    Several processes share the extraction; the first computes the figures, and all return them.
    """
    query = embedder.embed(dataset.query, "query")
    gallery = embedder.embed(dataset.gallery, "gallery")
    figures = evaluator.evaluate(query, gallery) if world().is_main else {}
    return broadcast(figures), query, gallery


# --------------------------------------------------------------------- from a checkpoint


def caching_embedder(
    checkpoint: Checkpoint, config: Config, cache: Path | None
) -> Embedder | FeatureCache:
    """The embedder of a checkpoint, before which stands a folder of kept features if one is given.

    Raises:
        CheckpointError: The weights do not fit the configured model.
    """
    embedder = restore_embedder(checkpoint, config)
    if cache is None:
        return embedder
    parts = {"backbone": config.backbone.as_dict(), "head": config.head.as_dict()}
    return FeatureCache(embedder, parts, cache)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation with what it was made from, for reports.

    Args:
        figures: The figures, fractions 0..1.
        query: The query's features.
        gallery: The gallery's features.
        evaluator: What ranked them.
        options: The evaluator's options, `name` among them.
        about: What was evaluated, for people: label to text.
    """

    figures: dict[str, Any]
    query: Embeddings
    gallery: Embeddings
    evaluator: Evaluator
    options: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


def evaluate_checkpoint(
    checkpoint: Checkpoint, config: Config, cache: Path | None = None
) -> Evaluation:
    """Evaluate a checkpoint on the data set of a configuration.

    Args:
        checkpoint: The checkpoint.
        config: Its configuration, perhaps with overrides.
        cache: The folder of kept features; None extracts anew and keeps nothing.
    """
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    evaluator = EVALUATORS.build(config.evaluator.name, **config.evaluator.options)
    for note in evaluator.check_ids(dataset.query, dataset.gallery):
        logger.info("note: %s", note)
    embedder = caching_embedder(checkpoint, config, cache)
    figures, query, gallery = evaluate_dataset(embedder, evaluator, dataset)
    options = {"name": config.evaluator.name, **config.evaluator.options}
    return Evaluation(figures, query, gallery, evaluator, options, _about(checkpoint, config))


def _about(checkpoint: Checkpoint, config: Config) -> dict[str, str]:
    height, width = config.input.size
    root = config.dataset.options.get("root")
    return {
        "Data set": config.dataset.name,
        **({"Root": str(root)} if root else {}),
        "Model": f"{config.backbone.name} + {config.head.name}, input {height} x {width}, "
        f"after {checkpoint.epoch} epochs",
    }


def evaluate(
    ckpt: str | Path,
    *layers: Layer,
    flags: Sequence[str] = (),
    output_dir: str | Path | None = None,
    cache: str | Path | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint; it needs nothing but the file and the data.

    Args:
        ckpt: The checkpoint's file.
        layers: Overrides of its configuration, as for `load_config`.
        flags: Overrides as flags.
        output_dir: Where metrics.json goes; None writes nothing.
        cache: A folder of features, which are kept for the next evaluation; None keeps nothing.

    Returns:
        The figures, fractions 0..1.
    """
    opened = open_checkpoint(ckpt, *layers, flags=flags)
    figures = evaluate_checkpoint(*opened, None if cache is None else Path(cache)).figures
    if output_dir is not None:
        write_metrics(figures, Path(output_dir) / "metrics.json")
    return figures


def run_folder_of(ckpt: Path) -> Path:
    """The folder of the run that a checkpoint belongs to, by where the file lies."""
    ckpt = ckpt.expanduser()
    return ckpt.parent.parent if ckpt.parent.name == "checkpoints" else ckpt.parent


def cache_folder_of(ckpt: Path) -> Path:
    """Where the features of a checkpoint are kept: beside it, whatever the output is."""
    return run_folder_of(ckpt) / "feature_cache"


def evaluate_features(query: str | Path, gallery: str | Path, evaluator: Evaluator) -> Evaluation:
    """Evaluate features of any system, in files as `load_features` reads them."""
    sides = load_features(query), load_features(gallery)
    about = {"Query features": str(query), "Gallery features": str(gallery)}
    return Evaluation(evaluator.evaluate(*sides), *sides, evaluator, about=about)


def write_metrics(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON; a reader never sees half a file.

    Raises:
        DataError: The folder cannot be written to, or the disk is full.
    """
    try:
        with replacing(path) as file:
            file.write(f"{json.dumps(figures, indent=2)}\n".encode())
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {path} ({reason}); give another --output") from error


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
    """As `extract`, of a checkpoint that is read and a configuration that is resolved.

    The features of a split, not those of a folder, may come from `cache`, and are kept there.
    """
    if (split is None) == (images is None):
        raise ConfigError("extract: give either a split (train, query, gallery) or images DIR")
    if images is not None:
        samples = folder_samples(Path(images))
        return restore_embedder(checkpoint, config).embed(samples, str(images))
    if split not in ("train", "query", "gallery"):
        raise ConfigError(f"extract: {split!r} is no split; it is train, query or gallery")
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    return caching_embedder(checkpoint, config, cache).embed(getattr(dataset, split), split)


def folder_samples(folder: Path) -> list[Sample]:
    """Every image below a folder, sorted; pid and camid are not known and stand as -1."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Sample(str(path), -1, -1) for path in paths]
