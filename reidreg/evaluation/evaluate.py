"""Query and gallery to figures: of a model, of a checkpoint, or of files of features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reidreg.config.layers import Layer
from reidreg.config.sections import Config
from reidreg.distributed.group import broadcast, world
from reidreg.errors import DataError
from reidreg.files import replacing
from reidreg.logs.console import logger
from reidreg.model.checkpoint import Checkpoint
from reidreg.model.embedder import Embedder
from reidreg.model.feature_cache import FeatureCache
from reidreg.model.feature_files import load_features
from reidreg.model.restore import caching_embedder, open_checkpoint
from reidreg.parts.interfaces import DATASETS, EVALUATORS, Dataset, Evaluator
from reidreg.values import Embeddings


def evaluate_dataset(
    embedder: Embedder | FeatureCache, evaluator: Evaluator, dataset: Dataset
) -> tuple[dict[str, Any], Embeddings, Embeddings]:
    """The figures of a model on a data set, with the query's and the gallery's features.

    All ranks share the extraction; rank 0 computes the figures, and all return them.
    """
    query = embedder.embed(dataset.query, "query")
    gallery = embedder.embed(dataset.gallery, "gallery")
    figures = evaluator.evaluate(query, gallery) if world().is_main else {}
    return broadcast(figures), query, gallery


@dataclass(frozen=True)
class Evaluation:
    """An evaluation with its inputs, for reports.

    Args:
        figures: The figures, fractions 0..1.
        query: The query's features.
        gallery: The gallery's features.
        evaluator: The evaluator that computed the figures.
        options: Its options, `name` among them.
        about: What was evaluated, as labels with their texts.
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
        cache: The folder of a feature cache; None for none.
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
    """Evaluate a checkpoint; only its file and the data are needed.

    Args:
        ckpt: The checkpoint's file.
        layers: Overrides of its configuration, as for `load_config`.
        flags: Overrides as flags.
        output_dir: Where metrics.json goes; None writes nothing.
        cache: A folder in which features are kept for the next evaluation; None for none.

    Returns:
        The figures, fractions 0..1.
    """
    opened = open_checkpoint(ckpt, *layers, flags=flags)
    figures = evaluate_checkpoint(*opened, None if cache is None else Path(cache)).figures
    if output_dir is not None:
        write_metrics(figures, Path(output_dir) / "metrics.json")
    return figures


def evaluate_features(query: str | Path, gallery: str | Path, evaluator: Evaluator) -> Evaluation:
    """Evaluate features of any system, from files that `load_features` reads."""
    sides = load_features(query), load_features(gallery)
    about = {"Query features": str(query), "Gallery features": str(gallery)}
    return Evaluation(evaluator.evaluate(*sides), *sides, evaluator, about=about)


def write_metrics(figures: dict[str, Any], path: Path) -> None:
    """Write figures as JSON, atomically.

    Raises:
        DataError: The folder cannot be written to, or the disk is full.
    """
    try:
        with replacing(path) as file:
            file.write(f"{json.dumps(figures, indent=2)}\n".encode())
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {path} ({reason}); give another --output") from error
