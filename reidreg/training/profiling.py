"""`reidreg fit --profile N`: time the phases of N steps, and record N more with torch's profiler.

Some steps before them warm up. Recording slows a step down, so the steps that are timed are not
the ones that are recorded. The run then continues, with the same results as without a profile.
With several processes, rank 0 is profiled.
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
    """Times N steps and logs a table, then records N more and writes them.

    Args:
        steps: N.
        folder: Gets trace.json, for chrome://tracing or ui.perfetto.dev, and operators.txt.
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
        elif self._done == _last_step(self.steps):
            self.write()
            wait()
        self.begin(DATA)

    def end_epoch(self) -> None:
        self._stopwatch.discard()
        self._range.close()

    def close(self) -> None:
        """Report the steps so far, if training had fewer."""
        self._range.close()
        if self._done < WARM_UP + self.steps:
            if self._stopwatch.steps:
                self._report()
            else:
                logger.warning("profile: the run was over before step %d", WARM_UP + 1)
        if self._recorder is not None:
            self.write()

    def _report(self) -> None:
        for line in profile_table(self._stopwatch.milliseconds(), self._stopwatch.steps):
            logger.info("%s", line)

    def _record(self) -> None:
        # torch's recorder reports on stderr that it starts and stops, above the level of errors.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._recorder = torch.profiler.profile(activities=activities)
        self._recorder.start()

    def write(self) -> None:
        """Stop recording, and write the trace and the table of operators."""
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
            logger.info("%s", _describe_copies(averages, self.steps))
        logger.info("profile: %s, for ui.perfetto.dev, and %s", trace, operators)


class ProfileBarrier(StepListener):
    """Makes the other ranks wait while rank 0 writes its profile, which exceeds a step's timeout.

    Args:
        steps: N.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self._done = 0

    def end_step(self) -> None:
        self._done += 1
        if self._done == _last_step(self.steps):
            wait()


def _last_step(steps: int) -> int:
    """The step after which a profile of N steps is written."""
    return WARM_UP + 2 * steps


def _describe_copies(averages: Any, steps: int) -> str:
    """A line on the copies from host to device, which run in parallel with the phases."""
    took = sum(row.device_time_total for row in averages if "Memcpy HtoD" in row.key)
    return f"host to device: {took / steps / 1e3:.2f} ms a step, while other phases run"


class Stopwatch:
    """Sums how long each phase takes.

    On a CUDA device it records events in the stream, since the host only queues work there: a
    phase takes the time that the device spends on it.

    Args:
        device: Where training runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self._cuda = device.type == "cuda"
        self._phase: str | None = None
        self._laps: list[tuple[str, Any, Any]] = []
        self._start: Any = None

    def begin(self, phase: str) -> None:
        """End the current phase, and begin this one."""
        now = self._now()
        self._end(now)
        self._phase, self._start = phase, now

    def end_step(self) -> None:
        """End the current phase, and count the step."""
        self._end(self._now())
        self._phase = None
        self.steps += 1

    def discard(self) -> None:
        """Do not count the current phase."""
        self._phase = None

    def milliseconds(self) -> dict[str, float]:
        """The total milliseconds of each phase, in the order in which they first began."""
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
    """A table of the milliseconds per step and the share of each phase, as lines.

    Args:
        milliseconds: The total of each phase over all steps.
        steps: The number of steps.
    """
    total = sum(milliseconds.values())
    rows = [(name, took / steps, took / max(total, 1e-9)) for name, took in milliseconds.items()]
    rows.append(("step", total / steps, 1.0))
    return [
        f"profile of {steps} steps",
        f"{'phase':<16} {'ms a step':>10} {'share':>7}",
        *(f"{name:<16} {took:>10.2f} {share:>7.1%}" for name, took, share in rows),
    ]
