"""Translate a configuration of reid-strong-baseline (yacs).

Every key of the old file is translated, named in a note that says why it was not, or refused. A key
that the file leaves out has the default of reid-strong-baseline, so that the result trains the same
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reidreg.config.parsing import load_config
from reidreg.config.sections import advice
from reidreg.config.yamlfile import dump_yaml
from reidreg.errors import ConfigError
from reidreg.tools import yacs_model as model
from reidreg.tools import yacs_sections as sections
from reidreg.tools.yacs_file import OldConfig, Section, read_config
from reidreg.tools.yacs_keys import KEYS


@dataclass(frozen=True)
class Imported:
    """A translated configuration.

    Args:
        values: The configuration as nested mappings, which `load_config` takes.
        notes: What a user should know about the translation, one line each.
    """

    values: dict[str, Any]
    notes: tuple[str, ...]


def import_config(path: str | Path) -> Imported:
    """Translate a configuration of reid-strong-baseline.

    Args:
        path: The old YAML file.

    Raises:
        ConfigError: The file cannot be read, a key is unknown, a value is malformed, or no
            registered part corresponds to what it names.
    """
    old = OldConfig(read_config(Path(path).expanduser()))
    values = {section: translate(old) for section, translate in _SECTIONS.items()}
    notes = [*old.notes, *_left_out(old), *_outlook(values)]
    return Imported(values, tuple(notes))


def render(imported: Imported, source: str) -> str:
    """The YAML text of a translated configuration, with its notes as comments at the top.

    Args:
        imported: The configuration.
        source: The name of the old file, for the first comment.
    """
    comments = [f"# Translated from {source!r}, a configuration of reid-strong-baseline."]
    comments += [f"# - {note}" for note in imported.notes]
    return "\n".join(comments) + "\n" + dump_yaml(imported.values)


_SECTIONS: Mapping[str, Callable[[OldConfig], Any]] = {
    "dataset": sections.dataset,
    "input": sections.images,
    "sampler": sections.sampler,
    "backbone": model.backbone,
    "head": model.head,
    "losses": sections.losses,
    "optimizer": sections.optimizer,
    "schedule": sections.schedule,
    "evaluator": sections.evaluator,
    "train": sections.train,
    "wandb": sections.wandb,
    "init_from": model.init_from,
    "output_dir": sections.output_dir,
}


def _left_out(old: OldConfig) -> list[str]:
    """Notes on the keys of the file that the translation did not read."""
    idle = [key for key in old.given if key not in old.used]
    dead = [key for key in idle if not KEYS[key].live]
    moot = [key for key in idle if KEYS[key].live]
    return [
        *_naming("left out, for nothing that trains or evaluates reads them", dead),
        *_naming("left out, for the file's other keys leave them without effect", moot),
    ]


def _naming(reason: str, keys: Iterable[str]) -> list[str]:
    listed = ", ".join(keys)
    return [f"{reason}: {listed}"] if listed else []


def _outlook(values: Section) -> list[str]:
    """Notes on what `reidreg fit` will say about the configuration."""
    try:
        return advice(load_config(values))
    except ConfigError as error:
        return [f"reidreg fit refuses this as it stands: {error}"]
