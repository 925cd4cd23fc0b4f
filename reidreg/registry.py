"""A registry: a mapping from names to classes, with a decorator that fills it.

The signature of a registered class is the schema of its options: `options_of` reads it, the
configuration and the command line are made from it, and `Registry.build` checks against it.
"""

from __future__ import annotations

import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from annotated_types import BaseMetadata, Ge, Gt, Interval, Le, Lt

from reidreg.errors import ConfigError, PluginError, UnknownNameError, did_you_mean
from reidreg.plugins import Plugin, broken_plugins, importing, load_plugins

# Constructor parameters that the framework fills in; they are no options of a part.
RUN_TIME_FACTS = frozenset(
    {
        "num_classes",
        "dim",
        "num_cameras",
        "input_size",
        "pids",
        "camids",
        "seed",
        "rank",
        "world_size",
    }
)

_NAME = re.compile(r"[a-z][a-z0-9_]*")

T = TypeVar("T")
C = TypeVar("C", bound=type)


@dataclass(frozen=True)
class Option:
    """One option of a registered class, read off its constructor.

    Args:
        name: The parameter's name.
        hint: Its type, with any `Annotated` limits.
        default: Its default, or `inspect.Parameter.empty` if it must be given.
    """

    name: str
    hint: Any
    default: Any

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty


@dataclass(frozen=True)
class _Entry:
    part: type
    plugin: Plugin


class Registry(Mapping[str, type[T]], Generic[T]):
    """The parts of one kind, by name. Reading it loads the plugins first.

    Args:
        kind: What the parts are, in one word: `loss`.
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
            plugin = importing() or Plugin(name=part.__module__, module=part.__module__)
            self._check_name(name, part, plugin)
            check_schema(part, self.base, f"{self.kind} {name!r}")
            self._entries[name] = _Entry(part, plugin)
            return part

        return decorate

    def _check_name(self, name: str, part: type, plugin: Plugin) -> None:
        if not _NAME.fullmatch(name):
            raise PluginError(
                f"{self.kind} {name!r}: a name is snake_case, such as 'my_{self.kind}'"
            )
        taken = self._entries.get(name)
        if taken is None or taken.plugin.error is not None:
            return
        # The same class again is a notebook cell or a module that ran twice, not a clash.
        same = (taken.part.__module__, taken.part.__qualname__)
        if same != (part.__module__, part.__qualname__):
            raise PluginError(
                f"{self.kind} {name!r} is taken: {taken.plugin} has registered it, and {plugin} "
                "tries to as well; rename one of them"
            )

    def _known(self) -> dict[str, _Entry]:
        load_plugins()
        # What a plugin registered before its import failed half-way is not to be relied on.
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
            failed = "".join(
                f"; plugin {plugin} failed to load: {plugin.error}" for plugin in broken_plugins()
            )
            raise UnknownNameError(
                f"no {self.kind} is registered as {name!r}{did_you_mean(name, known)}{failed}"
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
        # Not part(...): mypy sees an abstract class there.
        built: T = part(**options, **{key: facts[key] for key in facts if key in accepted})
        return built


# --------------------------------------------------------------------- signatures as schemas


def options_of(part: type, facts: frozenset[str] = RUN_TIME_FACTS) -> dict[str, Option]:
    """The options of a class: its constructor's parameters without run-time facts."""
    hints = typing.get_type_hints(part.__init__, include_extras=True)  # type: ignore[misc]
    return {
        name: Option(name, hints[name], parameter.default)
        for name, parameter in inspect.signature(part).parameters.items()
        if name not in facts
    }


def check_schema(part: type, base: type, what: str) -> None:
    """Raise PluginError unless a class can be registered: right base, typed named parameters."""
    if not (isinstance(part, type) and issubclass(part, base)):
        raise PluginError(f"{what}: {part!r} does not extend reidreg.{base.__name__}")
    for name, parameter in inspect.signature(part).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise PluginError(
                f"{what}: {part.__qualname__}.__init__ takes *{name}; name each option, "
                "its signature is the schema of the configuration"
            )
        if parameter.annotation is parameter.empty:
            raise PluginError(
                f"{what}: option {name!r} of {part.__qualname__}.__init__ has no type"
            )


def check_options(
    part: type,
    options: Mapping[str, Any],
    key: str,
    facts: frozenset[str] = RUN_TIME_FACTS,
) -> None:
    """Raise ConfigError for an unknown, missing or out-of-range option of a class.

    Args:
        part: The class.
        options: What it is about to be given.
        key: What to put before an option's name in a message, such as `losses.triplet`.
        facts: Parameters that are no options.
    """
    known = options_of(part, facts)
    for name in options:
        if name not in known:
            raise ConfigError(f"{key}.{name}: no such option{did_you_mean(name, known)}")
    for option in known.values():
        if option.name in options:
            check_limits(f"{key}.{option.name}", options[option.name], option.hint)
        elif option.required:
            raise ConfigError(f"{key}.{option.name}: this option must be given")
    check = getattr(part, "check", None)
    if check is not None:
        defaults = {o.name: o.default for o in known.values() if not o.required}
        try:
            check({**defaults, **options})
        except ValueError as error:
            raise ConfigError(f"{key}.{error}") from error


def check_limits(key: str, value: Any, hint: Any) -> None:
    """Raise ConfigError if a value lies outside the `Annotated` limits of its type.

    Args:
        key: The value's name, for the message.
        value: A value of the type, already converted.
        hint: The type; limits may sit inside tuples, lists and unions.
    """
    if get_origin(hint) is Annotated:
        base, *metadata = get_args(hint)
        limits = [limit for limit in metadata if isinstance(limit, BaseMetadata)]
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            _check_number(key, value, limits)
        check_limits(key, value, base)
    elif get_origin(hint) in (typing.Union, types.UnionType):
        for member in get_args(hint):
            if fits(value, member):
                return check_limits(key, value, member)
    elif get_origin(hint) in (tuple, list) and isinstance(value, (tuple, list)):
        members = get_args(hint)
        if get_origin(hint) is list or members[-1] is Ellipsis:
            members = (members[0],) * len(value)
        for position, (item, member) in enumerate(zip(value, members, strict=False)):
            check_limits(f"{key}[{position}]", item, member)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key}: {value} is not a finite number")


def _check_number(key: str, value: float, limits: list[BaseMetadata]) -> None:
    for limit in limits:
        for bound in limit if isinstance(limit, Interval) else [limit]:
            if not _holds(value, bound):
                raise ConfigError(f"{key}: {value} is out of range; {describe_limits(limits)}")


def _holds(value: float, bound: BaseMetadata) -> bool:
    if isinstance(bound, Ge):
        return bool(value >= bound.ge)  # type: ignore[operator]
    if isinstance(bound, Gt):
        return bool(value > bound.gt)  # type: ignore[operator]
    if isinstance(bound, Le):
        return bool(value <= bound.le)  # type: ignore[operator]
    if isinstance(bound, Lt):
        return bool(value < bound.lt)  # type: ignore[operator]
    return True


def describe_limits(limits: list[BaseMetadata]) -> str:
    """The limits in words: `at least 1`, `more than 0 and at most 1`."""
    words = []
    for limit in limits:
        for bound in limit if isinstance(limit, Interval) else [limit]:
            if isinstance(bound, Ge):
                words.append(f"at least {bound.ge}")
            elif isinstance(bound, Gt):
                words.append(f"more than {bound.gt}")
            elif isinstance(bound, Le):
                words.append(f"at most {bound.le}")
            elif isinstance(bound, Lt):
                words.append(f"less than {bound.lt}")
    return "it must be " + " and ".join(words)


def fits(value: Any, hint: Any) -> bool:
    """Whether a converted value is of a type, looking at its outermost layer alone."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin = get_origin(hint)
    if origin is typing.Literal:
        return value in get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in get_args(hint))
    if hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
