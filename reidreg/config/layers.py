"""Layers of a configuration: files, mappings and flags, merged into one nested mapping."""

from __future__ import annotations

import contextlib
import difflib
import importlib.resources
import os
import stat
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from reidreg.config.groups import holds_part
from reidreg.config.yamlfile import read_yaml
from reidreg.errors import ConfigError
from reidreg.parts.schema import shown

Layer = str | Path | Mapping[str, Any]

_INHERITED = object()  # a key that no file can hold


def find_config(name: str | Path) -> Path:
    """The file of a configuration: a path, or the name of one that ships with reidreg.

    Raises:
        ConfigError: There is neither; the line names those that ship.
    """
    path, shipped = Path(os.path.expanduser(name)), shipped_configs()
    # The documentation says `configs/aihub_kaist.yaml`, which is a path inside a clone; elsewhere
    # it means the file of the installed package. A folder of that name is likely to be the data.
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
        names = ", ".join(name for name in shipped if "/" not in name)
        hint = f"; shipped with reidreg: {names}, overlays/*"
    raise ConfigError(f"--config {shown(name)}: no such file{hint}")


def shipped_configs() -> dict[str, Path]:
    """The configurations that ship with reidreg: name to file."""
    package = Path(str(importlib.resources.files("reidreg")))
    # In a wheel the folder is inside the package, in a checkout beside it.
    folder = next(p for p in (package / "configs", package.parent / "configs") if p.is_dir())
    found = {
        str(path.relative_to(folder).with_suffix("")): path
        for path in sorted(folder.rglob("*.yaml"))
    }
    # The sweeps in the same folder are files for W&B, not configurations.
    return {name: path for name, path in found.items() if not name.startswith("sweeps/")}


def merged_layers(layers: Iterable[Layer], flags: Sequence[str]) -> dict[str, Any]:
    """Merge layers into one nested mapping; later ones win.

    Of the flags only the names of parts are merged, which decide what the other options are; the
    parser reads the rest.

    Raises:
        ConfigError: A file cannot be read, or a key is both a section and a value.
    """
    values: dict[str, Any] = {}
    for layer in [*[_nested(layer) for layer in layers], _named_by_flags(flags)]:
        values = _merged(values, layer)
    return values


def options_given(section: str, layers: Iterable[Layer], flags: Sequence[str]) -> set[str]:
    """The options of a section that a layer or a flag sets, to whatever value."""
    prefix = f"--{section}."
    given = {str(key) for layer in layers for key in _nested(layer).get(section) or {}}
    named = (flag.partition("=")[0] for flag in flags if flag.startswith(prefix))
    return given | {flag.removeprefix(prefix) for flag in named}


def restore_inherited(values: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """Put inherited options back where the chosen part has them too, and drop the others.

    Args:
        values: As from `merged_layers`.
        known: The full keys of all options of the chosen parts.
    """

    def restored(section: Any, prefix: str) -> Any:
        if not isinstance(section, dict):
            return section
        inherited = {
            key: value
            for key, value in section.get(_INHERITED, {}).items()
            if f"{prefix}{key}" in known
        }
        own = {
            key: restored(value, f"{prefix}{key}.")
            for key, value in section.items()
            if key is not _INHERITED
        }
        return {**inherited, **own}

    result: dict[str, Any] = restored(values, "")
    return result


def _nested(layer: Layer) -> dict[str, Any]:
    """A layer with its dotted keys as nested mappings."""
    values = layer if isinstance(layer, Mapping) else read_yaml(find_config(layer))
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = str(key).split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"{shown(key)}: {section} is both a section and a value")
        if isinstance(value, Mapping) and isinstance(target.get(last), dict):
            target[last] = _merged(target[last], value)
        else:
            target[last] = value
    return nested


def _merged(below: Mapping[Any, Any], above: Mapping[Any, Any]) -> dict[Any, Any]:
    """Merge two layers.

    Where the upper one names another part, the options of the lower part are kept under
    `_INHERITED`: `restore_inherited` decides which of them the new part has as well.
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


def _named_by_flags(flags: Sequence[str]) -> dict[str, Any]:
    """The parts that flags name, such as `--losses.center.name center`, as a layer."""
    names = {}
    for position, flag in enumerate(flags):
        key, equals, value = flag.removeprefix("--").partition("=")
        if not flag.startswith("--") or not key.endswith(".name"):
            continue
        if not holds_part(key.removesuffix(".name")):
            continue
        if not equals and position + 1 < len(flags):
            value = flags[position + 1]
        if value:
            names[key] = value
    return _nested(names)
