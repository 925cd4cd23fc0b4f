"""A run's state: captured as a checkpoint, and restored from one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch.optim import Optimizer

from reidreg.config.sections import plain
from reidreg.distributed.group import gather, world
from reidreg.distributed.random_state import random_state, seed_process, set_random_state
from reidreg.errors import CheckpointError
from reidreg.logs.console import logger
from reidreg.model.checkpoint import Checkpoint
from reidreg.model.restore import load_weights
from reidreg.training.run import Progress, Run


def capture(run: Run, resumable: bool = True) -> Checkpoint:
    """The run as a checkpoint, with the states of all its processes.

    Args:
        run: The run.
        resumable: Include what only a resume needs, about twice the size of the weights.
    """
    size, mean, std = run.embedder.input.size, run.embedder.input.mean, run.embedder.input.std
    return Checkpoint(
        # The weights that evaluation uses: they give the figures that were logged.
        model=run.embedder.model.state_dict(),
        config=run.config.as_dict(),
        labels=run.embedder.labels,
        preprocessing=plain({"size": size, "mean": mean, "std": std}),
        epoch=run.progress.epoch,
        step=run.progress.step,
        metrics=run.progress.metrics,
        training=training_state(run) if resumable else None,
    )


def training_state(run: Run) -> dict[str, Any]:
    """What only a resume needs; every process has to call it at the same time."""
    states = gather({"random": random_state(), "meter": run.meter.state_dict()})
    training = {
        "optimizer": run.optimizer.state_dict(),
        "objective": run.objective.state_dict(),
        "objective_optimizers": run.objective.optimizer_state(),
        "scaler": run.scaler.state_dict(),
        "sampler": run.sampler.state_dict(),
        "progress": asdict(run.progress),
        **states[0],
        "others": states[1:],
    }
    if run.ema is not None:
        training["model"] = run.model.state_dict()
    return training


def restore(run: Run, checkpoint: Checkpoint) -> None:
    """Restore a run from a checkpoint that has passed `check_resume`.

    Raises:
        CheckpointError: It was trained on other identities, or its states do not fit.
    """
    training = checkpoint.training
    assert training is not None  # as `check_resume` has made sure
    if checkpoint.labels.pids != run.embedder.labels.pids:
        raise CheckpointError(
            f"the checkpoint was trained on {len(checkpoint.labels.pids)} identities, the data "
            f"has {len(run.embedder.labels.pids)}, or others: start a new run from its weights "
            "with --init_from"
        )
    load_weights(run.model, training.get("model", checkpoint.model))
    if run.ema is not None:
        run.ema.load(checkpoint.model)
    load_weights(run.objective, training["objective"])
    load_optimizer(run.optimizer, training["optimizer"], "optimizer")
    own = run.objective.optimizers
    for term, state in training["objective_optimizers"].items():
        load_optimizer(own[term], state, f"losses.{term}")
    if training["scaler"] and run.scaler.is_enabled():  # both in fp16
        run.scaler.load_state_dict(training["scaler"])
    run.sampler.load_state_dict(training["sampler"])
    run.progress = Progress(**training["progress"])
    restore_process(run, [training, *training.get("others", [])])


def restore_process(run: Run, states: Sequence[Mapping[str, Any]]) -> None:
    """Restore the random generators and meter of this process.

    If the number of processes has changed, rank 0 continues its own random numbers, and the others
    begin new ones.

    Args:
        run: The run.
        states: The states of the saved processes by rank.
    """
    here = world()
    if len(states) == here.size:
        set_random_state(states[here.rank]["random"])
        run.meter.load_state_dict(states[here.rank]["meter"])
        return
    set_random_state(states[0]["random"])
    if not here.is_main:
        seed_process(run.config.train.seed, run.progress.step)
    logger.info(
        "resumed by %d processes, saved by %d: the batches stay the same; dropout masks, and sums "
        "over a process's share, differ",
        here.size,
        len(states),
    )


def load_optimizer(optimizer: Optimizer, saved: Mapping[str, Any], key: str) -> None:
    """Load an optimizer's state, but not its options: those are the configuration's.

    Raises:
        CheckpointError: The saved state belongs to other parameters or another optimizer.
    """
    current = optimizer.state_dict()
    groups = [group["params"] for group in current["param_groups"]]
    if groups != [group["params"] for group in saved["param_groups"]]:
        raise CheckpointError(
            f"{key}: the checkpoint's optimizer grouped the parameters differently, so it cannot "
            "go on; keep optimizer.bias_lr_factor, bias_weight_decay and layer_decay, or start a "
            "new run from its weights with --init_from"
        )
    known = set(current["param_groups"][0])
    if known != set(saved["param_groups"][0]):
        raise CheckpointError(f"{key}: the checkpoint was written by another optimizer")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": current["param_groups"]})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                # In the parameter's memory layout, since fused kernels read both in parallel.
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
