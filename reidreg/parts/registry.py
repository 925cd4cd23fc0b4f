"""A registry: a mapping from names to classes, with a decorator that fills it."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from reidreg.errors import PluginError, UnknownNameError, did_you_mean
from reidreg.parts.plugins import Plugin, broken_plugins, load_plugins, origin_of
from reidreg.parts.schema import RUN_TIME_FACTS, check_options, check_schema, shown

_NAME = re.compile(r"[a-z][a-z0-9_]*")


T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class _Entry:
    part: type
    plugin: Plugin


class Registry(Mapping[str, type[T]], Generic[T]):
    """The classes of one kind of part, by name; reading it loads the plugins first.

    Args:
        kind: The kind in one word, such as `loss`.
        base: The abstract class that each of them extends.
    """

    def __init__(self, kind: str, base: type[T]) -> None:
        self.kind = kind
        self.base = base
        self._entries: dict[str, _Entry] = {}

    def register(self, name: str) -> Callable[[C], C]:
        """Register the decorated class under a name and return it unchanged.

        Args:
            name: snake_case, unique within the kind.

        Raises:
            PluginError: The name is taken or not snake_case, the class does not extend the
                kind's abstract class, or its constructor cannot serve as a schema.
        """

        def decorate(part: C) -> C:
            plugin = origin_of(part.__module__)
            self._check_name(name, part, plugin)
            # Keys of a part's section in the configuration that are not options.
            taken = {"name", "weight"} if self.kind == "loss" else {"name"}
            check_schema(part, self.base, f"{self.kind} {name!r}", taken)
            self._entries[name] = _Entry(part, plugin)
            return part

        return decorate

    @contextmanager
    def temporary(self) -> Iterator[None]:
        """Undo registrations at the end of a `with` block, for tests and notebooks.

        Parts that are registered inside are removed, and parts that were replaced are restored:

            with LOSSES.temporary():
                LOSSES.register("my_loss")(MyLoss)
                ...
        """
        load_plugins()  # once per process: what they register inside the block would be lost
        before = dict(self._entries)
        try:
            yield
        finally:
            self._entries = before

    def _check_name(self, name: str, part: type, plugin: Plugin) -> None:
        if not _NAME.fullmatch(name):
            raise PluginError(
                f"{self.kind} {name!r}: a name is snake_case, such as 'my_{self.kind}'"
            )
        taken = self._entries.get(name)
        if taken is None or taken.plugin.error is not None:
            return
        # The same class again means that a notebook cell or a module ran twice: it is replaced.
        same = (taken.part.__module__, taken.part.__qualname__)
        if same != (part.__module__, part.__qualname__):
            raise PluginError(
                f"{self.kind} {name!r} is taken: {taken.plugin} has registered it, and {plugin} "
                "tries to as well; rename one of them"
            )

    def _known(self) -> dict[str, _Entry]:
        load_plugins()
        # A plugin whose import failed half-way may have registered parts: they are left out.
        return {name: e for name, e in sorted(self._entries.items()) if e.plugin.error is None}

    def __getitem__(self, name: str) -> type[T]:
        return self._entry(name).part

    def __iter__(self) -> Iterator[str]:
        return iter(self._known())

    def __len__(self) -> int:
        return len(self._known())

    def __contains__(self, name: object) -> bool:
        return name in self._known()

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return list(self._known())

    def plugin(self, name: str) -> Plugin:
        """The plugin that a part came from."""
        return self._entry(name).plugin

    def _entry(self, name: str) -> _Entry:
        known = self._known()
        if name not in known:
            hint = did_you_mean(name, known)
            raise UnknownNameError(
                f"no {self.kind} is registered as {shown(name)!r}{hint}{_failed()}"
            )
        return known[name]

    def build(self, name: str, **options: Any) -> T:
        """Construct a part.

        Args:
            name: Its registered name.
            options: Its options, and any run-time facts; facts that its constructor does not
                take are left out.

        Raises:
            UnknownNameError: Nothing is registered under this name.
            ConfigError: An option is unknown, missing or out of range.
        """
        part = self[name]
        accepted = inspect.signature(part).parameters
        facts = {key: options.pop(key) for key in list(options) if key in RUN_TIME_FACTS}
        check_options(part, options, self.kind)
        # Not `return part(...)`: mypy takes that for an abstract class.
        built: T = part(**options, **{key: facts[key] for key in facts if key in accepted})
        return built


def _failed() -> str:
    """A hint for an unknown name: it may belong to a plugin that failed to load."""
    broken = broken_plugins()
    if len(broken) == 1:
        return f"; plugin {broken[0]} failed to load: {broken[0].error:.90}"
    names = ", ".join(plugin.name for plugin in broken[:5])
    more = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    return f"; plugins {names}{more} failed to load, see `reidreg plugins`" if broken else ""
