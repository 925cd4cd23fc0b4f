"""The weights that a new run begins with."""

from __future__ import annotations

import torch

from reidreg.data.labels import Labels
from reidreg.distributed.group import broadcast_state, world
from reidreg.logs.console import logger
from reidreg.model.checkpoint import Checkpoint
from reidreg.model.model import Model
from reidreg.model.restore import load_weights
from reidreg.training.run import Run


def start_weights(run: Run, init_from: Checkpoint | None) -> None:
    """Load a new run's first weights: a checkpoint's, or the backbone's pretrained ones.

    With several processes, rank 0 loads them and sends them to the others.
    """
    report: str | None = None
    if init_from is not None:
        report = load_matching(run.model, init_from, run.embedder.labels)
    elif world().is_main:
        report = run.model.backbone.load_pretrained()
    if report is not None:
        logger.info("%s", report)
    broadcast_state(run.model, run.objective)
    if run.ema is not None:
        run.ema.load(run.model.state_dict())


def load_matching(model: Model, checkpoint: Checkpoint, labels: Labels) -> str:
    """Load the weights that fit; a classifier of other identities does not.

    Returns:
        A line that names the weights that were not loaded.

    Raises:
        CheckpointError: A weight of the backbone does not fit, so it is another model.
    """
    own = model.state_dict()
    same_identities = checkpoint.labels.pids == labels.pids
    fitting = {
        key: value
        for key, value in checkpoint.model.items()
        if key in own
        and own[key].shape == value.shape
        # A row for each identity: the same number of identities need not be the same ones.
        and (same_identities or not _has_row_per_identity(key, value, checkpoint.labels))
    }
    left = [key for key in own if key not in fitting]
    if any(key.startswith("backbone.") for key in left):
        load_weights(model, checkpoint.model)  # raises, naming the first keys and shapes
    model.load_state_dict(fitting, strict=False)
    rest = f"; not loaded: {', '.join(left)}" if left else ""
    return f"weights of a checkpoint of epoch {checkpoint.epoch}: {len(fitting)} tensors{rest}"


def _has_row_per_identity(key: str, value: torch.Tensor, labels: Labels) -> bool:
    return key.startswith("head.") and value.dim() > 1 and len(value) == len(labels.pids)
