"""The log lines of training: what is about to be trained, and each step."""

from __future__ import annotations

from collections.abc import Mapping

from reidreg.config.sections import TRAINING_FIGURES, advice
from reidreg.data.statistics import split_statistics, statistics_table
from reidreg.logs.console import logger
from reidreg.model.model import count_parameters
from reidreg.parts.interfaces import Dataset
from reidreg.training.run import Run


def announce(run: Run) -> None:
    """Log the data, the model, the losses and the settings of a run that is about to train."""
    config, embedder = run.config, run.embedder
    for line in statistics_table(run.dataset):
        logger.info("%s", line)
    if run.validation is not run.dataset:
        logger.info("%s", describe_held_out(run.validation))
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
        run.loader.workers,
    )
    for line in advice(config):
        logger.warning("note: %s", line)


def describe_held_out(held_out: Dataset) -> str:
    """A line on the training identities that are held out for validation."""
    query, gallery = held_out.query, held_out.gallery
    ids, images, _ = split_statistics([*query, *gallery])
    return (
        f"held out of training for validation: {ids:,} identities, {images:,} images "
        f"({len(query):,} queries, {len(gallery):,} in the gallery)"
    )


def describe_step(figures: Mapping[str, float], batch: int, steps: int, epochs: int) -> str:
    """A log line of a training step.

    Args:
        figures: The meter's averages, with the epoch.
        batch: The position of the step in the epoch, from 1.
        steps: The steps of an epoch.
        epochs: The epochs of the run.
    """
    terms = " ".join(
        f"{key.removeprefix('train/')} {figures[key]:.4f}"
        for key in figures
        if key.startswith("train/") and key not in _APART
    )
    accuracy = figures.get("train/accuracy")
    shown = "" if accuracy is None else f" accuracy {accuracy:.3f}"
    return (
        f"epoch {figures['epoch']:.0f}/{epochs} step {batch}/{steps} {terms}{shown} "
        f"lr {figures['train/lr']:.3g} {figures['train/images_per_second']:.0f} images/s, "
        f"{figures['train/data_wait']:.0%} waiting for data"
    )


_APART = {f"train/{name}" for name in TRAINING_FIGURES} - {"train/loss"}
