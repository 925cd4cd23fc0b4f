"""What can go wrong, and the exit code that the command line gives it.

Exception
├── ReidregError            2    the user can fix it: one line that names the key or the file
│   ├── ConfigError              a key, an option or a value of the configuration
│   │   └── UnknownNameError     no part is registered under this name
│   ├── PluginError              a plugin could not be loaded, or claims a taken name
│   ├── DataError                a folder, an image, a feature file
│   ├── CheckpointError          a checkpoint is missing, foreign, or does not fit
│   │   └── DamagedError             its file is not whole
│   ├── DeviceError              a device is missing or its memory does not suffice
│   └── RankError                the processes of a run do not fit together, or one is gone
└── DivergedError           3    the loss or a gradient is not finite
BaseException
└── InterruptedRun     130, 143  SIGINT or SIGTERM, after saving
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReidregError(Exception):
    """Something that the user can fix; its text is one line."""

    exit_code = 2


class ConfigError(ReidregError):
    """A key, an option or a value of the configuration is wrong."""


class UnknownNameError(ConfigError):
    """No part of this kind is registered under this name."""


class PluginError(ReidregError):
    """A plugin could not be loaded, or registers what it may not."""


class DataError(ReidregError):
    """A folder, an image or a feature file is missing, empty or damaged."""


class CheckpointError(ReidregError):
    """A checkpoint is missing, damaged, of another format, or does not fit the run."""


class DamagedError(CheckpointError):
    """A checkpoint's file is not whole, or not one of ours."""


class DeviceError(ReidregError):
    """The device that was asked for is not there, or is too small."""


class RankError(ReidregError):
    """The processes of a run do not fit together, or one of them has ended or hangs."""


class DivergedError(Exception):
    """The loss is no longer finite; the step that would have spoilt the weights was not made."""

    exit_code = 3


class InterruptedRun(BaseException):
    """A signal ended the run after its state was saved.

    Like KeyboardInterrupt it is no Exception: a part that passes over what goes wrong within it
    does not pass over this.

    Args:
        signum: The signal's number; the exit code is 128 more.
        checkpoint: Where the state was saved, or None if there was nothing to save yet.
    """

    def __init__(self, signum: int, checkpoint: str | None = None) -> None:
        saved = f"saved to {checkpoint}; --resume auto goes on from there" if checkpoint else ""
        super().__init__(saved or "stopped before there was anything to save")
        self.signum = signum
        self.checkpoint = checkpoint

    @property
    def exit_code(self) -> int:
        return 128 + self.signum


_SHOWN = 12  # as many names as a reader looks through


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint that ends an error's line: the nearest known word, or those that there are.

    Args:
        word: What the user wrote.
        known: What would have been right.

    Returns:
        `"; did you mean 'x'?"` if one is near, else `"; known: a, b, c"`, else an empty string.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = names if len(names) <= _SHOWN else [*names[:_SHOWN], "..."]
    return f"; known: {', '.join(shown)}" if names else ""
