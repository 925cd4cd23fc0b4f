"""A run's configuration: typed, resolved, and plain enough to be stored in a checkpoint.

`reidreg.config.parsing` makes one from files and flags; nothing here imports torch, so that
`reidreg fit --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Gt, Interval

# The upper limits are far above any useful value: they catch typing errors.
Positive = Annotated[int, Interval(ge=1, le=1_000_000)]
Pixels = Annotated[int, Interval(ge=1, le=4096)]
Probability = Annotated[float, Interval(ge=0, le=1)]
Weight = Annotated[float, Interval(ge=0, le=1_000_000)]
CacheSetting = Literal["auto", "memory", "disk", "none"]
_DEVICE = re.compile(r"auto|(cpu|cuda|mps)(:\d+)?")


@dataclass(frozen=True)
class PartConfig:
    """A registered part and its options.

    Args:
        name: Its registered name.
        options: Every option of its signature, resolved.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, **plain(self.options)}


@dataclass(frozen=True)
class LossConfig(PartConfig):
    """One term of the loss.

    Args:
        weight: The factor on the term; 0 turns it off.
    """

    weight: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"name": self.name, "weight": self.weight, **plain(self.options)}


@dataclass(frozen=True)
class InputConfig:
    """How an image becomes the model's input.

    Args:
        size: Height and width in pixels, for training and evaluation alike.
        flip_prob: Probability of a horizontal flip in training.
        padding: Pixels of black on every side before the random crop of training; 0 for none.
        erasing_prob: Probability of erasing a random box in training.
        flip_test: In evaluation, average the features of an image and its mirror image.
        mean: Mean of the channels; null takes what the backbone expects.
        std: Standard deviation of the channels; null takes what the backbone expects.
    """

    size: tuple[Pixels, Pixels] = (256, 128)
    flip_prob: Probability = 0.5
    padding: Annotated[int, Interval(ge=0, le=1024)] = 10
    erasing_prob: Probability = 0.5
    flip_test: bool = False
    mean: tuple[float, float, float] | None = None
    std: tuple[Annotated[float, Gt(0)], Annotated[float, Gt(0)], Annotated[float, Gt(0)]] | None = (
        None
    )


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, one of torch.optim's or timm's by name.

    Args:
        name: Name in lower case, such as adam, adamw, sgd, rmsprop, lamb.
        lr: Base learning rate, which the schedule multiplies.
        weight_decay: Weight decay, also of normalisation layers and biases.
        bias_lr_factor: Factor on the learning rate of biases.
        bias_weight_decay: Weight decay of biases; null means weight_decay.
        momentum: Momentum; null is 0.9 for sgd and otherwise the optimizer's own default.
        betas: Coefficients of the running averages; null is the optimizer's own default.
        layer_decay: Factor on the learning rate from each layer of the backbone to the one before
            it, about 0.65 to 0.9 for transformers; null is the same rate for all.
        clip_norm: Maximum norm of the gradient of all parameters together; null does not limit it.
    """

    name: str = "adam"
    lr: Annotated[float, Interval(gt=0, le=1)] = 3.5e-4
    weight_decay: Weight = 5e-4
    bias_lr_factor: Annotated[float, Interval(gt=0, le=1000)] = 1.0
    bias_weight_decay: Weight | None = None
    momentum: Annotated[float, Interval(ge=0, lt=1)] | None = None
    betas: (
        tuple[Annotated[float, Interval(ge=0, lt=1)], Annotated[float, Interval(ge=0, lt=1)]] | None
    ) = None
    layer_decay: Annotated[float, Interval(gt=0, le=1)] | None = None
    clip_norm: Annotated[float, Gt(0)] | None = None


@dataclass(frozen=True)
class ValidationConfig:
    """Training identities held out to choose the best model by, instead of the test set.

    Args:
        identities: Share of the training identities to hold out; 0 evaluates on query and gallery.
        seed: Seed of the choice of identities; runs that differ in train.seed hold out the same.
    """

    identities: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0


@dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Args:
        epochs: Epochs to train.
        eval_every: Epochs between evaluations; the last epoch is always evaluated.
        eval_untrained: Evaluate before the first epoch too, to see what training adds.
        checkpoint_every: Epochs between kept checkpoints; `last` is written every epoch.
        log_every: Steps between log lines.
        workers: Processes that load images; auto is one for each core, at most 8. Training uses
            none if its images are cached.
        cache: Where decoded training images are kept, so that later epochs and other processes of
            the machine need not decode them; auto is memory if they take no more than half of what
            is available, else disk ($REIDREG_CACHE, or ~/.cache/reidreg) if there is room.
        eval_batch_size: Images in a batch of evaluation and extraction.
        precision: Precision of the backbone; auto is bf16 if the hardware has it, fp16 with loss
            scaling on older CUDA cards, else fp32.
        compile: Compile the model with torch.compile, which takes minutes and then saves time.
        accumulate: Parts that each batch is split into, to save memory; one step is made for all of
            them, but batch normalisation and losses that compare images see one part at a time.
        ema_decay: Decay of an exponential moving average of the weights, which is then evaluated
            and kept as `best`; 0 for none, otherwise for example 0.999.
        gather: With several processes, compute every loss on the batch of all of them instead of on
            each process's share.
        sync_batchnorm: With several processes on CUDA, normalise over the batch of all of them.
        rank_timeout: Seconds that processes wait for each other within a step before all end.
        freeze: Regular expressions; parameters whose names they match are not trained at first.
        freeze_epochs: Epochs during which they are not trained.
        device: auto, cpu, cuda, cuda:N or mps; auto is cuda where there is one, else cpu.
        seed: Seed of everything that is random.
        preflight: Try a step and an evaluation of a few identities before the first epoch.
    """

    epochs: Positive = 120
    eval_every: Positive = 40
    eval_untrained: bool = False
    checkpoint_every: Positive = 40
    log_every: Positive = 20
    workers: Annotated[int, Interval(ge=0, le=1024)] | Literal["auto"] = "auto"
    cache: CacheSetting = "auto"
    eval_batch_size: Positive = 128
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: bool = False
    accumulate: Positive = 1
    ema_decay: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    gather: bool = False
    sync_batchnorm: bool = False
    rank_timeout: Annotated[float, Interval(gt=0, le=86_400)] = 45.0
    freeze: list[str] = field(default_factory=list)
    freeze_epochs: Annotated[int, Interval(ge=0, le=1_000_000)] = 0
    device: str = "auto"
    seed: Annotated[int, Interval(ge=0, lt=2**32)] = 0
    preflight: bool = True

    @staticmethod
    def check(options: dict[str, Any]) -> None:
        """Raise ValueError for an invalid device or regular expression.

        Whether the device exists, and what the expressions match, is checked later.
        """
        device = options["device"]
        if not _DEVICE.fullmatch(device):
            raise ValueError(f"device: {device[:60]!r} is not auto, cpu, cuda, cuda:N or mps")
        for pattern in options["freeze"]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(
                    f"freeze: {pattern!r} is not a regular expression ({error})"
                ) from error


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases.

    Args:
        mode: online, offline or disabled; online falls back to offline without a login or network.
        project: The project's name.
        entity: The team or user; null is your default.
        name: The run's name; null lets W&B choose one.
        tags: The run's tags.
    """

    mode: Literal["online", "offline", "disabled"] = "disabled"
    project: str = "reidreg"
    entity: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class RunConfig:
    """The run itself.

    Args:
        init_from: A reidreg checkpoint whose weights initialise this new run.
        output_dir: The folder that the run's files go to.
    """

    init_from: str | None = None
    output_dir: str = "log/run"


# The sections with fixed options, and those that hold a registered part, in a file's order.
FIXED_SECTIONS: dict[str, type] = {
    "input": InputConfig,
    "optimizer": OptimizerConfig,
    "validation": ValidationConfig,
    "train": TrainConfig,
    "wandb": WandbConfig,
}
# Figures of training in the log beside the terms of the loss, under `train/`.
TRAINING_FIGURES = (
    "loss",
    "accuracy",
    "lr",
    "images_per_second",
    "data_wait",
    "peak_memory_gib",
)
PART_SECTIONS = ("dataset", "sampler", "backbone", "head", "evaluator")
ORDER = (
    "dataset",
    "input",
    "sampler",
    "backbone",
    "head",
    "losses",
    "optimizer",
    "schedule",
    "evaluator",
    "validation",
    "train",
    "wandb",
    "init_from",
    "output_dir",
)


@dataclass(frozen=True)
class Config:
    """A resolved configuration; see the sections' own classes for their options."""

    dataset: PartConfig
    input: InputConfig
    sampler: PartConfig
    backbone: PartConfig
    head: PartConfig
    losses: dict[str, LossConfig]
    optimizer: OptimizerConfig
    schedule: PartConfig
    evaluator: PartConfig
    validation: ValidationConfig
    train: TrainConfig
    wandb: WandbConfig
    init_from: str | None = None
    output_dir: str = "log/run"

    def as_dict(self) -> dict[str, Any]:
        """The configuration as plain mappings, lists, numbers and strings, in a file's order."""
        values = {
            **{name: getattr(self, name).as_dict() for name in (*PART_SECTIONS, "schedule")},
            **{name: plain(dataclasses.asdict(getattr(self, name))) for name in FIXED_SECTIONS},
            "losses": {term: loss.as_dict() for term, loss in self.losses.items()},
            "init_from": self.init_from,
            "output_dir": self.output_dir,
        }
        return {name: values[name] for name in ORDER}


def config_from_dict(values: dict[str, Any]) -> Config:
    """The inverse of `Config.as_dict`, for values that were checked already."""

    def part(section: str) -> PartConfig:
        options = dict(values[section])
        return PartConfig(options.pop("name"), options)

    def loss(options: dict[str, Any]) -> LossConfig:
        options = dict(options)
        return LossConfig(options.pop("name"), weight=options.pop("weight"), options=options)

    # Checkpoints of earlier versions lack sections that were added later.
    fixed: dict[str, Any] = {
        name: cls(**values.get(name, {})) for name, cls in FIXED_SECTIONS.items()
    }
    parts: dict[str, Any] = {name: part(name) for name in (*PART_SECTIONS, "schedule")}
    return Config(
        **parts,
        **fixed,
        losses={term: loss(options) for term, options in values["losses"].items()},
        init_from=values["init_from"],
        output_dir=values["output_dir"],
    )


def plain(value: Any) -> Any:
    """A value with all tuples in it turned into lists, as in YAML and JSON."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def advice(config: Config) -> list[str]:
    """Warnings about settings that are allowed but probably not intended, a line each."""
    lines = []
    train, schedule = config.train, config.schedule.options
    warmup = schedule.get("warmup_epochs", 0)
    if warmup > train.epochs:
        lines.append(
            f"schedule.warmup_epochs {warmup} > train.epochs {train.epochs}: "
            "the full learning rate is never reached"
        )
    late = [epoch for epoch in schedule.get("milestones", ()) if epoch > train.epochs]
    if late and warmup <= train.epochs:
        lines.append(f"schedule.milestones {late} come after the last epoch ({train.epochs})")
    if bool(train.freeze) != bool(train.freeze_epochs):
        lines.append("train.freeze and train.freeze_epochs do nothing without each other")
    off = [term for term, loss in config.losses.items() if loss.weight == 0]
    if off:
        lines.append(f"losses turned off by weight 0: {', '.join(off)}")
    return lines
