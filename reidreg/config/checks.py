"""Checks of a configuration, each with an error of one line that names the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from reidreg.config.groups import AUTO_KEYS, TERM, Group, holds_part, known_options
from reidreg.config.sections import PART_SECTIONS
from reidreg.errors import ConfigError
from reidreg.parts.schema import AUTO, check_limits, check_options, shown

# --------------------------------------------------------------------- before parsing


def check_flags(flags: Sequence[str], groups: Sequence[Group], commands: Iterable[str]) -> None:
    """Raise ConfigError for a flag that neither the command nor a chosen part has."""
    known = [*known_options(groups), *commands, "config"]
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
        if section == "losses" and term and not TERM.fullmatch(term):
            raise ConfigError(f"--{shown(key)}: a term's name has only letters, digits and '_'")
        unnamed = _unnamed_section(key, groups)
        if unnamed:
            hint = f"; give --config FILE, or --{unnamed}.name first"
        else:
            hint = nearest_key(key, known)
        raise ConfigError(f"--{shown(key)}: no such option{hint}")


def _unnamed_section(key: str, groups: Sequence[Group]) -> str | None:
    """The section of a key, if it could hold a part and is not a typo of one that does."""
    section = key.rpartition(".")[0] if key.startswith("losses.") else key.partition(".")[0]
    chosen = [group.key for group in groups]
    if not holds_part(section) or section in chosen:
        return None
    terms = [group.key.removeprefix("losses.") for group in groups if "." in group.key]
    near = difflib.get_close_matches(section.removeprefix("losses."), terms)
    return None if near and section.startswith("losses.") else section


def check_complete(names: Mapping[str, str], sections: Sequence[str]) -> None:
    """Raise ConfigError if one of these sections needs a part and names none."""
    missing = [key for key in PART_SECTIONS if key in sections and key not in names]
    if missing:
        raise ConfigError(
            f"no {missing[0]} is named: give --config FILE (such as --config quickstart) "
            f"or --{missing[0]}.name"
        )
    if "losses" in sections and not any(key.startswith("losses.") for key in names):
        raise ConfigError("no loss is named: give --config FILE or --losses.TERM.name")


def check_keys(values: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raise ConfigError for a key that no chosen part has, or a section without options."""
    known = known_options(groups)
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


def nearest_key(key: str, known: Iterable[str]) -> str:
    """A hint with the known key that was probably meant, by the whole key or by its last word."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        leaf = difflib.SequenceMatcher(
            None, key.rpartition(".")[2], candidate.rpartition(".")[2]
        ).ratio()
        # A right last word in the wrong section counts nearly as much as a typo in place.
        return max(whole, 0.6 * leaf + 0.4 * whole, 0.9 * leaf if "." not in key else 0.0)

    # Do not suggest the section that the key is already in.
    others = sorted(candidate for candidate in known if not key.startswith(f"{candidate}."))
    best = max(others, key=likeness, default=None)
    return f"; did you mean {shown(best)!r}?" if best and likeness(best) >= 0.6 else ""


# --------------------------------------------------------------------- after parsing


def check_values(resolved: Mapping[str, Any], groups: Sequence[Group]) -> None:
    """Raise ConfigError for a wrong type, a value out of range, or options that conflict."""
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
            # With `auto` the part's own check has to wait until the number is known.
            if not any(group.prefixed(name) in AUTO_KEYS and own[name] == AUTO for name in own):
                check_options(group.part, own, group.key, group.facts)
    if not resolved["output_dir"]:
        raise ConfigError("output_dir: expected a folder, got an empty text")
    losses = resolved["losses"]
    if losses and all(loss["weight"] == 0 for loss in losses.values()):
        raise ConfigError("losses: every term has weight 0, so there is nothing to train")
