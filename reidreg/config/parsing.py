"""Files and flags to a resolved configuration, in two passes.

The first pass reads only the names of the parts; the second builds a jsonargparse parser from the
signatures of just those parts, which types, converts and documents every option. Around it stands
what jsonargparse leaves open: layering several files, the nearest name for a mistyped key, limits,
and errors of one line. A configuration holds registered names alone; nothing in it is imported.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib.resources
import inspect
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from reidreg.config.schedules import SCHEDULES
from reidreg.config.sections import (
    FIXED_SECTIONS,
    ORDER,
    PART_SECTIONS,
    TRAINING_FIGURES,
    Config,
    LossConfig,
    RunConfig,
    Weight,
    config_from_dict,
)
from reidreg.config.yamlfile import read_yaml
from reidreg.errors import ConfigError, did_you_mean
from reidreg.parts.schema import (
    AUTO,
    RUN_TIME_FACTS,
    Option,
    check_limits,
    check_options,
    describe_type,
    options_of,
    shown,
)

Layer = str | Path | Mapping[str, Any]
_Commands = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]

DEFAULT_SCHEDULE = "multistep"
_TERM = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_INHERITED = object()  # a key that no file can hold
# What may be `auto` without a word of it in a part's signature: a run finds the number.
_FOUND_OUT = frozenset({"sampler.batch_size"})


def load_config(*layers: Layer, flags: Sequence[str] = ()) -> Config:
    """Resolve a configuration from files, mappings and command-line flags; later ones win.

    Args:
        layers: Paths of YAML files, bare names of configurations that ship with reidreg
            (`"quickstart"`, `"overlays/center"`), or mappings; their keys may be dotted.
        flags: Such as `["--optimizer.lr", "0.001", "--dataset.root=data"]`.

    Raises:
        ConfigError: A file, key, value or name is wrong; one line that says which and what is
            allowed.
    """
    parsed, _ = parse(list(layers), list(flags), prog="reidreg fit", commands={})
    return parsed


# --------------------------------------------------------------------- the chosen parts


@dataclass(frozen=True)
class Group:
    """One section of the configuration and the class whose signature its options are.

    Args:
        key: `dataset`, `losses.triplet`, `train`, or empty for the top level.
        part: The class.
        name: Its registered name, or None in a section that holds no part.
        names: The names that could stand there.
    """

    key: str
    part: type
    name: str | None = None
    names: tuple[str, ...] = ()

    @property
    def facts(self) -> frozenset[str]:
        """Constructor parameters that are no options: only registered parts have any."""
        return RUN_TIME_FACTS if self.name is not None else frozenset()

    def prefixed(self, option: str) -> str:
        return f"{self.key}.{option}" if self.key else option

    def own_options(self) -> dict[str, Option]:
        """The options of the class, by name."""
        return {
            name: option.or_auto() if self.prefixed(name) in _FOUND_OUT else option
            for name, option in options_of(self.part, self.facts).items()
        }

    def options(self) -> dict[str, Option]:
        """All that may stand in the section, by full key."""
        own = {self.prefixed(name): option for name, option in self.own_options().items()}
        if self.name is not None:
            own[self.prefixed("name")] = Option("name", str, self.name)
        if self.key.startswith("losses."):
            own[self.prefixed("weight")] = Option("weight", Weight, LossConfig.weight)
        return own


def _registry(section: str) -> Mapping[str, type]:
    if section == "schedule":
        return SCHEDULES
    from reidreg.parts.interfaces import REGISTRIES  # imports torch: only once a part is named

    return REGISTRIES["loss" if section.startswith("losses.") else section]


def _groups(names: Mapping[str, str]) -> list[Group]:
    """The sections of a configuration whose parts have these names, in a file's order."""
    groups = []
    for section in ORDER:
        if section in FIXED_SECTIONS:
            groups.append(Group(section, FIXED_SECTIONS[section]))
        for key in names:
            if key == section or key.startswith(f"{section}."):
                groups.append(_part_group(key, names[key]))
    return [*groups, Group("", RunConfig)]


def _part_group(key: str, name: str) -> Group:
    registry = _registry(key)
    if key == "schedule" and name not in registry:
        hint = did_you_mean(name, registry)
        raise ConfigError(f"schedule.name: no schedule {shown(name)!r}{hint}")
    try:
        part = registry[name]
    except ConfigError as error:
        raise ConfigError(f"{key}.name: {error}") from error
    return Group(key, part, name, tuple(registry))


# --------------------------------------------------------------------- layers


def find_config(name: str | Path) -> Path:
    """The file of a configuration: a path, or the name of one that ships with reidreg.

    Raises:
        ConfigError: There is neither; the line names those that ship.
    """
    path, shipped = Path(os.path.expanduser(name)), shipped_configs()
    # `configs/aihub_kaist.yaml` is what the documentation says from within a clone; without one
    # the same file comes from the package. A folder of that name is likely the data.
    bare = str(name).removeprefix("configs/").removesuffix(".yaml").removesuffix(".yml")
    with contextlib.suppress(OSError):
        if not stat.S_ISDIR(path.stat().st_mode) or bare not in shipped:
            return path
    if bare in shipped:
        return shipped[bare]
    by_last_word = {full.rpartition("/")[2]: full for full in shipped}
    near = difflib.get_close_matches(bare, [*shipped, *by_last_word], n=1)
    if near:
        hint = f"; did you mean {by_last_word.get(near[0], near[0])!r}?"
    else:
        hint = f"; these ship: {', '.join(name for name in shipped if '/' not in name)}, overlays/*"
    raise ConfigError(f"--config {shown(name)}: no such file{hint}")


def shipped_configs() -> dict[str, Path]:
    """The configurations that ship with reidreg: name to file."""
    package = Path(str(importlib.resources.files("reidreg")))
    # In a wheel they lie inside the package, in a checkout beside it.
    folder = next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())
    found = {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*.yaml"))
    }
    # Those of sweeps lie there too, but they are W&B's to read.
    return {name: path for name, path in found.items() if not name.startswith("sweeps/")}


def _read_layer(layer: Layer) -> dict[str, Any]:
    values = layer if isinstance(layer, Mapping) else read_yaml(find_config(layer))
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = str(key).split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{shown(key)}: {section} stands here twice, once as a value")
        if isinstance(value, Mapping) and isinstance(target.get(last), dict):
            target[last] = _merged(target[last], value)
        else:
            target[last] = value
    return nested


def _merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Two layers in one.

    Where the upper one chooses another part, the options of the part below are kept under
    `_INHERITED`: those that the new part has too still hold, the others go without a word.
    """
    result = dict(below)
    for key, value in above.items():
        if isinstance(value, Mapping) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    if "name" in above and below.get("name", above["name"]) != above["name"]:
        inherited = {k: v for k, v in below.items() if k not in above and k is not _INHERITED}
        for key in inherited:
            del result[key]
        result[_INHERITED] = {**below.get(_INHERITED, {}), **inherited}
    return result


def _flag_layer(flags: Sequence[str]) -> dict[str, Any]:
    """What the flags say of names alone: `--losses.center.name center`."""
    names = {}
    for position, flag in enumerate(flags):
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not key.endswith(".name"):
            continue
        if not _holds_part(key.removesuffix(".name")):
            continue
        if not equals and position + 1 < len(flags):
            value = flags[position + 1]
        if value:
            names[key] = value
    return _read_layer(names)


def options_given(section: str, layers: Iterable[Layer], flags: Sequence[str]) -> set[str]:
    """The options of a section that a layer or a flag speaks of, whatever it says of them."""
    prefix = f"--{section}."
    given = {str(key) for layer in layers for key in _read_layer(layer).get(section) or {}}
    named = (flag.partition("=")[0] for flag in flags if flag.startswith(prefix))
    return given | {flag.removeprefix(prefix) for flag in named}


def _holds_part(section: str) -> bool:
    term = section.removeprefix("losses.")
    return section in (*PART_SECTIONS, "schedule") or (
        term != section and _TERM.fullmatch(term) is not None
    )


def _names_in(values: Mapping[str, Any]) -> dict[str, str]:
    """Section to part's name, as far as a merged layer gives them."""
    sections = {key: values[key] for key in (*PART_SECTIONS, "schedule") if key in values}
    losses = values.get("losses") or {}
    if not isinstance(losses, Mapping):
        raise ConfigError(f"losses: expected terms with names and options, got {shown(losses)}")
    for term, loss in losses.items():
        if not (isinstance(term, str) and _TERM.fullmatch(term)):
            raise ConfigError(f"losses.{shown(term)}: a term is named by letters, digits and '_'")
        if term in TRAINING_FIGURES:
            raise ConfigError(f"losses.{term}: this name is taken in the log; use another")
        sections[f"losses.{term}"] = loss
    names = {}
    for key, section in sections.items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{key}: expected a name and options, got {shown(section)}")
        if "name" in section:
            if not isinstance(section["name"], str):
                raise ConfigError(f"{key}.name: expected a name, got {shown(section['name'])}")
            names[key] = section["name"]
    return names


# --------------------------------------------------------------------- the two passes


def parse(
    layers: list[Layer],
    flags: list[str],
    *,
    prog: str,
    commands: Mapping[str, Mapping[str, Any]],
    description: str = "",
) -> tuple[Config, dict[str, Any]]:
    """Resolve a configuration together with a command's own options.

    Args:
        layers: As for `load_config`.
        flags: The command line behind the command's name, without its `--config`.
        prog: For the usage line.
        commands: The command's own options: name to `ArgumentParser.add_argument`'s keywords,
            which are hashable.
        description: What the command does, for its help.

    Returns:
        The configuration, and the values of the command's own options.

    Raises:
        ConfigError: As for `load_config`.
        SystemExit: After `--help`.
    """
    values, extra = resolve(layers, flags, prog=prog, commands=commands, description=description)
    config = config_from_dict(values)
    check_optimizer(config)
    return config, extra


def resolve(
    layers: list[Layer],
    flags: list[str],
    *,
    prog: str,
    commands: Mapping[str, Mapping[str, Any]],
    description: str = "",
    sections: tuple[str, ...] = ORDER,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `parse`, but for some sections alone, and with plain values as the result."""
    values: dict[str, Any] = {}
    for layer in [*[_read_layer(layer) for layer in layers], _flag_layer(flags)]:
        values = _merged(values, layer)
    names = {"schedule": DEFAULT_SCHEDULE, **_names_in(values)}
    groups = [group for group in _groups(names) if group.key.split(".")[0] in (*sections, "")]
    if any(flag in ("-h", "--help") for flag in flags):
        build_parser(groups, prog, commands, description).print_help()
        raise SystemExit(0)
    _check_flags(flags, groups, commands)
    _check_complete(names, sections)
    values = _without_foreign(values, groups)
    _check_keys(values, groups)
    parser = _parser_of(tuple(groups), prog, _frozen(commands), description)
    resolved = _run_parser(parser, values, flags, groups)
    extra = {name: resolved.pop(name) for name in commands}
    _check_values(resolved, groups)
    return resolved, extra


# Building takes longer than parsing, and who loads many configurations has few sets of parts.
# A group holds the class itself and the names beside it, so whatever is registered later, also
# under an old name, makes another key.
@functools.lru_cache(maxsize=32)
def _parser_of(
    groups: tuple[Group, ...], prog: str, commands: _Commands, description: str
) -> ArgumentParser:
    parser = build_parser(
        [*groups], prog, {name: dict(keywords) for name, keywords in commands}, description
    )
    for action in parser._actions:
        # jsonargparse would ask the files alone for what a flag gives; `_check_values` asks both.
        action.required = False
    return parser


def _frozen(commands: Mapping[str, Mapping[str, Any]]) -> _Commands:
    return tuple((name, tuple(keywords.items())) for name, keywords in commands.items())


def build_parser(
    groups: list[Group], prog: str, commands: Mapping[str, Mapping[str, Any]], description: str
) -> ArgumentParser:
    """The parser of the second pass; `--help` shows every option of the parts in use."""
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE ...] [OPTIONS]",
        exit_on_error=False,
        allow_abbrev=False,
        # Its own --print_config would claim the name of ours.
        print_config=None,
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a YAML file, or the name of one that ships; may be given several times, later wins",
    )
    for name, keywords in commands.items():
        parser.add_argument(f"--{name}", **keywords)
    for group in groups:
        _add_group(parser, group)
    known = _known_keys(groups)
    actions: list[Any] = parser._actions
    for action in actions:
        # jsonargparse offers a file for each section; `--config` layers files, so one way is
        # enough, and the help stays short.
        if type(action).__name__ == "_ActionConfigLoad":
            action.help = argparse.SUPPRESS
        elif action.dest in known and action.choices is None:
            action.metavar = "VALUE"
        if action.dest in _FOUND_OUT:
            # The parser reads the signature alone, which does not have the word.
            action._typehint = action._typehint | Literal["auto"]
    return parser


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults beside each option, descriptions as they are."""


def _add_group(parser: ArgumentParser, group: Group) -> None:
    skip = set(group.facts & inspect.signature(group.part).parameters.keys())
    parser.add_class_arguments(group.part, group.key or None, skip=skip)
    section: Any = (parser.groups or {}).get(group.key, parser)
    if group.name is not None:
        kind = "loss" if group.key.startswith("losses.") else group.key
        section.add_argument(
            f"--{group.key}.name",
            type=Literal[group.names],
            default=group.name,
            help=f"registered {kind}",
        )
    if group.key.startswith("losses."):
        section.add_argument(
            f"--{group.key}.weight", type=float, default=1.0, help="0 turns the term off"
        )


def _known_keys(groups: Iterable[Group]) -> dict[str, Option]:
    return {key: option for group in groups for key, option in group.options().items()}


def nearest_key(key: str, known: Iterable[str]) -> str:
    """A hint with the known key that was probably meant, by the whole key or by its last word."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        leaf = difflib.SequenceMatcher(
            None, key.rpartition(".")[2], candidate.rpartition(".")[2]
        ).ratio()
        # A right last word in the wrong section counts nearly as much as a typo in place.
        return max(whole, 0.6 * leaf + 0.4 * whole, 0.9 * leaf if "." not in key else 0.0)

    # Not the section that the key is in already.
    others = sorted(candidate for candidate in known if not key.startswith(f"{candidate}."))
    best = max(others, key=likeness, default=None)
    return f"; did you mean {shown(best)!r}?" if best and likeness(best) >= 0.6 else ""


def _check_flags(flags: list[str], groups: list[Group], commands: Mapping[str, Any]) -> None:
    known = [*_known_keys(groups), *commands, "config"]
    sections = {key.rpartition(".")[0] for key in known} | {"losses"}
    for flag in flags:
        if not flag.startswith("--") or flag == "--":
            continue
        key = flag[2:].partition("=")[0].removesuffix("+")
        if key in known:
            continue
        if key in sections:
            raise ConfigError(f"--{key}: this is a section; its options are --{key}.KEY")
        section, _, term = key.rpartition(".")[0].partition(".")
        if section == "losses" and term and not _TERM.fullmatch(term):
            raise ConfigError(f"--{shown(key)}: a term is named by letters, digits and '_'")
        unnamed = _unnamed_section(key, groups)
        if unnamed:
            hint = f"; give --config FILE, or --{unnamed}.name first"
        else:
            hint = nearest_key(key, known)
        raise ConfigError(f"--{shown(key)}: no such option{hint}")


def _unnamed_section(key: str, groups: list[Group]) -> str | None:
    """The section of a key, if it could hold a part, and is not a typo of one that does."""
    section = key.rpartition(".")[0] if key.startswith("losses.") else key.partition(".")[0]
    chosen = [group.key for group in groups]
    if not _holds_part(section) or section in chosen:
        return None
    terms = [group.key.removeprefix("losses.") for group in groups if "." in group.key]
    near = difflib.get_close_matches(section.removeprefix("losses."), terms)
    return None if near and section.startswith("losses.") else section


def check_optimizer(config: Config) -> None:
    """Raise ConfigError for an optimizer that does not exist, or lacks one of the options."""
    from reidreg.config import (
        optimizers as optimizer_names,  # imports torch: only once a configuration is whole
    )

    optimizer_names.check_optimizer(config.optimizer)


def _check_complete(names: Mapping[str, str], sections: tuple[str, ...]) -> None:
    missing = [key for key in PART_SECTIONS if key in sections and key not in names]
    if missing:
        raise ConfigError(
            f"no {missing[0]} is named: give --config FILE (such as --config quickstart) "
            f"or --{missing[0]}.name"
        )
    if "losses" in sections and not any(key.startswith("losses.") for key in names):
        raise ConfigError("no loss is named: give --config FILE or --losses.TERM.name")


def _without_foreign(values: dict[str, Any], groups: list[Group]) -> dict[str, Any]:
    """Put inherited options back where the chosen part has them too, and drop the others."""
    known = _known_keys(groups)

    def settle(section: Any, prefix: str) -> Any:
        if not isinstance(section, dict):
            return section
        inherited = {
            key: value
            for key, value in section.get(_INHERITED, {}).items()
            if f"{prefix}{key}" in known
        }
        own = {
            key: settle(value, f"{prefix}{key}.")
            for key, value in section.items()
            if key is not _INHERITED
        }
        return {**inherited, **own}

    settled: dict[str, Any] = settle(values, "")
    return settled


def _check_keys(values: Mapping[str, Any], groups: list[Group]) -> None:
    """Raise ConfigError for a key that no part in use has, or a section that is not one."""
    known = _known_keys(groups)
    sections = {group.key for group in groups if group.key} | {"losses"}

    def walk(section: Mapping[str, Any], prefix: str) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            if key in sections:
                if value is None:
                    continue
                if not isinstance(value, Mapping):
                    raise ConfigError(f"{key}: expected options, got {shown(value)}")
                walk(value, f"{key}.")
            elif key not in known:
                loss = key.startswith("losses.") and key.count(".") == 1
                if loss and isinstance(value, Mapping):
                    raise ConfigError(f"{key}: this term has no name{nearest_key(key, sections)}")
                hint = nearest_key(key, {*known, *sections})
                raise ConfigError(f"{shown(key)}: no such key{hint}")

    walk(values, "")


def _run_parser(
    parser: ArgumentParser, values: dict[str, Any], flags: list[str], groups: list[Group]
) -> dict[str, Any]:
    known = _known_keys(groups)
    # An empty section is one without options; an empty value is a null.
    values = {key: value for key, value in values.items() if value is not None or key in known}
    try:
        # `defaults=False`: left to itself, each pass would put them in and look through all again.
        below: Namespace = parser.get_defaults(skip_validation=True)
        below = parser.parse_object(values, namespace=below, defaults=False)
        above: Namespace = parser.parse_args(flags, namespace=below, defaults=False)
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error), known)) from error
    resolved: dict[str, Any] = above.as_dict()
    resolved.pop("config", None)
    resolved.setdefault("losses", {})
    return resolved


_KEY = re.compile(r'Parser key "([^"]+)"')
_VALUE = re.compile(r"(?:Got value|Given value): (.*)\Z", re.DOTALL)


def _one_line(message: str, known: Mapping[str, Option]) -> str:
    """jsonargparse's message as key, value and what is allowed."""
    key, value = _KEY.search(message), _VALUE.search(message)
    if key is None or key[1] not in known:
        return shown(message.removeprefix("argument "), 150)
    got = shown(value[1].strip().partition("\n")[0]) if value else "something else"
    return f"{key[1]}: expected {describe_type(known[key[1]].hint)}, got {got}"


def _check_values(resolved: dict[str, Any], groups: list[Group]) -> None:
    """Types, limits and options that do not go together, section by section."""
    for group in groups:
        section: Any = resolved
        for word in group.key.split(".") if group.key else []:
            section = section[word]
        for key, option in group.options().items():
            value = section.get(option.name)
            if option.required and value is None:
                raise ConfigError(f"{key}: this option must be given")
            check_limits(key, value, option.hint)
        if group.key:
            own = {name: section[name] for name in group.own_options()}
            # What does not go with a number can only be said once there is one.
            if not any(group.prefixed(name) in _FOUND_OUT and own[name] == AUTO for name in own):
                check_options(group.part, own, group.key, group.facts)
    if not resolved["output_dir"]:
        raise ConfigError("output_dir: expected a folder, got an empty text")
    losses = resolved["losses"]
    if losses and all(loss["weight"] == 0 for loss in losses.values()):
        raise ConfigError("losses: every term has weight 0, so there is nothing to train")
