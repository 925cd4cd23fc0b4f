"""`--sampler.batch_size auto`: the largest batch whose step fits into the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from reidreg.config.sections import Config
from reidreg.data.holdout import hold_out
from reidreg.data.labels import labels_of
from reidreg.distributed.group import gather, world
from reidreg.errors import ConfigError, DataError, DeviceError, ReidregError
from reidreg.logs.console import logger
from reidreg.machine.devices import choose_device
from reidreg.machine.gpu_memory import describe_shortage, memory_of
from reidreg.machine.memory import size_in_text
from reidreg.model.checkpoint import Checkpoint
from reidreg.parts.interfaces import SAMPLERS
from reidreg.parts.schema import AUTO, options_of
from reidreg.training.run import build_learner, read_training_set
from reidreg.training.step_memory import Memory, Trial, missing_state

# Of the memory at hand: the rest is for what the allocator cannot use, and for evaluation.
SHARE = 0.85


def with_batch_size(config: Config, resumed: Checkpoint | None = None) -> Config:
    """A configuration with a number for `sampler.batch_size: auto`; any other as it is.

    Args:
        config: The configuration.
        resumed: The checkpoint that the run goes on from, whose number is kept.

    Raises:
        DeviceError: Not even the smallest batch fits.
        ReidregError: The sampler accepts no batch size with its other options and these data.
    """
    if config.sampler.options.get("batch_size") != AUTO:
        return config
    kept = resumed.config["sampler"].get("batch_size") if resumed is not None else None
    memory = memory_of(choose_device(config.train.device))
    if kept is not None:
        logger.info("sampler.batch_size auto: %d, as this run began", kept)
        return _sized(config, kept)
    if memory is None:
        size = _default(config)
        logger.info(
            "sampler.batch_size auto: %d, by the sampler's default; only a CUDA device is tried",
            size,
        )
        return _sized(config, size)
    return _sized(config, _search(config, memory))


def _sized(config: Config, size: int) -> Config:
    options = {**config.sampler.options, "batch_size": size}
    return replace(config, sampler=replace(config.sampler, options=options))


def _unit(config: Config) -> int:
    """What sizes are multiples of: the images of one identity, for each part of each process."""
    instances = int(config.sampler.options.get("instances", 1))
    return instances * config.train.accumulate * world().size


def _default(config: Config) -> int:
    """The sampler's own size, or the next smaller one that can be shared evenly."""
    option = options_of(SAMPLERS[config.sampler.name])["batch_size"]
    if option.required:
        raise ConfigError(
            f"sampler.batch_size: auto needs a CUDA device, and {config.sampler.name} has no "
            "default; give a number"
        )
    size, unit = int(option.default), _unit(config)
    return max(size - size % unit, unit)


def _search(config: Config, memory: Memory) -> int:
    """Build what a step needs, try, and give it back."""
    _, samples = read_training_set(config)
    if config.validation.identities:
        # Who is held out does not depend on what their matches are.
        samples, _ = hold_out(samples, config.validation, across_cameras=False)
    labels = labels_of(samples)
    # A process whose memory runs out would leave the others waiting within the step.
    alone = replace(config, train=replace(config.train, sync_batchnorm=False))
    learner = build_learner(alone, labels)
    model, embedder = learner.model, learner.embedder
    state = missing_state(learner.optimizer, config.optimizer)
    if config.train.ema_decay:
        state += sum(value.nbytes for value in model.state_dict().values())
    size = embedder.input.size
    trial = Trial(model, learner.objective, size, embedder.device, embedder.dtype, state)
    pids = torch.tensor(labels.pid_labels(samples))
    parts = config.train.accumulate * world().size
    budget = int(SHARE * memory.available())

    def batch_of(size: int) -> list[int]:
        """The first batch of the sampler at a size; ReidregError if it makes none of that size."""
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

    def fits(batch: list[int]) -> bool:
        try:
            fine = trial.need(pids[batch[: len(batch) // parts]], memory) <= budget
        except torch.OutOfMemoryError:
            fine = False
        return all(gather(fine))  # the smallest device decides

    found = largest(_unit(config), batch_of, fits)
    if found is None:
        raise DeviceError(describe_shortage(embedder.device))
    memory.reset()
    logger.info(
        "sampler.batch_size auto: a step of %d images fits into %s; optimizer.lr %g is not scaled "
        "with it, and epochs have fewer steps where it is large",
        found,
        size_in_text(budget),
        config.optimizer.lr,
    )
    return found


def largest(
    unit: int,
    batch_of: Callable[[int], list[int]],
    fits: Callable[[list[int]], bool],
) -> int | None:
    """The largest batch that is to be had and fits: by doubling, then to an eighth by halving.

    Args:
        unit: Sizes are multiples of it: the images of one identity, for each part of a batch.
        batch_of: A batch of a size, or ReidregError where the sampler makes none.
        fits: Whether a step of a batch fits into memory.

    Returns:
        The size, or None if the smallest does not fit.

    Raises:
        ReidregError: The sampler makes none at all; its words for the smallest.
    """

    def good(size: int) -> bool:
        try:
            batch = batch_of(size)
        except ReidregError:
            return False
        return fits(batch)

    low = 2 * unit  # a batch of one identity teaches nothing
    if not fits(batch_of(low)):
        return None
    while good(2 * low):
        low *= 2
    # An eighth is as near as it pays: sizes stay multiples that kernels like.
    step, high = max(low // unit // 8, 1) * unit, 2 * low
    while high - low > step:
        middle = low + (high - low) // (2 * step) * step
        if good(middle):
            low = middle
        else:
            high = middle
    return low
