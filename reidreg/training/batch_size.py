"""`--sampler.batch_size auto`: find the largest batch whose step fits in the device's memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from reidreg.config.sections import Config
from reidreg.data.holdout import hold_out
from reidreg.data.labels import Labels, labels_of
from reidreg.distributed.group import gather, world
from reidreg.errors import ConfigError, DataError, DeviceError, ReidregError
from reidreg.logs.console import logger
from reidreg.machine.devices import choose_device
from reidreg.machine.gpu_memory import describe_shortage, memory_of
from reidreg.machine.memory import size_in_text
from reidreg.model.checkpoint import Checkpoint
from reidreg.parts.interfaces import SAMPLERS
from reidreg.parts.schema import AUTO, options_of
from reidreg.training.step_memory import Memory, StepProbe, missing_state
from reidreg.training.trainable import build_trainable
from reidreg.training.training_set import read_training_set
from reidreg.values import Sample

# Of the available memory: the rest is for fragmentation, and for evaluation.
SHARE = 0.85


def with_batch_size(config: Config, resumed: Checkpoint | None = None) -> Config:
    """The configuration, with `sampler.batch_size: auto` replaced by a number.

    Args:
        config: The configuration.
        resumed: The checkpoint to resume from, whose batch size is kept.

    Raises:
        DeviceError: Not even the smallest batch fits.
        ReidregError: The sampler can make no batch with its other options and these data.
    """
    if config.sampler.options.get("batch_size") != AUTO:
        return config
    kept = resumed.config["sampler"].get("batch_size") if resumed is not None else None
    memory = memory_of(choose_device(config.train.device))
    if kept is not None:
        logger.info("sampler.batch_size auto: %d, as before the resume", kept)
        return _sized(config, kept)
    if memory is None:
        size = _default(config)
        logger.info(
            "sampler.batch_size auto: %d, the sampler's default; only CUDA memory is measured",
            size,
        )
        return _sized(config, size)
    return _sized(config, _search(config, memory))


def _sized(config: Config, size: int) -> Config:
    options = {**config.sampler.options, "batch_size": size}
    return replace(config, sampler=replace(config.sampler, options=options))


def _unit(config: Config) -> int:
    """The number of which batch sizes are multiples.

    That is the images of one identity, for each part of `train.accumulate` in each process.
    """
    instances = int(config.sampler.options.get("instances", 1))
    return instances * config.train.accumulate * world().size


def _default(config: Config) -> int:
    """The sampler's default size, or the next smaller one that divides evenly."""
    option = options_of(SAMPLERS[config.sampler.name])["batch_size"]
    if option.required:
        raise ConfigError(
            f"sampler.batch_size: auto needs a CUDA device, and {config.sampler.name} has no "
            "default; give a number"
        )
    size, unit = int(option.default), _unit(config)
    return max(size - size % unit, unit)


def _search(config: Config, memory: Memory) -> int:
    """Build a model, try batch sizes with it, and free it again."""
    _, samples = read_training_set(config)
    if config.validation.identities:
        # Which identities are held out does not depend on how they are matched.
        samples, _ = hold_out(samples, config.validation, across_cameras=False)
    labels = labels_of(samples)
    probe = _build_probe(config, labels)
    pids = torch.tensor(labels.pid_labels(samples))
    parts = config.train.accumulate * world().size
    budget = int(SHARE * memory.available())

    def fits(batch: list[int]) -> bool:
        try:
            fine = probe.need(pids[batch[: len(batch) // parts]], memory) <= budget
        except torch.OutOfMemoryError:
            fine = False
        return all(gather(fine))  # the smallest device decides

    found = largest(_unit(config), lambda size: _first_batch(config, samples, size), fits)
    if found is None:
        raise DeviceError(describe_shortage(probe.device))
    memory.reset()
    logger.info(
        "sampler.batch_size auto: a step of %d images fits into %s; optimizer.lr %g is not scaled "
        "with it, and epochs have fewer steps where it is large",
        found,
        size_in_text(budget),
        config.optimizer.lr,
    )
    return found


def _build_probe(config: Config, labels: Labels) -> StepProbe:
    # With synchronised normalisation, a process that is out of memory would leave the others
    # waiting inside the step.
    alone = replace(config, train=replace(config.train, sync_batchnorm=False))
    model, embedder, objective, optimizer = build_trainable(alone, labels)
    state = missing_state(optimizer, config.optimizer)
    if config.train.ema_decay:
        state += sum(value.nbytes for value in model.state_dict().values())
    size = embedder.input.size
    return StepProbe(model, objective, size, embedder.device, embedder.dtype, state)


def _first_batch(config: Config, samples: Sequence[Sample], size: int) -> list[int]:
    """The sampler's first batch of a size; ReidregError if it can make none of that size."""
    sampler = SAMPLERS.build(
        config.sampler.name,
        **{**config.sampler.options, "batch_size": size},
        pids=[sample.pid for sample in samples],
        camids=[sample.camid for sample in samples],
        seed=config.train.seed,
        rank=0,
        world_size=1,
    )
    batch = next(iter(sampler), [])
    if len(batch) != size:
        raise DataError(f"sampler.batch_size: {size} images do not fit into an epoch")
    return batch


def largest(
    unit: int,
    batch_of: Callable[[int], list[int]],
    fits: Callable[[list[int]], bool],
) -> int | None:
    """The largest batch that the sampler can make and that fits in memory, to an eighth of it.

    It doubles the size while batches fit, and then bisects.

    Args:
        unit: Sizes are multiples of it.
        batch_of: Makes a batch of a size, or raises ReidregError where the sampler cannot.
        fits: Whether a step of a batch fits in memory.

    Returns:
        The size, or None if the smallest does not fit.

    Raises:
        ReidregError: The sampler can make none at all; its error for the smallest size.
    """

    def good(size: int) -> bool:
        try:
            batch = batch_of(size)
        except ReidregError:
            return False
        return fits(batch)

    low = 2 * unit  # a batch needs two identities
    if not fits(batch_of(low)):
        return None
    while good(2 * low):
        low *= 2
    # Steps of an eighth: more precision gains little, and kernels prefer such multiples.
    step, high = max(low // unit // 8, 1) * unit, 2 * low
    while high - low > step:
        middle = low + (high - low) // (2 * step) * step
        if good(middle):
            low = middle
        else:
            high = middle
    return low
