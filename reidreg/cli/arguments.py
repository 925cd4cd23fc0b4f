"""Parsing of command lines, with errors of one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from reidreg.errors import ConfigError, did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and the nearest name for a mistyped option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse(self, arguments: list[str]) -> argparse.Namespace:
        """The options' values; an unknown option is a ConfigError."""
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            raise self._unknown(unknown[0])
        return known

    def parse_with_overrides(self, arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
        """The options' values, and the flags with a dot, which override a configuration."""
        known, rest = self.parse_known_args(arguments)
        for position, word in enumerate(rest):
            is_option = word.startswith("--")
            if "." not in word.partition("=")[0] if is_option else not position:
                raise self._unknown(word)
        return known, rest

    def _unknown(self, argument: str) -> ConfigError:
        options = [option.removeprefix("--") for option in self._option_string_actions]
        word = argument.partition("=")[0]
        hint = did_you_mean(word.removeprefix("--"), options)
        return ConfigError(f"no such option: {word}{hint.replace(chr(39), '')}")


_OVERRIDES = (
    "The options of the checkpoint's configuration are accepted too, such as --train.device cpu."
)


def described_parser(prog: str, description: str, epilog: str = _OVERRIDES) -> Parser:
    """A parser whose help shows the description as it is written."""
    return Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def take_configs(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split off every `--config FILE`.

    Returns:
        The files, and the arguments without them.
    """
    configs, rest, position = [], [], 0
    while position < len(arguments):
        option, equals, value = arguments[position].partition("=")
        if option == "--config":
            if not equals:
                position += 1
                if position == len(arguments) or arguments[position].startswith("--"):
                    raise ConfigError("--config: expected a file, or the name of a shipped one")
                value = arguments[position]
            configs.append(value)
        else:
            rest.append(arguments[position])
        position += 1
    return configs, rest


def value_of(option: str, arguments: list[str]) -> str | None:
    """The value of an option that must be known before the others can be parsed."""
    for position, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == option:
            following = arguments[position + 1 : position + 2]
            return value if equals else (following[0] if following else None)
    return None
