"""Readers of the values of a yacs file.

A reader returns the value that its key holds, or raises a ValueError that says what it expected.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from typing import Any

Reader = Callable[[Any], Any]


def _literal(value: Any) -> Any:
    """The Python literal that a text spells, as yacs reads it; else the value itself."""
    # The limit is far above any option's length, and below what overflows the parser's stack.
    if not isinstance(value, str) or len(value) > 1000:
        return value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for invalid escapes, as in a Windows path
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value


def text(value: Any) -> str:
    """Text, without surrounding spaces."""
    literal = _literal(value)
    if isinstance(literal, str):
        return literal.strip()
    if isinstance(value, str):
        return value.strip()
    raise ValueError("text")


def device_id(value: Any) -> str:
    """A number, or text."""
    return str(value) if type(value) is int else text(value)


def whole_number(value: Any) -> int:
    """An integer that is not a boolean."""
    literal = _literal(value)
    if type(literal) is not int:
        raise ValueError("a whole number")
    return literal


def number(value: Any) -> float:
    """A finite number."""
    literal = _literal(value)
    if isinstance(literal, bool) or not isinstance(literal, (int, float)):
        raise ValueError("a number")
    try:
        result = float(literal)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise ValueError("a finite number")
    return result


def number_or_null(value: Any) -> float | None:
    """A finite number, or None."""
    return None if _literal(value) is None else number(value)


def boolean(value: Any) -> bool:
    """True or False, in any of YAML's spellings."""
    literal = _literal(value)
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(literal, str):
        literal = words.get(literal.strip().lower())
    if not isinstance(literal, bool):
        raise ValueError("True or False")
    return literal


def word(on: str) -> Reader:
    """A reader of text that takes YAML's true, an unquoted `on` or `yes`, as the word `on`."""

    def read(value: Any) -> str:
        literal = _literal(value)
        if isinstance(literal, bool):
            return on if literal else "no"
        return text(value)

    return read


def one_of(*choices: Any) -> Reader:
    """A reader of one of some values; YAML's true and false are `yes` and `no`."""
    *first, last = map(repr, choices)
    expected = f"{', '.join(first)} or {last}"

    def read(value: Any) -> Any:
        literal = _literal(value)
        if isinstance(literal, bool):
            literal = "yes" if literal else "no"
        if isinstance(literal, str):
            literal = literal.strip()
        if isinstance(literal, float) or literal not in choices:
            raise ValueError(expected)
        return literal

    return read


def list_of(read_item: Reader, expected: str, length: int | None = None) -> Reader:
    """A reader of a list whose items another reader reads.

    Args:
        read_item: Reads one item.
        expected: What an error says was expected.
        length: The number of items; None allows any.
    """

    def read(value: Any) -> list[Any]:
        literal = _literal(value)
        if not isinstance(literal, (list, tuple)) or length not in (None, len(literal)):
            raise ValueError(expected)
        try:
            return [read_item(item) for item in literal]
        except ValueError as error:
            raise ValueError(expected) from error

    return read


def single_name(value: Any) -> str:
    """A name, or a list of one name."""
    literal = _literal(value)
    if isinstance(literal, (list, tuple)) and len(literal) == 1:
        value = literal[0]
    try:
        return text(value)
    except ValueError as error:
        raise ValueError("the name of one data set") from error
