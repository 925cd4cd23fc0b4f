"""AIHub KAIST person re-identification."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from reidreg import DATASETS, Dataset, Sample
from reidreg_plugins.datasets.folders import FolderReader, find_root

# Published numbers of identities and images; the sample folders are smaller versions.
OFFICIAL = {
    "bounding_box_train_1": (188, 20_119),
    "bounding_box_train_2": (175, 18_476),
    "bounding_box_train_3": (175, 18_495),
    "query": (145, 1_065),
    "bounding_box_test": (145, 15_385),
    "sample_train": (100, 2_838),
    "sample_query": (100, 732),
    "sample_test": (100, 11_047),
    "sample_query_reduced": (100, 382),
    "sample_test_reduced": (100, 1_199),
}
# {pid}_c{camera}s{sequence}_{frame}.jpg, matched against the file name alone, not its folder's.
PATTERN = r"(?P<pid>\d+)_c(?P<camid>\d+)s\d+_\d+\.\w+"


@DATASETS.register("aihub_kaist")
class AIHubKAIST(Dataset):
    """AIHub KAIST: 16 cameras, three training folders, one query and one gallery folder.

    Pid 0 is an identity like any other, cameras are numbered from 1, and there is no junk.

    Args:
        root: The folder that holds query/, or the one that holds aihub_kaist/.
        train_folder: One training folder, or a list of them whose identities are merged.
        query_folder: The query's folder.
        gallery_folder: The gallery's folder.
    """

    def __init__(
        self,
        root: str = "data",
        train_folder: list[str] | str = "bounding_box_train_1",
        query_folder: str = "query",
        gallery_folder: str = "bounding_box_test",
    ) -> None:
        self.root = Path(root).expanduser()
        self.train_folders = [train_folder] if isinstance(train_folder, str) else train_folder
        self.query_folder = query_folder
        self.gallery_folder = gallery_folder
        self._reader = FolderReader(PATTERN, "0001_c02s31_000475.jpg")

    @staticmethod
    def check(options: dict[str, object]) -> None:
        """Raise ValueError for an empty or repeated list of training folders."""
        folders = options["train_folder"]
        if isinstance(folders, list) and (not folders or len(set(folders)) < len(folders)):
            raise ValueError(f"train_folder: {folders} is empty or names a folder twice")

    @cached_property
    def folder(self) -> Path:
        """The folder that holds the folders of the splits."""
        return find_root(self.root, ("aihub_kaist",), self.query_folder)

    @cached_property
    def _train_by_folder(self) -> dict[str, list[Sample]]:
        return {name: self._reader.read(self.folder / name) for name in self.train_folders}

    @cached_property
    def train(self) -> list[Sample]:
        return [sample for samples in self._train_by_folder.values() for sample in samples]

    @cached_property
    def query(self) -> list[Sample]:
        return self._reader.read(self.folder / self.query_folder)

    @cached_property
    def gallery(self) -> list[Sample]:
        return self._reader.read(self.folder / self.gallery_folder)

    def folders(self) -> dict[str, str]:
        return {
            "train": ", ".join(str(self.folder / name) for name in self.train_folders),
            "query": str(self.folder / self.query_folder),
            "gallery": str(self.folder / self.gallery_folder),
        }

    def notes(self) -> list[str]:
        """Names that did not match, and folders whose counts differ from the published ones."""
        splits = {
            self.query_folder: self.query,
            self.gallery_folder: self.gallery,
            **self._train_by_folder,
        }
        lines = list(self._reader.notes)
        for name, samples in splits.items():
            found = (len({sample.pid for sample in samples}), len(samples))
            if name in OFFICIAL and found != OFFICIAL[name]:
                lines.append(
                    f"{name}: {found[0]} identities, {found[1]} images; the published folder has "
                    f"{OFFICIAL[name][0]} and {OFFICIAL[name][1]}"
                )
        return lines
