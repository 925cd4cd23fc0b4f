"""The command `fit`."""

from __future__ import annotations

from typing import Any

from reidreg.cli.arguments import take_configs
from reidreg.cli.sweeps import SweepTrial, exit_by_signal, flags_of_agent
from reidreg.config.sections import Config
from reidreg.machine.world import world_from_env

_FIT = """Train a model; evaluates every train.eval_every epochs and at the end.

The options of dataset, sampler, backbone, head, losses and evaluator depend on the parts that a
configuration names: add --config FILE to this --help to see them."""

_OPTIONS: dict[str, dict[str, Any]] = {
    "resume": {
        "metavar": "auto|PATH",
        "default": None,
        "help": "continue from the newest checkpoint in output_dir, or from a file",
    },
    "profile": {
        "type": int,
        "default": 0,
        "metavar": "N",
        "help": "time N steps, record N more in output_dir/profile, and continue",
    },
    "print_config": {
        "action": "store_true",
        "help": "print the resolved configuration and stop",
    },
}


def fit_command(arguments: list[str]) -> int:
    """`reidreg fit`."""
    trial = SweepTrial.from_environment()
    if trial is None:
        return _fit(arguments, None)
    with exit_by_signal():
        return _fit(arguments, trial)


def _fit(arguments: list[str], trial: SweepTrial | None) -> int:
    from reidreg.config.parsing import parse

    configs, flags = take_configs(arguments)
    config, own = parse(
        [*configs],
        flags_of_agent(flags) if trial else flags,
        prog="reidreg fit",
        description=_FIT,
        commands=_OPTIONS,
    )
    if trial:
        config = trial.with_own_folder(config)
    if own["print_config"]:
        return _print_config(config)
    from reidreg.evaluation.table import evaluation_table
    from reidreg.logs.console import log_to_console, logger
    from reidreg.training.loop import fit

    log_to_console()
    warning = trial.offline_warning(config) if trial else None
    if warning:
        logger.warning("note: %s", warning)
    figures = fit(config, own["resume"], profile=own["profile"])
    if not world_from_env().is_main:
        return 0
    if figures:
        print("\n".join(evaluation_table(figures)))
    print(f"results: {config.output_dir}")
    return 0


def _print_config(config: Config) -> int:
    if world_from_env().is_main:
        from reidreg.config.yamlfile import dump_yaml

        print(dump_yaml(config.as_dict()), end="")
    return 0
