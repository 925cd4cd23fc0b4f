"""Plugins: installed distributions whose import registers parts.

A plugin declares an entry point of the group `reidreg.plugins` whose value is a module; importing
that module runs its `@KIND.register(name)` decorators. The parts that ship with reidreg are
registered in the same way. If a plugin fails to import, the reason is kept, and an error is raised
only when a run uses one of its parts.
"""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from reidreg.errors import PluginError, did_you_mean

GROUP = "reidreg.plugins"
VARIABLE = "REIDREG_PLUGINS"


@dataclass
class Plugin:
    """The origin of registered parts.

    Args:
        name: The entry point's name, or the module's for parts that no plugin registers.
        module: The module whose import registers the parts.
        distribution: The installed distribution, or an empty string.
        version: The distribution's version, or an empty string.
        error: Why the import failed, in one line; None if it did not.
        seconds: Duration of the import.
    """

    name: str
    module: str
    distribution: str = ""
    version: str = ""
    error: str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        owner = f"{self.distribution} {self.version}".strip()
        return f"{self.name} ({owner})" if owner else self.name


_importing: ContextVar[Plugin | None] = ContextVar("importing", default=None)
_loaded: list[Plugin] | None = None


def load_plugins() -> tuple[Plugin, ...]:
    """Import every installed plugin, once per process.

    The environment variable `REIDREG_PLUGINS` holds the names of those to load, separated by
    commas; empty loads none. Without it all are loaded.

    Returns:
        One entry for each plugin; those that failed have their `error` set.

    Raises:
        PluginError: The variable names a plugin that is not installed.
    """
    global _loaded
    if _loaded is None:
        wanted = _wanted(list(entry_points(group=GROUP)))
        # Set before importing: a plugin that reads a registry while it is imported must not
        # start the loading again.
        _loaded = []
        for entry in wanted:
            _loaded.append(_load(entry))
    return tuple(_loaded)


def _wanted(found: list[EntryPoint]) -> list[EntryPoint]:
    """The entry points to load, reidreg's own first, so that no other can take its names."""
    found = sorted(found, key=lambda e: (e.value != "reidreg_plugins", e.name, e.value))
    chosen = os.environ.get(VARIABLE)
    if chosen is None:
        return found
    names = [name.strip() for name in chosen.split(",") if name.strip()]
    known = [entry.name for entry in found]
    for name in names:
        if name not in known:
            raise PluginError(f"{VARIABLE}: no plugin {name!r}{did_you_mean(name, known)}")
    return [entry for entry in found if entry.name in names]


def origin_of(module: str) -> Plugin:
    """The plugin of a part that its module is registering now.

    Usually it is the plugin that is being imported. A user may also import a plugin's module
    directly, before the plugins are loaded, or register a part in a script.
    """
    plugin = _importing.get()
    if plugin is not None:
        return plugin
    for entry in entry_points(group=GROUP):
        if module == entry.value or module.startswith(f"{entry.value}."):
            return _described(entry)
    return Plugin(name=module, module=module)


def _described(entry: EntryPoint) -> Plugin:
    dist = entry.dist
    return Plugin(
        name=entry.name,
        module=entry.value,
        distribution=(dist.name or "") if dist else "",
        version=(dist.version or "") if dist else "",
    )


def _load(entry: EntryPoint) -> Plugin:
    plugin = _described(entry)
    start = time.perf_counter()
    with _as_importing(plugin):
        try:
            importlib.import_module(entry.value)
        # SystemExit too: a plugin that calls sys.exit on import must not end the process.
        except (Exception, SystemExit) as error:
            plugin.error = " ".join(f"{type(error).__name__}: {error}".split())
    plugin.seconds = time.perf_counter() - start
    return plugin


@contextmanager
def _as_importing(plugin: Plugin) -> Iterator[None]:
    token = _importing.set(plugin)
    try:
        yield
    finally:
        _importing.reset(token)


def broken_plugins() -> tuple[Plugin, ...]:
    """The plugins that have failed to load so far."""
    return tuple(plugin for plugin in _loaded or () if plugin.error is not None)
