"""The logger `reidreg`, and where its lines go: stdout and train.log."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reidreg.errors import DivergedError, InterruptedRun, ReidregError
from reidreg.machine.world import world_from_env

logger = logging.getLogger("reidreg")


class _StdoutHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic since 3.11
    """Writes to the current sys.stdout, which a progress bar may have replaced."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Stop printing when the reader is gone, as in `reidreg fit | head`; the run continues."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            logger.removeHandler(self)
        else:
            super().handleError(record)


def log_to_console() -> None:
    """Print the log's lines on stdout, on rank 0 only; a second call changes nothing."""
    if not world_from_env().is_main:
        logger.addHandler(logging.NullHandler())
        return
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.addHandler(_StdoutHandler())
    logger.setLevel(logging.INFO)


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the log's lines to a file, with their times, for the duration of a run.

    An error that ends the run is written too; with its traceback, unless the user can fix it.
    """
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    level = logger.level
    if not logger.isEnabledFor(logging.INFO):
        logger.setLevel(logging.INFO)
    try:
        yield
    except (ReidregError, DivergedError, InterruptedRun) as error:
        handler.handle(_record(str(error)))
        raise
    except BaseException as error:
        handler.handle(_record(repr(error), (type(error), error, error.__traceback__)))
        raise
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def log_silenced() -> Iterator[None]:
    """Drop the log's lines, as all ranks but 0 do during a run."""
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def _record(text: str, exception: Any = None) -> logging.LogRecord:
    return logging.LogRecord(logger.name, logging.ERROR, __file__, 0, text, None, exception)
