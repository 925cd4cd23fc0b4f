"""What the splits of a data set hold: counts, and the table that the log shows."""

from __future__ import annotations

from collections.abc import Sequence

from reidreg.parts.interfaces import Dataset
from reidreg.values import Sample


def split_statistics(samples: Sequence[Sample]) -> tuple[int, int, int]:
    """Identities, images and cameras of a split; junk (pid -1) is no identity."""
    pids = {sample.pid for sample in samples if sample.pid >= 0}
    return len(pids), len(samples), len({sample.camid for sample in samples})


def statistics_table(dataset: Dataset) -> list[str]:
    """Identities, images and cameras of each split, with the folders and notes of the data set."""
    folders = dataset.folders()
    lines = [f"{split} folder: {folder}" for split, folder in folders.items()]
    rule = "-" * 42
    lines += [rule, "subset   |   # ids |  # images | # cameras", rule]
    for split in ("train", "query", "gallery"):
        samples: Sequence[Sample] = getattr(dataset, split)
        ids, images, cameras = split_statistics(samples)
        lines.append(f"{split:<8} | {ids:>7,} | {images:>9,} | {cameras:>9,}")
    return [*lines, rule, *(f"note: {note}" for note in dataset.notes())]
