"""The configurations that ship: each resolves, and says what it should."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from reidreg import load_config
from reidreg.config.layers import find_config, shipped_configs
from reidreg.config.optimizers import optimizer_class
from reidreg.config.schedules import SCHEDULES
from reidreg.config.sections import PART_SECTIONS, advice, config_from_dict
from reidreg.config.yamlfile import dump_yaml, parse_yaml
from reidreg.parts.interfaces import REGISTRIES
from reidreg.training.optimizers import make_schedule

FOLDER = Path(__file__).parents[2] / "configs"
COMPLETE = sorted(path.stem for path in FOLDER.glob("*.yaml"))
OVERLAYS = sorted(f"overlays/{path.stem}" for path in FOLDER.glob("overlays/*.yaml"))
CHOICES = [(name,) for name in COMPLETE] + [("aihub_kaist", overlay) for overlay in OVERLAYS]


def test_every_file_ships_under_its_bare_name() -> None:
    assert COMPLETE and OVERLAYS
    shipped = shipped_configs()
    assert sorted(shipped) == sorted([*COMPLETE, *OVERLAYS])
    for name, path in shipped.items():
        assert path.is_file() and find_config(name) == path
        assert path.read_text() == (FOLDER / f"{name}.yaml").read_text()
        assert path.read_text().startswith("# "), "a line says what it is for"


@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_a_configuration_resolves_and_reads_back(names: tuple[str, ...]) -> None:
    config = load_config(*names)
    values = config.as_dict()
    again = parse_yaml(dump_yaml(values), "dump")
    assert again == values
    assert load_config(again) == config
    assert config_from_dict(values).as_dict() == values
    assert all(line.startswith("losses turned off by weight 0: ") for line in advice(config))


@pytest.mark.parametrize("names", CHOICES, ids="+".join)
def test_a_configuration_names_registered_parts_alone(names: tuple[str, ...]) -> None:
    config = load_config(*names)
    for section in PART_SECTIONS:
        assert getattr(config, section).name in REGISTRIES[section]
    for loss in config.losses.values():
        assert loss.name in REGISTRIES["loss"]
    assert config.schedule.name in SCHEDULES
    assert optimizer_class(config.optimizer.name).__name__.lower() == config.optimizer.name
    assert make_schedule(config).factor(config.train.epochs) > 0


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_changes_something_and_is_a_few_lines(overlay: str) -> None:
    assert load_config("aihub_kaist", overlay) != load_config("aihub_kaist")
    assert len(find_config(overlay).read_text().splitlines()) <= 8


@pytest.mark.parametrize("name", COMPLETE)
def test_a_complete_configuration_has_an_output_folder_of_its_own(name: str) -> None:
    assert load_config(name).output_dir == f"log/{name}"


GUIDE: dict[str, Any] = {
    "dataset": {
        "name": "aihub_kaist",
        "root": "data",
        "train_folder": "bounding_box_train_1",
        "query_folder": "query",
        "gallery_folder": "bounding_box_test",
    },
    "input": {"size": [256, 128], "flip_prob": 0.5, "padding": 10, "erasing_prob": 0.5},
    "sampler": {"name": "identity", "batch_size": 64, "instances": 4},
    "backbone": {"name": "resnet50", "pretrained": "imagenet", "last_stride": 1},
    "head": {"name": "bnneck"},
    "losses": {
        "id": {"name": "cross_entropy", "weight": 1.0, "label_smoothing": 0.1},
        "triplet": {"name": "triplet", "weight": 1.0, "margin": 0.3},
    },
    "optimizer": {"name": "adam", "lr": 3.5e-4, "weight_decay": 5.0e-4, "bias_lr_factor": 1.0},
    "schedule": {
        "name": "multistep",
        "milestones": [40, 70],
        "gamma": 0.1,
        "warmup_epochs": 10,
        "warmup_factor": 0.01,
        "warmup_method": "linear",
    },
    "evaluator": {"name": "retrieval", "metric": "cosine", "max_rank": 50},
    "train": {
        "epochs": 120,
        "eval_every": 40,
        "checkpoint_every": 40,
        "log_every": 20,
        "workers": 8,
        "precision": "auto",
        "device": "auto",
        "seed": 0,
    },
    "wandb": {
        "mode": "online",
        "project": "reid-aihub-kaist",
        "tags": ["aihub", "kaist", "person-reid"],
    },
    "init_from": None,
    "output_dir": "log/aihub_kaist",
}


def test_aihub_kaist_has_the_guides_values() -> None:
    assert yaml.safe_load((FOLDER / "aihub_kaist.yaml").read_text()) == GUIDE
    resolved = load_config("aihub_kaist").as_dict()
    for section, options in GUIDE.items():
        if not isinstance(options, dict):
            assert resolved[section] == options
        elif section == "losses":
            assert resolved[section] == options
        else:
            assert {key: resolved[section][key] for key in options} == options


def test_what_aihub_kaist_leaves_open_keeps_to_the_published_method() -> None:
    config = load_config("aihub_kaist")
    assert config.backbone.options["stem_relu"] is True
    assert config.head.options == {"pooling": "avg", "feature": "after"}
    assert config.optimizer.bias_weight_decay is None and config.optimizer.momentum is None
    assert config.evaluator.options["same_camera"] == "drop"
    assert config.evaluator.options["rerank"] is False


# Epoch -> factor, of a warm-up to epoch 10 and a tenth from epochs 40 and 70 on.
FACTORS = {1: 0.109, 5: 0.505, 9: 0.901, 10: 1.0, 39: 1.0, 40: 0.1, 69: 0.1, 70: 0.01, 120: 0.01}


def test_aihub_kaist_has_the_guides_learning_rates() -> None:
    schedule = make_schedule(load_config("aihub_kaist"))
    assert {epoch: schedule.factor(epoch) for epoch in FACTORS} == pytest.approx(FACTORS)


def test_market1501_differs_in_its_data_alone() -> None:
    ours, theirs = load_config("market1501").as_dict(), load_config("aihub_kaist").as_dict()
    different = {section for section in ours if ours[section] != theirs[section]}
    assert different == {"dataset", "wandb", "output_dir"}


def test_the_quickstart_needs_no_data_no_download_and_no_login() -> None:
    config = load_config("quickstart")
    assert config.dataset.name == "synthetic"
    assert config.backbone.options["pretrained"] == "none"
    assert config.wandb.mode == "disabled"
    assert config.train.eval_untrained
