"""The commands `evaluate` and `extract`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reidreg.cli.arguments import take_configs, value_of
from reidreg.errors import ConfigError

if TYPE_CHECKING:
    from reidreg.config.sections import Config
    from reidreg.evaluation.evaluate import Evaluation
    from reidreg.model.checkpoint import Checkpoint

_CKPT = {"metavar": "FILE", "default": None, "help": "a reidreg checkpoint"}
_NO_CACHE = {"action": "store_true", "help": "ignore the feature cache and do not write to it"}


# --------------------------------------------------------------------- evaluate

_EVALUATE = """Evaluate a checkpoint, or features of any system.

Needs only the checkpoint and the data; every option of its configuration can be overridden: add
--ckpt FILE to this --help to see them."""

_EVALUATE_OPTIONS: dict[str, dict[str, Any]] = {
    "ckpt": _CKPT,
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
        "help": "write an HTML report: figures, curves, ranked galleries; it shows people",
    },
    "save_threshold": {
        "action": "store_true",
        "help": "store the threshold of evaluator.verification in the checkpoint",
    },
    "no_cache": _NO_CACHE,
}


def evaluate_command(arguments: list[str]) -> int:
    """`reidreg evaluate`."""
    configs, flags = take_configs(arguments)
    ckpt = value_of("--ckpt", flags)
    if ckpt is None:
        return _evaluate_features(configs, flags)
    return _evaluate_checkpoint(ckpt, configs, flags)


def _evaluate_checkpoint(ckpt: str, configs: list[str], flags: list[str]) -> int:
    from reidreg.config.parsing import parse
    from reidreg.model.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(ckpt)
    config, own = parse(
        [checkpoint.config, *configs],
        flags,
        prog="reidreg evaluate",
        description=_EVALUATE,
        commands=_EVALUATE_OPTIONS,
    )
    if own["query"] or own["gallery"]:
        raise ConfigError("--ckpt and --query/--gallery exclude each other")
    from reidreg.distributed.group import joined
    from reidreg.evaluation.evaluate import evaluate_checkpoint
    from reidreg.logs.console import log_to_console
    from reidreg.machine.devices import choose_device
    from reidreg.model.feature_cache import cache_folder_of

    log_to_console()
    cache = None if own["no_cache"] else cache_folder_of(Path(ckpt))
    if own["report"]:
        config = _with_report_figures(config, configs, flags)
    if own["save_threshold"]:
        from reidreg.model.thresholds import check_threshold_wanted

        check_threshold_wanted(checkpoint, config)
    with joined(choose_device(config.train.device), config.train.rank_timeout) as processes:
        result = evaluate_checkpoint(checkpoint, config, cache)
    if processes.is_main:
        _write_results(result, ckpt, checkpoint, own)
    return 0


def _with_report_figures(config: Config, configs: list[str], flags: list[str]) -> Config:
    """The configuration with the figures turned on that the report shows."""
    from reidreg.config.layers import options_given
    from reidreg.report.options import with_report_figures

    part, given = config.evaluator, options_given("evaluator", configs, flags)
    options = with_report_figures(part.name, part.options, given)
    return replace(config, evaluator=replace(part, options=options))


def _write_results(
    result: Evaluation, ckpt: str, checkpoint: Checkpoint, own: dict[str, Any]
) -> None:
    from reidreg.evaluation.evaluate import write_metrics
    from reidreg.evaluation.table import evaluation_table
    from reidreg.logs.console import logger
    from reidreg.model.checkpoint import run_folder_of

    output = Path(own["output"]) if own["output"] else run_folder_of(Path(ckpt))
    logger.info("%s", "\n".join(evaluation_table(result.figures)))
    write_metrics(result.figures, output / "metrics.json")
    logger.info("figures: %s", output / "metrics.json")
    if own["save_threshold"]:
        from reidreg.model.thresholds import store_threshold

        store_threshold(Path(ckpt), checkpoint, result.figures)
        logger.info("threshold stored: %s", ckpt)
    if own["report"]:
        about = {"Checkpoint": ckpt, **result.about}
        _write_report(replace(result, about=about), output)


def _evaluate_features(configs: list[str], flags: list[str]) -> int:
    evaluator, own = _parse_for_features(configs, flags)
    if not (own["query"] and own["gallery"]):
        raise ConfigError("features are evaluated with both --query FILE and --gallery FILE")
    if own["save_threshold"]:
        raise ConfigError("--save_threshold stores it in a checkpoint; give --ckpt FILE")
    if own["report"] and not own["output"]:
        raise ConfigError("--report needs --output DIR, where the report goes")
    from reidreg.evaluation.evaluate import evaluate_features, write_metrics
    from reidreg.evaluation.table import evaluation_table
    from reidreg.logs.console import log_to_console
    from reidreg.parts.interfaces import EVALUATORS

    log_to_console()
    name = evaluator.pop("name")
    if own["report"]:
        from reidreg.config.layers import options_given
        from reidreg.report.options import with_report_figures

        given = options_given("evaluator", configs, flags)
        evaluator = with_report_figures(name, evaluator, given)
    part = EVALUATORS.build(name, **evaluator)
    result = evaluate_features(own["query"], own["gallery"], part)
    print("\n".join(evaluation_table(result.figures)))
    if own["output"]:
        write_metrics(result.figures, Path(own["output"]) / "metrics.json")
    if own["report"]:
        _write_report(replace(result, options={"name": name, **evaluator}), Path(own["output"]))
    return 0


def _parse_for_features(
    configs: list[str], flags: list[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluator's section, and the values of the command's own options."""
    from reidreg.config.parsing import resolve

    help_asked = "--help" in flags or "-h" in flags
    if value_of("--query", flags) is None and not help_asked:
        raise ConfigError("give --ckpt FILE, or --query FILE and --gallery FILE")
    # Help without a configuration shows only the command's own options.
    default = [] if help_asked else [{"evaluator": {"name": "retrieval"}}]
    values, own = resolve(
        [*(configs or default)],
        flags,
        prog="reidreg evaluate",
        description=_EVALUATE,
        commands=_EVALUATE_OPTIONS,
        sections=("evaluator",),
    )
    return values["evaluator"], own


def _write_report(result: Evaluation, output: Path) -> None:
    from reidreg.logs.console import logger
    from reidreg.report.write import write_report

    page = write_report(result, output / "report")
    shown = result.query.paths and result.gallery.paths
    logger.info("report%s: %s", ", with images of people in it" if shown else "", page)


# --------------------------------------------------------------------- extract

_EXTRACT = """Write features as .npz: features (N, D), pids, camids (N,) int64, paths.

Give --split for a split of the checkpoint's data set, or --images for a folder of images."""

_EXTRACT_OPTIONS: dict[str, dict[str, Any]] = {
    "ckpt": _CKPT,
    "split": {"metavar": "SPLIT", "default": None, "help": "train, query or gallery"},
    "images": {"metavar": "DIR", "default": None, "help": "a folder of images"},
    "output": {"metavar": "NPZ", "default": None, "help": "the file to write"},
    "dtype": {
        "choices": ("float32", "float16"),
        "default": "float32",
        "help": "type of the features; float16 is half the size and keeps three digits",
    },
    "no_cache": _NO_CACHE,
}


def extract_command(arguments: list[str]) -> int:
    """`reidreg extract`."""
    from reidreg.config.parsing import parse

    configs, flags = take_configs(arguments)
    ckpt = value_of("--ckpt", flags)
    checkpoint = None
    if ckpt is not None:
        from reidreg.model.checkpoint import load_checkpoint

        checkpoint = load_checkpoint(ckpt)
    elif "--help" not in flags and "-h" not in flags:
        raise ConfigError("give --ckpt FILE")
    base = [checkpoint.config] if checkpoint is not None else []
    config, own = parse(
        [*base, *configs],
        flags,
        prog="reidreg extract",
        description=_EXTRACT,
        commands=_EXTRACT_OPTIONS,
    )
    if own["output"] is None:
        raise ConfigError("give --output FILE.npz")
    # Without a checkpoint, `--help` was given, and `parse` has exited.
    assert ckpt is not None and checkpoint is not None
    return _extract(Path(ckpt), checkpoint, config, own)


def _extract(ckpt: Path, checkpoint: Checkpoint, config: Config, own: dict[str, Any]) -> int:
    from reidreg.distributed.group import joined
    from reidreg.evaluation.extract import extract_checkpoint
    from reidreg.logs.console import log_to_console
    from reidreg.machine.devices import choose_device
    from reidreg.model.feature_cache import cache_folder_of
    from reidreg.model.feature_files import check_output, save_features

    log_to_console()
    check_output(own["output"])
    cache = None if own["no_cache"] else cache_folder_of(ckpt)
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
