"""A folder of images for each identity."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from reidreg import DATASETS, DataError, Dataset, Sample

CAMERA = re.compile(r"c(\d+)_.*\.(jpg|png)")


@DATASETS.register("identity_folders")
class IdentityFolders(Dataset):
    """Images as `train/alice/c1_0001.jpg`: split, identity, camera; query and gallery likewise.

    Args:
        root: The folder that holds train/, query/ and gallery/.
        min_images: Training identities with fewer images are left out.
    """

    def __init__(self, root: str = "data/people", min_images: Annotated[int, Ge(1)] = 1) -> None:
        self.root = Path(root).expanduser()
        self.min_images = min_images

    @cached_property
    def _pids(self) -> dict[str, int]:
        names = {folder.name for folder in self.root.glob("*/*") if folder.is_dir()}
        return {name: pid for pid, name in enumerate(sorted(names))}

    def _read(self, split: str, min_images: int = 1) -> list[Sample]:
        if not (self.root / split).is_dir():
            raise DataError(f"{self.root / split} is missing; point --dataset.root at the data")
        samples = []
        for folder in sorted((self.root / split).iterdir()):
            matches = [(path, CAMERA.fullmatch(path.name)) for path in sorted(folder.iterdir())]
            found = [
                Sample(str(path), self._pids[folder.name], int(match[1]))
                for path, match in matches
                if match is not None
            ]
            samples += found if len(found) >= min_images else []
        return samples

    @cached_property
    def train(self) -> list[Sample]:
        return self._read("train", self.min_images)

    @cached_property
    def query(self) -> list[Sample]:
        return self._read("query")

    @cached_property
    def gallery(self) -> list[Sample]:
        return self._read("gallery")
