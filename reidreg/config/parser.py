"""The jsonargparse parser: values and flags to typed options, and the `--help` text.

This is the only module that imports jsonargparse or uses its private names.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from reidreg.config.groups import AUTO_KEYS, Group, known_options
from reidreg.errors import ConfigError
from reidreg.parts.schema import Option, describe_type, shown

# A command's own options: name to the keywords of `ArgumentParser.add_argument`, all hashable.
Commands = Mapping[str, Mapping[str, Any]]
_FrozenCommands = tuple[tuple[str, tuple[tuple[str, Any], ...]], ...]


def print_help(
    groups: Sequence[Group], prog: str, commands: Commands, description: str = ""
) -> None:
    """Print every option of the command and of the chosen parts."""
    _build_parser(groups, prog, commands, description).print_help()


def parse_options(
    groups: Sequence[Group],
    values: Mapping[str, Any],
    flags: Sequence[str],
    *,
    prog: str,
    commands: Commands,
    description: str = "",
) -> dict[str, Any]:
    """Convert values and flags to the types of the options, and fill in the defaults.

    Args:
        groups: The sections and their classes.
        values: The merged layers, without unknown keys.
        flags: Flags with known keys; they win over the values.
        prog: For the usage line.
        commands: The command's own options.
        description: What the command does, for its help.

    Returns:
        Nested plain values; those of the command's own options are among them, by name.

    Raises:
        ConfigError: A value does not have the type of its option.
    """
    parser = _cached_parser(tuple(groups), prog, _frozen(commands), description)
    known = known_options(groups)
    # An empty section has no options; an empty value is null.
    given = {key: value for key, value in values.items() if value is not None or key in known}
    try:
        # `defaults=False`: otherwise each pass fills in the defaults and validates all of them.
        below: Namespace = parser.get_defaults(skip_validation=True)
        below = parser.parse_object(given, namespace=below, defaults=False)
        above: Namespace = parser.parse_args([*flags], namespace=below, defaults=False)
    except argparse.ArgumentError as error:
        raise ConfigError(_one_line(str(error), known)) from error
    resolved: dict[str, Any] = above.as_dict()
    resolved.pop("config", None)
    resolved.setdefault("losses", {})
    return resolved


# Building a parser takes longer than parsing, and a program that loads many configurations uses few
# sets of parts. A group holds the class itself and the names beside it, so a part that is
# registered later, also under an old name, makes another key.
@functools.lru_cache(maxsize=32)
def _cached_parser(
    groups: tuple[Group, ...], prog: str, commands: _FrozenCommands, description: str
) -> ArgumentParser:
    parser = _build_parser(
        groups, prog, {name: dict(keywords) for name, keywords in commands}, description
    )
    for action in parser._actions:
        # jsonargparse would require the option in the files even if a flag gives it; the check
        # after parsing looks at both.
        action.required = False
    return parser


def _frozen(commands: Commands) -> _FrozenCommands:
    return tuple((name, tuple(keywords.items())) for name, keywords in commands.items())


def _build_parser(
    groups: Sequence[Group], prog: str, commands: Commands, description: str
) -> ArgumentParser:
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE ...] [OPTIONS]",
        exit_on_error=False,
        allow_abbrev=False,
        # jsonargparse's own --print_config would take the name of ours.
        print_config=None,
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="a YAML file, or the name of a shipped one; may be repeated, later ones win",
    )
    for name, keywords in commands.items():
        parser.add_argument(f"--{name}", **keywords)
    for group in groups:
        _add_group(parser, group)
    known = known_options(groups)
    actions: list[Any] = parser._actions
    for action in actions:
        # jsonargparse accepts a file for each section. `--config` is the one way to give files, so
        # these options are left out of the help.
        if type(action).__name__ == "_ActionConfigLoad":
            action.help = argparse.SUPPRESS
        elif action.dest in known and action.choices is None:
            action.metavar = "VALUE"
        if action.dest in AUTO_KEYS:
            # The parser reads the type off the signature, which does not include `auto`.
            action._typehint = action._typehint | Literal["auto"]
    return parser


class _HelpFormatter(DefaultHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Types and defaults beside each option, descriptions as they are written."""


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


_KEY = re.compile(r'Parser key "([^"]+)"')
_VALUE = re.compile(r"(?:Got value|Given value): (.*)\Z", re.DOTALL)


def _one_line(message: str, known: Mapping[str, Option]) -> str:
    """jsonargparse's message as key, value and what is allowed."""
    key, value = _KEY.search(message), _VALUE.search(message)
    if key is None or key[1] not in known:
        return shown(message.removeprefix("argument "), 150)
    got = shown(value[1].strip().partition("\n")[0]) if value else "something else"
    return f"{key[1]}: expected {describe_type(known[key[1]].hint)}, got {got}"
