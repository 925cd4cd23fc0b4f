"""The sections of a configuration, and the classes whose signatures define their options."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from reidreg.config.schedules import SCHEDULES
from reidreg.config.sections import (
    FIXED_SECTIONS,
    ORDER,
    PART_SECTIONS,
    TRAINING_FIGURES,
    LossConfig,
    RunConfig,
    Weight,
)
from reidreg.errors import ConfigError, did_you_mean
from reidreg.parts.schema import RUN_TIME_FACTS, Option, options_of, shown

TERM = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
# Options that may be `auto` although the part's signature does not say so: the run determines the
# number before it builds the part.
AUTO_KEYS = frozenset({"sampler.batch_size"})


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
        """Constructor parameters that are not options; only registered parts have any."""
        return RUN_TIME_FACTS if self.name is not None else frozenset()

    def prefixed(self, option: str) -> str:
        """An option's full key."""
        return f"{self.key}.{option}" if self.key else option

    def own_options(self) -> dict[str, Option]:
        """The options of the class, by name."""
        return {
            name: option.or_auto() if self.prefixed(name) in AUTO_KEYS else option
            for name, option in options_of(self.part, self.facts).items()
        }

    def options(self) -> dict[str, Option]:
        """All options of the section, by full key: those of the class, `name` and `weight`."""
        own = {self.prefixed(name): option for name, option in self.own_options().items()}
        if self.name is not None:
            own[self.prefixed("name")] = Option("name", str, self.name)
        if self.key.startswith("losses."):
            own[self.prefixed("weight")] = Option("weight", Weight, LossConfig.weight)
        return own


def groups_of(names: Mapping[str, str]) -> list[Group]:
    """The groups of a configuration, in a file's order.

    Args:
        names: Section to the name of its part, as from `part_names`.

    Raises:
        ConfigError: No part or schedule is registered under one of the names.
    """
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


def _registry(section: str) -> Mapping[str, type]:
    if section == "schedule":
        return SCHEDULES
    from reidreg.parts.interfaces import REGISTRIES  # imports torch: only once a part is named

    return REGISTRIES["loss" if section.startswith("losses.") else section]


def known_options(groups: Iterable[Group]) -> dict[str, Option]:
    """The options of all groups, by full key."""
    return {key: option for group in groups for key, option in group.options().items()}


def holds_part(section: str) -> bool:
    """Whether a section has a `name`: that of a part, of a loss term or of a schedule."""
    term = section.removeprefix("losses.")
    return section in (*PART_SECTIONS, "schedule") or (
        term != section and TERM.fullmatch(term) is not None
    )


def part_names(values: Mapping[str, Any]) -> dict[str, str]:
    """The name of each section's part, for the sections that name one.

    Args:
        values: The nested mapping of the merged layers.

    Raises:
        ConfigError: A section or a name is not of the right type, or a loss term has a name that
            it cannot have.
    """
    names = {}
    for key, section in _sections_with_parts(values).items():
        if not isinstance(section, Mapping):
            raise ConfigError(f"{key}: expected a name and options, got {shown(section)}")
        if "name" in section:
            if not isinstance(section["name"], str):
                raise ConfigError(f"{key}.name: expected a name, got {shown(section['name'])}")
            names[key] = section["name"]
    return names


def _sections_with_parts(values: Mapping[str, Any]) -> dict[str, Any]:
    sections = {key: values[key] for key in (*PART_SECTIONS, "schedule") if key in values}
    losses = values.get("losses") or {}
    if not isinstance(losses, Mapping):
        raise ConfigError(f"losses: expected terms with names and options, got {shown(losses)}")
    for term, loss in losses.items():
        if not (isinstance(term, str) and TERM.fullmatch(term)):
            raise ConfigError(
                f"losses.{shown(term)}: a term's name has only letters, digits and '_'"
            )
        if term in TRAINING_FIGURES:
            raise ConfigError(f"losses.{term}: the log uses this name; choose another")
        sections[f"losses.{term}"] = loss
    return sections
