"""Translate the keys that choose the model: backbone, pretrained weights, head."""

from __future__ import annotations

import re
from pathlib import PureWindowsPath

from reidreg.errors import ConfigError, did_you_mean
from reidreg.parts.interfaces import BACKBONES
from reidreg.parts.schema import options_of
from reidreg.tools.yacs_file import OldConfig, Section

RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
# timm's legacy_ models are the port, with the same weights, that reid-strong-baseline used.
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


def backbone(old: OldConfig) -> Section:
    """The section `backbone`."""
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


def _ibn(old: OldConfig) -> Section:
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


def _pretrained(old: OldConfig) -> str:
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
    """Whether a path is that of ImageNet weights that torchvision or a port of it downloaded.

    They are in torch's cache, or named after their architecture: `resnet50-19c8e357.pth`.
    """
    parts = PureWindowsPath(path).parts  # splits at both kinds of slash
    models = "|".join(map(re.escape, (*RESNETS, *TIMM_MODELS)))
    named = re.fullmatch(rf"({models})(-[0-9a-f]{{8}})?\.pth", parts[-1] if parts else "")
    return named is not None or ".torch" in parts or {".cache", "torch"} <= set(parts)


def head(old: OldConfig) -> Section:
    """The section `head`."""
    if old["MODEL.NECK"] == "no":
        return {"name": "linear"}
    return {"name": "bnneck", "feature": old["TEST.NECK_FEAT"]}


def init_from(old: OldConfig) -> str | None:
    """The option `init_from`."""
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
