"""Runs that are stopped at random moments and resumed: none hangs, and all end with the same bits.

REIDREG_STOPS is the number of stops and REIDREG_STOPS_SEED the seed of their moments.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import as_flags
from reidreg import load_checkpoint
from reidreg.cli import main as command_line
from worlds import FORKING

STOPS = int(os.environ.get("REIDREG_STOPS", "6"))
SEED = int(os.environ.get("REIDREG_STOPS_SEED", "0"))
PATIENCE = 60.0  # seconds after which a run that was told to stop hangs
# Batches from loading processes, and from a cache that threads build.
WAYS: dict[str, dict[str, Any]] = {
    "loading processes": {"train.workers": 2, "train.cache": "none"},
    "cache in memory": {"train.workers": 0, "train.cache": "memory"},
    "cache on disk": {"train.workers": 0, "train.cache": "disk"},
}
# What differs between two runs of the same numbers.
OF_THE_MOMENT = {"train/images_per_second", "train/data_wait", "train/peak_memory_gib"}

# Imports that would be most of each start; without effect if tests before have used FORKING.
FORKING.set_forkserver_preload(
    ["torch", "reidreg.training.loop", "reidreg_plugins", "timm", "wandb"]
)


@dataclass
class Leg:
    """One start of `reidreg fit --resume auto`, to its end or until it is stopped."""

    process: BaseProcess
    stderr: Path

    @classmethod
    def of(cls, values: dict[str, Any], folder: Path) -> Leg:
        begun = FORKING.Event()
        arguments = ["fit", "--config", "aihub_kaist", *as_flags(values), "--resume", "auto"]
        process = FORKING.Process(target=fit_command, args=(arguments, folder, begun))
        process.start()
        assert begun.wait(PATIENCE)
        return cls(process, folder / "stderr")

    def stop(self, number: signal.Signals, group: bool) -> None:
        assert self.process.pid is not None
        try:
            (os.killpg if group else os.kill)(self.process.pid, number)
        except ProcessLookupError:
            pass  # it has ended

    def end(self) -> tuple[int, str]:
        """The exit code and stderr, once it has ended."""
        self.process.join(PATIENCE)
        code = self.process.exitcode
        if code is None:
            os.kill(self.process.pid or 0, signal.SIGABRT)  # faulthandler prints where it hangs
            self.process.join(5)
            self.process.kill()
            raise AssertionError(f"the run hangs:\n{self.stderr.read_text()}")
        return code, self.stderr.read_text()

    def left(self) -> list[str]:
        """Processes of this leg that outlive it."""
        limit = time.monotonic() + 10
        while (found := session(self.process.pid or 0)) and time.monotonic() < limit:
            time.sleep(0.05)
        return found


def fit_command(arguments: list[str], folder: Path, begun: Event) -> None:
    """The command line in a session of its own."""
    import faulthandler

    os.setsid()
    # As a command line's: a child of a fork server would start loading processes from another one.
    multiprocessing.set_start_method("fork", force=True)
    for name, stream in (("stdout", sys.stdout), ("stderr", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    faulthandler.enable()
    os.environ["REIDREG_CACHE"] = str(folder / "cache")
    own_process = command_line.own_process

    def owned(command: str) -> None:
        own_process(command)
        begun.set()

    command_line.own_process = owned
    sys.argv[1:] = arguments
    sys.exit(command_line.main())


def session(leader: int) -> list[str]:
    """The processes of a session that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            name, fields = path.read_text().rsplit(")", 1)
        except OSError:
            continue
        if fields.split()[3] == str(leader) and fields.split()[0] not in "ZX":
            found.append(f"{name})")
    return found


def outcome(run: Path) -> dict[str, Any]:
    """What a run leaves, but for what depends on the moment, by place."""
    found = {}
    for name in ("last", "best"):
        checkpoint = load_checkpoint(run / f"checkpoints/{name}.ckpt")
        found |= leaves(vars(checkpoint), name)
    # Set when an epoch begins; a run that is resumed after its last epoch saves that of its first.
    found.pop("last/training/optimizer/param_groups/0/lr")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return found | leaves([json.loads(line) for line in lines])


def leaves(tree: Any, place: str = "") -> dict[str, Any]:
    """The values of a tree by place; tensors as their bytes."""
    if isinstance(tree, dict):
        items = [(key, tree[key]) for key in tree if key not in OF_THE_MOMENT]
    elif isinstance(tree, (list, tuple)):
        items = list(enumerate(tree))
    else:
        return {place: tree.numpy().tobytes() if isinstance(tree, torch.Tensor) else tree}
    return {k: v for key, value in items for k, v in leaves(value, f"{place}/{key}").items()}


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    assert one.keys() == other.keys()
    return [place for place in one if one[place] != other[place]]


def clear(folder: Path) -> None:
    for name in ("run", "cache"):
        shutil.rmtree(folder / name, ignore_errors=True)


def last_line(folder: Path) -> str:
    """The last line of a run's log before it was stopped."""
    said = [line for line in log_of(folder).splitlines() if " ERROR " not in line]
    return said[-1].split(" ", 2)[2] if said else "before the log"


def expected_end(code: int, errors: str, number: signal.Signals, outside: bool) -> bool:
    """Whether a leg that got a signal ended as it should.

    Args:
        code: Its exit code.
        errors: Its stderr.
        number: The signal.
        outside: It came before the run began or after its end, where SIGTERM is not handled.
    """
    if code == 0:
        return errors == ""  # the run was about to end
    if code == -signal.SIGTERM:
        return number == signal.SIGTERM and outside and errors == ""
    lines = errors.splitlines()
    if "resource_sharer" in errors:  # of a loading process that was handing over a batch
        lines = lines[-1:]
    return code == 128 + number and len(lines) == 1 and lines[0].startswith("reidreg fit: s")


def log_of(folder: Path) -> str:
    log = folder / "run/train.log"
    return log.read_text() if log.exists() else ""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_runs_stopped_at_random_end_as_one_that_was_not(
    tiny: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance = random.Random(SEED)
    ways = {way: {**tiny, "train.epochs": 3, "train.log_every": 1, **WAYS[way]} for way in WAYS}
    whole, seconds = {}, {}
    for way, values in ways.items():
        leg = Leg.of(values, tmp_path)
        start = time.monotonic()
        assert leg.end() == (0, "") and not leg.left()
        seconds[way], whole[way] = time.monotonic() - start, outcome(tmp_path / "run")
        clear(tmp_path)

    counts: Counter[str] = Counter()
    slowest = (0.0, "")
    while counts["stops"] < STOPS:
        way, code = chance.choice(list(WAYS)), None
        while code != 0:
            before = log_of(tmp_path)
            leg = Leg.of(ways[way], tmp_path)
            if counts["stops"] == STOPS:  # nothing is left but to finish this one
                assert leg.end() == (0, "")
                break
            leg.process.join(chance.uniform(0, seconds[way]))
            running = leg.process.is_alive()
            number = chance.choice([signal.SIGINT, signal.SIGTERM])
            group = chance.random() < 0.5
            start = time.monotonic()
            leg.stop(number, group)
            code, errors = leg.end()
            log = log_of(tmp_path)
            outside = log == before or "evaluation after epoch 3" in log
            assert expected_end(code, errors, number, outside), (code, errors, number, log)
            if running:
                slowest = max(slowest, (time.monotonic() - start, f"{way}: {last_line(tmp_path)}"))
                counts.update(["stops", number.name, f"exit {code}", *["group"] * group])
            assert not leg.left()
        places = differing(outcome(tmp_path / "run"), whole[way])
        assert places == [], way
        counts["runs"] += 1
        clear(tmp_path)
    codes = ", ".join(f"{n} x {key}" for key, n in sorted(counts.items()) if "exit" in key)
    with capsys.disabled():
        print(
            f"\nrandom stops: {counts['stops']} ({counts['SIGINT']} SIGINT, {counts['SIGTERM']} "
            f"SIGTERM, {counts['group']} of them to the group; {codes}), {counts['runs']} runs "
            f"ended with the same bits, slowest stop {slowest[0]:.2f} s ({slowest[1]!r}), "
            "no hang, no process left"
        )
