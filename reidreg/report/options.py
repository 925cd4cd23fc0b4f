"""What an evaluator is asked for when its report is wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reidreg.parts.interfaces import EVALUATORS
from reidreg.parts.schema import options_of

_WANTED = {"bootstrap": 1000, "cameras": True, "verification": True}


def with_report_figures(
    name: str, options: Mapping[str, Any], given: Collection[str] = ()
) -> dict[str, Any]:
    """An evaluator's options with the figures turned on that only a report has room for.

    Args:
        name: The evaluator's.
        options: Its options, resolved.
        given: Options that the user has spoken of; they stay as they are, and so does one that the
            evaluator does not know, that is no longer its default, or that does not go together
            with the others.
    """
    known = options_of(EVALUATORS[name])
    result = dict(options)
    for key, value in _WANTED.items():
        if key in known and key not in given and result.get(key) == known[key].default:
            more = {**result, key: value}
            result = more if _go_together(name, more) else result
    return result


def _go_together(name: str, options: Mapping[str, Any]) -> bool:
    check = getattr(EVALUATORS[name], "check", None)
    try:
        if check is not None:
            check(options)
    except ValueError:
        return False
    return True
