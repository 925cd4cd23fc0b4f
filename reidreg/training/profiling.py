"""Where the time of a step goes: `reidreg fit --profile N`.

The loop says which phase begins; without `--profile` nobody listens. With it, some steps warm up,
N steps are timed, and N more are recorded by torch's profiler: recording slows a step down, so
what is recorded is not what is timed. The run then goes on as if nothing had been. Of several
processes the first one is profiled.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from reidreg.distributed.group import wait
from reidreg.logs.console import logger
from reidreg.logs.step_phases import DATA, StepListener

WARM_UP = 5  # steps until kernels are chosen, caches filled and loading processes under way
_OPERATORS = 25  # rows of operators.txt


class Profile(StepListener):
    """Times N steps, records N more, and says and writes what it found.

    Args:
        steps: N.
        folder: Where trace.json, for chrome://tracing or ui.perfetto.dev, and operators.txt go.
        device: Where training runs.
    """

    def __init__(self, steps: int, folder: Path, device: torch.device) -> None:
        self.steps = steps
        self.folder = folder
        self._stopwatch = Stopwatch(device)
        self._cuda = device.type == "cuda"
        self._recorder: Any = None
        self._range = contextlib.ExitStack()
        self._done = 0

    def begin(self, phase: str) -> None:
        if self._timing:
            self._stopwatch.begin(phase)
        elif self._recorder is not None:
            self._range.close()
            self._range.enter_context(torch.profiler.record_function(phase))

    @property
    def _timing(self) -> bool:
        return WARM_UP <= self._done < WARM_UP + self.steps

    def end_step(self) -> None:
        if self._timing:
            self._stopwatch.end_step()
        self._range.close()
        self._done += 1
        if self._done == WARM_UP + self.steps:
            self._report()
            self._record()
        elif self._done == _over(self.steps):
            self._write()
            wait()
        self.begin(DATA)

    def end_epoch(self) -> None:
        self._stopwatch.forget()
        self._range.close()

    def close(self) -> None:
        """Report what there is, of a training that had fewer steps."""
        self._range.close()
        if self._done < WARM_UP + self.steps:
            if self._stopwatch.steps:
                self._report()
            else:
                logger.warning("profile: the run was over before step %d", WARM_UP + 1)
        if self._recorder is not None:
            self._write()

    def _report(self) -> None:
        for line in profile_table(self._stopwatch.milliseconds(), self._stopwatch.steps):
            logger.info("%s", line)

    def _record(self) -> None:
        # torch's recorder tells stderr that it starts and stops, above the level of errors.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._recorder = torch.profiler.profile(activities=activities)
        self._recorder.start()

    def _write(self) -> None:
        self._recorder.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace, operators = self.folder / "trace.json", self.folder / "operators.txt"
        self._recorder.export_chrome_trace(str(trace))
        by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        averages = self._recorder.key_averages()
        table = averages.table(sort_by=by, row_limit=_OPERATORS)
        operators.write_text(table, encoding="utf-8")
        self._recorder = None
        if self._cuda:
            logger.info("%s", _copies(averages, self.steps))
        logger.info("profile: %s, for ui.perfetto.dev, and %s", trace, operators)


class Bystander(StepListener):
    """Waits while the first process writes its profile, which takes longer than a step may.

    Args:
        steps: N.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._done = 0

    def end_step(self) -> None:
        self._done += 1
        if self._done == _over(self.steps):
            wait()


def _over(steps: int) -> int:
    """The step after which a profile of N steps is written."""
    return WARM_UP + 2 * steps


def _copies(averages: Any, steps: int) -> str:
    """How long copies from the host keep the device's copy engine, beside the phases."""
    took = sum(row.device_time_total for row in averages if "Memcpy HtoD" in row.key)
    return f"host to device: {took / steps / 1e3:.2f} ms a step, while other phases run"


class Stopwatch:
    """Adds up how long each phase takes.

    On a CUDA device by events in its stream: the host only queues work there, and what counts is
    when the device comes to it. A phase that the device did not have to wait for takes no time.

    Args:
        device: Whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._cuda = device.type == "cuda"
        self._phase: str | None = None
        self._laps: list[tuple[str, Any, Any]] = []
        self._start: Any = None

    def begin(self, phase: str) -> None:
        """End the phase under way, and begin this one."""
        now = self._now()
        self._end(now)
        self._phase, self._start = phase, now

    def end_step(self) -> None:
        """End the phase under way, and count the step."""
        self._end(self._now())
        self._phase = None
        self.steps += 1

    def forget(self) -> None:
        """Do not count the phase under way."""
        self._phase = None

    def milliseconds(self) -> dict[str, float]:
        """Milliseconds that each phase took in all, in the order in which they first began."""
        if self._cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for phase, start, stop in self._laps:
            took = start.elapsed_time(stop) if self._cuda else (stop - start) * 1e3
            sums[phase] = sums.get(phase, 0.0) + took
        return sums

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _end(self, now: Any) -> None:
        if self._phase is not None:
            self._laps.append((self._phase, self._start, now))


def profile_table(milliseconds: dict[str, float], steps: int) -> Sequence[str]:
    """Milliseconds a step and share of the whole for each phase, as lines.

    Args:
        milliseconds: What each phase took in all steps together.
        steps: How many those are.
    """
    total = sum(milliseconds.values())
    rows = [(name, took / steps, took / max(total, 1e-9)) for name, took in milliseconds.items()]
    rows.append(("step", total / steps, 1.0))
    return [
        f"profile of {steps} steps",
        f"{'phase':<16} {'ms a step':>10} {'share':>7}",
        *(f"{name:<16} {took:>10.2f} {share:>7.1%}" for name, took, share in rows),
    ]
