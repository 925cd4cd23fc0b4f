"""Which options may change when a run is resumed.

The configuration in the checkpoint is compared with the current one, and every changed key is
looked up in `RULES`, before anything slow happens. Allowed changes are logged, others are errors.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from reidreg.config.parsing import load_config
from reidreg.config.sections import Config, plain
from reidreg.errors import CheckpointError, ReidregError
from reidreg.parts.schema import shown


class Verdict(enum.Enum):
    """Whether an option may change on a resume."""

    ALLOWED = "allowed"
    BETWEEN_EPOCHS = "allowed between two epochs"
    REFUSED = "refused"


ALLOWED, BETWEEN_EPOCHS, REFUSED = Verdict


@dataclass(frozen=True)
class Rule:
    """Whether the keys that match a pattern may change.

    Args:
        pattern: A key; `*` stands for anything but a dot, `**` for anything.
        verdict: Whether they may change.
        why: The reason, as messages quote it: `optimizer.name: adam -> sgd (the saved state ...)`.
    """

    pattern: str
    verdict: Verdict
    why: str

    def covers(self, key: str) -> bool:
        """Whether a key matches the pattern."""
        words = {"**": ".*", "*": "[^.]*"}
        parts = (words.get(part, re.escape(part)) for part in re.split(r"(\*\*|\*)", self.pattern))
        return re.fullmatch("".join(parts), key) is not None


_ORDER = "the rest of the epoch would be other images"
_MODEL = "the weights belong to the model with which they were trained"
_INPUT = "the weights were trained on images of the former kind"
_EVALUATION = "it changes figures, not weights"
_SPEED = "it changes how fast a run is, not what it learns"
_NEXT_STEPS = "it only affects the steps to come"

# The first rule that covers a key counts. The last rule of a section is the default for the options
# of plugins and for unlisted ones; it is conservative.
RULES = (
    Rule("dataset.root", ALLOWED, "the same data may have been moved"),
    Rule("dataset.query_folder", ALLOWED, _EVALUATION),
    Rule("dataset.gallery_folder", ALLOWED, _EVALUATION),
    Rule("dataset.**", BETWEEN_EPOCHS, _ORDER),
    Rule("input.flip_test", ALLOWED, _EVALUATION),
    Rule("input.flip_prob", ALLOWED, _NEXT_STEPS),
    Rule("input.padding", ALLOWED, _NEXT_STEPS),
    Rule("input.erasing_prob", ALLOWED, _NEXT_STEPS),
    Rule("input.**", REFUSED, _INPUT),
    Rule("sampler.**", BETWEEN_EPOCHS, _ORDER),
    Rule("backbone.pretrained", ALLOWED, "the weights come from the checkpoint"),
    Rule("backbone.**", REFUSED, _MODEL),
    Rule("head.feature", ALLOWED, _EVALUATION),
    Rule("head.**", REFUSED, _MODEL),
    Rule("losses.*", REFUSED, "a term of the loss cannot come or go"),
    Rule("losses.*.name", REFUSED, "the state of the loss belongs to another"),
    Rule("losses.**", ALLOWED, _NEXT_STEPS),
    Rule("optimizer.name", REFUSED, "the saved state is that of another optimizer"),
    # Whether they group the parameters alike shows when the state is loaded.
    Rule("optimizer.**", ALLOWED, _NEXT_STEPS),
    Rule("schedule.**", ALLOWED, _NEXT_STEPS),
    Rule("evaluator.**", ALLOWED, _EVALUATION),
    Rule("validation.**", REFUSED, "other identities would be trained on"),
    Rule("train.seed", BETWEEN_EPOCHS, _ORDER),
    Rule("train.epochs", ALLOWED, "a run may become longer"),
    Rule("train.eval_every", ALLOWED, _EVALUATION),
    Rule("train.eval_untrained", ALLOWED, _EVALUATION),
    Rule("train.eval_batch_size", ALLOWED, _SPEED),
    Rule("train.checkpoint_every", ALLOWED, "it changes what is kept"),
    Rule("train.log_every", ALLOWED, "it changes what is logged"),
    Rule("train.workers", ALLOWED, _SPEED),
    Rule("train.device", ALLOWED, _SPEED),
    Rule("train.precision", ALLOWED, "the weights are float32 in every precision"),
    Rule("train.compile", ALLOWED, _SPEED),
    Rule("train.accumulate", ALLOWED, _NEXT_STEPS),
    Rule("train.ema_decay", ALLOWED, "an average can begin, or end, with the current weights"),
    Rule("train.freeze", ALLOWED, _NEXT_STEPS),
    Rule("train.freeze_epochs", ALLOWED, _NEXT_STEPS),
    Rule("train.cache", ALLOWED, _SPEED),
    Rule("train.gather", ALLOWED, _NEXT_STEPS),
    Rule("train.sync_batchnorm", ALLOWED, _NEXT_STEPS),
    Rule("train.rank_timeout", ALLOWED, "it changes how long processes wait"),
    Rule("train.preflight", ALLOWED, "it changes nothing in the run"),
    Rule("train.**", BETWEEN_EPOCHS, "it may change what the steps of an epoch are"),
    Rule("wandb.**", ALLOWED, "it changes what is logged"),
    Rule("init_from", ALLOWED, "the weights come from the checkpoint"),
    Rule("output_dir", ALLOWED, "a run may be resumed in another folder"),
    Rule("**", BETWEEN_EPOCHS, "it may change what the steps of an epoch are"),
)


@dataclass(frozen=True)
class Change:
    """An option that has another value than in the checkpoint.

    Args:
        key: Its key; for a whole part that was added or removed, the key of the part.
        before: Its value in the checkpoint, or None.
        after: Its value now, or None.
    """

    key: str
    before: Any
    after: Any

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.before)} -> {shown(self.after)}"

    @property
    def rule(self) -> Rule:
        """The rule that decides."""
        if re.fullmatch(r"losses\.\w+\.weight", self.key) and 0 in (self.before, self.after):
            return rule_of(self.key.removesuffix(".weight"))  # weight 0 is as if it were removed
        return rule_of(self.key)


def rule_of(key: str) -> Rule:
    """The rule for a key: the first that covers it."""
    return next(rule for rule in RULES if rule.covers(key))


def changes_between(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """The differences between two configurations as plain values."""
    return list(_changes(completed(old), new, ""))


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint's configuration, with defaults for options that are newer than it."""
    try:
        return load_config(config).as_dict()
    except ReidregError:  # it has an option that does not exist here; the comparison shows it
        return config


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> Iterator[Change]:
    for key in [*old, *(key for key in new if key not in old)]:
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _changes(before, after, f"{prefix}{key}.")
        elif plain(before) != plain(after):
            yield Change(f"{prefix}{key}", before, after)


def check_resume(
    saved: Mapping[str, Any], training: Mapping[str, Any] | None, config: Config
) -> list[Change]:
    """Check the options that changed since a checkpoint, before anything slow is done.

    Args:
        saved: The checkpoint's configuration.
        training: The checkpoint's training state, or None if it holds weights alone.
        config: The configuration of the resumed run.

    Returns:
        The changes, all of them allowed.

    Raises:
        CheckpointError: The checkpoint cannot be resumed, or not with this configuration; the line
            names each key that must not change.
    """
    if training is None:
        raise CheckpointError(
            "this checkpoint holds weights alone and cannot be resumed: use checkpoints/last.ckpt, "
            "or start a new run from the weights with --init_from"
        )
    epoch, batch = training["progress"]["epoch"], training["progress"]["batch"]
    changes = changes_between(saved, config.as_dict())
    kept_from = {REFUSED, BETWEEN_EPOCHS} if batch else {REFUSED}
    refused = [change for change in changes if change.rule.verdict in kept_from]
    if refused:
        raise CheckpointError(_refusal(refused, epoch, batch))
    _check_length(epoch, batch, config.train.epochs)
    return changes


def _refusal(refused: list[Change], epoch: int, batch: int) -> str:
    said = "; ".join(f"{change} ({change.rule.why})" for change in refused)
    middle = all(change.rule.verdict is BETWEEN_EPOCHS for change in refused)
    where = f" inside epoch {epoch + 1}, after step {batch} of it" if middle else ""
    return (
        f"this run cannot go on{where} with other options: {said}; keep the old ones, or start a "
        "new run from the weights with --init_from CKPT and another --output_dir"
    )


def _check_length(epoch: int, batch: int, epochs: int) -> None:
    """Raise CheckpointError if the run has more epochs behind it than it is to have."""
    if epochs < epoch + (batch > 0):
        done = f"{epoch} epochs and {batch} steps" if batch else f"{epoch} epochs"
        raise CheckpointError(
            f"train.epochs: {epochs} is less than the run has made ({done}); give at least "
            f"{epoch + (batch > 0)}, or start a new run from the weights with --init_from CKPT and "
            "another --output_dir"
        )
