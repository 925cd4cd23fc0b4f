"""The command line: a thin shell over the package.

Each command is a function of its arguments that returns an exit code. What it needs is imported
when it runs, so that `reidreg --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidreg.cli.arguments import Parser, take_configs, value_of
from reidreg.cli.sweeps import Trial, ended_by_its_signal, flags_of_agent
from reidreg.errors import (
    ConfigError,
    DivergedError,
    InterruptedRun,
    ReidregError,
    did_you_mean,
)
from reidreg.machine.interrupting import interrupt_outside_locks
from reidreg.machine.malloc import keep_freed_memory
from reidreg.machine.world import World, world_from_env

if TYPE_CHECKING:
    from reidreg.evaluation.evaluate import Evaluation

Command = Callable[[list[str]], int]
# What several processes do together; any other command is the first one's.
_SHARED = ("fit", "evaluate", "extract")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: The arguments; None takes those of the process.

    Returns:
        The exit code: 0 done, 1 a bug of ours, 2 the user can fix it, 3 training diverged,
        130 or 143 after SIGINT or SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        print(f"reidreg {_version()}" if name == "--version" else _usage())
        return 0 if arguments else 2
    try:
        place = world_from_env()
        if name not in COMMANDS:
            raise ConfigError(f"no such command: {name}{did_you_mean(name, COMMANDS)}")
        if not place.is_main:
            if name not in _SHARED:
                return 0  # the first process does it
            warnings.simplefilter("ignore")
        if argv is None:  # the process is ours
            interrupt_outside_locks()
            if name in _SHARED:  # and runs a model
                keep_freed_memory()
        code = COMMANDS[name][0](arguments[1:])
        sys.stdout.flush()
        return code
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    except (ReidregError, DivergedError, InterruptedRun) as error:
        return _fail(name, error, error.exit_code)
    except KeyboardInterrupt as error:
        return _fail(name, error, 130)
    except BrokenPipeError:
        # `reidreg plugins | head`: nobody reads on, which is no error.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        return _fail(name, error, 1)


def _fail(command: str, error: BaseException, code: int) -> int:
    """Tell why a command fails; of several processes only the first to fail does."""

    def tell() -> str:
        # All stop at a signal; anything else happened in one process, and perhaps there alone.
        place = "" if isinstance(error, InterruptedRun) else _place()
        line = f"reidreg {command}: {place}{_in_a_line(error)}"
        print(line, file=sys.stderr)
        return line

    try:
        alone = world_from_env() == World()
    except ConfigError:  # which is what there is to tell
        alone = True
    if alone:
        tell()
    else:
        from reidreg.distributed.failure import tell_failure

        tell_failure(error, tell)
    return code


def _place() -> str:
    """Which process this is, where that is not plain."""
    rank = os.environ.get("RANK", "0")
    return f"rank {rank}: " if rank != "0" else ""


def _in_a_line(error: BaseException) -> str:
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


def _version() -> str:
    from reidreg import __version__

    return __version__


def _usage() -> str:
    lines = [f"  {name:<14} {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: reidreg COMMAND [OPTIONS]",
            "",
            "Re-identification: recognise the same person in other cameras.",
            "",
            "commands:",
            *lines,
            "",
            "`reidreg COMMAND --help` shows a command's options; beside --config FILE, those of",
            "the parts that the file names. A first run: reidreg fit --config quickstart",
        ]
    )


# --------------------------------------------------------------------- commands


_FIT = """Train a model; evaluates every train.eval_every epochs and at the end.

Options of the dataset, sampler, backbone, head, losses and evaluator follow from the parts that
a configuration names: add --config FILE to this --help to see them."""


def fit_command(arguments: list[str]) -> int:
    """`reidreg fit`."""
    trial = Trial.under_way()
    if trial is None:
        return _fit(arguments, None)
    with ended_by_its_signal():
        return _fit(arguments, trial)


def _fit(arguments: list[str], trial: Trial | None) -> int:
    from reidreg.config.parsing import parse

    configs, flags = take_configs(arguments)
    config, own = parse(
        [*configs],
        flags_of_agent(flags) if trial else flags,
        prog="reidreg fit",
        description=_FIT,
        commands={
            "resume": {
                "metavar": "auto|PATH",
                "default": None,
                "help": "go on from the newest checkpoint in output_dir, or from a file",
            },
            "profile": {
                "type": int,
                "default": 0,
                "metavar": "N",
                "help": "time N steps, record N more in output_dir/profile, and go on",
            },
            "print_config": {
                "action": "store_true",
                "help": "print the resolved configuration and stop",
            },
        },
    )
    if trial:
        config = trial.in_its_own_folder(config)
    if own["print_config"]:
        if not world_from_env().is_main:
            return 0
        from reidreg.config.yamlfile import dump_yaml

        print(dump_yaml(config.as_dict()), end="")
        return 0
    from reidreg.evaluation.table import evaluation_table
    from reidreg.logs.console import log_to_console, logger
    from reidreg.training.loop import fit

    log_to_console()
    note = trial.unseen(config) if trial else None
    if note:
        logger.warning("note: %s", note)
    figures = fit(config, own["resume"], profile=own["profile"])
    if not world_from_env().is_main:
        return 0
    if figures:
        print("\n".join(evaluation_table(figures)))
    print(f"results: {config.output_dir}")
    return 0


_NO_CACHE = {"action": "store_true", "help": "extract features anew, and keep none"}

_EVALUATE = """Evaluate a checkpoint, or features of any system.

Needs nothing but the checkpoint and the data; every option of its configuration can be
overridden: add --ckpt FILE to this --help to see them."""


def evaluate_command(arguments: list[str]) -> int:
    """`reidreg evaluate`."""
    from reidreg.config.layers import options_given
    from reidreg.config.parsing import parse, resolve

    configs, flags = take_configs(arguments)
    commands: dict[str, dict[str, Any]] = {
        "ckpt": {"metavar": "FILE", "default": None, "help": "a checkpoint of ours"},
        "query": {
            "metavar": "FILE",
            "default": None,
            "help": "features of the query, .npz or .safetensors",
        },
        "gallery": {"metavar": "FILE", "default": None, "help": "features of the gallery"},
        "output": {
            "metavar": "DIR",
            "default": None,
            "help": "where metrics.json and the report go; default: the checkpoint's run",
        },
        "report": {
            "action": "store_true",
            "help": "write a page to look at: figures, curves, ranked galleries; it shows people",
        },
        "save_threshold": {
            "action": "store_true",
            "help": "store the threshold of evaluator.verification in the checkpoint",
        },
        "no_cache": _NO_CACHE,
    }
    ckpt, help_asked = value_of("--ckpt", flags), "--help" in flags or "-h" in flags
    prog = "reidreg evaluate"
    if ckpt is None:
        layers = [*configs] if configs else [{"evaluator": {"name": "retrieval"}}]
        if value_of("--query", flags) is None and not help_asked:
            raise ConfigError("give --ckpt FILE, or --query FILE and --gallery FILE")
        values, own = resolve(
            [*([] if help_asked and not configs else layers)],
            flags,
            prog=prog,
            description=_EVALUATE,
            commands=commands,
            sections=("evaluator",),
        )
        return _evaluate_features(
            values["evaluator"], own, options_given("evaluator", configs, flags)
        )
    from reidreg.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(ckpt)
    config, own = parse(
        [checkpoint.config, *configs], flags, prog=prog, description=_EVALUATE, commands=commands
    )
    if own["query"] or own["gallery"]:
        raise ConfigError("--ckpt and --query/--gallery exclude each other")
    from reidreg.distributed.group import joined
    from reidreg.evaluation.evaluate import evaluate_checkpoint, write_metrics
    from reidreg.evaluation.table import evaluation_table
    from reidreg.logs.console import log_to_console, logger
    from reidreg.machine.devices import choose_device
    from reidreg.model.checkpoint import run_folder_of
    from reidreg.model.feature_cache import cache_folder_of

    log_to_console()
    output = Path(own["output"]) if own["output"] else run_folder_of(Path(ckpt))
    cache = None if own["no_cache"] else cache_folder_of(Path(ckpt))
    if own["report"]:
        from reidreg.report.options import with_report_figures

        part, given = config.evaluator, options_given("evaluator", configs, flags)
        options = with_report_figures(part.name, part.options, given)
        config = replace(config, evaluator=replace(part, options=options))
    if own["save_threshold"]:
        from reidreg.model.thresholds import check_threshold_wanted, store_threshold

        check_threshold_wanted(checkpoint, config)
    with joined(choose_device(config.train.device), config.train.rank_timeout) as processes:
        result = evaluate_checkpoint(checkpoint, config, cache)
    if not processes.is_main:
        return 0
    logger.info("%s", "\n".join(evaluation_table(result.figures)))
    write_metrics(result.figures, output / "metrics.json")
    logger.info("figures: %s", output / "metrics.json")
    if own["save_threshold"]:
        store_threshold(Path(ckpt), checkpoint, result.figures)
        logger.info("threshold stored: %s", ckpt)
    if own["report"]:
        about = {"Checkpoint": ckpt, **result.about}
        _write_report(replace(result, about=about), output)
    return 0


def _evaluate_features(evaluator: dict[str, Any], own: dict[str, Any], given: set[str]) -> int:
    from reidreg.evaluation.evaluate import evaluate_features, write_metrics
    from reidreg.evaluation.table import evaluation_table
    from reidreg.logs.console import log_to_console
    from reidreg.parts.interfaces import EVALUATORS

    if not (own["query"] and own["gallery"]):
        raise ConfigError("features are evaluated with both --query FILE and --gallery FILE")
    if own["save_threshold"]:
        raise ConfigError("--save_threshold stores it in a checkpoint; give --ckpt FILE")
    if own["report"] and not own["output"]:
        raise ConfigError("--report: say with --output DIR where the report is to be")
    log_to_console()
    name = evaluator.pop("name")
    if own["report"]:
        from reidreg.report.options import with_report_figures

        evaluator = with_report_figures(name, evaluator, given)
    part = EVALUATORS.build(name, **evaluator)
    result = evaluate_features(own["query"], own["gallery"], part)
    print("\n".join(evaluation_table(result.figures)))
    if own["output"]:
        write_metrics(result.figures, Path(own["output"]) / "metrics.json")
    if own["report"]:
        _write_report(replace(result, options={"name": name, **evaluator}), Path(own["output"]))
    return 0


def _write_report(result: Evaluation, output: Path) -> None:
    from reidreg.logs.console import logger
    from reidreg.report.write import write_report

    page = write_report(result, output / "report")
    shown = result.query.paths and result.gallery.paths
    logger.info("report%s: %s", ", with images of people in it" if shown else "", page)


_EXTRACT = """Write features as .npz: features (N, D), pids, camids (N,) int64, paths.

Give --split for a split of the checkpoint's data set, or --images for a folder of images."""


def extract_command(arguments: list[str]) -> int:
    """`reidreg extract`."""
    from reidreg.config.parsing import parse

    configs, flags = take_configs(arguments)
    commands: dict[str, dict[str, Any]] = {
        "ckpt": {"metavar": "FILE", "default": None, "help": "a checkpoint of ours"},
        "split": {"metavar": "SPLIT", "default": None, "help": "train, query or gallery"},
        "images": {"metavar": "DIR", "default": None, "help": "a folder of images"},
        "output": {"metavar": "NPZ", "default": None, "help": "the file to write"},
        "dtype": {
            "choices": ("float32", "float16"),
            "default": "float32",
            "help": "of the features; float16 is half the size and keeps three digits",
        },
        "no_cache": _NO_CACHE,
    }
    ckpt = value_of("--ckpt", flags)
    checkpoint = None
    if ckpt is not None:
        from reidreg.model.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(ckpt)
    elif "--help" not in flags and "-h" not in flags:
        raise ConfigError("give --ckpt FILE")
    base = [checkpoint.config] if checkpoint is not None else []
    config, own = parse(
        [*base, *configs], flags, prog="reidreg extract", description=_EXTRACT, commands=commands
    )
    if own["output"] is None:
        raise ConfigError("give --output FILE.npz")
    # Without one, only --help comes this far, and it has left.
    assert ckpt is not None and checkpoint is not None
    from reidreg.distributed.group import joined
    from reidreg.evaluation.extract import extract_checkpoint
    from reidreg.logs.console import log_to_console
    from reidreg.machine.devices import choose_device
    from reidreg.model.feature_cache import cache_folder_of
    from reidreg.model.feature_files import check_output, save_features

    log_to_console()
    check_output(own["output"])
    cache = None if own["no_cache"] else cache_folder_of(Path(ckpt))
    with joined(choose_device(config.train.device), config.train.rank_timeout) as processes:
        embeddings = extract_checkpoint(
            checkpoint, config, split=own["split"], images=own["images"], cache=cache
        )
    if not processes.is_main:
        return 0
    save_features(embeddings, own["output"], own["dtype"])
    count, width = embeddings.features.shape
    print(f"{count} features of {width} numbers: {own['output']}")
    return 0


def index_command(arguments: list[str]) -> int:
    """`reidreg index`."""
    from reidreg.cli.index import index

    return index(arguments)


def search_command(arguments: list[str]) -> int:
    """`reidreg search`."""
    from reidreg.cli.index import search

    return search(arguments)


def plugins_command(arguments: list[str]) -> int:
    """`reidreg plugins`."""
    parser = Parser(
        prog="reidreg plugins", description="List every registered part, and broken plugins."
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help="dataset, sampler, backbone, ...")
    parser.add_argument("--json", action="store_true", help="as JSON")
    own = parser.parse(arguments)
    from reidreg.parts.interfaces import REGISTRIES
    from reidreg.parts.plugins import broken_plugins

    plurals = {f"{kind}es" if kind.endswith("s") else f"{kind}s": kind for kind in REGISTRIES}
    kind = plurals.get(own.kind, own.kind)
    if kind is not None and kind not in REGISTRIES:
        raise ConfigError(f"no kind {own.kind!r}{did_you_mean(own.kind, REGISTRIES)}")
    parts = [
        {
            "kind": registry.kind,
            "name": name,
            "plugin": registry.plugin(name).name,
            "origin": str(registry.plugin(name)),
            "class": f"{part.__module__}.{part.__qualname__}",
            "summary": (part.__doc__ or "").strip().splitlines()[0] if part.__doc__ else "",
        }
        for registry in REGISTRIES.values()
        for name, part in registry.items()
        if kind in (None, registry.kind)
    ]
    broken = [{"plugin": str(p), "module": p.module, "error": p.error} for p in broken_plugins()]
    if own.json:
        print(json.dumps({"parts": parts, "broken": broken}, indent=2))
        return 0
    widths = [max((len(p[key]) for p in parts), default=0) for key in ("kind", "name", "origin")]
    for part in parts:
        cells = [part[k].ljust(w) for k, w in zip(("kind", "name", "origin"), widths, strict=True)]
        print("  ".join([*cells, part["summary"]]))
    for plugin in broken:
        print(f"broken: {plugin['plugin']}: {plugin['error']}")
    return 0


def synthesize_command(arguments: list[str]) -> int:
    """`reidreg synthesize`."""
    parser = Parser(
        prog="reidreg synthesize",
        description="Draw a data set of pedestrians in the layout of a real one.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="it will hold query/")
    parser.add_argument("--layout", choices=("aihub_kaist", "market1501"), default="aihub_kaist")
    parser.add_argument("--identities", type=int, default=80, metavar="N")
    parser.add_argument("--cameras", type=int, default=6, metavar="N")
    parser.add_argument("--images_per_camera", type=int, default=4, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--full_size",
        action="store_true",
        help="as many identities, cameras and images as AIHub KAIST itself: 73,540 images",
    )
    own = parser.parse(arguments)
    from reidreg.logs.progress import ProgressBar
    from reidreg.synthesis.dataset import synthesize

    with ProgressBar("drawing") as bar:
        folders = synthesize(
            own.output,
            layout=own.layout,
            identities=own.identities,
            cameras=own.cameras,
            images_per_camera=own.images_per_camera,
            seed=own.seed,
            full_size=own.full_size,
            progress=bar.report,
        )
    for folder, (identities, images, cameras) in folders.items():
        print(f"{folder:<22} {identities:>6,} identities {images:>8,} images {cameras:>3} cameras")
    print(f"drawn: {own.output}")
    return 0


def doctor_command(arguments: list[str]) -> int:
    """`reidreg doctor`."""
    parser = Parser(
        prog="reidreg doctor", description="Look at everything that a run needs, before a run."
    )
    parser.add_argument("--config", action="append", default=[], help="look at its data as well")
    own = parser.parse(arguments)
    from reidreg.tools.doctor import examine

    lines, healthy = examine(own.config)
    print("\n".join(lines))
    return 0 if healthy else 2


def import_config_command(arguments: list[str]) -> int:
    """`reidreg import-config`."""
    parser = Parser(
        prog="reidreg import-config",
        description="Translate a reid-strong-baseline (yacs) configuration; ours goes to stdout.",
    )
    parser.add_argument("file", metavar="OLD.yml")
    own = parser.parse(arguments)
    from reidreg.tools.import_yacs import import_config, render

    imported = import_config(own.file)
    print(render(imported, own.file), end="")
    return 0


COMMANDS: dict[str, tuple[Command, str]] = {
    "fit": (fit_command, "train a model"),
    "evaluate": (evaluate_command, "figures of a checkpoint, or of features"),
    "extract": (extract_command, "features of images"),
    "index": (index_command, "put a gallery on disk, to search in"),
    "search": (search_command, "find images in an index"),
    "plugins": (plugins_command, "list every part and where it comes from"),
    "synthesize": (synthesize_command, "draw a data set in a real layout"),
    "doctor": (doctor_command, "look at everything that a run needs"),
    "import-config": (import_config_command, "translate a reid-strong-baseline configuration"),
}
