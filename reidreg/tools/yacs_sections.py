"""Translate the keys of data, losses, optimisation, evaluation and logging."""

from __future__ import annotations

import re

from reidreg.config.optimizers import optimizer_class
from reidreg.config.sections import RunConfig
from reidreg.errors import ConfigError
from reidreg.parts.interfaces import DATASETS, IMAGENET_MEAN, IMAGENET_STD
from reidreg.parts.schema import options_of
from reidreg.tools.yacs_file import OldConfig, Section
from reidreg.tools.yacs_keys import KEYS


def dataset(old: OldConfig) -> Section:
    """The section `dataset`."""
    name = old["DATASETS.NAMES"]
    try:
        part = DATASETS[name]
    except ConfigError as error:
        raise ConfigError(f"DATASETS.NAMES: {error}") from error
    options = options_of(part)
    sources = {
        "root": "DATASETS.ROOT_DIR",
        "train_folder": "DATASETS.TRAIN_FOLDER",
        "query_folder": "DATASETS.QUERY_FOLDER",
        "gallery_folder": "DATASETS.GALLERY_FOLDER",
    }
    return {"name": name, **{ours: old[key] for ours, key in sources.items() if ours in options}}


def images(old: OldConfig) -> Section:
    """The section `input`."""
    size, test_size = old["INPUT.SIZE_TRAIN"], old["INPUT.SIZE_TEST"]
    if size != test_size:
        old.notes.append(
            f"input.size is INPUT.SIZE_TRAIN {size}, for evaluation too; "
            f"INPUT.SIZE_TEST {test_size} is left out"
        )
    section = {
        "size": size,
        "flip_prob": old["INPUT.PROB"],
        "padding": old["INPUT.PADDING"],
        "erasing_prob": old["INPUT.RE_PROB"],
    }
    mean, std = old["INPUT.PIXEL_MEAN"], old["INPUT.PIXEL_STD"]
    if mean != list(IMAGENET_MEAN):
        section["mean"] = mean
        old.notes.append(
            f"INPUT.PIXEL_MEAN {mean} was the fill of erased boxes too; here that stays ImageNet's"
        )
    if std != list(IMAGENET_STD):
        section["std"] = std
    return section


def sampler(old: OldConfig) -> Section:
    """The section `sampler`."""
    size = old["SOLVER.IMS_PER_BATCH"]
    if old["DATALOADER.SAMPLER"] == "softmax":
        return {"name": "random", "batch_size": size}
    return {"name": "identity", "batch_size": size, "instances": old["DATALOADER.NUM_INSTANCE"]}


def losses(old: OldConfig) -> Section:
    """The section `losses`."""
    with_center = old["MODEL.IF_WITH_CENTER"] == "yes"
    identity, triplet = _has_terms(old, with_center)
    terms: Section = {}
    if identity:
        smoothing = 0.1 if _smooths(old, with_center) else 0.0
        terms["id"] = {"name": "cross_entropy", "weight": 1.0, "label_smoothing": smoothing}
    if triplet:
        terms["triplet"] = {"name": "triplet", "weight": 1.0, "margin": old["SOLVER.MARGIN"]}
    if with_center:
        terms.update(_center(old))
    return terms


def _has_terms(old: OldConfig, with_center: bool) -> tuple[bool, bool]:
    """Whether there is a cross-entropy term, and whether there is a triplet term.

    The sampler decides; with a center loss, the type of the metric loss does.
    """
    kind, sampling = old["MODEL.METRIC_LOSS_TYPE"], old["DATALOADER.SAMPLER"]
    if with_center and kind != "triplet":
        return True, kind == "triplet_center"
    if with_center:
        old.notes.append(
            "MODEL.IF_WITH_CENTER 'yes' with MODEL.METRIC_LOSS_TYPE 'triplet' crashed; here "
            f"the center loss joins those of DATALOADER.SAMPLER {sampling!r}"
        )
    elif kind != "triplet":
        old.notes.append(
            f"MODEL.METRIC_LOSS_TYPE {kind!r} needs MODEL.IF_WITH_CENTER 'yes'; here the losses "
            f"are those of DATALOADER.SAMPLER {sampling!r}, without a center loss"
        )
    return sampling != "triplet", sampling != "softmax"


def _smooths(old: OldConfig, with_center: bool) -> bool:
    smooths = old.is_on("MODEL.IF_LABELSMOOTH", "on")
    if not smooths or with_center or old["DATALOADER.SAMPLER"] != "softmax":
        return smooths
    old.notes.append(
        "losses.id.label_smoothing is 0: MODEL.IF_LABELSMOOTH was ignored with DATALOADER.SAMPLER "
        "'softmax'; 0.1 is what it stands for"
    )
    return False


def _center(old: OldConfig) -> Section:
    weight = old["SOLVER.CENTER_LOSS_WEIGHT"]
    if weight == 0:
        old.notes.append("SOLVER.CENTER_LOSS_WEIGHT 0: the center loss is left out")
        return {}
    return {"center": {"name": "center", "weight": weight, "lr": old["SOLVER.CENTER_LR"]}}


def optimizer(old: OldConfig) -> Section:
    """The section `optimizer`."""
    name = old["SOLVER.OPTIMIZER_NAME"].lower()
    try:
        optimizer_class(name)
    except ConfigError as error:
        reason = str(error).removeprefix("optimizer.name: ")
        raise ConfigError(f"SOLVER.OPTIMIZER_NAME: {reason}") from error
    section = {
        "name": name,
        "lr": old["SOLVER.BASE_LR"],
        "weight_decay": old["SOLVER.WEIGHT_DECAY"],
        "bias_lr_factor": old["SOLVER.BIAS_LR_FACTOR"],
        "bias_weight_decay": old["SOLVER.WEIGHT_DECAY_BIAS"],
    }
    if name == "sgd":
        section["momentum"] = old["SOLVER.MOMENTUM"]
    return section


def schedule(old: OldConfig) -> Section:
    """The section `schedule`."""
    # WARMUP_ITERS counts epochs, despite its name.
    return {
        "name": "multistep",
        "milestones": old["SOLVER.STEPS"],
        "gamma": old["SOLVER.GAMMA"],
        "warmup_epochs": old["SOLVER.WARMUP_ITERS"],
        "warmup_factor": old["SOLVER.WARMUP_FACTOR"],
        "warmup_method": old["SOLVER.WARMUP_METHOD"],
    }


def evaluator(old: OldConfig) -> Section:
    """The section `evaluator`."""
    rerank = old["TEST.RE_RANKING"] == "yes"
    if rerank:
        old.notes.append(
            "evaluator.rerank is true: training's evaluations re-rank too, not only those of a "
            "checkpoint"
        )
    if old["TEST.WEIGHT"]:
        old.notes.append(
            f"TEST.WEIGHT {old['TEST.WEIGHT']!r} is left out: a checkpoint of ours is given as "
            "reidreg evaluate --ckpt FILE"
        )
    metric = "cosine" if old.is_on("TEST.FEAT_NORM", "yes") else "euclidean"
    return {"name": "retrieval", "metric": metric, "rerank": rerank}


def train(old: OldConfig) -> Section:
    """The section `train`."""
    old.notes.append(
        "train.precision is fp32, as it was; auto is bf16 where the hardware has it, and faster"
    )
    return {
        "epochs": old["SOLVER.MAX_EPOCHS"],
        "eval_every": old["SOLVER.EVAL_PERIOD"],
        "checkpoint_every": old["SOLVER.CHECKPOINT_PERIOD"],
        "log_every": old["SOLVER.LOG_PERIOD"],
        "workers": old["DATALOADER.NUM_WORKERS"],
        "eval_batch_size": old["TEST.IMS_PER_BATCH"],
        "precision": "fp32",
        "device": _device(old),
    }


def _device(old: OldConfig) -> str:
    device: str = old["MODEL.DEVICE"]
    chosen = old["MODEL.DEVICE_ID"]
    if "MODEL.DEVICE_ID" in old.given and chosen:
        old.notes.append(
            f"MODEL.DEVICE_ID {chosen!r} is left out: set CUDA_VISIBLE_DEVICES to it in the "
            "environment of the command"
        )
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"MODEL.DEVICE: expected 'cuda' or 'cpu', got {device!r}")
    return "auto" if device == "cuda" else device


def wandb(old: OldConfig) -> Section:
    """The section `wandb`."""
    if "WANDB.ENABLE" not in old.given:
        old.notes.append(
            "wandb.mode is online: W&B was on unless WANDB.ENABLE was False; disabled turns it off"
        )
    return {
        "mode": "online" if old["WANDB.ENABLE"] else "disabled",
        "project": old["WANDB.PROJECT"] or KEYS["WANDB.PROJECT"].default,
        "entity": old["WANDB.ENTITY"] or None,
        "name": old["WANDB.NAME"] or None,
        "tags": list(old["WANDB.TAGS"]),
    }


def output_dir(old: OldConfig) -> str:
    """The option `output_dir`."""
    return old["OUTPUT_DIR"] or RunConfig.output_dir
