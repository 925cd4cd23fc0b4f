"""A run: all that training holds, built from a configuration."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from reidreg.config.schedules import Schedule
from reidreg.config.sections import Config
from reidreg.data.holdout import HeldOut, hold_out
from reidreg.data.labels import Labels, labels_of, training_samples
from reidreg.data.loading import TrainLoader
from reidreg.data.sampling import build_sampler
from reidreg.data.transforms import Augmentation
from reidreg.data.workers import count_workers
from reidreg.distributed.group import broadcast_state, main_first, world
from reidreg.distributed.random_state import (
    seed_everything,
    seed_process,
)
from reidreg.distributed.same_run import check_same_run
from reidreg.errors import ConfigError, DataError
from reidreg.logs.console import logger
from reidreg.machine.devices import choose_device
from reidreg.model.checkpoint import Checkpoint
from reidreg.model.embedder import Embedder, make_embedder
from reidreg.model.model import Model, build_model
from reidreg.model.restore import load_weights
from reidreg.parts.interfaces import DATASETS, EVALUATORS, Dataset, Evaluator, Sampler
from reidreg.training.divergence import Guard
from reidreg.training.ema import Average
from reidreg.training.forward import Network
from reidreg.training.freezing import Freezer
from reidreg.training.meter import Meter
from reidreg.training.objective import Objective, build_objective
from reidreg.training.optimizers import layer_scales, make_optimizer, make_schedule
from reidreg.values import Sample


@dataclass
class Progress:
    """Where a run stands.

    Args:
        epoch: Whole epochs done.
        batch: Steps done in the epoch under way.
        step: Steps done in all.
        evaluated: The last epoch that was evaluated, -1 if none was.
        tested: The last epoch after which the best model met the test set, -1 if it did not;
            with held-out identities alone.
        best: The best mAP so far, -1 if there is none.
        metrics: The last evaluation's figures.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    evaluated: int = -1
    tested: int = -1
    best: float = -1.0
    metrics: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """Everything that training holds, built from a configuration by `build_run`.

    `validation` is what is evaluated as training goes: the held-out identities, or the data set
    itself where none are held out. `network` is the model and the losses as training calls them;
    `average` is None without one, and otherwise what `embedder` embeds with.
    """

    config: Config
    dataset: Dataset
    validation: Dataset
    sampler: Sampler
    loader: TrainLoader
    model: Model
    network: Network
    average: Average | None
    embedder: Embedder
    evaluator: Evaluator
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    freezer: Freezer
    guard: Guard
    meter: Meter
    progress: Progress

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What `optimizer` steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


@dataclass(frozen=True)
class Learner:
    """What learns, on its device: the part of a run that a step of training is made with.

    Args:
        model: The model.
        embedder: Embeds with it.
        objective: The losses.
        optimizer: Steps the parameters of both.
    """

    model: Model
    embedder: Embedder
    objective: Objective
    optimizer: Optimizer


def build_learner(config: Config, labels: Labels) -> Learner:
    """Build what learns to tell the people of `labels` apart; weights are random."""
    model = build_model(config, labels)
    if config.train.sync_batchnorm and world().size > 1:
        synchronise_batchnorm(model)
    embedder = make_embedder(model, labels, config)
    objective = build_objective(config, labels, model.head.dim).to(embedder.device)
    parameters = [*model.named_parameters(), *objective.shared_parameters()]
    layer_decay = config.optimizer.layer_decay
    scales = layer_scales(model, layer_decay) if layer_decay is not None else {}
    optimizer = make_optimizer(config.optimizer, parameters, scales)
    return Learner(model, embedder, objective, optimizer)


def check_device(config: Config) -> None:
    """Raise DeviceError or ConfigError for a device that cannot train this configuration."""
    device = choose_device(config.train.device)
    if config.train.sync_batchnorm and world().size > 1 and device.type != "cuda":
        raise ConfigError(
            f"train.sync_batchnorm: with several processes it needs CUDA, and this run uses "
            f"{device.type}; set it to false"
        )


def synchronise_batchnorm(model: nn.Module) -> None:
    """Have batch normalisation average over all processes; parameters and their names stay."""
    layers: Any = importlib.import_module("timm.layers")  # knows timm's own kinds too
    layers.convert_sync_batchnorm(model)


def read_training_set(config: Config) -> tuple[Dataset, list[Sample]]:
    """The data set, and the training images of it whose people are known."""
    dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
    with main_first():  # a data set may have to be made before it can be read
        return dataset, training_samples(dataset)


def build_run(config: Config) -> Run:
    """Build every part of a run; weights are random, and the data's labels are checked."""
    seed_everything(config.train.seed)
    check_device(config)  # before the data are read
    evaluator = EVALUATORS.build(config.evaluator.name, **config.evaluator.options)
    dataset, samples = read_training_set(config)
    with main_first():
        check_splits(dataset, evaluator)
    splits = {"train": samples, "query": dataset.query, "gallery": dataset.gallery}
    check_same_run(config.as_dict(), splits)
    validation: Dataset = dataset
    if config.validation.identities:
        samples, validation = hold_out_people(samples, config, evaluator)
    labels = labels_of(samples)

    learner = build_learner(config, labels)
    model, embedder, objective = learner.model, learner.embedder, learner.objective
    decay = config.train.ema_decay
    average = Average(model, decay) if decay else None
    if average is not None:
        embedder = replace(embedder, model=average.model)
    sampler = build_sampler(
        config.sampler.name,
        config.sampler.options,
        world(),
        pids=[sample.pid for sample in samples],
        camids=[sample.camid for sample in samples],
        seed=config.train.seed,
    )
    if len(sampler) == 0:
        raise DataError(f"sampler {config.sampler.name}: not one batch fits into an epoch")
    check_parts(config, objective)
    loader = TrainLoader(
        samples,
        labels,
        sampler,
        Augmentation(embedder.input, embedder.normalisation),
        seed=config.train.seed,
        device=embedder.device,
        workers=count_workers(config.train.workers),
        cache=config.train.cache,
        rank=world().rank,
        world_size=world().size,
    )
    if not world().is_main:  # from here on each rank draws its own dropout masks
        seed_process(config.train.seed)
    return Run(
        config=config,
        dataset=dataset,
        validation=validation,
        sampler=sampler,
        loader=loader,
        model=model,
        network=Network(
            model,
            objective,
            embedder.dtype,
            gathered=config.train.gather,
            compiled=config.train.compile,
        ),
        average=average,
        embedder=embedder,
        evaluator=evaluator,
        objective=objective,
        optimizer=learner.optimizer,
        schedule=make_schedule(config),
        scaler=torch.amp.GradScaler(embedder.device.type, enabled=embedder.dtype == torch.float16),
        freezer=Freezer(model, config.train.freeze, config.train.freeze_epochs),
        guard=Guard(embedder.device),
        meter=Meter(),
        progress=Progress(),
    )


def check_parts(config: Config, objective: Objective) -> None:
    """Look at the parts that processes and `train.accumulate` cut a batch into.

    Raises:
        ConfigError: They are not of one size, or cut an identity's images apart.
    """
    parts, processes = config.train.accumulate, world().size
    size, instances = (config.sampler.options.get(key, 0) for key in ("batch_size", "instances"))
    if parts * processes == 1 or not size:
        return
    share = size // processes
    if share % parts or (instances and share // parts % instances):
        of = f" of {instances} images an identity" if instances else ""
        by = f" of each of {processes} processes" if processes > 1 else ""
        raise ConfigError(
            f"train.accumulate: batches of {share}{of}{by} cannot be cut into {parts} equal parts"
        )
    comparing = [term for term, loss in objective.losses() if loss.compares_images]
    seen = (size if config.train.gather else share) // parts
    if comparing and seen < size:
        causes = [f"train.accumulate {parts}"] if parts > 1 else []
        causes += [f"{processes} processes"] if share < size and not config.train.gather else []
        hint = "; --train.gather true shows it all of them"
        logger.warning(
            "note: with %s, %s compares %d images of a batch, not all %d%s",
            " and ".join(causes),
            ", ".join(comparing),
            seen,
            size,
            hint if parts == 1 else "",
        )


def check_splits(dataset: Dataset, evaluator: Evaluator) -> None:
    """Raise DataError now for an evaluation that could not succeed after hours of training."""
    for split in ("query", "gallery"):
        if not getattr(dataset, split):
            raise DataError(f"the {split} split holds no images, so nothing can be evaluated")
    for note in evaluator.check_ids(dataset.query, dataset.gallery):
        logger.info("note: %s", note)


def hold_out_people(
    samples: list[Sample], config: Config, evaluator: Evaluator
) -> tuple[list[Sample], HeldOut]:
    """As `hold_out`, for an evaluation that can succeed.

    Raises:
        ConfigError: There are too few identities.
        DataError: No held-out person can be looked for, or the evaluator says so.
    """
    across = config.evaluator.options.get("same_camera") != "keep"
    samples, people = hold_out(samples, config.validation, across_cameras=across)
    try:
        check_splits(people, evaluator)
    except DataError as error:
        raise DataError(f"validation.identities: {error}") from error
    return samples, people


def start_weights(run: Run, init_from: Checkpoint | None) -> None:
    """Give a new run its first weights: a checkpoint's of ours, or the backbone's pretrained.

    Of several processes the first loads them, and all others are given its.
    """
    report: str | None = None
    if init_from is not None:
        report = load_matching(run.model, init_from, run.embedder.labels)
    elif world().is_main:
        report = run.model.backbone.load_pretrained()
    if report is not None:
        logger.info("%s", report)
    broadcast_state(run.model, run.objective)
    if run.average is not None:
        run.average.load(run.model.state_dict())


def load_matching(model: Model, checkpoint: Checkpoint, labels: Labels) -> str:
    """Load the weights that fit; a classifier of other identities does not.

    Returns:
        A line that says what was left out.

    Raises:
        CheckpointError: A weight of the backbone does not fit, so it is another model.
    """
    own = model.state_dict()
    same_people = checkpoint.labels.pids == labels.pids
    fitting = {
        key: value
        for key, value in checkpoint.model.items()
        if key in own
        and own[key].shape == value.shape
        # A row for each identity: as many identities are not the same people.
        and (same_people or not _has_row_per_identity(key, value, checkpoint.labels))
    }
    left = [key for key in own if key not in fitting]
    if any(key.startswith("backbone.") for key in left):
        load_weights(model, checkpoint.model)  # raises, naming the first keys and shapes
    model.load_state_dict(fitting, strict=False)
    rest = f"; starting anew: {', '.join(left)}" if left else ""
    return f"weights of a checkpoint of epoch {checkpoint.epoch}: {len(fitting)} tensors{rest}"


def _has_row_per_identity(key: str, value: torch.Tensor, labels: Labels) -> bool:
    return key.startswith("head.") and value.dim() > 1 and len(value) == len(labels.pids)


# --------------------------------------------------------------------- to and from a checkpoint
