"""A run as a trial of a Weights & Biases sweep.

`wandb agent` starts `reidreg fit` with a flag for each parameter of the trial, and stops it with
SIGTERM. Two environment variables give the ids of the sweep and the run; nothing is imported from
wandb.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from reidreg.config.sections import Config
from reidreg.errors import InterruptedRun
from reidreg.machine.interrupting import end_by_signal


@dataclass(frozen=True)
class SweepTrial:
    """One run of a sweep.

    Args:
        sweep: The sweep's id.
        run: The run's id.
    """

    sweep: str
    run: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> SweepTrial | None:
        """The trial that this process is, or None if no agent started it."""
        sweep, run = environment.get("WANDB_SWEEP_ID"), environment.get("WANDB_RUN_ID")
        return cls(sweep.rpartition("/")[2], run) if sweep and run else None

    def with_own_folder(self, config: Config) -> Config:
        """The configuration with the trial's ids appended to `output_dir`: each has its folder."""
        folder = Path(config.output_dir) / self.sweep / self.run
        return replace(config, output_dir=str(folder))

    def offline_warning(self, config: Config) -> str | None:
        """A warning if the sweep will not get the run's figures, else None."""
        if config.wandb.mode == "online":
            return None
        return f"wandb.mode is {config.wandb.mode}: the sweep gets no figures from this trial"


def flags_of_agent(flags: Sequence[str]) -> list[str]:
    """An agent's flags with null for None: the agent writes values as Python prints them."""
    return [f"{flag[:-4]}null" if _is_none(flag) else flag for flag in flags]


def _is_none(flag: str) -> bool:
    return flag.startswith("--") and flag.endswith("=None")


@contextlib.contextmanager
def exit_by_signal() -> Iterator[None]:
    """If a signal stopped the run, end the process by that signal at exit.

    The agent counts every exit code above 0 as a failure, and gives up on a sweep whose first
    trials all fail. A stopped trial is not a failure, and early termination stops many. The code
    of a process that a signal has ended is below 0. A shell sees 128 plus the signal either way.
    """
    end_by_signal()
    received: list[int] = []
    # What is registered first is called last; torch and wandb are not imported yet.
    atexit.register(_end_by, received)
    try:
        yield
    except InterruptedRun as stop:
        received.append(stop.signum)
        raise


def _end_by(received: Sequence[int]) -> None:
    for signum in received:
        sys.stdout.flush()
        sys.stderr.flush()
        signal.signal(signum, signal.SIG_DFL)
        os.kill(os.getpid(), signum)
