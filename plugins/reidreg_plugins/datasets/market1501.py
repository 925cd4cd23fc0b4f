"""Market-1501."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from reidreg import DATASETS, Dataset, Sample
from reidreg_plugins.datasets.folders import FolderReader, find_root

# Some of the published names end in .jpg.jpg.
PATTERN = r"(?P<pid>-1|\d+)_c(?P<camid>\d+)s\d+_\d+_\d+(\.\w+)+"
OFFICIAL = {"train": 12_936, "query": 3_368, "gallery": 19_732}


@DATASETS.register("market1501")
class Market1501(Dataset):
    """Market-1501: 6 cameras, 751 training and 750 test identities (Zheng et al., ICCV 2015).

    In the gallery, pid -1 is junk, which evaluation leaves out, and pid 0 are distractors, which
    it keeps. Cameras are numbered from 0.

    Args:
        root: The folder that holds query/, or one that holds Market-1501-v15.09.15/.
    """

    def __init__(self, root: str = "data") -> None:
        self.root = Path(root).expanduser()
        self._reader = FolderReader(PATTERN, "0002_c1s1_000451_03.jpg", camera_offset=-1)

    @cached_property
    def folder(self) -> Path:
        """The folder that holds the folders of the splits."""
        names = ("Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "market1501")
        return find_root(self.root, names, "query")

    @cached_property
    def train(self) -> list[Sample]:
        return self._reader.read(self.folder / "bounding_box_train")

    @cached_property
    def query(self) -> list[Sample]:
        return self._reader.read(self.folder / "query")

    @cached_property
    def gallery(self) -> list[Sample]:
        return self._reader.read(self.folder / "bounding_box_test")

    def folders(self) -> dict[str, str]:
        return {
            "train": str(self.folder / "bounding_box_train"),
            "query": str(self.folder / "query"),
            "gallery": str(self.folder / "bounding_box_test"),
        }

    def notes(self) -> list[str]:
        """Junk and distractors, and splits whose counts differ from the published ones."""
        junk = sum(sample.pid == -1 for sample in self.gallery)
        distractors = sum(sample.pid == 0 for sample in self.gallery)
        lines = [f"the gallery holds {junk} junk images (left out) and {distractors} distractors"]
        for split, count in OFFICIAL.items():
            found = len(getattr(self, split))
            if found != count:
                lines.append(f"{split}: {found} images; the published split has {count}")
        return [*lines, *self._reader.notes]
