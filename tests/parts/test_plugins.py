"""Plugins: third-party parts are registered like ours, and a broken plugin harms no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from conftest import Command, as_flags
from reidreg.parts.plugins import GROUP, load_plugins

EXAMPLE = Path(__file__).parents[1] / "example_plugin"

LOSS = """
from reidreg import LOSSES, Loss
@LOSSES.register({name!r})
class Part(Loss):
    def __init__(self, {options}) -> None:
        super().__init__()
    def forward(self, output, pids):
        return output.features.sum()
"""
# Plugin's name -> its module's text, and a part of its error in the listing.
BROKEN = {
    "imports": ("import no_such_module_at_all\n", "No module named 'no_such_module_at_all'"),
    "syntax": ("def broken(:\n", "SyntaxError: "),
    "exits": ("import sys\nsys.exit(3)\n", "SystemExit: 3"),
    "raises": ("raise ValueError('line one\\nline two')\n", "ValueError: line one line two"),
    "taken": (
        LOSS.format(name="triplet", options="margin: float = 9.0"),
        "loss 'triplet' is taken: builtin (reidreg",
    ),
    "wrong_base": (
        "from reidreg import LOSSES\n@LOSSES.register('loose')\nclass Loose:\n    pass\n",
        "does not extend reidreg.Loss",
    ),
    "untyped": (LOSS.format(name="vague", options="margin=0.3"), "option 'margin' has no type"),
    "keywords": (LOSS.format(name="greedy", options="**options: float"), "takes *options"),
    "callable": (
        "from typing import Any\n" + LOSS.format(name="runs", options="what: Any = None"),
        "option 'what' is of type Any",
    ),
    "half_way": (LOSS.format(name="half", options="margin: float = 1.0") + "\n1 / 0\n", "Zero"),
}


def fake_distribution(folder: Path, name: str, text: str, value: str | None = None) -> None:
    """An installed distribution `name` 1.0 with one module and one plugin, both called `name`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{name}_module.py").write_text(text)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {value or f'{name}_module'}\n")
    (info / "RECORD").write_text(f"{name}_module.py,,\n")


def python(code: str, folder: Path, *arguments: str, **env: str) -> str:
    """What a program prints, with a folder of distributions beside those installed."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(folder), **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin, built and installed into a separate folder."""
    pytest.importorskip("hatchling")
    pytest.importorskip("pip")
    target = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source") / "example_plugin"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--no-compile"]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)],
        check=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    return target


@pytest.fixture(scope="module")
def crowded(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example plugin with broken ones beside it."""
    folder = tmp_path_factory.mktemp("crowd") / "site"
    shutil.copytree(installed, folder)
    for name, (text, _) in BROKEN.items():
        fake_distribution(folder, name, text)
    fake_distribution(folder, "no_module", "", value="not a module!")
    return folder


EXAMPLE_FLAGS = {
    "dataset.name": "identity_folders",
    "losses.circle.name": "circle",
    "losses.circle.weight": "0.1",
}
FIT = ["fit", "--config", "aihub_kaist"]
COMMANDS = {
    "listing": ["plugins", "--json"],
    "help": [*FIT, *as_flags(EXAMPLE_FLAGS), "--help"],
    "limit": [*FIT, *as_flags(EXAMPLE_FLAGS), "--losses.circle.margin", "1"],
    "unknown": [*FIT, "--losses.x.name", "zzz"],
}
RUN = """
import contextlib, io, json, sys
from reidreg.cli.main import main
outcomes = {}
for name, arguments in json.loads(sys.argv[1]).items():
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = main(arguments)
    outcomes[name] = (code, out.getvalue(), err.getvalue())
print(json.dumps(outcomes))
"""


@pytest.fixture(scope="module")
def outcomes(crowded: Path) -> dict[str, tuple[int, str, str]]:
    """Exit code, output and errors of some commands among all those plugins."""
    printed = python(RUN, crowded, json.dumps(COMMANDS), COLUMNS="200")
    return {name: tuple(outcome) for name, outcome in json.loads(printed).items()}


@pytest.fixture(scope="module")
def listing(outcomes: dict[str, tuple[int, str, str]]) -> dict[str, Any]:
    """`reidreg plugins --json` among all those plugins."""
    code, output, errors = outcomes["listing"]
    assert code == 0 and not errors
    parsed: dict[str, Any] = json.loads(output)
    return parsed


@pytest.fixture(scope="module")
def people(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn images in the layout that the example's data set reads."""
    root = tmp_path_factory.mktemp("people")
    folders = {"train": "bounding_box_train_1", "query": "query", "gallery": "bounding_box_test"}
    for split, folder in folders.items():
        for image in (aihub_root / "aihub_kaist" / folder).glob("*.jpg"):
            pid, camera = image.name.split("_")[:2]
            target = root / split / f"person_{pid}" / f"c{camera[1:3]}_{image.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, target)
    return root


# --------------------------------------------------------------------- the example


def test_the_parts_of_an_installed_plugin_are_listed_with_their_origin(
    listing: dict[str, Any],
) -> None:
    ours = {part["name"]: part for part in listing["parts"] if part["plugin"] == "example"}
    assert ours.keys() == {"circle", "identity_folders"}
    assert ours["circle"] == {
        "kind": "loss",
        "name": "circle",
        "plugin": "example",
        "origin": "example (reidreg-example 1.2.3)",
        "class": "reidreg_example.circle.Circle",
        "summary": "Circle loss over all pairs of a batch (Sun et al., CVPR 2020, equation 6).",
    }
    assert ours["identity_folders"]["kind"] == "dataset"


def test_help_shows_a_plugins_options_typed_and_documented(
    outcomes: dict[str, tuple[int, str, str]],
) -> None:
    code, text, errors = outcomes["help"]
    assert code == 0 and not errors
    assert "--losses.circle.margin VALUE" in text
    assert "The relaxation m; similar pairs should be above 1 - m" in text
    assert "(type: float, default: 0.25)" in text
    assert "--dataset.min_images VALUE" in text
    assert "fewer images are left out. (type: int, default: 1)" in text
    assert "--dataset.train_folder" not in text


def test_a_run_trains_with_a_plugins_parts_among_broken_plugins(
    reidreg: Command, crowded: Path, people: Path, tiny: Mapping[str, Any], tmp_path: Path
) -> None:
    values = {**tiny, **EXAMPLE_FLAGS, "dataset.root": people, "losses.circle.gamma": 16}
    result = reidreg(*FIT, *as_flags(values), PYTHONPATH=str(crowded))
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line) for line in lines]
    assert any("train/circle" in line for line in steps)
    assert any("val/mAP" in line for line in steps)
    config = (tmp_path / "run/config.yaml").read_text()
    assert "name: identity_folders" in config and "gamma: 16.0" in config


def test_a_plugins_limits_are_checked_like_ours(
    outcomes: dict[str, tuple[int, str, str]],
) -> None:
    code, _, errors = outcomes["limit"]
    assert code == 2
    assert errors == (
        "reidreg fit: losses.circle.margin: 1.0 is out of range; "
        "it must be at least 0 and less than 1\n"
    )


CIRCLE = """
import math, torch
from reidreg import LOSSES, Output
torch.manual_seed(0)
features = torch.randn(9, 5, dtype=torch.float64).float().requires_grad_()
pids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 3])  # the last one has no partner
m, g = 0.25, 8.0
loss = LOSSES.build("circle", margin=m, gamma=g)(Output(features, features), pids)
loss.backward()
unit = [row / row.norm() for row in features.detach().double()]
total = 0.0
for i in range(9):
    pull = push = 0.0
    for j in range(9):
        s = float(unit[i] @ unit[j])
        if j != i and pids[i] == pids[j]:
            pull += math.exp(-g * max(1 + m - s, 0) * (s - (1 - m)))
        elif pids[i] != pids[j]:
            push += math.exp(g * max(s + m, 0) * (s - m))
    total += math.log(1 + pull * push)
assert abs(loss.item() - total / 9) < 1e-5, (loss.item(), total / 9)
assert features.grad.isfinite().all() and features.grad.abs().sum() > 0
"""


def test_the_examples_loss_is_that_of_its_paper(installed: Path) -> None:
    python(CIRCLE, installed)


# --------------------------------------------------------------------- broken ones


@pytest.mark.parametrize("name", [*BROKEN, "no_module"])
def test_a_broken_plugin_is_listed_with_its_reason(listing: dict[str, Any], name: str) -> None:
    found = [entry for entry in listing["broken"] if entry["plugin"] == f"{name} ({name} 1.0)"]
    assert len(found) == 1
    reason = BROKEN[name][1] if name in BROKEN else "ModuleNotFoundError: No module named"
    assert reason in found[0]["error"]
    assert "\n" not in found[0]["error"]


def test_a_broken_plugin_leaves_no_part_and_no_built_in_is_replaced(
    listing: dict[str, Any],
) -> None:
    assert len(listing["broken"]) == len(BROKEN) + 1
    assert {part["plugin"] for part in listing["parts"]} == {"builtin", "example"}
    classes = {(part["kind"], part["name"]): part["class"] for part in listing["parts"]}
    assert classes["loss", "triplet"] == "reidreg_plugins.losses.triplet.Triplet"
    assert ("loss", "half") not in classes


def test_an_unknown_name_mentions_the_plugins_that_failed(
    outcomes: dict[str, tuple[int, str, str]],
) -> None:
    code, _, errors = outcomes["unknown"]
    assert code == 2
    line = errors.strip()
    assert line.startswith("reidreg fit: losses.x.name: no loss is registered as 'zzz'; known: ")
    assert "callable, exits, " in line and "6 more failed to load, see `reidreg plugins`" in line
    assert len(line) < 250 and "\n" not in line


def test_two_plugins_of_the_same_name_are_both_kept(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "first", "raise OSError('first')")
    fake_distribution(tmp_path, "second", "pass")
    points = tmp_path / "second-1.0.dist-info/entry_points.txt"
    points.write_text(f"[{GROUP}]\nfirst = second_module\n")
    code = "from reidreg import load_plugins; print([str(p) for p in load_plugins()])"
    listed = python(code, tmp_path, REIDREG_PLUGINS="first")
    assert listed.strip() == "['first (first 1.0)', 'first (second 1.0)']"
    listed = python(code.replace("str(p)", "p.error"), tmp_path, REIDREG_PLUGINS="first")
    assert listed.strip() == "['OSError: first', None]"


def test_a_plugin_called_builtin_cannot_take_the_names_of_ours(tmp_path: Path) -> None:
    fake_distribution(tmp_path, "aaa", BROKEN["taken"][0])
    points = tmp_path / "aaa-1.0.dist-info/entry_points.txt"
    points.write_text(f"[{GROUP}]\nbuiltin = aaa_module\n")
    code = (
        "from reidreg import LOSSES, ReidregError, load_plugins\n"
        "print(LOSSES['triplet'].__module__, [p.error is None for p in load_plugins()])\n"
        "try:\n    LOSSES['tripled']\nexcept ReidregError as error:\n    print(error)"
    )
    first, second = python(code, tmp_path).splitlines()
    assert first == "reidreg_plugins.losses.triplet [True, False]"
    assert second.startswith(
        "no loss is registered as 'tripled'; did you mean 'triplet'?; plugin builtin (aaa 1.0) "
        "failed to load: PluginError: loss 'triplet' is taken"
    )


# --------------------------------------------------------------------- which ones are loaded

NAMES = "from reidreg import load_plugins; print([p.name for p in load_plugins()])"


@pytest.mark.parametrize(
    ("chosen", "loaded"),
    [
        ("", []),
        (" , ", []),
        ("one", ["one"]),
        ("two,one", ["one", "two"]),
        (" one , two ", ["one", "two"]),
    ],
)
def test_a_variable_chooses_the_plugins(tmp_path: Path, chosen: str, loaded: list[str]) -> None:
    for name in ("one", "two", "three"):
        fake_distribution(tmp_path, name, "")
    assert python(NAMES, tmp_path, REIDREG_PLUGINS=chosen).strip() == str(loaded)


def test_only_the_built_in_ones_are_loaded_when_they_alone_are_chosen(crowded: Path) -> None:
    assert python(NAMES, crowded, REIDREG_PLUGINS="builtin").strip() == "['builtin']"


def test_an_unknown_plugin_in_the_variable_is_an_error(crowded: Path) -> None:
    code = (
        "from reidreg import ReidregError, load_plugins\n"
        "try:\n    load_plugins()\nexcept ReidregError as error:\n    print(error)"
    )
    said = python(code, crowded, REIDREG_PLUGINS="builtin,exampel").strip()
    assert said == "REIDREG_PLUGINS: no plugin 'exampel'; did you mean 'example'?"


def test_without_plugins_the_error_names_the_missing_part(reidreg: Command) -> None:
    result = reidreg("fit", "--config", "quickstart", REIDREG_PLUGINS="")
    assert result.returncode == 2
    assert result.stderr == "reidreg fit: dataset.name: no dataset is registered as 'synthetic'\n"


def test_plugins_are_loaded_once() -> None:
    first = load_plugins()
    assert load_plugins() == first
    assert [plugin.name for plugin in first if plugin.module == "reidreg_plugins"] == ["builtin"]
    assert all(plugin.seconds >= 0 for plugin in first)


def test_a_plugin_imported_directly_is_still_the_origin_of_its_parts() -> None:
    code = (
        "import reidreg_plugins\nfrom reidreg import LOSSES\n"
        "print(LOSSES.plugin('triplet').name, len(LOSSES))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert shown.split()[0] == "builtin" and int(shown.split()[1]) >= 3
