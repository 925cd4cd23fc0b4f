"""A run's folder: its files, a lock, and earlier runs moved aside instead of overwritten."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from reidreg.config.sections import Config
from reidreg.config.yamlfile import dump_yaml
from reidreg.errors import CheckpointError, ConfigError, DamagedError
from reidreg.files import exclusive
from reidreg.logs.console import log_to_file, logger
from reidreg.model.checkpoint import (
    Checkpoint,
    load_checkpoint,
    remove_partial_files,
    save_checkpoint,
)


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
    def previous(self) -> Path:
        """The `last` checkpoint before the current one: a hard link, so it is not written twice."""
        return self.checkpoints / "previous.ckpt"

    @property
    def best(self) -> Path:
        return self.checkpoints / "best.ckpt"

    @property
    def profile(self) -> Path:
        return self.root / "profile"

    def at_epoch(self, epoch: int) -> Path:
        """The checkpoint of an epoch, from `train.checkpoint_every`."""
        return self.checkpoints / f"epoch_{epoch:04d}.ckpt"

    def saved(self) -> str | None:
        """The checkpoint to resume from, if there is one."""
        return str(self.last) if self.last.exists() else None

    def open(self) -> None:
        """Make the folder, and check that it can be written to.

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
        """Whether the files here belong to the run that the launcher has started or restarted."""
        return self._mark.exists()

    def mark_begun(self, begun: bool) -> None:
        """Record whether they do, for a launcher that restarts failed processes."""
        if begun:
            self._mark.touch()
        else:
            self._mark.unlink(missing_ok=True)

    def save_last(self, checkpoint: Checkpoint) -> None:
        """Write `last`, and keep the one before it as `previous`.

        Raises:
            CheckpointError: The folder cannot be written to, or the disk is full.
        """
        spare = self.checkpoints / f".previous.{os.getpid()}.partial"
        # A hard link; on file systems that have none there is no `previous`.
        with contextlib.suppress(OSError):
            os.link(self.last, spare)
            os.replace(spare, self.previous)
        save_checkpoint(checkpoint, self.last)

    def open_resumable(self, resume: str | None) -> tuple[Path, Checkpoint] | None:
        """The checkpoint that `--resume` names, or None for a new run.

        If `auto` finds `last` damaged, `previous` takes its place.

        Raises:
            CheckpointError: The path does not exist, or no undamaged checkpoint is left.
        """
        if resume is None:
            return None
        if resume != "auto":
            path = Path(resume).expanduser()
            if not path.is_file():
                raise CheckpointError(f"--resume {resume}: no such file; `--resume auto` finds it")
            return path, load_checkpoint(path)
        if not self.last.exists():
            return None
        try:
            return self.last, load_checkpoint(self.last)
        except DamagedError as error:
            return self.last, self._replace_last(error)

    def _replace_last(self, damage: DamagedError) -> Checkpoint:
        try:
            checkpoint = load_checkpoint(self.previous)
        except CheckpointError:
            raise DamagedError(
                f"{damage}; no other checkpoint here can be resumed: start a new run with "
                "--init_from, from the weights of best.ckpt or epoch_*.ckpt, and another "
                "--output_dir"
            ) from damage
        logger.warning("%s; going on from %s", damage, self.previous)
        # Otherwise the next save would overwrite it with the damaged one.
        os.replace(self.previous, self.last)
        return checkpoint

    def set_earlier_run_aside(self) -> Path | None:
        """Move the files of an earlier run to `earlier-N`; train.log stays and is continued.

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
        """Open the folder, lock it for this process, and write its log."""
        self.open()
        with self.exclusive(), log_to_file(self.log):
            yield

    @contextlib.contextmanager
    def exclusive(self) -> Iterator[None]:
        """Lock the folder for this process.

        Raises:
            ConfigError: Another run is using it.
        """
        fix = "give another --output_dir"
        with exclusive(self.root, "output_dir", fix):
            yield
