"""The threshold that is stored with a model: from which cosine on two images show one person.

It lies among the figures of the last evaluation with `verification`, `fit`'s own or a later one's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reidreg.config.parsing import load_config
from reidreg.config.sections import Config
from reidreg.errors import CheckpointError, ConfigError
from reidreg.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

_FEATURES = ("input", "backbone", "head")  # the sections that features depend on


def stored_threshold(checkpoint: Checkpoint) -> float | None:
    """The cosine from which on two images show the same person, or None if none is known.

    A threshold for squared distances is none for the unit vectors that a model is used for.
    """
    verification = checkpoint.metrics.get("verification", {})
    if verification.get("metric", "cosine") != "cosine":
        return None
    threshold: float | None = verification.get("threshold")
    return threshold


def check_threshold_wanted(checkpoint: Checkpoint, config: Config) -> None:
    """Look, before an evaluation, whether its threshold can be stored.

    Args:
        checkpoint: What is evaluated.
        config: Its configuration, perhaps with overrides.

    Raises:
        ConfigError: The evaluation gives none, or not one for the features of the stored model.
    """
    if not config.evaluator.options.get("verification", True):
        raise ConfigError("--save_threshold needs a threshold; add --evaluator.verification true")
    own = load_config(checkpoint.config)
    for section in _FEATURES:
        if getattr(config, section) != getattr(own, section):
            raise ConfigError(
                f"--save_threshold: {section} differs from the checkpoint's, whose features "
                "the threshold would not be for; leave the override out"
            )


def store_threshold(path: Path, checkpoint: Checkpoint, figures: Mapping[str, Any]) -> None:
    """Write an evaluation's verification figures into its checkpoint; all else stays as it is.

    Args:
        path: The checkpoint's file.
        checkpoint: What was read from it and evaluated.
        figures: The evaluation's figures.

    Raises:
        ConfigError: There is no threshold among the figures.
        CheckpointError: The file has changed since, or cannot be written.
    """
    verification = figures.get("verification")
    if not verification:
        raise ConfigError("--save_threshold: the evaluator gave no verification figures")
    current = load_checkpoint(path)
    # A run that goes on beside the evaluation may have saved a better one in its place.
    if (current.epoch, current.step) != (checkpoint.epoch, checkpoint.step):
        raise CheckpointError(f"{path} has changed while it was evaluated; evaluate it again")
    kept = {key: value for key, value in verification.items() if key != "histogram"}
    current.metrics = {**current.metrics, "verification": kept}
    save_checkpoint(current, path)
