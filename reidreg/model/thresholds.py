"""The threshold stored with a model: the cosine at and above which two images show one person.

It is among the figures of the last evaluation with `verification`, that of `fit` or a later one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reidreg.config.parsing import load_config
from reidreg.config.sections import Config
from reidreg.errors import CheckpointError, ConfigError
from reidreg.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

_SECTIONS = ("input", "backbone", "head")  # those that features depend on


def stored_threshold(checkpoint: Checkpoint) -> float | None:
    """The cosine at and above which two images show the same person; None if none is stored.

    A threshold for squared distances does not count: it is not one for normalised features.
    """
    verification = checkpoint.metrics.get("verification", {})
    if verification.get("metric", "cosine") != "cosine":
        return None
    threshold: float | None = verification.get("threshold")
    return threshold


def check_threshold_wanted(checkpoint: Checkpoint, config: Config) -> None:
    """Check before an evaluation that its threshold can be stored.

    Args:
        checkpoint: The checkpoint to evaluate.
        config: Its configuration, perhaps with overrides.

    Raises:
        ConfigError: There will be no threshold, or not one for the features of the stored model.
    """
    if not config.evaluator.options.get("verification", True):
        raise ConfigError("--save_threshold needs a threshold; add --evaluator.verification true")
    own = load_config(checkpoint.config)
    for section in _SECTIONS:
        if getattr(config, section) != getattr(own, section):
            raise ConfigError(
                f"--save_threshold: {section} differs from the checkpoint's, so the threshold "
                "would be for other features; leave the override out"
            )


def store_threshold(path: Path, checkpoint: Checkpoint, figures: Mapping[str, Any]) -> None:
    """Write the verification figures of an evaluation into its checkpoint, and change nothing else.

    Args:
        path: The checkpoint's file.
        checkpoint: The evaluated checkpoint, as it was read from the file.
        figures: The evaluation's figures.

    Raises:
        ConfigError: There is no threshold among the figures.
        CheckpointError: The file has changed since it was read, or cannot be written.
    """
    verification = figures.get("verification")
    if not verification:
        raise ConfigError("--save_threshold: the evaluator returned no verification figures")
    current = load_checkpoint(path)
    # A run that is still training may have replaced it by a better one.
    if (current.epoch, current.step) != (checkpoint.epoch, checkpoint.step):
        raise CheckpointError(f"{path} has changed during the evaluation; evaluate it again")
    stored = {key: value for key, value in verification.items() if key != "histogram"}
    current.metrics = {**current.metrics, "verification": stored}
    save_checkpoint(current, path)
