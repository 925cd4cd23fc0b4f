"""SIGINT and SIGTERM before the first step: nothing is to be saved, so a run stops at once."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import time
from importlib import import_module
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from conftest import as_flags
from reidreg import fit, load_config
from reidreg.cli.main import main
from reidreg.data import image_cache
from reidreg.errors import InterruptedRun
from reidreg.training.signals import StopSignals
from worlds import FORKING

Values = dict[str, Any]

# What takes long, and the seconds of each of its calls: an image's decoding ends before it stops.
PHASES = {
    "checkpoint": ("reidreg.training.runfolder", "load_checkpoint", 30),
    "data": ("reidreg_plugins.datasets.folders", "FolderReader.read", 30),
    "weights": ("reidreg.training.loop", "start_weights", 30),
    "preflight": ("reidreg_plugins.evaluators.retrieval", "Retrieval.evaluate", 30),
    "cache": ("reidreg.data.image_cache", "load_images", 0.5),
}
AT_ONCE = 2.0  # seconds


def command_line(phase: str, arguments: list[str], said: Path, begun: Event, cache: str) -> None:
    """The command line, with one function slow, and passing over errors as a part might."""
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    os.environ["REIDREG_CACHE"] = cache
    image_cache._BLOCK = 1
    module, path, seconds = PHASES[phase]
    *owners, name = path.split(".")
    place = functools.reduce(getattr, owners, import_module(module))
    quick = getattr(place, name)

    def slow(*arguments: Any, **options: Any) -> Any:
        begun.set()
        with contextlib.suppress(Exception):
            time.sleep(seconds)
        return quick(*arguments, **options)

    setattr(place, name, slow)
    sys.exit(main(arguments))


def stop_in(
    phase: str,
    values: Values,
    *arguments: str,
    number: signal.Signals = signal.SIGTERM,
) -> tuple[int | None, str, float]:
    """A run's exit code, its stderr, and the seconds that it took to stop within a phase."""
    fit_command = ["fit", "--config", "aihub_kaist", *as_flags(values), *arguments]
    folder = Path(values["output_dir"]).parent
    said, begun = folder / "stderr", FORKING.Event()
    process = FORKING.Process(
        target=command_line, args=(phase, fit_command, said, begun, str(folder / "cache"))
    )
    process.start()
    assert begun.wait(60) and process.pid is not None
    start = time.perf_counter()
    os.kill(process.pid, number)
    process.join(60)
    seconds = time.perf_counter() - start
    errors = said.read_text()
    said.unlink()
    return process.exitcode, errors, seconds


@pytest.mark.parametrize(
    ("phase", "cache", "number", "code"),
    [
        ("data", "none", signal.SIGINT, 130),
        ("weights", "none", signal.SIGTERM, 143),
        ("preflight", "none", signal.SIGTERM, 143),
        ("cache", "memory", signal.SIGINT, 130),
        ("cache", "disk", signal.SIGTERM, 143),
    ],
)
def test_a_signal_before_the_first_step_stops_at_once_and_leaves_nothing_half_made(
    tiny: Values,
    tmp_path: Path,
    phase: str,
    cache: str,
    number: signal.Signals,
    code: int,
) -> None:
    values = {**tiny, "train.cache": cache}
    returned, errors, seconds = stop_in(phase, values, number=number)
    assert errors == "reidreg fit: stopped before there was anything to save\n"
    assert returned == code
    assert seconds < AT_ONCE
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    kept = {name for name in left if not name.endswith((".lock", ".holder"))}
    assert kept - {".begun"} == {"train.log", *(["config.yaml"] if phase == "cache" else [])}


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
            with contextlib.suppress(BaseException):
                signal.raise_signal(signal.SIGTERM)
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
