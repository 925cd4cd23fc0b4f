"""A run: everything that training holds, built from a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from reidreg.config.schedules import Schedule
from reidreg.config.sections import Config
from reidreg.data.labels import Labels, labels_of
from reidreg.data.loading import TrainLoader
from reidreg.data.sampling import build_sampler
from reidreg.data.transforms import Augmentation
from reidreg.data.workers import count_workers
from reidreg.distributed.group import main_first, world
from reidreg.distributed.random_state import seed_everything, seed_process
from reidreg.distributed.same_run import check_same_run
from reidreg.errors import ConfigError, DataError
from reidreg.logs.console import logger
from reidreg.machine.devices import choose_device
from reidreg.model.embedder import Embedder
from reidreg.model.model import Model
from reidreg.parts.interfaces import EVALUATORS, Dataset, Evaluator, Sampler
from reidreg.training.divergence import DivergenceCheck
from reidreg.training.ema import WeightEMA
from reidreg.training.forward import TrainingForward
from reidreg.training.freezing import Freezer
from reidreg.training.meter import Meter
from reidreg.training.objective import Objective
from reidreg.training.optimizers import make_schedule
from reidreg.training.trainable import build_trainable
from reidreg.training.training_set import check_splits, hold_out_identities, read_training_set
from reidreg.values import Sample


@dataclass
class Progress:
    """How far a run has come.

    Args:
        epoch: Epochs completed.
        batch: Steps completed in the current epoch.
        step: Steps completed in all.
        evaluated: The last epoch that was evaluated, -1 if none was.
        tested: The last epoch after which the best model was evaluated on the test set, -1 if it
            was not; only with held-out identities.
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

    `validation` is evaluated during training: the held-out identities, or the data set itself if
    none are held out. `forward` computes the losses with the model. `ema` is None unless
    `train.ema_decay` is set; otherwise `embedder` uses its model.
    """

    config: Config
    dataset: Dataset
    validation: Dataset
    sampler: Sampler
    loader: TrainLoader
    model: Model
    forward: TrainingForward
    ema: WeightEMA | None
    embedder: Embedder
    evaluator: Evaluator
    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    freezer: Freezer
    divergence: DivergenceCheck
    meter: Meter
    progress: Progress

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The parameters that `optimizer` steps."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]


def build_run(config: Config) -> Run:
    """Build every part of a run; weights are random, and the data's labels are checked."""
    seed_everything(config.train.seed)
    check_device(config)  # before the data are read
    evaluator = EVALUATORS.build(config.evaluator.name, **config.evaluator.options)
    dataset, validation, samples = read_data(config, evaluator)
    labels = labels_of(samples)
    model, embedder, objective, optimizer = build_trainable(config, labels)
    decay = config.train.ema_decay
    ema = WeightEMA(model, decay) if decay else None
    if ema is not None:
        embedder = replace(embedder, model=ema.model)
    sampler = build_training_sampler(config, samples)
    check_parts(config, objective)
    loader = build_loader(config, samples, labels, sampler, embedder)
    if not world().is_main:  # each rank draws its own dropout masks
        seed_process(config.train.seed)
    compiled, gathered = config.train.compile, config.train.gather
    return Run(
        config=config,
        dataset=dataset,
        validation=validation,
        sampler=sampler,
        loader=loader,
        model=model,
        forward=TrainingForward(model, objective, embedder.dtype, gathered, compiled),
        ema=ema,
        embedder=embedder,
        evaluator=evaluator,
        objective=objective,
        optimizer=optimizer,
        schedule=make_schedule(config),
        scaler=torch.amp.GradScaler(embedder.device.type, enabled=embedder.dtype == torch.float16),
        freezer=Freezer(model, config.train.freeze, config.train.freeze_epochs),
        divergence=DivergenceCheck(embedder.device),
        meter=Meter(),
        progress=Progress(),
    )


def check_device(config: Config) -> None:
    """Raise DeviceError or ConfigError for a device that cannot train this configuration."""
    device = choose_device(config.train.device)
    if config.train.sync_batchnorm and world().size > 1 and device.type != "cuda":
        raise ConfigError(
            f"train.sync_batchnorm: with several processes it needs CUDA, and this run uses "
            f"{device.type}; set it to false"
        )


def read_data(config: Config, evaluator: Evaluator) -> tuple[Dataset, Dataset, list[Sample]]:
    """The data set, what is evaluated during training, and the training images."""
    dataset, samples = read_training_set(config)
    with main_first():
        check_splits(dataset, evaluator)
    splits = {"train": samples, "query": dataset.query, "gallery": dataset.gallery}
    check_same_run(config.as_dict(), splits)
    if not config.validation.identities:
        return dataset, dataset, samples
    samples, validation = hold_out_identities(samples, config, evaluator)
    return dataset, validation, samples


def build_training_sampler(config: Config, samples: list[Sample]) -> Sampler:
    """The sampler of this process's share of every batch.

    Raises:
        DataError: The data are too few for one batch.
    """
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
    return sampler


def build_loader(
    config: Config, samples: list[Sample], labels: Labels, sampler: Sampler, embedder: Embedder
) -> TrainLoader:
    """The loader of augmented training batches."""
    return TrainLoader(
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


def check_parts(config: Config, objective: Objective) -> None:
    """Check the parts into which processes and `train.accumulate` divide a batch.

    It warns where a loss that compares images sees only a part of the batch.

    Raises:
        ConfigError: The parts are not of one size, or separate the images of an identity.
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
