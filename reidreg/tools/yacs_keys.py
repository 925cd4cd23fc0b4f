"""The table of reid-strong-baseline's keys: their defaults, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from reidreg.parts.interfaces import IMAGENET_MEAN, IMAGENET_STD
from reidreg.tools.yacs_values import (
    Reader,
    boolean,
    device_id,
    list_of,
    number,
    number_or_null,
    one_of,
    single_name,
    text,
    whole_number,
    word,
)


@dataclass(frozen=True)
class Key:
    """A key of reid-strong-baseline.

    Args:
        default: Its value if a file leaves it out.
        read: Turns a file's value into what the key holds.
        live: Whether anything in reid-strong-baseline reads it when training or evaluating.
    """

    default: Any
    read: Reader
    live: bool = True


def _unused() -> Key:
    """A key that nothing reads, whose value may be anything."""
    return Key(None, lambda value: value, live=False)


_SIZE = list_of(whole_number, "[height, width] in pixels", length=2)
_CHANNELS = list_of(number, "three numbers, one a channel", length=3)

# Every key of config/defaults.py, with its default there.
KEYS: Mapping[str, Key] = {
    "MODEL.DEVICE": Key("cuda", text),
    "MODEL.DEVICE_ID": Key("0", device_id),
    "MODEL.NAME": Key("resnet50", text),
    "MODEL.LAST_STRIDE": Key(1, one_of(1, 2)),
    "MODEL.PRETRAIN_PATH": Key("", text),
    "MODEL.PRETRAIN_CHOICE": Key("imagenet", one_of("imagenet", "self")),
    "MODEL.NECK": Key("bnneck", one_of("bnneck", "no")),
    "MODEL.IF_WITH_CENTER": Key("no", one_of("yes", "no")),
    "MODEL.METRIC_LOSS_TYPE": Key("triplet", one_of("triplet", "center", "triplet_center")),
    "MODEL.IF_LABELSMOOTH": Key("on", word("on")),
    "INPUT.SIZE_TRAIN": Key([384, 128], _SIZE),
    "INPUT.SIZE_TEST": Key([384, 128], _SIZE),
    "INPUT.PROB": Key(0.5, number),
    "INPUT.RE_PROB": Key(0.5, number),
    "INPUT.PIXEL_MEAN": Key(list(IMAGENET_MEAN), _CHANNELS),
    "INPUT.PIXEL_STD": Key(list(IMAGENET_STD), _CHANNELS),
    "INPUT.PADDING": Key(10, whole_number),
    "DATASETS.NAMES": Key("market1501", single_name),
    "DATASETS.ROOT_DIR": Key("./data", text),
    "DATASETS.TRAIN_FOLDER": Key("bounding_box_train_1", text),
    "DATASETS.QUERY_FOLDER": Key("query", text),
    "DATASETS.GALLERY_FOLDER": Key("bounding_box_test", text),
    "DATALOADER.NUM_WORKERS": Key(8, whole_number),
    "DATALOADER.SAMPLER": Key("softmax", one_of("softmax", "triplet", "softmax_triplet")),
    "DATALOADER.NUM_INSTANCE": Key(16, whole_number),
    "SOLVER.OPTIMIZER_NAME": Key("Adam", text),
    "SOLVER.MAX_EPOCHS": Key(50, whole_number),
    "SOLVER.BASE_LR": Key(3e-4, number),
    "SOLVER.BIAS_LR_FACTOR": Key(2.0, number),
    "SOLVER.MOMENTUM": Key(0.9, number),
    "SOLVER.MARGIN": Key(0.3, number_or_null),
    "SOLVER.CENTER_LR": Key(0.5, number),
    "SOLVER.CENTER_LOSS_WEIGHT": Key(5e-4, number),
    "SOLVER.CLUSTER_MARGIN": _unused(),
    "SOLVER.RANGE_K": _unused(),
    "SOLVER.RANGE_MARGIN": _unused(),
    "SOLVER.RANGE_ALPHA": _unused(),
    "SOLVER.RANGE_BETA": _unused(),
    "SOLVER.RANGE_LOSS_WEIGHT": _unused(),
    "SOLVER.WEIGHT_DECAY": Key(5e-4, number),
    "SOLVER.WEIGHT_DECAY_BIAS": Key(0.0, number),
    "SOLVER.STEPS": Key([30, 55], list_of(whole_number, "a list of epochs")),
    "SOLVER.GAMMA": Key(0.1, number),
    "SOLVER.WARMUP_FACTOR": Key(1 / 3, number),
    "SOLVER.WARMUP_ITERS": Key(500, whole_number),
    "SOLVER.WARMUP_METHOD": Key("linear", one_of("linear", "constant")),
    "SOLVER.CHECKPOINT_PERIOD": Key(50, whole_number),
    "SOLVER.LOG_PERIOD": Key(100, whole_number),
    "SOLVER.EVAL_PERIOD": Key(50, whole_number),
    "SOLVER.IMS_PER_BATCH": Key(64, whole_number),
    "TEST.IMS_PER_BATCH": Key(128, whole_number),
    "TEST.RE_RANKING": Key("no", one_of("yes", "no")),
    "TEST.WEIGHT": Key("", text),
    "TEST.NECK_FEAT": Key("after", one_of("after", "before")),
    "TEST.FEAT_NORM": Key("yes", word("yes")),
    "OUTPUT_DIR": Key("", text),
    "WANDB.ENABLE": Key(True, boolean),
    "WANDB.PROJECT": Key("reid-strong-baseline", text),
    "WANDB.ENTITY": Key("", text),
    "WANDB.NAME": Key("", text),
    "WANDB.TAGS": Key([], list_of(text, "a list of text")),
    "WANDB.SYNC_TENSORBOARD": _unused(),
    "WANDB.SAVE_CODE": _unused(),
}
