"""`--sampler.batch_size auto`: the largest batch whose step fits into the device's memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from reidreg.checkpoint import Checkpoint
from reidreg.config import Config
from reidreg.data import labels_of, training_samples
from reidreg.device_memory import describe_shortage, gib, memory_of
from reidreg.devices import choose_device
from reidreg.distributed import gather, main_first, world
from reidreg.embedding import make_embedder
from reidreg.errors import ConfigError, DataError, DeviceError, ReidregError
from reidreg.interfaces import DATASETS, SAMPLERS
from reidreg.logs import logger
from reidreg.model import build_model
from reidreg.objective import build_objective
from reidreg.optimizers import make_optimizer
from reidreg.schema import AUTO, options_of
from reidreg.trial import Memory, Trial, missing_state
from reidreg.validation import hold_out

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
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    with main_first():  # a data set may have to be made before it can be read
        samples = training_samples(dataset)
    if config.validation.identities:
        # Who is held out does not depend on what their matches are.
        samples, _ = hold_out(samples, config.validation, across_cameras=False)
    labels = labels_of(samples)
    model = build_model(config, labels)
    embedder = make_embedder(model, labels, config)
    objective = build_objective(config, labels, model.head.dim).to(embedder.device)
    parameters = [*model.named_parameters(), *objective.shared_parameters()]
    optimizer = make_optimizer(config.optimizer, parameters)
    state = missing_state(optimizer, config.optimizer)
    if config.train.ema_decay:
        state += sum(value.nbytes for value in model.state_dict().values())
    size = embedder.input.size
    trial = Trial(model, objective, size, embedder.device, embedder.dtype, state)
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
        gib(budget),
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
