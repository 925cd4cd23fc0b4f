"""The images that a run trains on and the identities that it holds out, checked before training."""

from __future__ import annotations

from reidreg.config.sections import Config
from reidreg.data.holdout import HeldOut, hold_out
from reidreg.data.labels import training_samples
from reidreg.distributed.group import main_first
from reidreg.errors import DataError
from reidreg.logs.console import logger
from reidreg.parts.interfaces import DATASETS, Dataset, Evaluator
from reidreg.values import Sample


def read_training_set(config: Config) -> tuple[Dataset, list[Sample]]:
    """The data set, and those of its training images whose identities are known."""
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    with main_first():  # a data set may have to be made before it can be read
        return dataset, training_samples(dataset)


def check_splits(dataset: Dataset, evaluator: Evaluator) -> None:
    """Raise DataError now for an evaluation that could not succeed after hours of training."""
    for split in ("query", "gallery"):
        if not getattr(dataset, split):
            raise DataError(f"the {split} split holds no images, so nothing can be evaluated")
    for note in evaluator.check_ids(dataset.query, dataset.gallery):
        logger.info("note: %s", note)


def hold_out_identities(
    samples: list[Sample], config: Config, evaluator: Evaluator
) -> tuple[list[Sample], HeldOut]:
    """As `hold_out`, for an evaluation that can succeed.

    Raises:
        ConfigError: There are too few identities.
        DataError: No held-out identity has a match, or the evaluator refuses them.
    """
    across = config.evaluator.options.get("same_camera") != "keep"
    samples, held_out = hold_out(samples, config.validation, across_cameras=across)
    try:
        check_splits(held_out, evaluator)
    except DataError as error:
        raise DataError(f"validation.identities: {error}") from error
    return samples, held_out
