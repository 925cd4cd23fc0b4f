"""Sweeps: the shipped files, what an agent passes to a trial, and how a stopped trial ends."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args
from wandb.wandb_agent import Agent

from reidreg import load_checkpoint, load_config
from reidreg.cli.arguments import take_configs
from reidreg.cli.main import main
from reidreg.cli.sweeps import SweepTrial, flags_of_agent
from reidreg.config.layers import find_config, shipped_configs
from reidreg.config.sections import Config, advice
from reidreg.errors import ConfigError

Values = dict[str, Any]

FOLDER = Path(__file__).parents[2] / "configs/sweeps"
FILES = sorted(FOLDER.glob("*.yaml"))


def read(path: Path) -> Values:
    """A sweep as `wandb sweep` reads it: as YAML 1.1, where 1e-4 is text."""
    sweep: Values = yaml.safe_load(path.read_text())
    return sweep


def ends(space: Values) -> list[Any]:
    """All values of a parameter, or the ends of its range."""
    if "value" in space:
        return [space["value"]]
    return space["values"] if "values" in space else [space["min"], space["max"]]


def trials(sweep: Values) -> Iterator[Values]:
    """Every combination of values and ends of ranges."""
    names, spaces = zip(*sweep["parameters"].items(), strict=True)
    for values in itertools.product(*map(ends, spaces)):
        yield dict(zip(names, values, strict=True))


def command_of(sweep: Values, trial: Values) -> list[str]:
    """What an agent would start, by the agent's own code."""
    arguments = {"args": {key: {"value": value} for key, value in trial.items()}}
    flags = create_sweep_command_args(arguments)["args"]
    command = create_sweep_command([*sweep["command"]])
    place = command.index("${args}")
    return [*command[:place], *flags, *command[place + 1 :]]


def resolved(command: list[str]) -> Config:
    assert command[:2] == ["reidreg", "fit"]
    configs, flags = take_configs(command[2:])
    return load_config(*configs, flags=flags_of_agent(flags))


def value_in(config: Config, key: str) -> Any:
    value: Any = config.as_dict()
    for word in key.split("."):
        value = value[word]
    return value


# --------------------------------------------------------------------- the files


def test_the_reference_sweeps_ship_and_are_not_configurations() -> None:
    names = [path.stem for path in FILES]
    assert names == ["full", "lr", "memory_test", "optimizer", "test"]
    assert not [name for name in shipped_configs() if "sweep" in name]
    with pytest.raises(ConfigError, match="no such file"):
        find_config("sweeps/lr")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_wandb_accepts_each_sweep(path: Path) -> None:
    sweep = read(path)
    assert path.read_text().startswith("# "), "its first line describes it"
    assert sweep["program"] == "reidreg" and sweep["name"] == path.stem
    assert sweep["method"] in ("grid", "random", "bayes")
    assert sweep["metric"]["name"] == "val/mAP" and sweep["metric"]["goal"] == "maximize"
    assert sweep["run_cap"] >= 1
    for key, space in sweep["parameters"].items():
        assert space.keys() in ({"value"}, {"values"}, {"min", "max", "distribution"}), key
        assert len(set(ends(space))) == len(ends(space)), f"{key}: duplicate value"
        assert not any(isinstance(value, str) for value in ends(space)), key
        # W&B's log_uniform takes exponents, and would give rates above 1.
        assert space.get("distribution") in (None, "uniform", "log_uniform_values"), key
    # Given both, W&B ignores min_iter.
    assert {"max_iter", "min_iter"} - sweep.get("early_terminate", {}).keys()
    if sweep["method"] == "grid":
        assert len(list(trials(sweep))) == sweep["run_cap"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_trial_is_a_valid_configuration(path: Path) -> None:
    sweep = read(path)
    # Every value of each parameter beside the first ones of the others: 20 parsings, not 500.
    first, *_ = trials(sweep)
    for key, space in sweep["parameters"].items():
        for value in ends(space):
            config = resolved(command_of(sweep, {**first, key: value}))
            assert value_in(config, key) == value
            assert config.optimizer.lr < 0.1
            assert config.optimizer.bias_weight_decay is None, "biases decay as the rest does"
            assert config.validation.identities > 0, "the test set chooses nothing"
            assert config.train.epochs % config.train.eval_every == 0
            assert not [line for line in advice(config) if "warmup" in line]


def test_early_termination_waits_for_the_warm_up() -> None:
    sweep = read(FOLDER / "full.yaml")
    config = resolved(command_of(sweep, next(trials(sweep))))
    first = sweep["early_terminate"]["min_iter"] * config.train.eval_every
    assert (
        max(sweep["parameters"]["schedule.warmup_epochs"]["values"]) < first < config.train.epochs
    )


# --------------------------------------------------------------------- what an agent passes


@pytest.mark.parametrize(
    ("key", "value", "given"),
    [
        ("train.eval_untrained", True, True),
        ("train.eval_untrained", False, False),
        ("losses.triplet.margin", None, None),
        ("wandb.entity", None, None),
        ("input.size", [384, 128], [384, 128]),
        ("dataset.train_folder", ["a", "b"], ["a", "b"]),
        ("optimizer.lr", 5e-05, 5e-05),
        ("optimizer.lr", 0.00012345678901234567, 0.00012345678901234567),
        ("optimizer.name", "sgd", "sgd"),
        ("schedule.name", "cosine", "cosine"),
        ("losses.center.name", "center", "center"),
        ("sampler.batch_size", 48, 48),
    ],
)
def test_a_value_arrives_as_the_sweep_has_it(key: str, value: Any, given: Any) -> None:
    sweep = read(FOLDER / "lr.yaml")
    assert value_in(resolved(command_of(sweep, {key: value})), key) == given


def test_only_a_flag_of_none_becomes_null() -> None:
    flags = ["--a.b=None", "--c=NoneOther", "None", "--d", "x=None"]
    assert flags_of_agent(flags) == ["--a.b=null", *flags[1:]]


def test_a_trial_has_the_ids_that_the_agent_gives() -> None:
    ids = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1"}
    assert SweepTrial.from_environment(ids) == SweepTrial("sweep1", "run1")
    assert SweepTrial.from_environment(
        {**ids, "WANDB_SWEEP_ID": "team/project/sweep1"}
    ) == SweepTrial("sweep1", "run1")
    for key in ids:
        assert SweepTrial.from_environment({key: ids[key]}) is None
        assert SweepTrial.from_environment({**ids, key: ""}) is None


def test_each_trial_has_its_own_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = []
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for run in ("run1", "run2"):
        monkeypatch.setenv("WANDB_RUN_ID", run)
        flags = ["--losses.triplet.margin=None", "--print_config"]
        assert main(["fit", "--config", "quickstart", *flags]) == 0
        config = yaml.safe_load(capsys.readouterr().out)
        assert config["losses"]["triplet"]["margin"] is None
        folders.append(config["output_dir"])
    assert folders == ["log/quickstart/sweep1/run1", "log/quickstart/sweep1/run2"]


def test_a_trial_without_wandb_online_warns() -> None:
    trial = SweepTrial("s", "r")
    assert trial.offline_warning(load_config("aihub_kaist")) is None
    offline = trial.offline_warning(load_config("aihub_kaist", {"wandb.mode": "offline"}))
    assert offline == "wandb.mode is offline: the sweep gets no figures from this trial"


INIT = """
import json, sys
from pathlib import Path
from reidreg import load_config
from reidreg.logs.wandb import start_wandb
config = load_config("aihub_kaist", flags=sys.argv[2:])
run = start_wandb(config, Path(sys.argv[1]))
print(json.dumps({"id": run.id, "sweep": run.sweep_id, "config": dict(run.config)}))
run.finish()
"""


@pytest.mark.slow
def test_wandb_knows_the_parameters_as_the_run_does(tmp_path: Path) -> None:
    parameters = tmp_path / "config.yaml"
    parameters.write_text("wandb_version: 1\n\noptimizer.lr:\n  value: 0.0002\n")
    env = {key: value for key, value in os.environ.items() if key != "WANDB_MODE"}
    env |= {
        "WANDB_SWEEP_ID": "sweep1",
        "WANDB_RUN_ID": "run1",
        "WANDB_SWEEP_PARAM_PATH": str(parameters),
    }
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            INIT,
            str(tmp_path),
            "--optimizer.lr=0.0002",
            "--wandb.mode=offline",
        ],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    run = json.loads(result.stdout.splitlines()[-1])
    assert run["id"] == "run1" and run["sweep"] == "sweep1"
    assert run["config"]["optimizer.lr"] == run["config"]["optimizer"]["lr"] == 0.0002


# --------------------------------------------------------------------- how a trial ends


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Agent]:
    """W&B's agent without its server: the commands come from the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH", "WANDB_DIR"):
        monkeypatch.setenv(name, "")  # the agent sets them: restore them after the test
    monkeypatch.delenv("WANDB_DIR")
    agent = Agent(api=None, queue=None)
    yield agent
    for process in agent._run_processes.values():
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], Any], seconds: float) -> None:
    """Wait until something holds."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "the condition is still false"
        time.sleep(0.02)


def marked(mark: str) -> list[int]:
    """The living processes with a mark in their environment: a trial and all its descendants."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "ZX" and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue  # it has ended, or belongs to another user
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    ("command", "by"),
    [("stop", signal.SIGTERM), ("exit", signal.SIGKILL)],
    ids=["stopped", "killed"],
)
def test_a_trial_that_an_agent_ends_leaves_nothing_behind(
    command: str,
    by: signal.Signals,
    agent: Agent,
    tiny: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mark, log = uuid.uuid4().hex, tmp_path / "trial.log"
    log.touch()
    monkeypatch.setenv("MARK", mark)
    shared = set(os.listdir("/dev/shm"))
    fit = [sys.executable, "-m", "reidreg", "fit", "--config", "aihub_kaist", "${args}"]
    # The agent's child processes write to its terminal; this one writes to a file.
    agent._sweep_command = ["sh", "-c", f'exec "$@" > {shlex.quote(str(log))} 2>&1', "sh", *fit]
    values = {**tiny, "train.epochs": 50, "train.workers": 2, "train.cache": "none"}
    parameters = {key: {"value": value} for key, value in values.items()}
    run = {"type": "run", "run_id": "run1", "program": "reidreg", "args": parameters}
    assert "exception" not in agent._process_command(run)
    trial = agent._run_processes["run1"]
    wait_for(lambda: "epoch 2/50 step 2" in log.read_text() or trial.poll() is not None, 90)
    assert trial.poll() is None, log.read_text()
    assert len(marked(mark)) >= 3, "the trial and its two loading processes"

    assert "exception" not in agent._process_command({"type": command, "run_id": "run1"})
    # Well before the agent would kill it; the agent does not count a code below 0 as a failure.
    assert trial.wait(timeout=agent._kill_delay - 5) == -by, log.read_text()
    wait_for(lambda: not marked(mark), seconds=2)
    assert set(os.listdir("/dev/shm")) <= shared
    saved = load_checkpoint(tmp_path / "run/sweep1/run1/checkpoints/last.ckpt")
    assert saved.training is not None
    if by == signal.SIGTERM:
        assert "--resume auto goes on from there" in log.read_text().splitlines()[-1]
        assert saved.training["progress"]["batch"] >= 2, "saved in the middle of an epoch"


def test_a_trial_that_fails_has_an_exit_code_that_the_agent_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep1")
    monkeypatch.setenv("WANDB_RUN_ID", "run1")
    flags = ["--dataset.root=/nowhere", f"--output_dir={tmp_path}"]
    assert main(["fit", "--config", "aihub_kaist", *flags]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_the_signal_is_sent_after_all_other_exit_handlers() -> None:
    program = """
import atexit, signal, sys
from reidreg.errors import InterruptedRun
from reidreg.cli.sweeps import exit_by_signal
try:
    with exit_by_signal():
        atexit.register(print, "cleaned up")
        raise InterruptedRun(signal.SIGTERM)
except InterruptedRun:
    sys.exit(143)
"""
    python = [sys.executable, "-c", program]
    result = subprocess.run(python, capture_output=True, text=True)
    assert result.returncode == -signal.SIGTERM and result.stdout == "cleaned up\n"
    shell = subprocess.run(["sh", "-c", '"$@"; echo $?', "sh", *python], capture_output=True)
    assert shell.stdout == b"cleaned up\n143\n"
