"""The exceptions of reidreg, and the exit codes that the command line gives them.

Exception
├── ReidregError            2    the user can fix it: one line that names the key or the file
│   ├── ConfigError              a key, an option or a value of the configuration
│   │   └── UnknownNameError     no part is registered under this name
│   ├── PluginError              a plugin could not be loaded, or claims a taken name
│   ├── DataError                a folder, an image, a feature file
│   ├── CheckpointError          a checkpoint is missing, of another format, or does not fit
│   │   └── DamagedError             its file is incomplete or corrupt
│   ├── DeviceError              a device is missing or its memory does not suffice
│   └── RankError                the ranks of a run do not agree, or one has ended or hangs
└── DivergedError           3    the loss or a gradient is not finite
BaseException
└── InterruptedRun     130, 143  SIGINT or SIGTERM, after saving
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ReidregError(Exception):
    """An error that the user can fix; its text is one line."""

    exit_code = 2


class ConfigError(ReidregError):
    """A key, an option or a value of the configuration is wrong."""


class UnknownNameError(ConfigError):
    """No part of this kind is registered under this name."""


class PluginError(ReidregError):
    """A plugin could not be loaded, or registers a class or a name that is not allowed."""


class DataError(ReidregError):
    """A folder, an image or a feature file is missing, empty or damaged."""


class CheckpointError(ReidregError):
    """A checkpoint is missing, damaged, of another format, or does not fit the run."""


class DamagedError(CheckpointError):
    """A checkpoint's file is incomplete, corrupt, or not a reidreg checkpoint."""


class DeviceError(ReidregError):
    """The requested device does not exist, or has too little memory."""


class RankError(ReidregError):
    """The ranks of a run do not agree on what they run, or one of them has ended or hangs."""


class DivergedError(Exception):
    """The loss or a gradient is not finite; the optimizer step was not made."""

    exit_code = 3


class InterruptedRun(BaseException):
    """A signal ended the run after its state was saved.

    A BaseException, like KeyboardInterrupt, so that `except Exception` in a part does not catch it.

    Args:
        signum: The signal's number; the exit code is 128 plus it.
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


_SHOWN = 12  # names in a hint: more make a line too long to read


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for the end of an error message: the nearest known word, or all known words.

    Args:
        word: What the user wrote.
        known: The words that are accepted.

    Returns:
        `"; did you mean 'x'?"` if one is similar, else `"; known: a, b, c"`, else an empty string.
    """
    names = sorted(set(known))
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = names if len(names) <= _SHOWN else [*names[:_SHOWN], "..."]
    return f"; known: {', '.join(shown)}" if names else ""
