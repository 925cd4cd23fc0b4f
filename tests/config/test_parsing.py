"""Configurations: layers, values, and an error of one line for each mistake."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml

from conftest import Command, as_flags
from reidreg import EVALUATORS, LOSSES, SAMPLERS, Loss, ReidregError, load_config
from reidreg.cli.main import main
from reidreg.config.layers import find_config, shipped_configs
from reidreg.config.parsing import parse, resolve
from reidreg.config.schedules import SCHEDULES
from reidreg.config.sections import FIXED_SECTIONS, Config
from reidreg.config.yamlfile import read_yaml
from reidreg.errors import ConfigError, UnknownNameError
from reidreg.parts.schema import RUN_TIME_FACTS, bounds_of, options_of

Refused = Callable[..., str]


@pytest.fixture
def refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Refused:
    """Runs `reidreg fit` in an empty folder with input that it must refuse; returns the error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, base: Sequence[str] = ("--config", "aihub_kaist")) -> str:
        # If the input were accepted, this would print a configuration and not train.
        code = main(["fit", *base, *arguments, "--print_config"])
        printed, errors = capsys.readouterr()
        assert code == 2, (arguments, code, errors, printed)
        assert printed == ""
        assert errors.startswith("reidreg fit: ") and errors.endswith("\n")
        assert errors.count("\n") == 1 and len(errors) < 200, errors
        assert "Traceback" not in errors
        return errors.removeprefix("reidreg fit: ").strip()

    return run


def in_file(values: Any) -> str:
    """Writes a YAML file into the current folder and returns its name."""
    Path("x.yaml").write_text(yaml.safe_dump(values))
    return "x.yaml"


def nested(key: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `a.b`."""
    for word in reversed(key.split(".")):
        value = {word: value}
    result: dict[str, Any] = value
    return result


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{prefix}{key}."))
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


BASE = load_config("aihub_kaist")
RESOLVED = flat(BASE.as_dict())
WRITTEN = flat(yaml.safe_load(shipped_configs()["aihub_kaist"].read_text()))


# --------------------------------------------------------------------- layers


def test_later_layers_win_and_keep_what_they_do_not_mention(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("optimizer: {lr: 0.01}\ntrain.epochs: 7\nlosses: {triplet: {margin: 0.1}}\n")
    config = load_config(
        "aihub_kaist",
        file,
        {"train": {"workers": 1}, "losses.triplet.margin": 0.2},
        flags=["--train.workers=2", "--train.seed", "3"],
    )
    assert config.optimizer.lr == 0.01
    assert (config.train.epochs, config.train.workers, config.train.seed) == (7, 2, 3)
    assert config.losses["triplet"].options == {"margin": 0.2}
    expected = {**RESOLVED, "optimizer.lr": 0.01, "losses.triplet.margin": 0.2}
    expected.update({"train.epochs": 7, "train.workers": 2, "train.seed": 3})
    assert flat(config.as_dict()) == expected


def test_several_files_are_layered_in_their_order() -> None:
    both = load_config("aihub_kaist", "overlays/sample", "overlays/sample_reduced")
    assert both.train.epochs == 4 and both.dataset.options["query_folder"] == "sample_query_reduced"
    other = load_config("aihub_kaist", "overlays/sample_reduced", "overlays/sample")
    assert other.train.epochs == 20 and other.dataset.options["query_folder"] == "sample_query"


def test_the_command_line_takes_several_configs_and_flags(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--config", "aihub_kaist", "--config=overlays/center", "--train.epochs", "3"]
    assert main(["fit", *arguments, "--print_config"]) == 0
    config = load_config(yaml.safe_load(capsys.readouterr().out))
    assert config == load_config("aihub_kaist", "overlays/center", {"train.epochs": 3})


def test_dotted_and_nested_keys_are_the_same() -> None:
    dotted = load_config("aihub_kaist", {"losses.center.name": "center", "losses.center.lr": 0.1})
    tree = load_config("aihub_kaist", {"losses": {"center": {"name": "center", "lr": 0.1}}})
    assert dotted == tree
    assert list(dotted.losses) == ["id", "triplet", "center"]


@pytest.mark.parametrize("where", ["flag", "mapping", "file"])
def test_another_part_keeps_shared_options_and_drops_foreign_ones(
    where: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("dataset: {name: synthetic}\nschedule: {name: cosine}\n")
    flags = ["--dataset.name", "synthetic", "--schedule.name=cosine"]
    layers: dict[str, tuple[list[Any], list[str]]] = {
        "flag": ([], flags),
        "mapping": ([{"dataset.name": "synthetic", "schedule.name": "cosine"}], []),
        "file": ([file], []),
    }
    above, given = layers[where]
    below = {"dataset.root": "elsewhere", "schedule.warmup_epochs": 3}
    config = load_config("aihub_kaist", below, *above, flags=given)
    assert config.dataset.options["root"] == "elsewhere"
    assert "train_folder" not in config.dataset.options
    assert config.dataset.options["identities"] == 80
    assert config.schedule.options["warmup_epochs"] == 3
    assert "milestones" not in config.schedule.options


def test_a_part_chosen_again_gets_its_options_back() -> None:
    changes = {"sampler.instances": 8, "sampler.batch_size": 32}
    there = load_config("aihub_kaist", changes, {"sampler.name": "random"})
    assert there.sampler.options == {"batch_size": 32}
    back = load_config(
        "aihub_kaist", changes, {"sampler.name": "random"}, {"sampler.name": "identity"}
    )
    assert back.sampler.options == {"batch_size": 32, "instances": 8}


def test_an_option_beside_the_new_name_must_be_of_the_new_part(refused: Refused) -> None:
    values = {"sampler": {"name": "random", "instances": 4}}
    line = refused("--config", in_file(values))
    assert line == "sampler.instances: no such key; did you mean 'sampler.name'?"


def test_the_softmax_overlay_makes_a_run_of_classification_alone() -> None:
    config = load_config("aihub_kaist", "overlays/softmax")
    assert config.sampler.as_dict() == {"name": "random", "batch_size": 64}
    assert config.losses["id"].options == {"label_smoothing": 0.0}
    assert config.losses["triplet"].weight == 0


def test_a_term_is_added_by_flags_alone() -> None:
    flags = ["--losses.center.name=center", "--losses.center.weight", "5e-4"]
    config = load_config("aihub_kaist", flags=flags)
    assert config.losses["center"].as_dict() == {"name": "center", "weight": 0.0005, "lr": 0.5}
    assert load_config("aihub_kaist", "overlays/center") == config


def test_a_part_with_a_required_option_can_be_chosen_by_flags(refused: Refused) -> None:
    flags = ["--backbone.name", "timm", "--backbone.model", "resnet10t"]
    assert load_config("aihub_kaist", flags=flags).backbone.options["model"] == "resnet10t"
    line = refused("--backbone.name", "timm")
    assert line == "backbone.model: this option must be given"


def test_an_empty_section_takes_its_defaults(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("wandb:\n")
    assert load_config("aihub_kaist", file).wandb.mode == "disabled"


def test_lists_grow_by_plus() -> None:
    config = load_config("aihub_kaist", flags=["--wandb.tags+", "fast", "--wandb.tags+=x"])
    assert config.wandb.tags == ["aihub", "kaist", "person-reid", "fast", "x"]


def test_a_loaded_configuration_does_not_change_later_ones() -> None:
    first = load_config("aihub_kaist", flags=["--wandb.tags+", "mine", "--train.seed", "5"])
    first.wandb.tags.append("changed")
    first.dataset.options["root"] = "changed"
    assert flat(load_config("aihub_kaist").as_dict()) == RESOLVED
    defaults = load_config("aihub_kaist", {"schedule": {"name": "cosine"}, "input.mean": [0, 0, 0]})
    defaults.schedule.options.clear()
    assert flat(load_config("aihub_kaist").as_dict()) == RESOLVED


def test_a_part_registered_between_two_loads_is_seen_and_so_is_its_next_version() -> None:
    term = {"losses.own.name": "own"}
    with pytest.raises(ConfigError, match=r"losses\.own\.name: no loss is registered as 'own'"):
        load_config("aihub_kaist", term)
    with LOSSES.temporary():
        for option in ("margin", "scale"):
            LOSSES.register("own")(loss_with(option))
            assert load_config("aihub_kaist", term).losses["own"].options == {option: 0.5}
            # The name is accepted in the sections of other parts, too.
            flags = ["--losses.id.name", "own", f"--losses.id.{option}", "0.25"]
            assert load_config("aihub_kaist", flags=flags).losses["id"].options == {option: 0.25}
    with pytest.raises(ConfigError, match=r"losses\.own\.name: no loss is registered as 'own'"):
        load_config("aihub_kaist", term)


def loss_with(option: str) -> type[Loss]:
    """A loss with one option, as a notebook cell defines it that is edited and run again."""
    code = (
        f"class Own(Loss):\n    def __init__(self, {option}: float = 0.5) -> None: ...\n"
        "    def forward(self, output, pids): ..."
    )
    scope: dict[str, Any] = {"Loss": Loss, "__name__": __name__}
    exec(code, scope)
    own: type[Loss] = scope["Own"]
    return own


def test_configs_ship_by_bare_name_and_by_the_path_of_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["aihub_kaist", "aihub_kaist.yaml", "configs/aihub_kaist.yaml", "configs/aihub_kaist"]
    assert len({find_config(name) for name in names}) == 1
    # The folder of the data may have the same name.
    (tmp_path / "aihub_kaist").mkdir()
    assert find_config("aihub_kaist").is_file()
    (tmp_path / "quickstart.yaml").write_text("train: {epochs: 1}\n")
    assert find_config("quickstart.yaml") == Path("quickstart.yaml")


def test_the_printed_configuration_loads_to_the_same(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--wandb.name", "0012", "--wandb.project", "1e5", "--output_dir", "null"]
    flags += ["--dataset.train_folder", "[a, b]", "--wandb.entity", "2024-01-01"]
    flags += ["--losses.triplet.margin", "null", "--optimizer.betas", "[0.8, 0.99]"]
    assert main(["fit", "--config", "aihub_kaist", *flags, "--print_config"]) == 0
    file = tmp_path / "again.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(file) == load_config("aihub_kaist", flags=flags)
    assert load_config(load_config(file).as_dict()) == load_config(file)


# --------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 1e-3), ("3.5e-4", 3.5e-4), ("1", 1.0), (".5", 0.5), ("1.E-2", 0.01)],
)
@pytest.mark.parametrize("where", ["flag", "file"])
def test_every_notation_of_a_number_gives_a_float(
    text: str, value: float, where: str, tmp_path: Path
) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"optimizer: {{lr: {text}}}\n")
    if where == "flag":
        config = load_config("aihub_kaist", flags=["--optimizer.lr", text])
    else:
        config = load_config("aihub_kaist", file)
    assert config.optimizer.lr == value and isinstance(config.optimizer.lr, float)


@pytest.mark.parametrize(
    "text",
    ["0012", "913264e", "1e5", "5", "true", "null", "2024-01-01", "a: b", "~", "1:30", "x,y"],
)
@pytest.mark.parametrize("key", ["wandb.project", "output_dir", "dataset.root"])
def test_text_given_by_a_flag_stays_text(key: str, text: str) -> None:
    config = load_config("aihub_kaist", flags=[f"--{key}", text])
    assert flat(config.as_dict())[key] == text


@pytest.mark.parametrize("text", ["0012", "1:30", "2024-01-01", "913264e", "1.2.3", "12_c3"])
def test_text_that_is_not_a_number_stays_text_in_a_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"dataset: {{train_folder: {text}}}\nwandb: {{tags: [{text}]}}\n")
    config = load_config("aihub_kaist", file)
    assert config.dataset.options["train_folder"] == text and config.wandb.tags == [text]


# --------------------------------------------------------------------- names and keys


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--optimizer.lrr", "1"], "--optimizer.lrr: no such option; did you mean 'optimizer.lr'?"),
        (["--trian.epochs=4"], "--trian.epochs: no such option; did you mean 'train.epochs'?"),
        (["--epochs", "4"], "--epochs: no such option; did you mean 'train.epochs'?"),
        (["--train.lr", "4"], "--train.lr: no such option; did you mean 'optimizer.lr'?"),
        (["--print_confg"], "--print_confg: no such option; did you mean 'print_config'?"),
        (["--resumee", "auto"], "--resumee: no such option; did you mean 'resume'?"),
        (["--train", "4"], "--train: this is a section; its options are --train.KEY"),
        (["--losses", "x"], "--losses: this is a section; its options are --losses.KEY"),
        (["--losses.center.weight", "1"], "--losses.center.weight: no such option; give --config "
         "FILE, or --losses.center.name first"),
        (["--losses.tripet.margin", "1"], "--losses.tripet.margin: no such option; did you mean "
         "'losses.triplet.margin'?"),
        (["--losses.a-b.name", "triplet"], "--losses.a-b.name: a term's name has only letters, "
         "digits and '_'"),
        (["--dataset.name", "aihub_kiast"], "dataset.name: no dataset is registered as "
         "'aihub_kiast'; did you mean 'aihub_kaist'?"),
        (["--head.name", "x"], "head.name: no head is registered as 'x'; known: bnneck, linear"),
        (["--schedule.name", "step"], "schedule.name: no schedule 'step'; did you mean "
         "'multistep'?"),
        (["--losses.new.name", "tripel"], "losses.new.name: no loss is registered as 'tripel'; did "
         "you mean 'triplet'?"),
        (["--optimizer.name", "adamx"], "optimizer.name: no optimizer 'adamx'; did you mean "
         "'adamax'?"),
        (["--dataset.name", "reidreg.cli.main.main"], "dataset.name: no dataset is registered as "
         "'reidreg.cli.main.main'; known: aihub_kaist, market1501, synthetic"),
        (["--dataset.name="], "dataset.name: expected text, got ''"),
        (["--config", "nope"], "--config nope: no such file; shipped with reidreg: aihub_kaist, "
         "market1501, quickstart, overlays/*"),
        (["--config", "aihub_kiast"], "--config aihub_kiast: no such file; did you mean "
         "'aihub_kaist'?"),
        (["--config", "center"], "--config center: no such file; did you mean 'overlays/center'?"),
        (["stray"], "unrecognized arguments: stray"),
        (["--optimizer.lr"], "--optimizer.lr: expected one argument"),
        (["--print_config=1"], "--print_config: ignored explicit argument '1'"),
    ],
)  # fmt: skip
def test_a_wrong_flag_or_name_is_refused_with_a_suggestion(
    refused: Refused, arguments: list[str], line: str
) -> None:
    if arguments == ["--optimizer.lr"]:
        arguments = [*arguments, "--train.seed", "1"]
    assert refused(*arguments) == line


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"trian": {"epochs": 3}}, "trian: no such key; did you mean 'train'?"),
        ({"train": {"epoch": 3}}, "train.epoch: no such key; did you mean 'train.epochs'?"),
        ({"train.epoch": 3}, "train.epoch: no such key; did you mean 'train.epochs'?"),
        ({"train": 3}, "train: expected options, got 3"),
        ({"train": [3]}, "train: expected options, got [3]"),
        ({"train": 3, "train.seed": 1}, "train.seed: train is both a section and a value"),
        ({"dataset": 3}, "dataset: expected a name and options, got 3"),
        ({"dataset": None}, "dataset: expected a name and options, got null"),
        ({"dataset": {"name": None}}, "dataset.name: expected a name, got null"),
        ({"dataset": {"name": ["a"]}}, "dataset.name: expected a name, got ['a']"),
        ({"losses": [1]}, "losses: expected terms with names and options, got [1]"),
        ({"losses": None}, "no loss is named: give --config FILE or --losses.TERM.name"),
        ({"losses": {"id": None}}, "losses.id: expected a name and options, got null"),
        ({"losses": {"tripet": {"margin": 1}}}, "losses.tripet: this term has no name; did you "
         "mean 'losses.triplet'?"),
        ({"losses": {None: {"name": "triplet"}}}, "losses.null: a term's name has only letters, "
         "digits and '_'"),
        ({"losses": {True: {"name": "triplet"}}}, "losses.true: a term's name has only letters, "
         "digits and '_'"),
        ({5: 1}, "5: no such key"),
        ({"train": {5: 1}}, "train.5: no such key; did you mean 'train.seed'?"),
        ({"losses": {"a.b": {"name": "x"}}}, "losses.a.b: a term's name has only letters, digits "
         "and '_'"),
        ({"losses": {"id": {"weight": 0}, "triplet": {"weight": 0}}}, "losses: every term has "
         "weight 0, so there is nothing to train"),
        ({"schedule": {"name": "cosinus"}}, "schedule.name: no schedule 'cosinus'; did you mean "
         "'cosine'?"),
        ({"dataset": {"_inherited": {"x": 1}}}, "dataset._inherited: no such key; did you mean "
         "'dataset.name'?"),
        ({"resume": "auto"}, "resume: no such key"),
        ({"output_dir": None}, "output_dir: expected text, got null"),
        ({"backbone": {"class_path": "antigravity.X"}}, "backbone.class_path: no such key; did you "
         "mean 'backbone.last_stride'?"),
    ],
)  # fmt: skip
def test_a_wrong_key_in_a_file_is_refused_with_a_suggestion(
    refused: Refused, values: dict[str, Any], line: str
) -> None:
    assert refused("--config", in_file(values)) == line


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ([], "no dataset is named: give --config FILE (such as --config quickstart) or "
         "--dataset.name"),
        (["--dataset.name", "synthetic"], "no sampler is named: give --config FILE (such as "
         "--config quickstart) or --sampler.name"),
        (["--dataset.root", "x"], "--dataset.root: no such option; give --config FILE, or "
         "--dataset.name first"),
        (["--losses.id.weight", "1"], "--losses.id.weight: no such option; give --config FILE, or "
         "--losses.id.name first"),
        (["--config"], "--config: expected a file, or the name of a shipped one"),
    ],
)  # fmt: skip
def test_what_is_missing_is_named(refused: Refused, base: list[str], line: str) -> None:
    assert refused(base=base) == line


@pytest.mark.parametrize("section", ["dataset", "sampler", "backbone", "head", "evaluator"])
def test_every_part_that_is_missing_is_named(section: str) -> None:
    values = BASE.as_dict()
    del values[section]
    with pytest.raises(ConfigError, match=f"^no {section} is named: give --config FILE"):
        load_config(values)
    for other in ("input", "optimizer", "schedule", "train", "wandb", "init_from", "output_dir"):
        del values[other]
    complete = load_config({**values, section: {"name": RESOLVED[f"{section}.name"]}})
    assert complete.train.epochs == 120 and complete.schedule.name == "multistep"


def test_an_unknown_command_is_refused_with_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["fitt"]) == 2
    assert capsys.readouterr().err == "reidreg fitt: no such command: fitt; did you mean 'fit'?\n"


# --------------------------------------------------------------------- typos


def typos(word: str) -> Iterator[str]:
    """A word with a letter dropped, two swapped, one doubled, one replaced; then with two of it."""
    once = [edit(word, kind, len(word) // 2) for kind in range(4)]
    yield from once
    for kind, first in enumerate(once):
        yield edit(first, (kind + 1) % 4, len(first) // 2 - 1)


def edit(word: str, kind: int, at: int) -> str:
    if kind == 0 and len(word) > 1:
        return word[:at] + word[at + 1 :]
    if kind == 1 and len(word) > 1:
        at = max(at, 1)
        return word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :]
    if kind == 2:
        return word[: at + 1] + word[at:]
    return word[:at] + ("q" if word[at : at + 1] != "q" else "x") + word[at + 1 :]


def mistyped() -> list[tuple[str, str]]:
    """Every key of `aihub_kaist.yaml` with its typos, in its last word and in its section."""
    known = {*RESOLVED, *(key.rpartition(".")[0] for key in RESOLVED), "losses", "resume"}
    cases = []
    for key in WRITTEN:
        section, _, word = key.rpartition(".")
        candidates = [f"{section}.{typo}" if section else typo for typo in typos(word)]
        if section and "." not in section:
            candidates += [f"{typo}.{word}" for typo in list(typos(section))[:2]]
        cases += [(key, wrong) for wrong in dict.fromkeys(candidates) if wrong not in known]
    return cases


@pytest.mark.parametrize("where", ["flag", "file"])
def test_every_mistyped_key_is_refused_and_nearly_always_guessed(
    where: str, record_property: Callable[[str, object], None]
) -> None:
    cases = mistyped()
    # Read the file once: reading it for each of the hundreds of cases would take most of the time.
    base = read_yaml(shipped_configs()["aihub_kaist"])
    assert len(cases) > 350
    wrong = []
    for key, typo in cases:
        if where == "flag":
            with pytest.raises(ConfigError) as caught:
                load_config(base, flags=[f"--{typo}", "1"])
            line = str(caught.value)
            assert line.startswith(f"--{typo}: no such option")
        else:
            with pytest.raises(ConfigError) as caught:
                load_config(base, nested(typo, 1))
            line = str(caught.value)
            # For a mistyped section the error names the section and suggests the right one.
            section = typo.partition(".")[0]
            assert line.startswith((f"{typo}: no such key", f"{section}: no such key"))
            if line.startswith(f"{section}: "):
                key = key.partition(".")[0]
        if not line.endswith(f"; did you mean {key!r}?"):
            wrong.append((typo, line))
    share = 1 - len(wrong) / len(cases)
    record_property("right suggestions", f"{share:.1%} of {len(cases)} typos by {where}")
    print(f"right suggestions by {where}: {share:.1%} of {len(cases)}")
    assert share >= 0.95, wrong


# --------------------------------------------------------------------- types and limits

# Values from YAML that are wrong for each type.
TEXT, LIST, MAPPING = "abc", [1], {"a": 1}
WRONG: dict[type, list[Any]] = {
    int: [TEXT, 1.5, [1], {"a": 1}, True, None],
    float: [TEXT, [1.0], MAPPING, True, None],
    str: [5, 1.5, LIST, MAPPING, True, None],
    bool: [TEXT, 5, [True], MAPPING, None],
    list: [TEXT, 5, MAPPING, True, None],
}
NULL_IS_FINE = {
    "init_from",
    "input.mean",
    "input.std",
    "losses.triplet.margin",
    "optimizer.betas",
    "optimizer.bias_weight_decay",
    "optimizer.clip_norm",
    "optimizer.layer_decay",
    "optimizer.momentum",
    "wandb.entity",
    "wandb.name",
}
SORTS: dict[str, type] = {
    **{key: list for key in ("input.mean", "input.std", "optimizer.betas")},
    **{
        f"optimizer.{key}": float
        for key in ("bias_weight_decay", "clip_norm", "layer_decay", "momentum")
    },
    **{key: str for key in ("init_from", "wandb.entity", "wandb.name")},
}
# Options of several types: a folder or a list of them, a number or auto.
MIXED = {"dataset.train_folder": [5, 1.5, True, None, MAPPING, [1]], "train.workers": WRONG[int]}


def wrong_values(key: str) -> list[Any]:
    if key in MIXED:
        return MIXED[key]
    values = WRONG[SORTS.get(key, type(RESOLVED[key]))]
    return [value for value in values if value is not None or key not in NULL_IS_FINE]


@pytest.mark.parametrize("key", sorted(RESOLVED))
def test_a_value_of_the_wrong_type_is_refused_with_the_right_one(
    refused: Refused, key: str
) -> None:
    for value in wrong_values(key):
        line = refused("--config", in_file(nested(key, value)))
        assert re.match(rf"{re.escape(key)}(\[0\])?: expected .*, got ", line), (value, line)


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("optimizer.lr", "abc", "a number, got abc"),
        ("train.epochs", "1.5", "a whole number, got 1.5"),
        ("train.epochs", "true", "a whole number, got True"),
        ("train.eval_untrained", "1", "true or false, got 1"),
        ("train.precision", "fp64", "'auto' or 'bf16' or 'fp16' or 'fp32', got fp64"),
        ("train.workers", "many", "a whole number or 'auto', got many"),
        ("backbone.last_stride", "3", "1 or 2, got 3"),
        ("input.size", "256", "[a whole number, a whole number], got 256"),
        ("input.size", "[256]", "[a whole number, a whole number], got [256]"),
        ("input.size", "[256, 128, 64]", "[a whole number, a whole number], got [256, 128, 64]"),
        ("input.mean", "[nan, 0, 0]", "[a number, a number, a number] or null, got nan"),
        ("schedule.milestones", "40", "a list [a whole number, ...], got 40"),
        ("wandb.tags", "abc", "a list [text, ...], got abc"),
        ("wandb.mode", "", "'online' or 'offline' or 'disabled', got ''"),
    ],
)
def test_a_flag_of_the_wrong_type_is_refused_with_the_right_one(
    refused: Refused, key: str, text: str, expected: str
) -> None:
    assert refused(f"--{key}={text}") == f"{key}: expected {expected}"


def limited() -> dict[str, Any]:
    """The keys of the configuration whose numbers have limits, with the type that has them."""
    options = {
        f"{section}.{name}": option
        for parts, facts in ((PARTS, RUN_TIME_FACTS), (FIXED_SECTIONS, frozenset[str]()))
        for section, part in parts.items()
        for name, option in options_of(part, facts).items()
    }
    found = {key: first_limited(option.hint) for key, option in options.items()}
    return {key: leaf for key, leaf in found.items() if leaf is not None}


def first_limited(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return hint
    return next((leaf for m in get_args(hint) if (leaf := first_limited(m)) is not None), None)


PARTS: dict[str, type] = {
    "sampler": SAMPLERS["identity"],
    "evaluator": EVALUATORS["retrieval"],
    "schedule": SCHEDULES["multistep"],
    "losses.id": LOSSES["cross_entropy"],
    "losses.triplet": LOSSES["triplet"],
}


LIMITED = limited()
MUST_BE_LIMITED = {
    "input.size",
    "input.flip_prob",
    "input.padding",
    "input.erasing_prob",
    "sampler.batch_size",
    "sampler.instances",
    "losses.id.label_smoothing",
    "losses.triplet.margin",
    "optimizer.lr",
    "optimizer.weight_decay",
    "optimizer.bias_lr_factor",
    "optimizer.momentum",
    "optimizer.betas",
    "schedule.milestones",
    "schedule.gamma",
    "schedule.warmup_epochs",
    "schedule.warmup_factor",
    "evaluator.max_rank",
    "evaluator.lambda_value",
    "train.epochs",
    "train.eval_every",
    "train.checkpoint_every",
    "train.log_every",
    "train.workers",
    "train.eval_batch_size",
    "train.seed",
}


def test_what_has_to_be_limited_is() -> None:
    assert MUST_BE_LIMITED <= LIMITED.keys()


def outside(leaf: Any) -> list[Any]:
    """Those of some typical numbers that are not within the limits."""
    base, *metadata = get_args(leaf)
    numbers: list[Any] = [0, -1, 10**12]
    if base is float:
        numbers = [0.0, -1.0, 1.0 + 1e-9, 1e12, float("nan"), float("inf"), float("-inf")]

    def inside(number: float) -> bool:
        tests = {"ge": number.__ge__, "gt": number.__gt__, "le": number.__le__, "lt": number.__lt__}
        return all(
            tests[name](getattr(bound, name))
            for bound in bounds_of(metadata)
            for name in tests
            if hasattr(bound, name)
        )

    return [number for number in numbers if not inside(number) or math.isinf(number)]


@pytest.mark.parametrize("key", sorted(LIMITED))
def test_a_number_out_of_range_is_refused_with_the_range(refused: Refused, key: str) -> None:
    numbers = outside(LIMITED[key])
    assert numbers
    count = {"input.size": 2, "input.std": 3, "optimizer.betas": 2, "schedule.milestones": 1}.get(
        key
    )
    for number in numbers:
        value = number if count is None else [number] * count
        line = refused("--config", in_file(nested(key, value)))
        head = rf"{re.escape(key)}(\[0\])?: "
        allowed = r".* is out of range; it must be (at least|more than|at most|less than) .*"
        assert re.fullmatch(rf"{head}({allowed}|.* is not a finite number)", line), (number, line)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--optimizer.lr", "2"], "optimizer.lr: 2.0 is out of range; it must be more than 0 and "
         "at most 1"),
        (["--optimizer.lr=nan"], "optimizer.lr: expected a number, got nan"),
        (["--optimizer.lr=.nan"], "optimizer.lr: nan is out of range; it must be more than 0 and "
         "at most 1"),
        (["--optimizer.lr", ".inf"], "optimizer.lr: inf is out of range; it must be more than 0 "
         "and at most 1"),
        (["--input.size", "[256, 0]"], "input.size[1]: 0 is out of range; it must be at least 1 "
         "and at most 4096"),
        (["--input.mean=[.nan, 0, 0]"], "input.mean[0]: nan is not a finite number"),
        (["--losses.id.weight=-1"], "losses.id.weight: -1.0 is out of range; it must be at least 0 "
         "and at most 1000000"),
        (["--losses.triplet.margin", ".inf"], "losses.triplet.margin: inf is not a finite number"),
        (["--schedule.milestones", "[70, 40]"], "schedule.milestones: [70, 40] are not increasing"),
        (["--schedule.milestones", "[40, 40]"], "schedule.milestones: [40, 40] are not increasing"),
        (["--schedule.milestones", "[0, 40]"], "schedule.milestones[0]: 0 is out of range; it must "
         "be at least 1"),
        (["--sampler.batch_size", "65"], "sampler.batch_size: 65 is not a multiple of "
         "sampler.instances 4; use 64 or 68"),
        (["--sampler.instances", "64"], "sampler.batch_size: 64 holds one identity of 64 images; "
         "use at least 128, so that a batch has images of others"),
        (["--evaluator.max_rank", "9"], "evaluator.max_rank: 9 is out of range; it must be at "
         "least 10"),
        (["--train.device", "gpu"], "train.device: 'gpu' is not auto, cpu, cuda, cuda:N or mps"),
        (["--optimizer.momentum", "0.9"], "optimizer.momentum: adam has no momentum; leave it out"),
        (["--dataset.train_folder", "[]"], "dataset.train_folder: [] is empty or names a folder "
         "twice"),
        (["--backbone.pretrained", "nofile"], "backbone.pretrained: 'nofile' is neither imagenet, "
         "nor none, nor a file that is there"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(
    refused: Refused, arguments: list[str], line: str
) -> None:
    assert refused(*arguments) == line


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_devices_are_accepted_whether_or_not_they_exist(device: str) -> None:
    assert load_config("aihub_kaist", {"train.device": device}).train.device == device


def test_a_long_value_or_key_makes_a_short_line(refused: Refused) -> None:
    long = "x" * 5000
    assert refused(f"--train.epochs={long}").endswith("x...")
    assert refused(f"--{long}", "1").startswith("--xxx")
    assert refused("--dataset.name", long).startswith("dataset.name: no dataset is registered as")
    assert refused("--config", long).startswith("--config xxx")
    for values in (
        {long[:100]: 1},
        {"train": long},
        {"train": {long: 1}},
        {"losses": {long: {"name": "triplet", "x-y": 1}}},
        {"losses": {long + "-": {"name": "triplet"}}},
        {"dataset": {"name": [long]}},
        {"wandb": {"tags": [{long[:100]: 1}]}},
        {"schedule": {"name": long}},
    ):
        refused("--config", in_file(values))


# --------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "x.yaml is empty"),
        (b"# nothing\n", "x.yaml is empty"),
        (bytes(range(256)), "x.yaml is not UTF-8 text"),
        ("train: {epochs: 3}".encode("utf-16"), "x.yaml is not UTF-8 text"),
        (b"output_dir: caf\xe9\n", "x.yaml is not UTF-8 text"),
        (b"# " + b"x" * 70_000, "x.yaml is larger than any configuration (65,536 bytes)"),
        (b"- a\n- b\n", "x.yaml holds a list, not keys and values"),
        (b"text\n", "x.yaml holds a str, not keys and values"),
        (b"train: {epochs: 3\n", "x.yaml, line 2: expected ',' or '}', but got '<stream end>'"),
        (b"train:\n\tepochs: 3\n", "x.yaml, line 2: found character '\\t' that cannot start any "
         "token"),
        (b"train: {epochs: 3}\ntrain: {seed: 1}\n", "x.yaml, line 2: duplicate key 'train'"),
        (b"train: {seed: 3, seed: 4}\n", "x.yaml, line 1: duplicate key 'seed'"),
        (b"a: &x 1\nb: *x\n", "x.yaml: aliases (*x) are not supported"),
        (b"&a [*a]\n", "x.yaml: aliases (*a) are not supported"),
        (b"a: !!python/object/apply:os.system [ls]\n", "x.yaml, line 1: could not determine a "
         "constructor for the tag 'tag:yaml.org,2002:python/object/apply:os.system'"),
        (b"a: 1\n---\nb: 2\n", "x.yaml, line 2: but found another document"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_a_configuration_is_refused_by_its_name(
    refused: Refused, content: bytes, line: str
) -> None:
    Path("x.yaml").write_bytes(content)
    assert refused("--config", "x.yaml") == line


def test_a_folder_and_a_missing_file_are_refused(refused: Refused) -> None:
    Path("folder.yaml").mkdir()
    assert refused("--config", "folder.yaml") == "folder.yaml is a folder, not a configuration file"
    for path in ("no/such/file.yaml", "~nobody-at-all/x.yaml", "/dev/null/x.yaml"):
        line = refused("--config", path)
        assert line.startswith(f"--config {path}: no such file; shipped with reidreg: ")
    assert refused("--config", "/dev/zero").startswith("/dev/zero is larger than any")


def test_a_byte_order_mark_and_the_line_ends_of_windows_are_fine(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbftrain:\r\n  epochs: 3\r\n  seed: 4\r\n")
    config = load_config("aihub_kaist", file)
    assert (config.train.epochs, config.train.seed) == (3, 4)


LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{below}'] * 9)}]\n"
    for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    "text",
    [
        LAUGHS,
        "[" * 30_000,
        "train: " + "[" * 30_000 + "]" * 30_000,
        "{a: " * 15_000,
        "- " * 30_000,
        "? " * 30_000,
        "".join(f"{' ' * i}a:\n" for i in range(350)),
        "train: {" + ",".join(f"k{i}: 1" for i in range(4900)) + "}",
        "a: '" + "x\n " * 20_000 + "'",
        "%a b\n" * 10_000,
    ],
    ids=[
        "laughs",
        "lists",
        "closed",
        "maps",
        "dashes",
        "keys",
        "block",
        "wide",
        "lines",
        "percent",
    ],
)
def test_malicious_text_is_refused_quickly(refused: Refused, text: str) -> None:
    Path("x.yaml").write_text(text)
    start = time.process_time()
    refused("--config", "x.yaml")
    # Tenths of a second on an idle machine; expanding the text would take minutes.
    assert time.process_time() - start < 5


# --------------------------------------------------------------------- nothing is executed


MARKER = "import pathlib\npathlib.Path(__file__).with_name('imported').touch()\nclass Evil: pass\n"


def test_a_dotted_path_is_never_imported(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_module.py").write_text(MARKER)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = "evil_module.Evil"
    for section in ("dataset", "sampler", "backbone", "head", "evaluator", "schedule"):
        refused(f"--{section}.name", path)
        refused("--config", in_file({section: {"name": path}}))
        refused("--config", in_file({section: {"class_path": path}}))
        refused("--config", in_file({section: {"_target_": path, "name": "x"}}))
    for key in sorted(WRITTEN):
        if not isinstance(RESOLVED[key], str) and key != "init_from":
            refused(f"--{key}={path}")
        refused("--config", in_file(nested(key, {"class_path": path, "init_args": {}})))
    with pytest.raises(ConfigError, match=r"^optimizer\.name: no optimizer 'evil_module\.Evil'"):
        load_config("aihub_kaist", {"optimizer.name": path})
    refused("--config", in_file({"losses": {"evil": {"name": path}}}))
    Path("x.yaml").write_text("dataset: !!python/object:evil_module.Evil {}\n")
    refused("--config", "x.yaml")
    assert not (tmp_path / "imported").exists()
    assert "evil_module" not in sys.modules
    __import__("evil_module")
    assert (tmp_path / "imported").exists(), "the marker works"


UNTOUCHED = """
import json, os, sys
touched = []
def watch(event, arguments):
    if event in ("open", "os.mkdir", "os.listdir", "os.scandir", "os.rename"):
        path = str(arguments[0])
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
        if os.environ["DATA"] in path or writes or event == "os.mkdir":
            touched.append((event, path))
from reidreg.cli.main import main
import reidreg.parts.interfaces, reidreg.config.optimizers, torch
reidreg.parts.interfaces.LOSSES.names()
sys.dont_write_bytecode = True
sys.addaudithook(watch)
codes = [main(arguments) for arguments in json.loads(sys.argv[1])]
late = ("reidreg.training.run", "reidreg.training.loop", "timm", "wandb")
late = [module for module in late if module in sys.modules]
print(json.dumps([codes, touched, late, torch.cuda.is_initialized()]))
"""


def test_an_error_comes_before_data_model_or_gpu_are_touched(
    aihub_root: Path, tmp_path: Path
) -> None:
    fit = ["fit", "--config", "aihub_kaist", "--dataset.root", str(aihub_root)]
    bad = [
        ["--optimizer.lr", "2"],
        ["--losses.triplet.margin", "x"],
        ["--train.device", "gpu"],
        ["--sampler.batch_size", "65"],
        ["--head.name", "none"],
        ["--backbone.pretrained", "nofile"],
        ["--wandb.mode", "on"],
        ["--evaluator.metrik", "cosine"],
        ["--optimizer.betas", "[0.9, 0.99]", "--optimizer.name", "sgd"],
    ]
    result = subprocess.run(
        [sys.executable, "-c", UNTOUCHED, json.dumps([[*fit, *flags] for flags in bad])],
        cwd=tmp_path,
        env={**os.environ, "DATA": str(aihub_root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    codes, touched, late, cuda = json.loads(result.stdout.splitlines()[-1])
    assert codes == [2] * len(bad), result.stderr
    assert touched == [] and late == [] and not cuda
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------- as a user runs it


def test_a_process_ends_with_code_2_and_one_line(reidreg: Command, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text("[" * 30_000)
    cases = {
        "deep.yaml: too deeply nested, or too long, for a configuration": ["--config", "deep.yaml"],
        "--train.epoch: no such option; did you mean 'train.epochs'?": [
            "--config=aihub_kaist",
            "--train.epoch=3",
        ],
    }
    for line, arguments in cases.items():
        result = reidreg("fit", *arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr == f"reidreg fit: {line}\n"


def seconds(code: str) -> float:
    """The median duration of three processes."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


NO_TORCH = """
import sys
from reidreg.cli.main import main
assert main({arguments}) == 0
heavy = {{"torch", "timm", "numpy", "faiss", "wandb", "torchvision"}} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    ("arguments", "limit"), [(["--help"], 0.5), (["--version"], 0.5), (["fit", "--help"], 1.0)]
)
def test_help_answers_at_once_and_imports_no_torch(arguments: list[str], limit: float) -> None:
    # On a busy machine everything takes longer: scale the limit by how long a bare start takes.
    idle = seconds("import argparse, json, difflib, importlib.metadata")
    assert seconds(NO_TORCH.format(arguments=arguments)) < limit * max(1.0, idle / 0.06)


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, reidreg; dir(reidreg); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_help_beside_a_config_shows_the_options_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "aihub_kaist", "--losses.center.name", "center", "-h"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--losses.center.lr VALUE Learning rate of the centres" in text
    assert "--sampler.instances VALUE K, images of each identity. (type: int, default: 4)" in text
    assert "--dataset.identities" not in text
    for key in RESOLVED:
        assert f"--{key} " in text, key


# --------------------------------------------------------------------- from Python


def test_every_error_is_a_reidreg_error() -> None:
    for layer in ({"train.epoch": 1}, {"dataset.name": "x"}, "no_such_config", {"train": 1}):
        with pytest.raises(ReidregError):
            load_config("aihub_kaist", layer)


def test_an_unknown_part_is_an_error_of_the_configuration() -> None:
    assert issubclass(UnknownNameError, ConfigError)


def test_a_commands_own_options_stand_beside_the_configuration() -> None:
    commands: dict[str, dict[str, Any]] = {
        "ckpt": {"default": None},
        "fast": {"action": "store_true"},
    }
    flags = ["--ckpt", "x.ckpt", "--fast", "--train.epochs", "3"]
    config, own = parse([BASE.as_dict()], flags, prog="x", commands=commands)
    assert isinstance(config, Config) and config.train.epochs == 3
    assert own == {"ckpt": "x.ckpt", "fast": True}


def test_some_sections_alone_can_be_resolved() -> None:
    values, _ = resolve(
        [{"evaluator": {"name": "retrieval"}}],
        as_flags({"evaluator.metric": "euclidean"}),
        prog="x",
        commands={},
        sections=("evaluator",),
    )
    assert values["evaluator"]["metric"] == "euclidean" and "dataset" not in values
    with pytest.raises(ConfigError, match=r"^--train.epochs: no such option"):
        resolve(
            [{"evaluator": {"name": "retrieval"}}],
            ["--train.epochs", "3"],
            prog="x",
            commands={},
            sections=("evaluator",),
        )


@pytest.mark.parametrize("term", ["loss", "accuracy", "lr"])
def test_a_term_cannot_have_the_name_of_another_figure_of_the_log(term: str) -> None:
    with pytest.raises(ConfigError, match=rf"losses\.{term}: the log uses this name"):
        load_config("aihub_kaist", {f"losses.{term}": {"name": "center"}})
