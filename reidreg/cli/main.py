"""The entry point: the table of commands, the exit codes, and errors in one line."""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence

from reidreg.cli.evaluate import evaluate_command, extract_command
from reidreg.cli.fit import fit_command
from reidreg.cli.index import index_command
from reidreg.cli.listing import plugins_command
from reidreg.cli.search import search_command
from reidreg.cli.tools import doctor_command, import_config_command, synthesize_command
from reidreg.errors import (
    ConfigError,
    DivergedError,
    InterruptedRun,
    ReidregError,
    did_you_mean,
)
from reidreg.machine.interrupting import own_process
from reidreg.machine.malloc import keep_freed_memory
from reidreg.machine.world import World, world_from_env

Command = Callable[[list[str]], int]

COMMANDS: dict[str, tuple[Command, str]] = {
    "fit": (fit_command, "train a model"),
    "evaluate": (evaluate_command, "evaluate a checkpoint or files of features"),
    "extract": (extract_command, "write the features of images to a file"),
    "index": (index_command, "build an index of a gallery"),
    "search": (search_command, "search an index by images or features"),
    "plugins": (plugins_command, "list every part and where it comes from"),
    "synthesize": (synthesize_command, "draw a data set in the layout of a real one"),
    "doctor": (doctor_command, "check everything that a run needs"),
    "import-config": (import_config_command, "translate a reid-strong-baseline configuration"),
}
# Commands that all ranks run together; the others run on rank 0 only.
_DISTRIBUTED = ("fit", "evaluate", "extract")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 a bug in reidreg, 2 an error that the user can fix, 3 training
        diverged, 130 or 143 after SIGINT or SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        print(f"reidreg {_version()}" if name == "--version" else _usage())
        return 0 if arguments else 2
    try:
        return _run(name, arguments[1:], as_process=argv is None)
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except (ReidregError, DivergedError, InterruptedRun) as error:
        return _fail(name, error, error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(name, error, 130)
    except BrokenPipeError:
        # As in `reidreg plugins | head`: the reader has closed the pipe, which is not an error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _fail(name, error, 1)


def _run(name: str, arguments: list[str], as_process: bool) -> int:
    world = world_from_env()
    if name not in COMMANDS:
        raise ConfigError(f"no such command: {name}{did_you_mean(name, COMMANDS)}")
    if not world.is_main:
        if name not in _DISTRIBUTED:
            return 0
        warnings.simplefilter("ignore")
    if as_process:  # signal handlers and malloc's settings hold for the whole process
        own_process(name)
        if name in _DISTRIBUTED:
            keep_freed_memory()
    command, _ = COMMANDS[name]
    code = command(arguments)
    sys.stdout.flush()
    return code


# --------------------------------------------------------------------- errors


def _fail(command: str, error: BaseException, code: int) -> int:
    """Print why a command failed; of several ranks only the first to fail prints."""

    def tell() -> str:
        # A signal stops all ranks; any other error has happened on one, and perhaps only there.
        rank = "" if isinstance(error, InterruptedRun) else _rank_prefix()
        line = f"reidreg {command}: {rank}{_one_line(error)}"
        print(line, file=sys.stderr)
        return line

    try:
        alone = world_from_env() == World()
    except ConfigError:  # the launcher's variables are wrong: this is the error to print
        alone = True
    if alone:
        tell()
    else:
        from reidreg.distributed.failure import tell_failure

        tell_failure(error, tell)
    return code


def _rank_prefix() -> str:
    """The rank that an error comes from, unless it is 0."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if rank != "0" else ""


def _one_line(error: BaseException) -> str:
    """The text of an error; of an unexpected one, with the file that its traceback is saved to."""
    if isinstance(error, (ReidregError, DivergedError, InterruptedRun)):
        return " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return "stopped"
    with tempfile.NamedTemporaryFile(
        "w", prefix="reidreg-", suffix=".log", delete=False, encoding="utf-8"
    ) as file:
        trace = "".join(traceback.format_exception(error))
        file.write(f"reidreg {_version()} {' '.join(sys.argv[1:])}\n\n{trace}")
    summary = f"{type(error).__name__}: {error}".splitlines()[0]
    return f"unexpected {summary}; the traceback is in {file.name}"


# --------------------------------------------------------------------- help


def _version() -> str:
    from reidreg import __version__

    return __version__


def _usage() -> str:
    lines = [f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: reidreg COMMAND [OPTIONS]",
            "",
            "Re-identification: recognise the same person across cameras.",
            "",
            "commands:",
            *lines,
            "",
            "`reidreg COMMAND --help` lists a command's options; with --config FILE also those of",
            "the parts that the file names. A first run: reidreg fit --config quickstart",
        ]
    )
