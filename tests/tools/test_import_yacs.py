"""The translation of reid-strong-baseline configurations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg import BACKBONES, DATASETS, Backbone, Config, Dataset, Sample, load_config
from reidreg.config.yamlfile import parse_yaml
from reidreg.errors import ConfigError
from reidreg.tools.import_yacs import Imported, import_config, render
from reidreg.tools.yacs_keys import KEYS
from reidreg.tools.yacs_model import RESNETS, TIMM_MODELS, is_download

Import = Callable[..., Imported]

GUIDE = """\
MODEL:
  PRETRAIN_CHOICE: 'imagenet'
  PRETRAIN_PATH: '/home/jongphago/.torch/models/resnet50.pth'
  METRIC_LOSS_TYPE: 'triplet'
  IF_LABELSMOOTH: 'on'
  IF_WITH_CENTER: 'no'

INPUT:
  SIZE_TRAIN: [256, 128]
  SIZE_TEST: [256, 128]
  PROB: 0.5
  RE_PROB: 0.5
  PADDING: 10

DATASETS:
  NAMES: 'aihub_kaist'
  ROOT_DIR: './data'
  TRAIN_FOLDER: 'bounding_box_train_1'

DATALOADER:
  SAMPLER: 'softmax_triplet'
  NUM_INSTANCE: 4
  NUM_WORKERS: 8

SOLVER:
  OPTIMIZER_NAME: 'Adam'
  MAX_EPOCHS: 120
  BASE_LR: 0.00035
  IMS_PER_BATCH: 64
  STEPS: [40, 70]
  GAMMA: 0.1
  CHECKPOINT_PERIOD: 40
  LOG_PERIOD: 20
  EVAL_PERIOD: 40

WANDB:
  ENABLE: True
  PROJECT: "reid-aihub-kaist"
  ENTITY: ""
  NAME: ""
  TAGS: ["aihub", "kaist", "person-reid"]
"""

# With these values every live key has an effect.
ALL_LIVE = {
    "MODEL.PRETRAIN_PATH": "resnet50.pth",
    "MODEL.IF_WITH_CENTER": "yes",
    "MODEL.METRIC_LOSS_TYPE": "triplet_center",
    "DATASETS.NAMES": "aihub_kaist",
    "DATALOADER.SAMPLER": "softmax_triplet",
    "SOLVER.OPTIMIZER_NAME": "SGD",
}

# A value for every key that is neither its default nor what ALL_LIVE gives it.
OTHER: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.DEVICE_ID": "1",
    "MODEL.NAME": "resnet18",
    "MODEL.LAST_STRIDE": 2,
    "MODEL.PRETRAIN_PATH": "weights/other.pth",
    "MODEL.PRETRAIN_CHOICE": "self",
    "MODEL.NECK": "no",
    "MODEL.IF_WITH_CENTER": "no",
    "MODEL.METRIC_LOSS_TYPE": "center",
    "MODEL.IF_LABELSMOOTH": "off",
    "INPUT.SIZE_TRAIN": [192, 96],
    "INPUT.SIZE_TEST": [224, 112],
    "INPUT.PROB": 0.25,
    "INPUT.RE_PROB": 0.75,
    "INPUT.PIXEL_MEAN": [0.5, 0.5, 0.5],
    "INPUT.PIXEL_STD": [0.25, 0.25, 0.25],
    "INPUT.PADDING": 4,
    "DATASETS.NAMES": "synthetic",
    "DATASETS.ROOT_DIR": "/data",
    "DATASETS.TRAIN_FOLDER": "bounding_box_train_2",
    "DATASETS.QUERY_FOLDER": "sample_query",
    "DATASETS.GALLERY_FOLDER": "sample_test",
    "DATALOADER.NUM_WORKERS": 3,
    "DATALOADER.SAMPLER": "softmax",
    "DATALOADER.NUM_INSTANCE": 8,
    "SOLVER.OPTIMIZER_NAME": "AdamW",
    "SOLVER.MAX_EPOCHS": 77,
    "SOLVER.BASE_LR": 1e-4,
    "SOLVER.BIAS_LR_FACTOR": 1,
    "SOLVER.MOMENTUM": 0.8,
    "SOLVER.MARGIN": 0.4,
    "SOLVER.CENTER_LR": 0.25,
    "SOLVER.CENTER_LOSS_WEIGHT": 0.001,
    "SOLVER.CLUSTER_MARGIN": 0.5,
    "SOLVER.RANGE_K": 3,
    "SOLVER.RANGE_MARGIN": 0.5,
    "SOLVER.RANGE_ALPHA": 1,
    "SOLVER.RANGE_BETA": 2,
    "SOLVER.RANGE_LOSS_WEIGHT": 2,
    "SOLVER.WEIGHT_DECAY": 1e-3,
    "SOLVER.WEIGHT_DECAY_BIAS": 1e-4,
    "SOLVER.STEPS": [10, 20],
    "SOLVER.GAMMA": 0.5,
    "SOLVER.WARMUP_FACTOR": 0.01,
    "SOLVER.WARMUP_ITERS": 10,
    "SOLVER.WARMUP_METHOD": "constant",
    "SOLVER.CHECKPOINT_PERIOD": 5,
    "SOLVER.LOG_PERIOD": 7,
    "SOLVER.EVAL_PERIOD": 9,
    "SOLVER.IMS_PER_BATCH": 32,
    "TEST.IMS_PER_BATCH": 256,
    "TEST.RE_RANKING": "yes",
    "TEST.WEIGHT": "model.pth",
    "TEST.NECK_FEAT": "before",
    "TEST.FEAT_NORM": "no",
    "OUTPUT_DIR": "./log/x",
    "WANDB.ENABLE": False,
    "WANDB.PROJECT": "p",
    "WANDB.ENTITY": "e",
    "WANDB.NAME": "n",
    "WANDB.TAGS": ["t"],
    "WANDB.SYNC_TENSORBOARD": True,
    "WANDB.SAVE_CODE": True,
}


def write(folder: Path, keys: Mapping[str, Any]) -> Path:
    """Write a YAML file with these dotted keys."""
    nested: dict[str, Any] = {}
    for key, value in keys.items():
        section, _, name = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[name] = value
    path = folder / "old.yml"
    path.write_text(yaml.safe_dump(nested), encoding="utf-8")
    return path


@pytest.fixture
def imported(tmp_path: Path) -> Import:
    """Import a file of the given text, or of DATASETS.NAMES and the given dotted keys."""

    def run(old: str | Mapping[str, Any]) -> Imported:
        if isinstance(old, str):
            path = tmp_path / "old.yml"
            path.write_text(old, encoding="utf-8")
        else:
            path = write(tmp_path, {"DATASETS.NAMES": "market1501", **old})
        return import_config(path)

    return run


def resolved(result: Imported) -> Config:
    return load_config(result.values)


def named(key: str, result: Imported) -> bool:
    return any(key in note for note in result.notes)


def accepted(result: Imported) -> dict[str, Any]:
    """The values, which `load_config` accepted during the import."""
    assert not named("refuses", result)
    return result.values


def losses(result: Imported) -> dict[str, Any]:
    return dict(sorted(accepted(result)["losses"].items()))


CROSS_ENTROPY = {"name": "cross_entropy", "weight": 1.0, "label_smoothing": 0.0}
SMOOTHED = {**CROSS_ENTROPY, "label_smoothing": 0.1}
TRIPLET = {"name": "triplet", "weight": 1.0, "margin": 0.3}
CENTER = {"name": "center", "weight": 0.0005, "lr": 0.5}


# --------------------------------------------------------------------- whole files


def test_the_guides_configuration_trains_what_it_trained(imported: Import) -> None:
    config = resolved(imported(GUIDE))
    assert config.dataset.as_dict() == {
        "name": "aihub_kaist",
        "root": "./data",
        "train_folder": "bounding_box_train_1",
        "query_folder": "query",
        "gallery_folder": "bounding_box_test",
    }
    assert (config.input.size, config.input.padding) == ((256, 128), 10)
    assert (config.input.flip_prob, config.input.erasing_prob) == (0.5, 0.5)
    assert config.input.mean is None and config.input.std is None
    assert config.sampler.as_dict() == {"name": "identity", "batch_size": 64, "instances": 4}
    assert config.backbone.as_dict() == {
        "name": "resnet50",
        "pretrained": "imagenet",
        "last_stride": 1,
        "stem_relu": False,
    }
    assert (config.head.name, config.head.options["feature"]) == ("bnneck", "after")
    assert losses(imported(GUIDE)) == {"id": SMOOTHED, "triplet": TRIPLET}
    assert (config.optimizer.name, config.optimizer.lr) == ("adam", 3.5e-4)
    assert config.optimizer.momentum is None
    assert config.schedule.as_dict() == {
        "name": "multistep",
        "milestones": [40, 70],
        "gamma": 0.1,
        "warmup_epochs": 500,
        "warmup_factor": 1 / 3,
        "warmup_method": "linear",
    }
    assert config.evaluator.options["metric"] == "cosine"
    assert config.evaluator.options["rerank"] is False
    train = config.train
    assert (train.epochs, train.eval_every, train.checkpoint_every) == (120, 40, 40)
    assert (train.log_every, train.workers, train.eval_batch_size) == (20, 8, 128)
    assert (train.device, train.precision) == ("auto", "fp32")
    assert (config.wandb.mode, config.wandb.project) == ("online", "reid-aihub-kaist")
    assert (config.wandb.entity, config.wandb.name) == (None, None)
    assert config.wandb.tags == ["aihub", "kaist", "person-reid"]
    assert (config.init_from, config.output_dir) == (None, "log/run")


def test_the_guides_configuration_is_annotated(imported: Import) -> None:
    notes = "\n".join(imported(GUIDE).notes)
    assert "'/home/jongphago/.torch/models/resnet50.pth'" in notes
    assert "stem_relu" in notes
    assert "warmup_epochs 500 > train.epochs 120" in notes
    assert "refuses" not in notes and "left out" not in notes


def test_absent_keys_have_the_old_defaults(imported: Import) -> None:
    result = imported("DATASETS:\n  NAMES: 'market1501'\nMODEL:\n")
    config = resolved(result)
    assert config.dataset.as_dict() == {"name": "market1501", "root": "./data"}
    assert config.input.size == (384, 128)
    assert config.sampler.as_dict() == {"name": "random", "batch_size": 64}
    assert losses(result) == {"id": CROSS_ENTROPY}
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (3e-4, 5e-4)
    assert (config.optimizer.bias_lr_factor, config.optimizer.bias_weight_decay) == (2, 0)
    assert list(config.schedule.options["milestones"]) == [30, 55]
    train = config.train
    assert (train.epochs, train.eval_every, train.checkpoint_every) == (50, 50, 50)
    assert train.log_every == 100
    assert (config.wandb.mode, config.wandb.project) == ("online", "reid-strong-baseline")
    assert named("wandb.mode", result)


def test_rendered_text_is_the_configuration_with_its_notes_on_top(
    imported: Import, tmp_path: Path
) -> None:
    result = imported(GUIDE)
    text = render(result, "configs/aihub_kaist.yml")
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert text.splitlines()[: len(comments)] == comments
    assert "'configs/aihub_kaist.yml'" in comments[0]
    assert comments[1:] == [f"# - {note}" for note in result.notes]
    assert parse_yaml(text, "new.yaml") == yaml.safe_load(text) == result.values
    path = tmp_path / "new.yaml"
    path.write_text(text, encoding="utf-8")
    assert load_config(path) == resolved(result)


def test_a_name_with_line_breaks_stays_inside_its_comment(imported: Import) -> None:
    result = imported({"MODEL.DEVICE_ID": "0\nlosses: 1"})
    assert parse_yaml(render(result, "a\nb.yml"), "new.yaml") == result.values


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(
    imported: Import, tmp_path: Path
) -> None:
    expected = imported(GUIDE)
    path = tmp_path / "windows.yml"
    path.write_bytes(b"\xef\xbb\xbf" + GUIDE.replace("\n", "\r\n").encode())
    assert import_config(str(path)) == expected


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yml"):
        import_config(tmp_path / "nowhere.yml")


# --------------------------------------------------------------------- every key


def test_the_samples_below_cover_every_key() -> None:
    assert OTHER.keys() == KEYS.keys()


@pytest.fixture(scope="module")
def all_live(tmp_path_factory: pytest.TempPathFactory) -> Imported:
    return import_config(write(tmp_path_factory.mktemp("all_live"), ALL_LIVE))


@pytest.mark.parametrize("key", OTHER)
def test_a_key_is_translated_or_named(key: str, all_live: Imported, imported: Import) -> None:
    result = imported({**ALL_LIVE, key: OTHER[key]})
    assert result.values != all_live.values or named(key, result)
    assert KEYS[key].live or result.values == all_live.values


@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_in_any_combination_a_key_is_translated_or_named(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = data.draw(st.sets(st.sampled_from(sorted(OTHER))))
    old = {**ALL_LIVE, **{key: OTHER[key] for key in changed}}
    # The choice `self` is refused without its path.
    candidates = [
        key for key in old.keys() - {"MODEL.PRETRAIN_PATH"} if old[key] != KEYS[key].default
    ]
    gone = data.draw(st.sampled_from(sorted(candidates)))
    folder = tmp_path_factory.mktemp("combination")
    whole = import_config(write(folder, old))
    part = import_config(write(folder, {key: old[key] for key in old if key != gone}))
    assert whole.values != part.values or set(whole.notes) != set(part.notes)


@pytest.mark.parametrize("key", [key for key, entry in KEYS.items() if entry.live])
def test_a_value_of_a_wrong_kind_names_its_key(key: str, imported: Import) -> None:
    with pytest.raises(ConfigError) as caught:
        imported({key: {"nested": 1}})
    assert str(caught.value).startswith(f"{key}: expected ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.MAX_EPOCHS", "many"),
        ("SOLVER.MAX_EPOCHS", 12.5),
        ("SOLVER.MAX_EPOCHS", True),
        ("SOLVER.MAX_EPOCHS", None),
        ("SOLVER.BASE_LR", "fast"),
        ("SOLVER.BASE_LR", False),
        ("SOLVER.BASE_LR", float("nan")),
        ("SOLVER.BASE_LR", "1e999"),
        ("SOLVER.BASE_LR", 10**400),
        ("SOLVER.STEPS", 40),
        ("SOLVER.STEPS", "[40, 'x']"),
        ("SOLVER.STEPS", "__import__('os').getcwd()"),
        ("SOLVER.MARGIN", "(" * 5000),
        ("SOLVER.WARMUP_METHOD", "cosine"),
        ("INPUT.SIZE_TRAIN", [256]),
        ("INPUT.SIZE_TRAIN", [256.0, 128.0]),
        ("INPUT.PIXEL_STD", [0.2, 0.2]),
        ("MODEL.LAST_STRIDE", 3),
        ("MODEL.LAST_STRIDE", 1.0),
        ("MODEL.LAST_STRIDE", True),
        ("MODEL.NECK", "yes"),
        ("MODEL.IF_WITH_CENTER", "on"),
        ("MODEL.METRIC_LOSS_TYPE", "cluster"),
        ("MODEL.PRETRAIN_CHOICE", "scratch"),
        ("MODEL.DEVICE", "tpu"),
        ("DATALOADER.SAMPLER", "random"),
        ("DATASETS.NAMES", ["market1501", "aihub_kaist"]),
        ("TEST.RE_RANKING", "maybe"),
        ("WANDB.ENABLE", "perhaps"),
        ("WANDB.TAGS", [1]),
        ("OUTPUT_DIR", 7),
    ],
)
def test_a_malformed_value_names_its_key(key: str, value: Any, imported: Import) -> None:
    with pytest.raises(ConfigError) as caught:
        imported({key: value})
    assert str(caught.value).startswith(f"{key}: expected ")
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("SOLVER: {MAX_EPOCH: 3}", "SOLVER.MAX_EPOCH: .*did you mean 'SOLVER.MAX_EPOCHS'"),
        ("MODEL: {name: resnet50}", "MODEL.name: .*did you mean 'MODEL.NAME'"),
        ("SOLVER: {NUM_WORKERS: 3}", "did you mean 'DATALOADER.NUM_WORKERS'"),
        ("OUTPUTDIR: log", "did you mean 'OUTPUT_DIR'"),
        ("QQQ: {A: 1}", "QQQ: .*known: .*MODEL"),
        ("INPUT: {QQQ: 1}", "INPUT.QQQ: .*known: .*PADDING"),
        ("on: 1", "True: "),
        ("MODEL: resnet50", "MODEL: expected keys and values, got 'resnet50'"),
    ],
)
def test_an_unknown_key_is_refused(text: str, hint: str, imported: Import) -> None:
    with pytest.raises(ConfigError, match=hint):
        imported(text)


def test_dead_keys_are_named_in_one_note(imported: Import) -> None:
    dead = [key for key, entry in KEYS.items() if not entry.live]
    (note,) = [note for note in imported(OTHER | ALL_LIVE).notes if dead[0] in note]
    assert all(key in note for key in dead)
    assert len(dead) == 8


def test_keys_without_effect_on_this_configuration_are_named(imported: Import) -> None:
    result = imported({"SOLVER.MARGIN": 0.5, "SOLVER.MOMENTUM": 0.8, "DATALOADER.NUM_INSTANCE": 4})
    (note,) = [note for note in result.notes if "SOLVER.MARGIN" in note]
    assert "SOLVER.MOMENTUM" in note and "DATALOADER.NUM_INSTANCE" in note


# --------------------------------------------------------------------- spellings


@pytest.mark.parametrize(
    ("spelling", "size"),
    [
        ("[256, 128]", (256, 128)),
        ("'[256,128]'", (256, 128)),
        ("(192, 96)", (192, 96)),
        ("\"('224', '112')\"", (224, 112)),
    ],
)
def test_sizes_are_read_as_yacs_users_write_them(
    spelling: str, size: tuple[int, int], imported: Import
) -> None:
    text = f"INPUT:\n  SIZE_TRAIN: {spelling}\n  SIZE_TEST: {spelling}\n"
    result = imported(text)
    assert accepted(result)["input"]["size"] == list(size)
    assert not named("INPUT.SIZE_TEST", result)


@pytest.mark.parametrize("spelling", ["(30, 55)", "[30, 55]", "'(30, 55)'", '"[30, 55]"'])
def test_milestones_are_read_in_every_spelling(spelling: str, imported: Import) -> None:
    result = imported(f"SOLVER:\n  STEPS: {spelling}\n")
    assert accepted(result)["schedule"]["milestones"] == [30, 55]


@pytest.mark.parametrize("spelling", ["on", "'on'", '"on"', "yes", "True", "\"'on'\"", "('on')"])
def test_smoothing_is_on_in_every_spelling(spelling: str, imported: Import) -> None:
    text = f"MODEL:\n  IF_LABELSMOOTH: {spelling}\nDATALOADER:\n  SAMPLER: softmax_triplet\n"
    assert losses(imported(text))["id"] == SMOOTHED


@pytest.mark.parametrize("spelling", ["off", "'off'", "no", "False", '""'])
def test_smoothing_is_off_in_every_spelling(spelling: str, imported: Import) -> None:
    text = f"MODEL:\n  IF_LABELSMOOTH: {spelling}\nDATALOADER:\n  SAMPLER: softmax_triplet\n"
    result = imported(text)
    assert losses(result)["id"] == CROSS_ENTROPY
    assert not named("IF_LABELSMOOTH", result)


@pytest.mark.parametrize(
    ("key", "word"), [("MODEL.IF_LABELSMOOTH", "yes"), ("TEST.FEAT_NORM", "Yes")]
)
def test_a_word_that_did_not_turn_a_key_on_is_named(key: str, word: str, imported: Import) -> None:
    result = imported({"DATALOADER.SAMPLER": "softmax_triplet", key: word})
    assert named(f"{key} {word!r}", result)
    smoothing = losses(result)["id"]["label_smoothing"]
    metric = accepted(result)["evaluator"]["metric"]
    assert (smoothing, metric) == (
        (0.0, "cosine") if key.startswith("MODEL") else (0.1, "euclidean")
    )


@pytest.mark.parametrize("spelling", ["('market1501')", "market1501", "\"('market1501',)\""])
def test_a_data_set_is_read_in_every_spelling(spelling: str, imported: Import) -> None:
    assert imported(f"DATASETS:\n  NAMES: {spelling}\n").values["dataset"]["name"] == "market1501"


@pytest.mark.parametrize("spelling", ["3e-4", "'3e-4'", "0.0003", "3.0e-4"])
def test_numbers_are_read_in_every_spelling(spelling: str, imported: Import) -> None:
    assert accepted(imported(f"SOLVER: {{BASE_LR: {spelling}}}"))["optimizer"]["lr"] == 3e-4


# --------------------------------------------------------------------- the model


@pytest.mark.parametrize("name", RESNETS)
def test_resnets_lack_the_relu_that_the_old_code_lacked(name: str, imported: Import) -> None:
    result = imported({"MODEL.NAME": name, "MODEL.LAST_STRIDE": 2})
    backbone = resolved(result).backbone
    assert backbone.name == name
    assert backbone.options == {"pretrained": "imagenet", "last_stride": 2, "stem_relu": False}
    assert named("stem_relu", result)


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_squeeze_and_excitation_models_are_timms_ports(name: str, imported: Import) -> None:
    result = imported({"MODEL.NAME": name})
    backbone = resolved(result).backbone
    assert backbone.name == "timm"
    assert timm.is_model_pretrained(backbone.options["model"])
    assert backbone.options["model"].startswith("legacy_")
    assert named("MODEL.LAST_STRIDE 1", result) and not named("stem_relu", result)


def test_an_ibn_model_needs_a_plugin(imported: Import) -> None:
    with pytest.raises(ConfigError, match="MODEL.NAME: .*'resnet50_ibn_a'.*plugin"):
        imported({"MODEL.NAME": "resnet50_ibn_a"})


@pytest.fixture
def temporary_parts() -> Iterator[None]:
    """Removes what a test registers."""
    with BACKBONES.temporary(), DATASETS.temporary():
        yield


def test_an_ibn_model_of_a_plugin_is_taken(imported: Import, temporary_parts: None) -> None:
    @BACKBONES.register("resnet50_ibn_a")
    class ResNetIBN(Backbone):
        """A backbone."""

        def __init__(self, pretrained: str = "none") -> None:
            super().__init__()

        def forward(self, images: Any, camids: Any = None) -> Any:
            return images

    result = imported({"MODEL.NAME": "resnet50_ibn_a", "MODEL.LAST_STRIDE": 2})
    assert result.values["backbone"] == {"name": "resnet50_ibn_a", "pretrained": "imagenet"}
    assert named("MODEL.LAST_STRIDE", result)
    assert resolved(result).backbone.options == {"pretrained": "imagenet"}


def test_an_unknown_model_is_answered_with_the_nearest(imported: Import) -> None:
    with pytest.raises(ConfigError, match="MODEL.NAME: .*'resnet-50'.*did you mean 'resnet50'"):
        imported({"MODEL.NAME": "resnet-50"})


@pytest.mark.parametrize(
    ("path", "download"),
    [
        ("/home/haoluo/.torch/models/resnet50-19c8e357.pth", True),
        ("~/.torch/models/resnet50.pth", True),
        ("C:\\Users\\x\\.torch\\models\\mine.pth", True),
        ("/root/.cache/torch/hub/checkpoints/mine.pth", True),
        ("weights/resnet101.pth", True),
        ("se_resnext50_32x4d-a260b3a4.pth", True),
        ("weights/resnet50_ibn_a.pth", False),
        ("weights/lup_resnet50.pth", False),
        ("torch/mine.pth", False),
        (".", False),
    ],
)
def test_downloads_are_distinguished_from_other_weights(path: str, download: bool) -> None:
    assert is_download(path) is download


def test_other_weights_stay_a_path(imported: Import, tmp_path: Path) -> None:
    weights = tmp_path / "lup.pth"
    weights.touch()
    result = imported({"MODEL.PRETRAIN_PATH": str(weights)})
    assert resolved(result).backbone.options["pretrained"] == str(weights)
    assert named("MODEL.PRETRAIN_PATH", result)


def test_missing_weights_are_noted(imported: Import) -> None:
    result = imported({"MODEL.PRETRAIN_PATH": "nowhere/lup.pth"})
    assert result.values["backbone"]["pretrained"] == "nowhere/lup.pth"
    assert named("refuses this as it stands: backbone.pretrained", result)


def test_the_path_of_choice_self_starts_the_run(imported: Import) -> None:
    result = imported({"MODEL.PRETRAIN_CHOICE": "self", "MODEL.PRETRAIN_PATH": "log/m_10.pth"})
    config = resolved(result)
    assert (config.init_from, config.backbone.options["pretrained"]) == ("log/m_10.pth", "none")
    assert named("'log/m_10.pth'", result)


def test_choice_self_needs_a_path(imported: Import) -> None:
    with pytest.raises(ConfigError, match="MODEL.PRETRAIN_PATH"):
        imported({"MODEL.PRETRAIN_CHOICE": "self"})


def test_the_neck_becomes_the_head(imported: Import) -> None:
    before = resolved(imported({"TEST.NECK_FEAT": "before"})).head
    assert (before.name, before.options["feature"]) == ("bnneck", "before")
    plain = imported("MODEL: {NECK: no}\nTEST: {NECK_FEAT: before}")
    assert resolved(plain).head.name == "linear"
    assert named("TEST.NECK_FEAT", plain)


# --------------------------------------------------------------------- sampler and losses


@pytest.mark.parametrize(
    ("sampler", "name", "terms"),
    [
        ("softmax", "random", {"id": CROSS_ENTROPY}),
        ("triplet", "identity", {"triplet": TRIPLET}),
        ("softmax_triplet", "identity", {"id": SMOOTHED, "triplet": TRIPLET}),
    ],
)
def test_the_sampler_decides_the_batches_and_the_losses(
    sampler: str, name: str, terms: dict[str, Any], imported: Import
) -> None:
    result = imported({"DATALOADER.SAMPLER": sampler})
    assert accepted(result)["sampler"]["name"] == name
    assert losses(result) == terms


def test_smoothing_that_was_ignored_is_named(imported: Import) -> None:
    assert named("IF_LABELSMOOTH", imported({"MODEL.IF_LABELSMOOTH": "on"}))
    assert not named("IF_LABELSMOOTH", imported({"MODEL.IF_LABELSMOOTH": "off"}))


@pytest.mark.parametrize("sampler", ["softmax", "triplet", "softmax_triplet"])
@pytest.mark.parametrize(
    ("kind", "terms"),
    [
        ("center", {"center": CENTER, "id": SMOOTHED}),
        ("triplet_center", {"center": CENTER, "id": SMOOTHED, "triplet": TRIPLET}),
    ],
)
def test_with_a_center_loss_the_metric_loss_decides(
    kind: str, terms: dict[str, Any], sampler: str, imported: Import
) -> None:
    result = imported(
        {
            "MODEL.IF_WITH_CENTER": "yes",
            "MODEL.METRIC_LOSS_TYPE": kind,
            "DATALOADER.SAMPLER": sampler,
        }
    )
    assert losses(result) == terms
    assert accepted(result)["sampler"]["name"] == ("random" if sampler == "softmax" else "identity")
    assert not named("METRIC_LOSS_TYPE", result)


@pytest.mark.parametrize(
    ("sampler", "terms"),
    [
        ("softmax", {"center": CENTER, "id": SMOOTHED}),
        ("triplet", {"center": CENTER, "triplet": TRIPLET}),
        ("softmax_triplet", {"center": CENTER, "id": SMOOTHED, "triplet": TRIPLET}),
    ],
)
def test_the_guides_center_command_trains_with_the_center_loss(
    sampler: str, terms: dict[str, Any], imported: Import
) -> None:
    result = imported({"MODEL.IF_WITH_CENTER": "yes", "DATALOADER.SAMPLER": sampler})
    assert losses(result) == terms
    assert named("crashed", result)


def test_a_center_type_without_center_loss_is_named(imported: Import) -> None:
    result = imported(
        {"MODEL.METRIC_LOSS_TYPE": "triplet_center", "DATALOADER.SAMPLER": "softmax_triplet"}
    )
    assert losses(result) == {"id": SMOOTHED, "triplet": TRIPLET}
    assert named("MODEL.METRIC_LOSS_TYPE 'triplet_center'", result)


def test_a_center_loss_of_weight_zero_is_left_out(imported: Import) -> None:
    result = imported({**ALL_LIVE, "SOLVER.CENTER_LOSS_WEIGHT": 0, "SOLVER.CENTER_LR": 0.1})
    assert losses(result) == {"id": SMOOTHED, "triplet": TRIPLET}
    assert named("SOLVER.CENTER_LOSS_WEIGHT 0", result)
    assert named("SOLVER.CENTER_LR", result)


@pytest.mark.parametrize("spelling", ["null", "'None'"])
def test_a_margin_of_none_is_the_soft_margin(spelling: str, imported: Import) -> None:
    result = imported(f"SOLVER: {{MARGIN: {spelling}}}\nDATALOADER: {{SAMPLER: triplet}}")
    assert losses(result) == {"triplet": {**TRIPLET, "margin": None}}


def test_a_batch_size_that_splits_an_identity_is_noted_with_the_nearest(imported: Import) -> None:
    result = imported(
        {
            "DATALOADER.SAMPLER": "softmax_triplet",
            "DATALOADER.NUM_INSTANCE": 4,
            "SOLVER.IMS_PER_BATCH": 62,
        }
    )
    assert result.values["sampler"] == {"name": "identity", "batch_size": 62, "instances": 4}
    assert named("refuses this as it stands: sampler.batch_size: 62", result)
    assert named("60 or 64", result)


# --------------------------------------------------------------------- data and images


@pytest.mark.parametrize("name", ["dukemtmc", "msmt17", "veri", "market1502"])
def test_a_data_set_that_is_not_registered_is_refused(name: str, imported: Import) -> None:
    with pytest.raises(ConfigError, match=f"DATASETS.NAMES: .*{name!r}.*market1501"):
        imported({"DATASETS.NAMES": name})


def test_a_data_set_of_a_plugin_is_taken_with_the_options_it_has(
    imported: Import, temporary_parts: None
) -> None:
    @DATASETS.register("veri")
    class VeRi(Dataset):
        """A data set."""

        def __init__(self, root: str = "data", query_folder: str = "q") -> None:
            self.root = root

        @property
        def train(self) -> list[Sample]:
            return []

        query = gallery = train

    result = imported({"DATASETS.NAMES": "veri", "DATASETS.TRAIN_FOLDER": "image_train"})
    config = resolved(result)
    assert config.dataset.options == {"root": "./data", "query_folder": "query"}
    assert named("DATASETS.TRAIN_FOLDER", result)


def test_folders_of_aihub_kaist_are_kept(imported: Import) -> None:
    folders = {
        "DATASETS.NAMES": "aihub_kaist",
        "DATASETS.ROOT_DIR": "('/mnt/data')",
        "DATASETS.TRAIN_FOLDER": "sample_train",
        "DATASETS.QUERY_FOLDER": "sample_query",
        "DATASETS.GALLERY_FOLDER": "sample_test",
    }
    assert resolved(imported(folders)).dataset.options == {
        "root": "/mnt/data",
        "train_folder": "sample_train",
        "query_folder": "sample_query",
        "gallery_folder": "sample_test",
    }


def test_a_different_size_for_evaluation_is_named(imported: Import) -> None:
    result = imported({"INPUT.SIZE_TRAIN": [256, 128]})
    assert resolved(result).input.size == (256, 128)
    assert named("INPUT.SIZE_TEST [384, 128]", result)


def test_a_different_normalisation_is_kept(imported: Import) -> None:
    result = imported({"INPUT.PIXEL_MEAN": "[0.5, 0.5, 0.5]", "INPUT.PIXEL_STD": (0.2, 0.2, 1)})
    images = resolved(result).input
    assert (images.mean, images.std) == ((0.5, 0.5, 0.5), (0.2, 0.2, 1.0))
    assert named("erased", result)


def test_imagenets_normalisation_is_left_to_the_backbone(imported: Import) -> None:
    text = "INPUT:\n  PIXEL_MEAN: [0.485, 0.456, 0.406]\n  PIXEL_STD: [0.229, 0.224, 0.225]\n"
    values = imported(text).values
    assert values["input"].keys() == {"size", "flip_prob", "padding", "erasing_prob"}


# --------------------------------------------------------------------- the run


def test_momentum_is_for_sgd_alone(imported: Import) -> None:
    sgd = resolved(imported({"SOLVER.OPTIMIZER_NAME": "SGD", "SOLVER.MOMENTUM": 0.8})).optimizer
    assert (sgd.name, sgd.momentum) == ("sgd", 0.8)
    adam = imported({"SOLVER.OPTIMIZER_NAME": "Adam", "SOLVER.MOMENTUM": 0.8})
    assert resolved(adam).optimizer.momentum is None
    assert named("SOLVER.MOMENTUM", adam)


def test_an_unknown_optimizer_is_answered_with_the_nearest(imported: Import) -> None:
    with pytest.raises(ConfigError, match="SOLVER.OPTIMIZER_NAME: .*did you mean 'adam"):
        imported({"SOLVER.OPTIMIZER_NAME": "Adamm"})


def test_the_solver_is_translated(imported: Import) -> None:
    keys = {key: value for key, value in OTHER.items() if key.startswith(("SOLVER.", "TEST."))}
    config = resolved(imported({**keys, "DATALOADER.NUM_WORKERS": 3}))
    optimizer, train = config.optimizer, config.train
    assert (optimizer.lr, optimizer.bias_lr_factor) == (1e-4, 1)
    assert (optimizer.weight_decay, optimizer.bias_weight_decay) == (1e-3, 1e-4)
    assert config.schedule.as_dict() == {
        "name": "multistep",
        "milestones": [10, 20],
        "gamma": 0.5,
        "warmup_epochs": 10,
        "warmup_factor": 0.01,
        "warmup_method": "constant",
    }
    assert (train.epochs, train.checkpoint_every, train.log_every) == (77, 5, 7)
    assert (train.eval_every, train.eval_batch_size, train.workers) == (9, 256, 3)
    assert config.sampler.options["batch_size"] == 32


def test_evaluation_is_translated(imported: Import) -> None:
    result = imported({"TEST.FEAT_NORM": "no", "TEST.RE_RANKING": "yes", "TEST.WEIGHT": "w.pth"})
    options = resolved(result).evaluator.options
    assert (options["metric"], options["rerank"]) == ("euclidean", True)
    assert named("evaluator.rerank", result)
    assert named("TEST.WEIGHT 'w.pth'", result)


@pytest.mark.parametrize(
    ("spelling", "mode"),
    [
        ("True", "online"),
        ("'True'", "online"),
        ("on", "online"),
        ("False", "disabled"),
        ("'no'", "disabled"),
    ],
)
def test_wandb_is_on_or_off(spelling: str, mode: str, imported: Import) -> None:
    result = imported(f"WANDB: {{ENABLE: {spelling}, NAME: run 1, ENTITY: us, PROJECT: ''}}")
    wandb = resolved(result).wandb
    assert (wandb.mode, wandb.name, wandb.entity) == (mode, "run 1", "us")
    assert wandb.project == "reid-strong-baseline"
    assert not named("wandb.mode", result)


@pytest.mark.parametrize(
    ("device", "ours"), [("cuda", "auto"), ("cpu", "cpu"), ("cuda:1", "cuda:1")]
)
def test_the_device_is_translated(device: str, ours: str, imported: Import) -> None:
    assert accepted(imported({"MODEL.DEVICE": device}))["train"]["device"] == ours


@pytest.mark.parametrize("spelling", ["('1')", "1", "'1'"])
def test_a_device_number_goes_to_the_environment(spelling: str, imported: Import) -> None:
    result = imported(f"MODEL:\n  DEVICE_ID: {spelling}\n")
    assert named("MODEL.DEVICE_ID '1'", result) and named("CUDA_VISIBLE_DEVICES", result)


def test_an_output_folder_is_kept(imported: Import) -> None:
    assert resolved(imported({"OUTPUT_DIR": "('./log/x')"})).output_dir == "./log/x"
    assert resolved(imported({"OUTPUT_DIR": ""})).output_dir == "log/run"
