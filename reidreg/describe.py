"""What a run says to people: lines and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reidreg.config import TRAINING_FIGURES, advice
from reidreg.data import count_workers, statistics
from reidreg.interfaces import Dataset
from reidreg.logs import logger
from reidreg.model import count_parameters
from reidreg.run import Run
from reidreg.values import Sample

FIGURES = ("mAP", "mINP", "rank1", "rank5", "rank10")


def announce(run: Run) -> None:
    """Log what is about to be trained, on what, and how."""
    config, embedder = run.config, run.embedder
    for line in statistics_table(run.dataset):
        logger.info("%s", line)
    total, trained = count_parameters(run.model)
    frozen = f", {trained:,} of them trained" if trained != total else ""
    name = f"{config.backbone.name} + {config.head.name}"
    logger.info("model: %s, %s parameters%s", name, f"{total:,}", frozen)
    terms = [f"{loss.weight:g} x {term}" for term, loss in config.losses.items() if loss.weight]
    logger.info("loss: %s", " + ".join(terms))
    height, width = embedder.input.size
    logger.info(
        "training: %d epochs of %d steps, input %d x %d, %s on %s, %d loading processes",
        config.train.epochs,
        len(run.sampler),
        height,
        width,
        str(embedder.dtype).removeprefix("torch."),
        embedder.device,
        count_workers(config.train.workers),
    )
    for line in advice(config):
        logger.warning("note: %s", line)


def statistics_table(dataset: Dataset) -> list[str]:
    """Identities, images and cameras of each split, with the folders and notes of the data set."""
    folders = dataset.folders()
    lines = [f"{split} folder: {folder}" for split, folder in folders.items()]
    rule = "-" * 42
    lines += [rule, "subset   |   # ids |  # images | # cameras", rule]
    for split in ("train", "query", "gallery"):
        samples: Sequence[Sample] = getattr(dataset, split)
        ids, images, cameras = statistics(samples)
        lines.append(f"{split:<8} | {ids:>7,} | {images:>9,} | {cameras:>9,}")
    return [*lines, rule, *(f"note: {note}" for note in dataset.notes())]


def describe_step(figures: Mapping[str, float], batch: int, steps: int, epochs: int) -> str:
    """A log line of training."""
    terms = " ".join(
        f"{key.removeprefix('train/')} {figures[key]:.4f}"
        for key in figures
        if key.startswith("train/") and key not in _APART
    )
    accuracy = figures.get("train/accuracy")
    shown = "" if accuracy is None else f" accuracy {accuracy:.3f}"
    return (
        f"epoch {figures['epoch']:.0f}/{epochs} step {batch}/{steps} {terms}{shown} "
        f"lr {figures['train/lr']:.3g} {figures['train/images_per_second']:.0f} images/s"
    )


_APART = {f"train/{name}" for name in TRAINING_FIGURES} - {"train/loss"}


def describe_evaluation(figures: Mapping[str, Any], epoch: int) -> str:
    """A log line of an evaluation during training."""
    when = f"after epoch {epoch}" if epoch else "before training"
    return f"evaluation {when}: {_in_words(figures)}" + (
        f"; re-ranked {_in_words(figures['reranked'])}" if "reranked" in figures else ""
    )


def _in_words(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {figures[key]:.2%}" for key in FIGURES if key in figures)


def validation_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """An evaluation's figures under the keys of metrics.jsonl and W&B."""
    blocks = {"val/": figures}
    if "reranked" in figures:
        blocks["val/reranked/"] = figures["reranked"]
    return {
        f"{prefix}{key}": block[key]
        for prefix, block in blocks.items()
        for key in FIGURES
        if key in block
    }


def evaluation_table(figures: Mapping[str, Any]) -> list[str]:
    """An evaluation's figures as a table, raw and post-processed side by side."""
    columns = {"": figures, **{k: v for k, v in figures.items() if isinstance(v, Mapping)}}
    lines = ["figure  " + "".join(f"{name or 'raw':>12}" for name in columns)]
    for key in FIGURES:
        if key in figures:
            lines.append(
                f"{key:<8}" + "".join(f"{block[key]:>12.2%}" for block in columns.values())
            )
    skipped = figures["num_queries"] - figures["num_valid_queries"]
    lines.append(
        f"{figures['num_valid_queries']:,} of {figures['num_queries']:,} queries against "
        f"{figures['num_gallery']:,} gallery images"
        + (f"; {skipped:,} queries have no match and are not counted" if skipped else "")
    )
    return lines
