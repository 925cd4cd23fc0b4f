"""Reading folders whose file names say who is where: `0001_c02s31_000475.jpg`."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

from reidreg import DataError, Sample

SUFFIXES = (".jpg", ".jpeg", ".png")
# Stray files happen (Thumbs.db, notes); more than this share of odd image names is a wrong folder.
TOLERATED = 0.05


class FolderReader:
    """Reads one folder a split, and keeps what was odd about it.

    Args:
        pattern: Matches a whole file name, with groups `pid` and `camid`.
        expected: An example of a right name, for messages.
        camera_offset: Added to the camera's number in the name.
    """

    def __init__(self, pattern: str, expected: str, camera_offset: int = 0) -> None:
        self._pattern = re.compile(pattern)
        self._expected = expected
        self._offset = camera_offset
        self.notes: list[str] = []

    def read(self, folder: Path) -> list[Sample]:
        """The samples of a folder, sorted by name.

        Raises:
            DataError: The folder is missing or empty, or its names do not fit.
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
    """What to say of a folder that is not there: the archive beside it, or what is there."""
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
    """The folder that really holds a data set: the root, or one of the usual names inside it.

    Args:
        root: What the user gave.
        names: What the data set's folder is usually called.
        split: A folder that the data set has, or has as an archive that is still to be extracted.
    """
    candidates = [*(root / name for name in names), root]
    whole = [path for path in candidates if (path / split).is_dir()]
    packed = [path for path in candidates if (path / f"{split}.zip").is_file()]
    return [*whole, *packed, *candidates][0]
