"""A configuration of reid-strong-baseline (yacs) as one of ours.

Every key of the old file is translated, or named in a note that says why not, or refused. A key
that the file leaves out has the default of reid-strong-baseline, so that the result trains the
same thing.
"""

from __future__ import annotations

import ast
import difflib
import math
import re
import reprlib
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from reidreg.config.optimizers import optimizer_class
from reidreg.config.parsing import load_config
from reidreg.config.sections import RunConfig, advice
from reidreg.config.yamlfile import dump_yaml, read_yaml
from reidreg.errors import ConfigError, did_you_mean
from reidreg.parts.interfaces import BACKBONES, DATASETS, IMAGENET_MEAN, IMAGENET_STD
from reidreg.parts.schema import options_of

Section = dict[str, Any]
Reader = Callable[[Any], Any]


@dataclass(frozen=True)
class Imported:
    """A translated configuration.

    Args:
        values: The configuration, nested, as `load_config` takes it.
        notes: What a user should know of the translation, a line each.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def import_config(path: str | Path) -> Imported:
    """Translate a configuration of reid-strong-baseline.

    Args:
        path: The old file, YAML as yacs reads it.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, a value is malformed, or nothing
            registered can stand for what it names.
    """
    old = _Old(_read(Path(path).expanduser()))
    values = {section: translate(old) for section, translate in _SECTIONS.items()}
    notes = [*old.notes, *_left_out(old), *_outlook(values)]
    return Imported(values, tuple(notes))


def render(imported: Imported, source: str) -> str:
    """The YAML text of a translated configuration, with its notes as comments on top.

    Args:
        imported: The configuration.
        source: Where it came from, for the first comment.
    """
    comments = [f"# Translated from {source!r}, a configuration of reid-strong-baseline."]
    comments += [f"# - {note}" for note in imported.notes]
    return "\n".join(comments) + "\n" + dump_yaml(imported.values)


# --------------------------------------------------------------------- values
#
# A reader turns a value into what its key holds, or raises ValueError saying what it expected.


def _literal(value: Any) -> Any:
    """A text that spells a Python literal as that literal, as yacs reads it; else the value."""
    # The limit is far above any option's length, and below what overruns the parser's stack.
    if not isinstance(value, str) or len(value) > 1000:
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd escapes, such as in a Windows path
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value


def _text(value: Any) -> str:
    literal = _literal(value)
    if isinstance(literal, str):
        return literal.strip()
    if isinstance(value, str):
        return value.strip()
    raise ValueError("text")


def _device_id(value: Any) -> str:
    return str(value) if type(value) is int else _text(value)


def _whole(value: Any) -> int:
    literal = _literal(value)
    if type(literal) is not int:
        raise ValueError("a whole number")
    return literal


def _number(value: Any) -> float:
    literal = _literal(value)
    if isinstance(literal, bool) or not isinstance(literal, (int, float)):
        raise ValueError("a number")
    try:
        number = float(literal)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError("a finite number")
    return number


def _number_or_null(value: Any) -> float | None:
    return None if _literal(value) is None else _number(value)


def _boolean(value: Any) -> bool:
    literal = _literal(value)
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(literal, str):
        literal = words.get(literal.strip().lower())
    if not isinstance(literal, bool):
        raise ValueError("True or False")
    return literal


def _word(on: str) -> Reader:
    """Text in which YAML's true, an unquoted `on` or `yes`, is the word that turns a key on."""

    def read(value: Any) -> str:
        literal = _literal(value)
        if isinstance(literal, bool):
            return on if literal else "no"
        return _text(value)

    return read


def _one_of(*choices: Any) -> Reader:
    *first, last = map(repr, choices)
    expected = f"{', '.join(first)} or {last}"

    def read(value: Any) -> Any:
        literal = _literal(value)
        if isinstance(literal, bool):
            literal = "yes" if literal else "no"
        if isinstance(literal, str):
            literal = literal.strip()
        if isinstance(literal, float) or literal not in choices:
            raise ValueError(expected)
        return literal

    return read


def _list_of(read_item: Reader, expected: str, length: int | None = None) -> Reader:
    def read(value: Any) -> list[Any]:
        literal = _literal(value)
        if not isinstance(literal, (list, tuple)) or length not in (None, len(literal)):
            raise ValueError(expected)
        try:
            return [read_item(item) for item in literal]
        except ValueError as error:
            raise ValueError(expected) from error

    return read


def _only_name(value: Any) -> str:
    literal = _literal(value)
    if isinstance(literal, (list, tuple)) and len(literal) == 1:
        value = literal[0]
    try:
        return _text(value)
    except ValueError as error:
        raise ValueError("the name of one data set") from error


# --------------------------------------------------------------------- keys


@dataclass(frozen=True)
class Key:
    """A key of reid-strong-baseline.

    Args:
        default: What it is where a file leaves it out.
        read: Turns a file's value into what the key holds.
        live: Whether anything that trains or evaluates reads it.
    """

    default: Any
    read: Reader
    live: bool = True


def _dead() -> Key:
    return Key(None, lambda value: value, live=False)


_SIZE = _list_of(_whole, "[height, width] in pixels", length=2)
_CHANNELS = _list_of(_number, "three numbers, one a channel", length=3)

# Every key, with the default of config/defaults.py.
KEYS: Mapping[str, Key] = {
    "MODEL.DEVICE": Key("cuda", _text),
    "MODEL.DEVICE_ID": Key("0", _device_id),
    "MODEL.NAME": Key("resnet50", _text),
    "MODEL.LAST_STRIDE": Key(1, _one_of(1, 2)),
    "MODEL.PRETRAIN_PATH": Key("", _text),
    "MODEL.PRETRAIN_CHOICE": Key("imagenet", _one_of("imagenet", "self")),
    "MODEL.NECK": Key("bnneck", _one_of("bnneck", "no")),
    "MODEL.IF_WITH_CENTER": Key("no", _one_of("yes", "no")),
    "MODEL.METRIC_LOSS_TYPE": Key("triplet", _one_of("triplet", "center", "triplet_center")),
    "MODEL.IF_LABELSMOOTH": Key("on", _word("on")),
    "INPUT.SIZE_TRAIN": Key([384, 128], _SIZE),
    "INPUT.SIZE_TEST": Key([384, 128], _SIZE),
    "INPUT.PROB": Key(0.5, _number),
    "INPUT.RE_PROB": Key(0.5, _number),
    "INPUT.PIXEL_MEAN": Key(list(IMAGENET_MEAN), _CHANNELS),
    "INPUT.PIXEL_STD": Key(list(IMAGENET_STD), _CHANNELS),
    "INPUT.PADDING": Key(10, _whole),
    "DATASETS.NAMES": Key("market1501", _only_name),
    "DATASETS.ROOT_DIR": Key("./data", _text),
    "DATASETS.TRAIN_FOLDER": Key("bounding_box_train_1", _text),
    "DATASETS.QUERY_FOLDER": Key("query", _text),
    "DATASETS.GALLERY_FOLDER": Key("bounding_box_test", _text),
    "DATALOADER.NUM_WORKERS": Key(8, _whole),
    "DATALOADER.SAMPLER": Key("softmax", _one_of("softmax", "triplet", "softmax_triplet")),
    "DATALOADER.NUM_INSTANCE": Key(16, _whole),
    "SOLVER.OPTIMIZER_NAME": Key("Adam", _text),
    "SOLVER.MAX_EPOCHS": Key(50, _whole),
    "SOLVER.BASE_LR": Key(3e-4, _number),
    "SOLVER.BIAS_LR_FACTOR": Key(2.0, _number),
    "SOLVER.MOMENTUM": Key(0.9, _number),
    "SOLVER.MARGIN": Key(0.3, _number_or_null),
    "SOLVER.CENTER_LR": Key(0.5, _number),
    "SOLVER.CENTER_LOSS_WEIGHT": Key(5e-4, _number),
    "SOLVER.CLUSTER_MARGIN": _dead(),
    "SOLVER.RANGE_K": _dead(),
    "SOLVER.RANGE_MARGIN": _dead(),
    "SOLVER.RANGE_ALPHA": _dead(),
    "SOLVER.RANGE_BETA": _dead(),
    "SOLVER.RANGE_LOSS_WEIGHT": _dead(),
    "SOLVER.WEIGHT_DECAY": Key(5e-4, _number),
    "SOLVER.WEIGHT_DECAY_BIAS": Key(0.0, _number),
    "SOLVER.STEPS": Key([30, 55], _list_of(_whole, "a list of epochs")),
    "SOLVER.GAMMA": Key(0.1, _number),
    "SOLVER.WARMUP_FACTOR": Key(1 / 3, _number),
    "SOLVER.WARMUP_ITERS": Key(500, _whole),
    "SOLVER.WARMUP_METHOD": Key("linear", _one_of("linear", "constant")),
    "SOLVER.CHECKPOINT_PERIOD": Key(50, _whole),
    "SOLVER.LOG_PERIOD": Key(100, _whole),
    "SOLVER.EVAL_PERIOD": Key(50, _whole),
    "SOLVER.IMS_PER_BATCH": Key(64, _whole),
    "TEST.IMS_PER_BATCH": Key(128, _whole),
    "TEST.RE_RANKING": Key("no", _one_of("yes", "no")),
    "TEST.WEIGHT": Key("", _text),
    "TEST.NECK_FEAT": Key("after", _one_of("after", "before")),
    "TEST.FEAT_NORM": Key("yes", _word("yes")),
    "OUTPUT_DIR": Key("", _text),
    "WANDB.ENABLE": Key(True, _boolean),
    "WANDB.PROJECT": Key("reid-strong-baseline", _text),
    "WANDB.ENTITY": Key("", _text),
    "WANDB.NAME": Key("", _text),
    "WANDB.TAGS": Key([], _list_of(_text, "a list of text")),
    "WANDB.SYNC_TENSORBOARD": _dead(),
    "WANDB.SAVE_CODE": _dead(),
}
_OLD_SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


class _Old:
    """An old configuration, which keeps count of the keys that the translation has looked at.

    Args:
        given: Key to value, for those that the file gives.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.used: set[str] = set()
        self.notes: list[str] = []

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return self.given.get(key, KEYS[key].default)

    def is_on(self, key: str, on: str) -> bool:
        """Whether a key is the one word that turns it on; any other turned it off."""
        word = self[key]
        if word not in (on, "no", "off", ""):
            self.notes.append(f"{key} {word!r}: only {on!r} turned it on, so it is off")
        return bool(word == on)


def _read(path: Path) -> dict[str, Any]:
    """The keys of a file, dotted, with their values checked."""
    flat: dict[str, Any] = {}
    for name, content in read_yaml(path).items():
        if name not in _OLD_SECTIONS:
            flat[str(name)] = content
        elif isinstance(content, Mapping):
            flat.update({f"{name}.{key}": value for key, value in content.items()})
        elif content is not None:
            raise ConfigError(f"{name}: expected keys and values, got {_brief(content)}")
    return {key: _checked(key, value) for key, value in flat.items()}


def _checked(key: str, value: Any) -> Any:
    if key not in KEYS:
        raise ConfigError(f"{key}: reid-strong-baseline has no such key{_nearest(key)}")
    try:
        return KEYS[key].read(value)
    except ValueError as error:
        raise ConfigError(f"{key}: expected {error}, got {_brief(value)}") from error


def _nearest(key: str) -> str:
    """A hint with the key that was probably meant: one of its own section, or of another."""
    section, _, name = key.upper().rpartition(".")
    everywhere = {known.rpartition(".")[2]: known for known in KEYS}
    own = {known.rpartition(".")[2]: known for known in KEYS if known.startswith(f"{section}.")}
    own = own or {name: name for name in (*_OLD_SECTIONS, "OUTPUT_DIR")}
    for names in (own, everywhere):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if near:
            return f"; did you mean {names[near[0]]!r}?"
    return did_you_mean(name, own)


def _brief(value: Any) -> str:
    return reprlib.repr(value)


# --------------------------------------------------------------------- sections


def _dataset(old: _Old) -> Section:
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


def _input(old: _Old) -> Section:
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


def _sampler(old: _Old) -> Section:
    size = old["SOLVER.IMS_PER_BATCH"]
    if old["DATALOADER.SAMPLER"] == "softmax":
        return {"name": "random", "batch_size": size}
    return {"name": "identity", "batch_size": size, "instances": old["DATALOADER.NUM_INSTANCE"]}


RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# timm's legacy_ models are the very port, with the very weights, that reid-strong-baseline took.
TIMM_MODELS = {
    "se_resnet50": "legacy_seresnet50",
    "se_resnet101": "legacy_seresnet101",
    "se_resnet152": "legacy_seresnet152",
    "se_resnext50": "legacy_seresnext50_32x4d",
    "se_resnext50_32x4d": "legacy_seresnext50_32x4d",
    "se_resnext101": "legacy_seresnext101_32x4d",
    "se_resnext101_32x4d": "legacy_seresnext101_32x4d",
    "senet154": "legacy_senet154",
}
IBN = "resnet50_ibn_a"


def _backbone(old: _Old) -> Section:
    name = old["MODEL.NAME"]
    if name in RESNETS:
        old.notes.append(
            "backbone.stem_relu is false: the published reid-strong-baseline lacks the ReLU of the "
            "stem; true is the corrected model"
        )
        stride = old["MODEL.LAST_STRIDE"]
        return {
            "name": name,
            "pretrained": _pretrained(old),
            "last_stride": stride,
            "stem_relu": False,
        }
    if name in TIMM_MODELS:
        stride = old["MODEL.LAST_STRIDE"]
        if stride == 1:
            old.notes.append(
                "MODEL.LAST_STRIDE 1 is left out: backbone timm keeps the model's own stride of 2 "
                "in its last stage, so the map has half the height and width"
            )
        return {"name": "timm", "model": TIMM_MODELS[name], "pretrained": _pretrained(old)}
    if name == IBN:
        return _ibn(old)
    models = [*RESNETS, *TIMM_MODELS, IBN]
    raise ConfigError(
        f"MODEL.NAME: reid-strong-baseline has no model {name!r}{did_you_mean(name, models)}"
    )


def _ibn(old: _Old) -> Section:
    if IBN not in BACKBONES:
        raise ConfigError(
            f"MODEL.NAME: no registered backbone implements {IBN!r}; install a plugin that "
            f"registers it under that name, or choose {', '.join(RESNETS)}"
        )
    options = options_of(BACKBONES[IBN])
    section = {"name": IBN}
    if "pretrained" in options:
        section["pretrained"] = _pretrained(old)
    if "last_stride" in options:
        section["last_stride"] = old["MODEL.LAST_STRIDE"]
    return section


def _pretrained(old: _Old) -> str:
    if old["MODEL.PRETRAIN_CHOICE"] == "self":
        return "none"
    path: str = old["MODEL.PRETRAIN_PATH"]
    if not path:
        return "imagenet"
    if is_download(path):
        old.notes.append(
            f"backbone.pretrained is imagenet: MODEL.PRETRAIN_PATH {path!r} names a download of "
            "those weights, which is made here when it is needed"
        )
        return "imagenet"
    old.notes.append(
        f"backbone.pretrained is the file of MODEL.PRETRAIN_PATH {path!r}, with tensors alone by "
        "torchvision's or timm's names; imagenet would download the usual weights"
    )
    return path


def is_download(path: str) -> bool:
    """Whether a path is that of ImageNet weights which torchvision or a port has downloaded.

    They lie in torch's cache, or bear the name of their architecture: `resnet50-19c8e357.pth`.
    """
    parts = PureWindowsPath(path).parts  # which splits at both kinds of slash
    models = "|".join(map(re.escape, (*RESNETS, *TIMM_MODELS)))
    named = re.fullmatch(rf"({models})(-[0-9a-f]{{8}})?\.pth", parts[-1] if parts else "")
    return named is not None or ".torch" in parts or {".cache", "torch"} <= set(parts)


def _head(old: _Old) -> Section:
    if old["MODEL.NECK"] == "no":
        return {"name": "linear"}
    return {"name": "bnneck", "feature": old["TEST.NECK_FEAT"]}


def _losses(old: _Old) -> Section:
    with_center = old["MODEL.IF_WITH_CENTER"] == "yes"
    identity, triplet = _terms(old, with_center)
    losses: Section = {}
    if identity:
        smoothing = 0.1 if _smooths(old, with_center) else 0.0
        losses["id"] = {"name": "cross_entropy", "weight": 1.0, "label_smoothing": smoothing}
    if triplet:
        losses["triplet"] = {"name": "triplet", "weight": 1.0, "margin": old["SOLVER.MARGIN"]}
    if with_center:
        losses.update(_center(old))
    return losses


def _terms(old: _Old, with_center: bool) -> tuple[bool, bool]:
    """Whether there are a cross-entropy and a triplet term.

    The sampler decides, unless there is a center loss: then the type of the metric loss does.
    """
    kind, sampler = old["MODEL.METRIC_LOSS_TYPE"], old["DATALOADER.SAMPLER"]
    if with_center and kind != "triplet":
        return True, kind == "triplet_center"
    if with_center:
        old.notes.append(
            "MODEL.IF_WITH_CENTER 'yes' with MODEL.METRIC_LOSS_TYPE 'triplet' crashed; here "
            f"the center loss joins those of DATALOADER.SAMPLER {sampler!r}"
        )
    elif kind != "triplet":
        old.notes.append(
            f"MODEL.METRIC_LOSS_TYPE {kind!r} needs MODEL.IF_WITH_CENTER 'yes'; here the losses "
            f"are those of DATALOADER.SAMPLER {sampler!r}, without a center loss"
        )
    return sampler != "triplet", sampler != "softmax"


def _smooths(old: _Old, with_center: bool) -> bool:
    smooths = old.is_on("MODEL.IF_LABELSMOOTH", "on")
    if not smooths or with_center or old["DATALOADER.SAMPLER"] != "softmax":
        return smooths
    old.notes.append(
        "losses.id.label_smoothing is 0: MODEL.IF_LABELSMOOTH was ignored with DATALOADER.SAMPLER "
        "'softmax'; 0.1 is what it stands for"
    )
    return False


def _center(old: _Old) -> Section:
    weight = old["SOLVER.CENTER_LOSS_WEIGHT"]
    if weight == 0:
        old.notes.append("SOLVER.CENTER_LOSS_WEIGHT 0: the center loss is left out")
        return {}
    return {"center": {"name": "center", "weight": weight, "lr": old["SOLVER.CENTER_LR"]}}


def _optimizer(old: _Old) -> Section:
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


def _schedule(old: _Old) -> Section:
    # WARMUP_ITERS counts epochs, whatever its name says.
    return {
        "name": "multistep",
        "milestones": old["SOLVER.STEPS"],
        "gamma": old["SOLVER.GAMMA"],
        "warmup_epochs": old["SOLVER.WARMUP_ITERS"],
        "warmup_factor": old["SOLVER.WARMUP_FACTOR"],
        "warmup_method": old["SOLVER.WARMUP_METHOD"],
    }


def _evaluator(old: _Old) -> Section:
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


def _train(old: _Old) -> Section:
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


def _device(old: _Old) -> str:
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


def _wandb(old: _Old) -> Section:
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


def _init_from(old: _Old) -> str | None:
    if old["MODEL.PRETRAIN_CHOICE"] != "self":
        return None
    path: str = old["MODEL.PRETRAIN_PATH"]
    if not path:
        raise ConfigError(
            "MODEL.PRETRAIN_PATH: MODEL.PRETRAIN_CHOICE 'self' needs the path of a model"
        )
    old.notes.append(
        f"init_from is MODEL.PRETRAIN_PATH {path!r}, but pickled models cannot be loaded: "
        "give a checkpoint of reidreg, or weights alone as --backbone.pretrained FILE; --resume "
        "goes on with a run"
    )
    return path


def _output_dir(old: _Old) -> str:
    return old["OUTPUT_DIR"] or RunConfig.output_dir


_SECTIONS: Mapping[str, Callable[[_Old], Any]] = {
    "dataset": _dataset,
    "input": _input,
    "sampler": _sampler,
    "backbone": _backbone,
    "head": _head,
    "losses": _losses,
    "optimizer": _optimizer,
    "schedule": _schedule,
    "evaluator": _evaluator,
    "train": _train,
    "wandb": _wandb,
    "init_from": _init_from,
    "output_dir": _output_dir,
}


# --------------------------------------------------------------------- notes


def _left_out(old: _Old) -> list[str]:
    """The keys of the file that nothing was made of."""
    idle = [key for key in old.given if key not in old.used]
    dead = [key for key in idle if not KEYS[key].live]
    moot = [key for key in idle if KEYS[key].live]
    return [
        *_naming("left out, for nothing that trains or evaluates reads them", dead),
        *_naming("left out, for the file's other keys leave them without effect", moot),
    ]


def _naming(reason: str, keys: Iterable[str]) -> list[str]:
    listed = ", ".join(keys)
    return [f"{reason}: {listed}"] if listed else []


def _outlook(values: Section) -> list[str]:
    """What `reidreg fit` is going to say of a configuration, if anything."""
    try:
        return advice(load_config(values))
    except ConfigError as error:
        return [f"reidreg fit refuses this as it stands: {error}"]
