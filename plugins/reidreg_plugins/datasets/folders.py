"""Folders of images whose names hold pid and camera: `0001_c02s31_000475.jpg`."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from reidreg import DataError, Sample

SUFFIXES = (".jpg", ".jpeg", ".png")
TOLERATED = 0.05  # share of image names that may not match; above it, it is the wrong folder


class FolderReader:
    """Reads the folder of a split, and keeps notes on names that do not match.

    Args:
        pattern: Matches a whole file name, with groups `pid` and `camid`.
        expected: An example of a matching name, for messages.
        camera_offset: Added to the camera number in the name.
    """

    def __init__(self, pattern: str, expected: str, camera_offset: int = 0) -> None:
        self._pattern = re.compile(pattern)
        self._expected = expected
        self._offset = camera_offset
        self.notes: list[str] = []

    def read(self, folder: Path) -> list[Sample]:
        """The samples of a folder, sorted by name.

        Raises:
            DataError: The folder is missing or empty, or its names do not match.
        """
        if not folder.is_dir():
            raise DataError(missing_folder(folder))
        with os.scandir(folder) as entries:
            names = sorted(e.name for e in entries if e.name.lower().endswith(SUFFIXES))
        if not names:
            raise DataError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        matches = [(name, self._pattern.fullmatch(name)) for name in names]
        odd = [name for name, match in matches if match is None]
        if len(odd) > TOLERATED * len(names):
            raise DataError(
                f"{folder}: {len(odd)} of {len(names)} names are not like {self._expected} "
                f"(such as {odd[0]}); is it the right folder?"
            )
        if odd:
            note = f"{folder}: {len(odd)} images left out, their names do not fit ({odd[0]}, ...)"
            if note not in self.notes:
                self.notes.append(note)
        prefix = f"{folder}{os.sep}"
        return [
            Sample(prefix + name, int(match["pid"]), int(match["camid"]) + self._offset)
            for name, match in matches
            if match is not None
        ]


def missing_folder(folder: Path) -> str:
    """The error for a missing folder: names its archive, or the folders beside it."""
    archive = folder.with_name(f"{folder.name}.zip")
    if archive.exists():
        command = shlex.join(["unzip", "-n", str(archive), "-d", str(folder.parent)])
        return f"{folder} is missing, but {archive.name} is there: run `{command}`"
    parent = folder.parent
    if not parent.is_dir():
        return f"{folder} is missing: there is no {parent}; point --dataset.root at the data"
    found = sorted(path.name for path in parent.iterdir() if path.is_dir())
    inside = f"it holds {', '.join(found[:8])}" if found else "it holds no folders"
    return f"{folder} is missing: {inside}; point --dataset.root at the data"


def find_root(root: Path, names: tuple[str, ...], split: str) -> Path:
    """The folder that holds a data set: the root, or a folder with a usual name inside it.

    Args:
        root: The folder that the user named.
        names: Usual names of the data set's folder.
        split: A folder of the data set, which may still be an archive.
    """
    candidates = [*(root / name for name in names), root]
    extracted = [path for path in candidates if (path / split).is_dir()]
    packed = [path for path in candidates if (path / f"{split}.zip").is_file()]
    return [*extracted, *packed, *candidates][0]
