"""Log lines, figures, and what is sent to Weights & Biases."""

from __future__ import annotations

import json
import logging
import socket
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import as_flags
from reidreg import fit, load_config
from reidreg.logs.console import log_to_file, logger
from reidreg.logs.metrics import MetricsLog
from reidreg.logs.wandb import wandb_obstacle


class RecordedRun:
    """A fake W&B run, since no test can reach the server; records what it is given."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.name, self.id = "recorded", "0"
        self.lines: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, Any] = {}
        self.finished: int | None = None

    def log(self, values: dict[str, Any], step: int) -> None:
        self.lines.append((step, values))

    def finish(self, exit_code: int) -> None:
        self.finished = exit_code


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[RecordedRun]]:
    """Replaces the module `wandb` by a fake one; the runs that it starts."""
    runs: list[RecordedRun] = []

    def init(**options: Any) -> RecordedRun:
        runs.append(RecordedRun(options))
        return runs[-1]

    module = types.ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    module.Settings = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    yield runs


def test_wandb_gets_the_lines_of_metrics_jsonl_and_the_resolved_configuration(
    tiny: dict[str, Any], recorded: list[RecordedRun]
) -> None:
    config = load_config("aihub_kaist", tiny, {"wandb.mode": "offline", "train.epochs": 2})
    fit(config)
    (run,) = recorded
    assert run.options["config"] == config.as_dict()
    assert run.options["project"] == "reid-aihub-kaist"
    assert run.options["tags"] == ["aihub", "kaist", "person-reid"]
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert [{"step": step, **values} for step, values in run.lines] == lines
    steps = [step for step, _ in run.lines]
    assert steps == sorted(steps)
    assert run.summary["best/mAP"] == max(line.get("val/mAP", 0) for line in lines)
    assert run.finished == 0


def test_no_image_goes_to_wandb(tiny: dict[str, Any], recorded: list[RecordedRun]) -> None:
    fit(load_config("aihub_kaist", tiny, {"wandb.mode": "offline"}))
    values = [value for _, line in recorded[0].lines for value in line.values()]
    assert values and all(isinstance(value, (int, float)) for value in values)


def test_a_failing_wandb_does_not_stop_a_run(
    tiny: dict[str, Any], recorded: list[RecordedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: RecordedRun, values: dict[str, Any], step: int) -> None:
        raise ConnectionError("503: try later")

    monkeypatch.setattr(RecordedRun, "log", fail)
    config = load_config("aihub_kaist", tiny, {"wandb.mode": "offline"})
    assert fit(config)["num_queries"] > 0
    assert "W&B: 503: try later" in (Path(config.output_dir) / "train.log").read_text()


def test_an_online_run_without_a_login_goes_offline_with_one_line(
    tiny: dict[str, Any], recorded: list[RecordedRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    config = load_config("aihub_kaist", tiny, {"wandb.mode": "online"})
    fit(config)
    assert recorded[0].options["mode"] == "offline"
    log = (Path(config.output_dir) / "train.log").read_text()
    assert "not logged in (run `wandb login`); this run is recorded offline" in log


@pytest.mark.parametrize(
    ("content", "is_login"),
    [
        ("machine api.wandb.ai login user password 0123456789abcdef\n", True),
        ('machine api.wandb.ai login user password ""\n', False),
        ("machine elsewhere login user password 0123456789abcdef\n", False),
        ("not a netrc file at all {", False),
    ],
)
def test_only_a_key_in_netrc_is_a_login(
    content: str, is_login: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text(content)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: socket.socket())
    obstacle = wandb_obstacle()
    assert (obstacle is None) == is_login
    if not is_login:
        assert obstacle is not None and "wandb login" in obstacle


def test_a_server_that_cannot_be_reached_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    obstacle = wandb_obstacle(timeout=2)
    assert obstacle is not None and "cannot be reached" in obstacle


@pytest.mark.slow
def test_a_real_offline_run_is_written(
    tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE")
    config = load_config("aihub_kaist", tiny, {"wandb.mode": "offline"})
    fit(config)
    (run,) = (Path(config.output_dir) / "wandb").glob("offline-run-*")
    (file,) = run.glob("*.wandb")
    content = file.read_bytes()
    for word in (b"train/loss", b"val/mAP", b"label_smoothing", b"reid-aihub-kaist"):
        assert word in content


def test_lines_after_the_step_of_a_resume_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 3, "a": 3}\n{"step": 4, "')
    log = MetricsLog(path, step=2)
    log.write({"step": 3, "a": 4})
    log.close()
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1, 2, 4]


def test_an_evaluation_that_will_be_repeated_is_dropped(tmp_path: Path) -> None:
    """A run killed between an evaluation and the checkpoint that records it."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "val/mAP": 1}, {"step": 2, "train/loss": 2}, {"step": 2, "val/mAP": 3}]
    for to_come, kept in ((["val"], lines[:2]), ([], lines)):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        MetricsLog(path, step=2, to_come=to_come).close()
        assert [json.loads(line) for line in path.read_text().splitlines()] == kept


def test_a_figure_that_is_not_finite_stays_json(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1, "a": float("nan")})
    log.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None}


def test_the_log_is_appended_to_and_keeps_an_errors_traceback(tmp_path: Path) -> None:
    path = tmp_path / "train.log"
    for word in ("first", "second"):
        with log_to_file(path):
            logger.info(word)
    with pytest.raises(ZeroDivisionError), log_to_file(path):
        1 / 0  # noqa: B018
    text = path.read_text()
    assert text.index("first") < text.index("second") < text.index("Traceback")
    assert not any(isinstance(h, logging.FileHandler) for h in logger.handlers)


def test_a_reader_that_goes_away_does_not_stop_a_run(tiny: dict[str, Any]) -> None:
    command = [sys.executable, "-m", "reidreg", "fit", "--config", "aihub_kaist", *as_flags(tiny)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and errors == ""
    assert (Path(tiny["output_dir"]) / "metrics.json").exists()
