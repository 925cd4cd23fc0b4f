"""Signatures as schemas: a class's constructor defines its options, their types and limits.

The configuration, the command line and `Registry.build` all read options through this module.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Annotated, Any, get_args, get_origin

from annotated_types import Ge, Gt, Interval, Le, Lt

from reidreg.errors import ConfigError, PluginError, did_you_mean

# Constructor parameters that the framework fills in; they are not options of a part.
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

Bound = Ge | Gt | Le | Lt

# The value of an option whose number the framework determines before it builds the part.
AUTO = "auto"


@dataclass(frozen=True)
class Option:
    """One option of a registered class, from its constructor.

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

    def or_auto(self) -> Option:
        """The same option, with `auto` allowed too."""
        return replace(self, hint=self.hint | typing.Literal["auto"])


def options_of(part: type, facts: frozenset[str] = RUN_TIME_FACTS) -> dict[str, Option]:
    """The options of a class: its constructor's parameters without run-time facts."""
    return {option.name: option for option in _parameters(part) if option.name not in facts}


# Loading one configuration asks for each signature a dozen times.
@functools.lru_cache(maxsize=256)
def _parameters(part: type) -> tuple[Option, ...]:
    # Not typing.get_type_hints: before 3.11 it makes a type optional whose default is None.
    hints = inspect.get_annotations(part.__init__, eval_str=True)  # type: ignore[misc]
    parameters = inspect.signature(part).parameters.items()
    return tuple(Option(name, hints[name], parameter.default) for name, parameter in parameters)


def check_schema(part: type, base: type, what: str, taken: AbstractSet[str] = frozenset()) -> None:
    """Raise PluginError unless a class can be registered: right base, typed named parameters.

    Args:
        part: The class.
        base: The class that it has to extend.
        what: Its kind and name, for the message.
        taken: Names that its options must not have.
    """
    if not (isinstance(part, type) and issubclass(part, base)):
        raise PluginError(f"{what}: {part!r} does not extend reidreg.{base.__name__}")
    where = f"{what}: {part.__qualname__}.__init__"
    for name, parameter in inspect.signature(part).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise PluginError(
                f"{where} takes *{name}; name each option, its signature is the schema of the "
                "configuration"
            )
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise PluginError(f"{where} takes {name!r} by position only; options go by name")
        if parameter.annotation is parameter.empty:
            raise PluginError(f"{where}: option {name!r} has no type")
    try:
        options = options_of(part)
    except (NameError, TypeError, AttributeError, SyntaxError) as error:
        raise PluginError(f"{where}: its types cannot be resolved at run time ({error})") from error
    for option in options.values():
        if option.name in taken:
            raise PluginError(f"{where}: the name of option {option.name!r} is reserved")
        if not _is_plain(option.hint):
            raise PluginError(
                f"{where}: option {option.name!r} is of type {describe_type(option.hint)}, which "
                "YAML cannot hold; use bool, int, float, str, None, Literal, or list, tuple and "
                "dict of them"
            )
        if not option.required and not fits(option.default, option.hint):
            raise PluginError(
                f"{where}: option {option.name!r} is {describe_type(option.hint)}, and its default "
                f"{option.default!r:.60} is not"
            )


def _is_plain(hint: Any) -> bool:
    """Whether a type's values are plain data.

    A class or a callable would be written as an import path, and importing runs code.
    """
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _is_plain(members[0])
    if origin is typing.Literal:
        return True
    if origin in (typing.Union, types.UnionType, list, tuple, dict):
        return bool(members) and all(_is_plain(m) for m in members if m is not Ellipsis)
    return hint in (bool, int, float, str, type(None))


def check_options(
    part: type,
    options: Mapping[str, Any],
    key: str,
    facts: frozenset[str] = RUN_TIME_FACTS,
) -> None:
    """Raise ConfigError for an unknown, missing or out-of-range option of a class.

    Args:
        part: The class.
        options: Options by name.
        key: What to put before an option's name in a message, such as `losses.triplet`.
        facts: Parameters that are not options.
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
    """Raise ConfigError if a value is not of a type, or outside the type's `Annotated` limits.

    Args:
        key: The value's name, for the message.
        value: A converted value: text is not accepted as a number.
        hint: The type; limits may be inside tuples, lists and unions.
    """
    if not fits(value, hint):
        raise ConfigError(f"{key}: expected {describe_type(hint)}, got {shown(value)}")
    origin, members = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if isinstance(value, numbers.Real):
            _check_number(key, value, bounds_of(members[1:]))
        check_limits(key, value, members[0])
    elif origin in (typing.Union, types.UnionType):
        check_limits(key, value, next(member for member in members if fits(value, member)))
    elif origin in (tuple, list):
        if origin is list or members[-1] is Ellipsis:
            members = (members[0],) * len(value)
        for position, (item, member) in enumerate(zip(value, members, strict=True)):
            check_limits(f"{key}[{position}]", item, member)
    elif isinstance(value, numbers.Real) and not math.isfinite(value):
        raise ConfigError(f"{key}: {value} is not a finite number")


def bounds_of(metadata: Iterable[Any]) -> list[Bound]:
    """The limits among the metadata of an `Annotated` type, intervals as their two ends."""
    found: list[Bound] = []
    for item in metadata:
        # An Interval is not a limit itself but a group of them.
        ends = item if isinstance(item, Interval) else [item]
        found += [end for end in ends if isinstance(end, (Ge, Gt, Le, Lt))]
    return found


def _check_number(key: str, value: numbers.Real, bounds: list[Bound]) -> None:
    for bound in bounds:
        if not _holds(value, bound):
            raise ConfigError(f"{key}: {value} is out of range; {describe_limits(bounds)}")


def _holds(value: Any, bound: Bound) -> bool:
    if isinstance(bound, Ge):
        return bool(value >= bound.ge)
    if isinstance(bound, Gt):
        return bool(value > bound.gt)
    if isinstance(bound, Le):
        return bool(value <= bound.le)
    return bool(value < bound.lt)


def describe_limits(bounds: list[Bound]) -> str:
    """The limits in words: `it must be at least 1`, `it must be more than 0 and at most 1`."""
    words = []
    for bound in bounds:
        if isinstance(bound, Ge):
            words.append(f"at least {bound.ge}")
        elif isinstance(bound, Gt):
            words.append(f"more than {bound.gt}")
        elif isinstance(bound, Le):
            words.append(f"at most {bound.le}")
        else:
            words.append(f"less than {bound.lt}")
    return "it must be " + " and ".join(words)


def describe_type(hint: Any) -> str:
    """A type in words: `a whole number`, `one of 'linear', 'constant'`, `a list of text`."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    origin, members = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "null"
    if origin is typing.Literal:
        return " or ".join(repr(member) for member in members)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe_type(member) for member in members)
    if origin is list or (origin is tuple and members and members[-1] is Ellipsis):
        return f"a list [{describe_type(members[0])}, ...]"
    if origin is tuple:
        return f"[{', '.join(describe_type(member) for member in members)}]"
    return getattr(hint, "__name__", str(hint))


def shown(value: Any, length: int = 60) -> str:
    """A value as a message shows it: on one line, and not too long."""
    text = {None: "null", True: "true", False: "false"}[value] if _is_word(value) else str(value)
    return " ".join(text[:length].split()) + ("..." if len(text) > length else "") or "''"


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def fits(value: Any, hint: Any) -> bool:
    """Whether a converted value is of a type, without looking inside containers."""
    while get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin, members = get_origin(hint), get_args(hint)
    if origin is typing.Literal:
        # True == 1 == 1.0, but neither is the 1 of a Literal[1, 2].
        return any(value == member and type(value) is type(member) for member in members)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in members)
    if origin is tuple and members[-1] is not Ellipsis:
        return isinstance(value, (tuple, list)) and len(value) == len(members)
    if origin in (tuple, list):
        return isinstance(value, (tuple, list))
    if hint is type(None):
        return value is None
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True
