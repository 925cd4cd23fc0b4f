"""The figures of a run: metrics.jsonl, and the same lines to Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from reidreg.logs.console import logger


class MetricsLog:
    """Appends figures to metrics.jsonl, and logs them to W&B if it is on.

    Args:
        path: The file, or None to write none, as on all ranks but 0. Lines after `step` are
            dropped: a resumed run writes them again.
        step: The step that the run starts from.
        wandb_run: A W&B run, or None.
        to_come: First parts of the keys, such as `val`, that the run will write again at `step`:
            it may have been killed between an evaluation and the checkpoint that records it.
    """

    def __init__(
        self,
        path: Path | None,
        step: int = 0,
        wandb_run: Any = None,
        to_come: Collection[str] = (),
    ) -> None:
        self.wandb_run = wandb_run
        if path is not None:
            _drop_lines(path, step, to_come)
        self._file = (path or Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, figures: dict[str, float]) -> None:
        """Write one line.

        Args:
            figures: By key, `step` and `epoch` among them. What is not finite is written as null.
        """
        finite = {k: v if math.isfinite(v) else None for k, v in figures.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()
        if self.wandb_run is not None:
            values = {key: value for key, value in figures.items() if key != "step"}
            with _errors_logged():
                self.wandb_run.log(values, step=int(figures["step"]))

    def summarise(self, figures: dict[str, float]) -> None:
        """Set figures of the whole run, such as the best mAP, in W&B's summary."""
        if self.wandb_run is not None:
            with _errors_logged():
                self.wandb_run.summary.update(figures)

    def close(self, exit_code: int = 0) -> None:
        """Close the file, and finish W&B's run."""
        self._file.close()
        if self.wandb_run is not None:
            with _errors_logged():
                self.wandb_run.finish(exit_code=exit_code)


def _drop_lines(path: Path, step: int, to_come: Collection[str]) -> None:
    """Drop the lines after a step, and those of the step itself that will be written again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        # A kill may have cut the last line short.
        with contextlib.suppress(json.JSONDecodeError):
            figures = json.loads(line)
            again = any(key.split("/")[0] in to_come for key in figures)
            if figures["step"] < step or (figures["step"] == step and not again):
                kept.append(line + "\n")
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)


@contextlib.contextmanager
def _errors_logged() -> Iterator[None]:
    """Log an error of W&B as one line: it must not end the run."""
    try:
        yield
    except Exception as error:
        logger.warning("W&B: %s", str(error).splitlines()[0] if str(error) else repr(error))
