"""Evaluator options that a report turns on."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reidreg.parts.interfaces import EVALUATORS
from reidreg.parts.schema import options_of

_REPORT_OPTIONS = {"bootstrap": 1000, "cameras": True, "verification": True}


def with_report_figures(
    name: str, options: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """The options of an evaluator, with the additional figures of a report turned on.

    An option does not change if the user gave it, if its value is not the default, if the evaluator
    does not have it, or if it is incompatible with the others.

    Args:
        name: The name of the evaluator.
        options: Its resolved options.
        given: Names of the options that the user gave.
    """
    known = options_of(EVALUATORS[name])
    result = dict(options)
    for key, value in _REPORT_OPTIONS.items():
        if key in known and key not in given and result.get(key) == known[key].default:
            more = {**result, key: value}
            result = more if _compatible(name, more) else result
    return result


def _compatible(name: str, options: Mapping[str, Any]) -> bool:
    """Whether the evaluator accepts these options together."""
    check = getattr(EVALUATORS[name], "check", None)
    try:
        if check is not None:
            check(options)
    except ValueError:
        return False
    return True
