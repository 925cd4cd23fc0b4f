"""Files and flags to a resolved configuration, in two passes.

The first pass reads only the names of the parts; the second builds a parser from the signatures of
just those parts, which types, converts and documents every option. A configuration holds
registered names only; no text in it is imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from reidreg.config.checks import check_complete, check_flags, check_keys, check_values
from reidreg.config.groups import groups_of, known_options, part_names
from reidreg.config.layers import Layer, merged_layers, restore_inherited
from reidreg.config.parser import parse_options, print_help
from reidreg.config.sections import ORDER, Config, config_from_dict

DEFAULT_SCHEDULE = "multistep"


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
        flags: The command line after the command's name, without its `--config`.
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
    values, own = resolve(layers, flags, prog=prog, commands=commands, description=description)
    config = config_from_dict(values)
    from reidreg.config.optimizers import check_optimizer  # imports torch: not for --help

    check_optimizer(config.optimizer)
    return config, own


def resolve(
    layers: list[Layer],
    flags: list[str],
    *,
    prog: str,
    commands: Mapping[str, Mapping[str, Any]],
    description: str = "",
    sections: tuple[str, ...] = ORDER,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """As `parse`, but for some sections only, and with plain values as the result."""
    values = merged_layers(layers, flags)
    names = {"schedule": DEFAULT_SCHEDULE, **part_names(values)}
    groups = [group for group in groups_of(names) if group.key.split(".")[0] in (*sections, "")]
    if any(flag in ("-h", "--help") for flag in flags):
        print_help(groups, prog, commands, description)
        raise SystemExit(0)
    check_flags(flags, groups, commands)
    check_complete(names, sections)
    values = restore_inherited(values, known_options(groups))
    check_keys(values, groups)
    resolved = parse_options(
        groups, values, flags, prog=prog, commands=commands, description=description
    )
    own = {name: resolved.pop(name) for name in commands}
    check_values(resolved, groups)
    return resolved, own
