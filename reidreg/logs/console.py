"""What a run tells: console, train.log, metrics.jsonl, Weights & Biases.

Lines for people go through the logger `reidreg`, figures through `MetricsLog`. Everything is
written whether or not W&B is on, and W&B never decides whether a run goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import netrc
import os
import socket
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

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

from reidreg.config.sections import Config, WandbConfig
from reidreg.errors import DivergedError, InterruptedRun, ReidregError
from reidreg.machine.world import world_from_env

logger = logging.getLogger("reidreg")


class _StdoutHandler(logging.StreamHandler):  # type: ignore[type-arg]  # generic since 3.11
    """Writes to the sys.stdout of the moment, which a progress bar may have replaced."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stdout
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Fall silent where nobody reads on, as in `reidreg fit | head`; the run goes on."""
        if isinstance(sys.exc_info()[1], BrokenPipeError):
            logger.removeHandler(self)
        else:
            super().handleError(record)


def log_to_console() -> None:
    """Show the log's lines on stdout, as the command line does; a second call changes nothing.

    Of several processes only the first shows its own.
    """
    if not world_from_env().is_main:
        logger.addHandler(logging.NullHandler())
        return
    if not any(isinstance(handler, _StdoutHandler) for handler in logger.handlers):
        logger.addHandler(_StdoutHandler())
    logger.setLevel(logging.INFO)


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the log's lines to a file, with the time of each, for the length of a run.

    An error that ends the run is written too, with its traceback unless the user can mend it.
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
def log_to_nobody() -> Iterator[None]:
    """Drop the log's lines, as all processes of a run but the first do."""
    logger.disabled, before = True, logger.disabled
    try:
        yield
    finally:
        logger.disabled = before


def _record(text: str, exception: Any = None) -> logging.LogRecord:
    return logging.LogRecord(logger.name, logging.ERROR, __file__, 0, text, None, exception)


class ProgressBar:
    """A bar on stderr, if that is a terminal; silent otherwise.

    Args:
        description: What is under way.
        total: How many steps it has, or None where `report` says so later.
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
        """Move on, and show figures beside the bar if any are given."""
        fields: dict[str, Any] = {} if figures is None else {"figures": figures}
        self._progress.update(self._task, advance=steps, **fields)

    def report(self, done: int, total: int) -> None:
        """Move to an absolute place."""
        self._progress.update(self._task, completed=done, total=total)


# --------------------------------------------------------------------- figures


class MetricsLog:
    """Appends figures to metrics.jsonl, and to W&B where it is on.

    Args:
        path: The file; on a resume, lines that will come again are dropped. None keeps nothing, as
            in all processes of a run but the first.
        step: The step that the run starts from.
        wandb_run: A run of W&B, or None.
        to_come: What of that very step is still to come, by the first part of its keys: a run may
            have been killed between an evaluation and the checkpoint that knows of it.
    """

    def __init__(
        self,
        path: Path | None,
        step: int = 0,
        wandb_run: Any = None,
        to_come: Collection[str] = (),
    ) -> None:
        self.wandb_run = wandb_run
        if path is not None:
            _drop_lines(path, step, to_come)
        self._file = (path or Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, figures: dict[str, float]) -> None:
        """Write one line.

        Args:
            figures: By key; `step` and `epoch` among them.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self.wandb_run is not None:
            values = {key: value for key, value in figures.items() if key != "step"}
            with _isolated():
                self.wandb_run.log(values, step=int(figures["step"]))

    def summarise(self, figures: dict[str, float]) -> None:
        """Set figures that stand for the whole run."""
        if self.wandb_run is not None:
            with _isolated():
                self.wandb_run.summary.update(figures)

    def close(self, exit_code: int = 0) -> None:
        """Close the file, and W&B's run."""
        self._file.close()
        if self.wandb_run is not None:
            with _isolated():
                self.wandb_run.finish(exit_code=exit_code)


def _drop_lines(path: Path, step: int, to_come: Collection[str]) -> None:
    """Drop lines behind a step, and those of the step itself that are to come."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A kill may have cut the last line short.
        with contextlib.suppress(json.JSONDecodeError):
            figures = json.loads(line)
            again = any(key.split("/")[0] in to_come for key in figures)
            if figures["step"] < step or (figures["step"] == step and not again):
                kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def _isolated() -> Iterator[None]:
    """A failure of W&B is a line in the log, never the end of a run."""
    try:
        yield
    except Exception as error:
        logger.warning("W&B: %s", str(error).splitlines()[0] if str(error) else repr(error))


# --------------------------------------------------------------------- Weights & Biases


def start_wandb(config: Config, folder: Path) -> Any:
    """Start a W&B run, or None if it is disabled.

    Whether there is a login and a network is found out first, in seconds and without a prompt;
    where one is missing, a line says so and the run is recorded offline.
    """
    settings = config.wandb
    if settings.mode == "disabled":
        return None
    mode = settings.mode
    if mode == "online":
        obstacle = wandb_obstacle()
        if obstacle is not None:
            logger.warning("W&B: %s; this run is recorded offline", obstacle)
            mode = "offline"
    run = _init_wandb(settings, mode, config, folder)
    if run is not None:
        logger.info("W&B: %s run %s in project %s", mode, run.name or run.id, settings.project)
    return run


def _init_wandb(settings: WandbConfig, mode: str, config: Config, folder: Path) -> Any:
    import wandb

    try:
        return wandb.init(
            mode=mode,  # type: ignore[arg-type]
            project=settings.project,
            entity=settings.entity,
            name=settings.name,
            tags=list(settings.tags),
            config=config.as_dict(),
            dir=folder,
            # Neither code nor diffs nor the terminal's text leave the machine unasked.
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_save_requirements=False,
                init_timeout=15,
            ),
        )
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        if mode == "online":
            logger.warning("W&B: %s; this run is recorded offline", reason)
            return _init_wandb(settings, "offline", config, folder)
        logger.warning("W&B: %s; this run is not recorded there", reason)
        return None


def wandb_obstacle(timeout: float = 5.0) -> str | None:
    """Why an online run could not start, in a few words; None if nothing speaks against it.

    Args:
        timeout: Seconds to wait for the network.
    """
    url = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = url.hostname or "api.wandb.ai"
    if not os.environ.get("WANDB_API_KEY") and not _netrc_key(host):
        return "not logged in (run `wandb login`)"
    # Behind a proxy it is the proxy that must answer.
    proxy = urlsplit(getproxies().get(url.scheme, "") if not proxy_bypass(host) else "")
    target = proxy if proxy.hostname else url
    port = target.port or (443 if target.scheme == "https" else 80)
    try:
        socket.create_connection((target.hostname, port), timeout=timeout).close()
    except OSError as error:
        return f"{target.hostname} cannot be reached ({error.strerror or error})"
    return None


def _netrc_key(host: str) -> bool:
    """Whether the netrc file holds a key: an entry with an empty password is no login."""
    path = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        entry = netrc.netrc(str(path)).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return False
    return bool(entry and entry[2])
