"""A run's folder: its files, one run at a time in it, and nothing of an earlier run lost."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reidreg.checkpoint import remove_partial_files
from reidreg.config import Config
from reidreg.errors import CheckpointError, ConfigError
from reidreg.locking import exclusive
from reidreg.logs import log_to_file
from reidreg.yamlfile import dump_yaml


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run.

    Args:
        root: The folder, `output_dir`.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def log(self) -> Path:
        return self.root / "train.log"

    @property
    def metrics_log(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.json"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def last(self) -> Path:
        return self.checkpoints / "last.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    def at_epoch(self, epoch: int) -> Path:
        """The kept checkpoint of an epoch."""
        return self.checkpoints / f"epoch_{epoch:04d}.ckpt"

    def saved(self) -> str | None:
        """The checkpoint to resume from, if there is one."""
        return str(self.last) if self.last.exists() else None

    def open(self) -> None:
        """Make the folder, and find out now whether it can be written to.

        Raises:
            ConfigError: It cannot.
        """
        probe = self.root / f".probe.{os.getpid()}"
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"output_dir: cannot write to {self.root} ({error.strerror})"
            ) from error
        remove_partial_files(self.checkpoints)

    @property
    def _mark(self) -> Path:
        return self.root / ".begun"

    def begun(self) -> bool:
        """Whether the files here are of the run that the launcher has started, or restarted."""
        return self._mark.exists()

    def mark_begun(self, begun: bool) -> None:
        """Note it, for a launcher that starts failed processes again."""
        if begun:
            self._mark.touch()
        else:
            self._mark.unlink(missing_ok=True)

    def to_resume(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume` means, or None for a new run.

        Raises:
            CheckpointError: A path was given and there is no such file.
        """
        if resume is None or (resume == "auto" and not self.last.exists()):
            return None
        path = self.last if resume == "auto" else Path(resume).expanduser()
        if not path.is_file():
            raise CheckpointError(f"--resume {resume}: no such file; `--resume auto` finds it")
        return path

    def set_earlier_run_aside(self) -> Path | None:
        """Move the files of an earlier run into a folder of their own; the log goes on.

        Returns:
            That folder, or None if there was no earlier run.
        """
        if not any(self.checkpoints.glob("*.ckpt")) and not self.metrics_log.exists():
            return None
        number = 1
        while (self.root / f"earlier-{number}").exists():
            number += 1
        aside = self.root / f"earlier-{number}"
        aside.mkdir()
        for path in (self.config, self.metrics_log, self.metrics, self.checkpoints):
            if path.exists():
                os.replace(path, aside / path.name)
        self.checkpoints.mkdir()
        return aside

    def write_config(self, config: Config) -> None:
        """Write the resolved configuration."""
        self.config.write_text(dump_yaml(config.as_dict()), encoding="utf-8")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Open the folder, hold it for this process, and write its log."""
        self.open()
        with self.exclusive(), log_to_file(self.log):
            yield

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            ConfigError: Another run holds it.
        """
        fix = "give another --output_dir"
        with exclusive(self.root, "output_dir", fix):
            yield
