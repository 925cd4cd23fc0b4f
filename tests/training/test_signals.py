"""SIGINT and SIGTERM where there is nothing to save: before the first step, in other commands."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from importlib import import_module
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from conftest import as_flags
from reidreg import fit, load_config
from reidreg.cli.main import main
from reidreg.data import image_cache
from reidreg.errors import InterruptedRun
from reidreg.machine.interrupting import check_stop
from reidreg.training.signals import StopSignals
from worlds import FORKING

Values = dict[str, Any]

# A function of each phase, and the seconds that each of its calls takes here: a call of half a
# second ends before the run stops, and one of 30 seconds never looks whether it has to.
PHASES = {
    "checkpoint": ("reidreg.training.runfolder", "load_checkpoint", 30),
    "data": ("reidreg_plugins.datasets.folders", "FolderReader.read", 30),
    "weights": ("reidreg.training.loop", "start_weights", 30),
    "preflight": ("reidreg_plugins.evaluators.retrieval", "Retrieval.evaluate", 30),
    "cache": ("reidreg.data.image_cache", "load_images", 0.5),
    "model": ("reidreg.model.checkpoint", "load_checkpoint", 30),
}
AT_ONCE = 2.0  # seconds


def command_line(phase: str, arguments: list[str], said: Path, begun: Event, cache: str) -> None:
    """The command line with one function slow, which also swallows errors as a part might."""
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
    sys.argv[1:] = arguments
    sys.exit(main())


def stop_in(
    phase: str, folder: Path, *arguments: str, number: signal.Signals = signal.SIGTERM
) -> tuple[int | None, str, float]:
    """A command's exit code, its stderr, and the seconds that it took to stop within a phase."""
    said, begun = folder / "stderr", FORKING.Event()
    process = FORKING.Process(
        target=command_line, args=(phase, [*arguments], said, begun, str(folder / "cache"))
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


def fit_command(values: Values, *arguments: str) -> list[str]:
    return ["fit", "--config", "aihub_kaist", *as_flags(values), *arguments]


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
def test_a_signal_before_the_first_step_stops_at_once_and_leaves_no_partial_files(
    tiny: Values,
    tmp_path: Path,
    phase: str,
    cache: str,
    number: signal.Signals,
    code: int,
) -> None:
    values = {**tiny, "train.cache": cache}
    returned, errors, seconds = stop_in(phase, tmp_path, *fit_command(values), number=number)
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
    returned, errors, seconds = stop_in(phase, tmp_path, *fit_command(values, "--resume", "auto"))
    assert errors == f"reidreg fit: saved to {last}; --resume auto goes on from there\n"
    assert returned == 143 and seconds < AT_ONCE
    assert last.read_bytes() == before


def test_an_earlier_runs_checkpoint_is_not_taken_for_this_ones(
    tiny: Values, tmp_path: Path
) -> None:
    fit(load_config("aihub_kaist", flags=as_flags(tiny)))
    _, errors, _ = stop_in("data", tmp_path, *fit_command(tiny))
    assert errors == "reidreg fit: stopped before there was anything to save\n"


@pytest.mark.parametrize("command", ["evaluate", "extract"])
def test_ctrl_c_stops_other_commands_at_once_and_in_one_line(tmp_path: Path, command: str) -> None:
    arguments = [command, "--ckpt", "none.ckpt"]
    if command == "extract":
        arguments += ["--split", "query", "--output", str(tmp_path / "features.npz")]
    returned, errors, seconds = stop_in("model", tmp_path, *arguments, number=signal.SIGINT)
    assert (returned, errors) == (130, f"reidreg {command}: stopped\n")
    assert seconds < AT_ONCE


# --------------------------------------------------------------------- looking at the flag


def test_a_signal_that_a_part_swallows_is_obeyed_at_the_end_of_the_block() -> None:
    with StopSignals() as signals:
        with pytest.raises(InterruptedRun, match=r"last\.ckpt"), signals.immediate("last.ckpt"):
            signal.raise_signal(signal.SIGTERM)
            with contextlib.suppress(BaseException):
                check_stop()
        assert signals.agreed() == signal.SIGTERM
        with pytest.raises(InterruptedRun, match=r"last\.ckpt"):
            signals.obey("last.ckpt")
        with pytest.raises(InterruptedRun), signals.immediate(None):
            raise AssertionError("the block must not begin")


def test_between_two_steps_a_signal_is_only_noted() -> None:
    with StopSignals() as signals:
        assert signals.agreed() is None
        signals.obey(None)
        signal.raise_signal(signal.SIGTERM)
        check_stop()
        assert signals.agreed() == signal.SIGTERM
        with pytest.raises(InterruptedRun) as stop:
            signals.obey(None)
    assert stop.value.exit_code == 143


@pytest.mark.parametrize("blocks", [1, 20])
def test_a_signal_stops_the_cache_builder_after_a_block_and_ends_its_threads(
    blocks: int, aihub_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REIDREG_CACHE", str(tmp_path))
    monkeypatch.setattr(image_cache, "_BLOCK", 1)
    paths = [str(path) for path in sorted(aihub_root.rglob("*.jpg"))[:blocks]]
    decode, main_thread = image_cache.load_images, threading.main_thread().ident
    assert main_thread is not None

    def decoding(*arguments: Any) -> Any:
        signal.pthread_kill(main_thread, signal.SIGINT)
        return decode(*arguments)

    monkeypatch.setattr(image_cache, "load_images", decoding)
    threads = threading.active_count()
    with StopSignals() as signals, pytest.raises(InterruptedRun), signals.immediate(None):
        image_cache.open_image_cache("disk", paths, (8, 8))
    assert threading.active_count() == threads
    assert not list((tmp_path / "images").glob("*.npy"))


def test_a_signal_stops_a_process_that_waits_for_another_builder(
    aihub_root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REIDREG_CACHE", str(tmp_path))
    paths = [str(next(aihub_root.rglob("*.jpg")))]
    image_cache.open_image_cache("memory", paths, (8, 8))
    (lock,) = (tmp_path / "images").glob(".*.lock")
    start = time.monotonic()
    with FileLock(lock), StopSignals() as signals:
        sender = threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGINT])
        sender.start()
        with pytest.raises(InterruptedRun), signals.immediate(None):
            image_cache.open_image_cache("memory", paths, (8, 8))
    sender.join()
    assert time.monotonic() - start < AT_ONCE
