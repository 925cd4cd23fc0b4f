"""The progress bar of anything that takes a while."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from reidreg.machine.interrupting import check_stop
from reidreg.machine.world import world_from_env


class ProgressBar:
    """A progress bar on stderr, shown only on a terminal and only by rank 0.

    Each move is also a place where Ctrl-C may stop the work (`check_stop`).

    Args:
        description: What is being done.
        total: The number of steps, or None if `report` gives it later.
    """

    def __init__(self, description: str, total: int | None = None) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
            disable=not (sys.stderr.isatty() and world_from_env().is_main),
        )
        self._task = self._progress.add_task(description, total=total, figures="")

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def advance(self, steps: int = 1, figures: str | None = None) -> None:
        """Advance by some steps, and show figures beside the bar if any are given."""
        fields: dict[str, Any] = {} if figures is None else {"figures": figures}
        self._progress.update(self._task, advance=steps, **fields)
        check_stop()

    def report(self, done: int, total: int) -> None:
        """Set the number of steps done, and the total."""
        self._progress.update(self._task, completed=done, total=total)
        check_stop()
