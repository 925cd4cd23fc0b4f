"""SIGINT and SIGTERM before the first step: nothing is to be saved, so a run stops at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conftest import as_flags
from reidreg import fit, load_config
from reidreg.errors import InterruptedRun
from reidreg.signals import StopSignals

Values = dict[str, Any]

# The command line, with one function that takes long, and passes over any error as a part might.
PROGRAM = """
import sys, time
from importlib import import_module
from reidreg import image_cache
from reidreg.cli import main

image_cache._BLOCK = 1
module, name, seconds = sys.argv[1:4]
place = import_module(module)
*path, name = name.split(".")
for part in path:
    place = getattr(place, part)
quick = getattr(place, name)

def slow(*arguments, **options):
    print("now", flush=True)
    try:
        time.sleep(float(seconds))
    except Exception:
        pass
    return quick(*arguments, **options)

setattr(place, name, slow)
sys.exit(main(sys.argv[4:]))
"""
# What takes long, and the seconds of each of its calls: an image's decoding ends before it stops.
PHASES = {
    "checkpoint": ("reidreg.runfolder", "load_checkpoint", 30),
    "data": ("reidreg_plugins.datasets.folders", "FolderReader.read", 30),
    "weights": ("reidreg.training", "start_weights", 30),
    "preflight": ("reidreg_plugins.evaluators.retrieval", "Retrieval.evaluate", 30),
    "cache": ("reidreg.image_cache", "load_images", 0.5),
}
AT_ONCE = 5.0  # seconds, of which the interpreter's end takes most on a busy machine


def stop_in(
    phase: str, values: Values, *arguments: str, number: signal.Signals = signal.SIGTERM
) -> tuple[int, str, float]:
    """A run's exit code, its stderr, and the seconds that it took to stop within a phase."""
    module, name, seconds = PHASES[phase]
    fit_command = ["fit", "--config", "aihub_kaist", *as_flags(values), *arguments]
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, module, name, str(seconds), *fit_command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stdout is not None
        assert any("now" in line for line in process.stdout), process.communicate()[1]
        start = time.perf_counter()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors, time.perf_counter() - start


@pytest.mark.parametrize(
    ("phase", "cache"),
    [("data", "none"), ("weights", "none"), ("preflight", "none")]
    + [("cache", "memory"), ("cache", "disk")],
)
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_before_the_first_step_stops_at_once_and_leaves_nothing_half_made(
    tiny: Values,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    cache: str,
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.setenv("REIDREG_CACHE", str(tmp_path / "cache"))
    values = {**tiny, "train.cache": cache}
    returned, errors, seconds = stop_in(phase, values, number=number)
    assert errors == "reidreg fit: stopped before there was anything to save\n"
    assert returned == code
    assert seconds < AT_ONCE
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    kept = {name for name in left if not name.endswith(".lock")}
    assert kept - {".begun"} == {"train.log", *(["config.yaml"] if phase == "cache" else [])}
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in running.stdout


@pytest.mark.parametrize("phase", ["checkpoint", "data", "cache"])
def test_a_signal_as_a_run_is_resumed_says_where_it_goes_on_from(
    tiny: Values, tmp_path: Path, phase: str
) -> None:
    fit(load_config("aihub_kaist", flags=as_flags(tiny)))
    last = tmp_path / "run/checkpoints/last.ckpt"
    before = last.read_bytes()
    values = {**tiny, "train.epochs": 2, "train.cache": "memory"}
    returned, errors, seconds = stop_in(phase, values, "--resume", "auto")
    assert errors == f"reidreg fit: saved to {last}; --resume auto goes on from there\n"
    assert returned == 143 and seconds < AT_ONCE
    assert last.read_bytes() == before


def test_an_earlier_runs_checkpoint_is_not_taken_for_this_ones(tiny: Values) -> None:
    fit(load_config("aihub_kaist", flags=as_flags(tiny)))
    _, errors, _ = stop_in("data", tiny)
    assert errors == "reidreg fit: stopped before there was anything to save\n"


def test_a_signal_that_a_part_passes_over_is_obeyed_at_the_next_look() -> None:
    with StopSignals() as signals:
        with signals.immediate("last.ckpt"):
            try:
                signal.raise_signal(signal.SIGTERM)
            except BaseException:
                pass
        assert signals.agreed() == signal.SIGTERM
        with pytest.raises(InterruptedRun, match=r"last\.ckpt"):
            signals.obey("last.ckpt")


def test_between_two_steps_a_signal_is_only_noted_and_a_second_one_stops() -> None:
    with StopSignals() as signals:
        assert signals.agreed() is None
        signals.obey(None)
        signal.raise_signal(signal.SIGINT)
        assert signals.agreed() == signal.SIGINT
        with pytest.raises(InterruptedRun) as stop:
            signal.raise_signal(signal.SIGTERM)
    assert stop.value.exit_code == 143
