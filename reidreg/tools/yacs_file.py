"""A configuration file of reid-strong-baseline, its keys and values checked."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reidreg.config.yamlfile import read_yaml
from reidreg.errors import ConfigError, did_you_mean
from reidreg.tools.yacs_keys import KEYS

Section = dict[str, Any]
_SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}


class OldConfig:
    """An old configuration that records which keys the translation has read.

    Args:
        given: Dotted key -> value, for the keys of the file. Other keys have their defaults.
    """

    def __init__(self, given: Mapping[str, Any]) -> None:
        self.given = given
        self.used: set[str] = set()
        self.notes: list[str] = []

    def __getitem__(self, key: str) -> Any:
        self.used.add(key)
        return self.given.get(key, KEYS[key].default)

    def is_on(self, key: str, on: str) -> bool:
        """Whether a key has the one value that turned it on; any other value turned it off."""
        word = self[key]
        if word not in (on, "no", "off", ""):
            self.notes.append(f"{key} {word!r}: only {on!r} turned it on, so it is off")
        return bool(word == on)


def read_config(path: Path) -> dict[str, Any]:
    """Read a file.

    Returns:
        Dotted key -> checked value, for the keys of the file.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, or a value is malformed.
    """
    flat: dict[str, Any] = {}
    for name, content in read_yaml(path).items():
        if name not in _SECTIONS:
            flat[str(name)] = content
        elif isinstance(content, Mapping):
            flat.update({f"{name}.{key}": value for key, value in content.items()})
        elif content is not None:
            raise ConfigError(f"{name}: expected keys and values, got {_brief(content)}")
    return {key: _checked(key, value) for key, value in flat.items()}


def _checked(key: str, value: Any) -> Any:
    if key not in KEYS:
        raise ConfigError(f"{key}: reid-strong-baseline has no such key{_hint(key)}")
    try:
        return KEYS[key].read(value)
    except ValueError as error:
        raise ConfigError(f"{key}: expected {error}, got {_brief(value)}") from error


def _hint(key: str) -> str:
    """A hint with the key that was probably meant: from the same section, or from another."""
    section, _, name = key.upper().rpartition(".")
    everywhere = {known.rpartition(".")[2]: known for known in KEYS}
    own = {known.rpartition(".")[2]: known for known in KEYS if known.startswith(f"{section}.")}
    own = own or {name: name for name in (*_SECTIONS, "OUTPUT_DIR")}
    for names in (own, everywhere):
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.7)
        if near:
            return f"; did you mean {names[near[0]]!r}?"
    return did_you_mean(name, own)


def _brief(value: Any) -> str:
    return reprlib.repr(value)
