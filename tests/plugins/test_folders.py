"""Data sets in folders: names to pids and camids, and the errors for a wrong folder."""

from __future__ import annotations

import os
import random
import shlex
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from reidreg import DATASETS, DataError, Dataset, Sample
from reidreg.data.statistics import split_statistics
from reidreg.errors import ConfigError
from reidreg_plugins.datasets.aihub_kaist import OFFICIAL

# Names of the real data sets.
TRAIN = ["0000_c07s32_005875.jpg", "0001_c04s31_001150.jpg", "0074_c14s32_001450.jpg"]
QUERY = ["1001_c04s43_000750.jpg", "1001_c16s42_007350.jpg", "1099_c09s43_006800.jpg"]
GALLERY = ["1001_c04s43_000475.jpg", "1002_c10s43_003725.jpg"]


def touch(folder: Path, names: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    first, *others = names
    (folder / first).touch()
    for name in others:  # a link takes a quarter of the time of a new file
        os.link(folder / first, folder / name)
    return folder


def aihub_folders(root: Path) -> Path:
    touch(root / "bounding_box_train_1", TRAIN)
    touch(root / "query", QUERY)
    touch(root / "bounding_box_test", GALLERY)
    return root


def aihub(root: Path, **options: object) -> Dataset:
    return DATASETS.build("aihub_kaist", root=str(root), **options)


def ids(samples: Iterable[Sample]) -> list[tuple[int, int]]:
    return [(sample.pid, sample.camid) for sample in samples]


def message(dataset: Dataset, split: str = "query") -> str:
    with pytest.raises(DataError) as caught:
        getattr(dataset, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --------------------------------------------------------------------- names


def test_names_of_aihub_give_the_person_and_the_camera(tmp_path: Path) -> None:
    dataset = aihub(aihub_folders(tmp_path))
    # Pid 0 is an identity, leading zeros are dropped, and cameras keep their numbers.
    assert ids(dataset.train) == [(0, 7), (1, 4), (74, 14)]
    assert ids(dataset.query) == [(1001, 4), (1001, 16), (1099, 9)]
    assert ids(dataset.gallery) == [(1001, 4), (1002, 10)]
    assert [sample.path for sample in dataset.train] == [
        str(tmp_path / "bounding_box_train_1" / name) for name in TRAIN
    ]


def test_all_sixteen_cameras_are_told_apart(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    touch(
        tmp_path / "all", [f"0003_c{camera:02d}s31_000{camera:03d}.jpg" for camera in range(1, 17)]
    )
    touch(tmp_path / "short", [f"3_c{camera}s1_{camera}.jpg" for camera in range(1, 17)])
    for folder in ("all", "short"):
        samples = aihub(tmp_path, train_folder=folder).train
        assert sorted(ids(samples)) == [(3, camera) for camera in range(1, 17)]


@pytest.mark.parametrize("above", ["2025_c1s/0007_c3s1_000001.jpg", "9999_c9s9_999999", "_c1s"])
def test_a_folder_whose_name_looks_like_an_image_is_no_image(above: str, tmp_path: Path) -> None:
    dataset = aihub(aihub_folders(tmp_path / above))
    assert ids(dataset.train) == [(0, 7), (1, 4), (74, 14)]
    market = DATASETS.build("market1501", root=str(market_folders(tmp_path / above / "market")))
    assert ids(market.query) == [(1, 0), (2, 5)]


@pytest.mark.parametrize(
    "name",
    [
        "x0001_c02s31_000475.jpg",
        "0001_c02s31_000475_extra.jpg",
        "0001_c02_000475.jpg",
        "-1_c02s31_000475.jpg",
        "0001c02s31_000475.jpg",
        "0001_C02S31_000475.jpg",
        "._0001_c02s31_000475.jpg",
    ],
)
def test_a_name_is_matched_whole(name: str, tmp_path: Path) -> None:
    touch(tmp_path / "query", [name])
    assert "1 of 1 names are not like 0001_c02s31_000475.jpg" in message(aihub(tmp_path))


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".jpeg", ".png", ".PNG"])
def test_usual_suffixes_of_images_are_read(suffix: str, tmp_path: Path) -> None:
    touch(tmp_path / "query", [f"0001_c02s31_000475{suffix}", "Thumbs.db", "notes.txt", "x.zip"])
    assert ids(aihub(tmp_path).query) == [(1, 2)]


def test_samples_are_in_the_order_of_their_names(tmp_path: Path) -> None:
    names = [f"{pid:04d}_c{camera:02d}s31_000025.jpg" for pid in range(20) for camera in (1, 9, 12)]
    orders = []
    for seed in (0, 1):
        random.Random(seed).shuffle(names)
        root = tmp_path / str(seed)
        touch(root / "query", names)
        orders.append([Path(sample.path).name for sample in aihub(root).query])
    assert orders[0] == orders[1] == sorted(names)


# --------------------------------------------------------------------- training folders


def test_a_list_of_training_folders_is_one_training_set(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    touch(tmp_path / "bounding_box_train_2", ["0001_c05s31_000100.jpg", "0300_c05s31_000100.jpg"])
    both = aihub(tmp_path, train_folder=["bounding_box_train_1", "bounding_box_train_2"])
    # Pid 1 is in both folders and is one identity.
    assert split_statistics(both.train) == (4, 5, 4)
    assert ids(both.train)[3:] == [(1, 5), (300, 5)]
    assert both.folders()["train"].count("bounding_box_train_") == 2
    alone = aihub(tmp_path, train_folder="bounding_box_train_2")
    assert split_statistics(alone.train) == (2, 2, 1)


@pytest.mark.parametrize("folders", [[], ["a", "a"], ["a", "b", "a"]])
def test_an_empty_or_repeated_list_of_folders_is_refused(folders: list[str]) -> None:
    with pytest.raises(ConfigError, match="train_folder: .* is empty or names a folder twice"):
        DATASETS.build("aihub_kaist", train_folder=folders)


def test_other_folders_may_be_query_and_gallery(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    touch(tmp_path / "sample_query", QUERY[:1])
    touch(tmp_path / "sample_test", GALLERY[:1])
    dataset = aihub(tmp_path, query_folder="sample_query", gallery_folder="sample_test")
    assert (len(dataset.query), len(dataset.gallery)) == (1, 1)
    assert dataset.folders()["query"] == str(tmp_path / "sample_query")


@pytest.mark.parametrize("given", ["data", "data/aihub_kaist"])
def test_the_root_may_be_the_data_set_or_the_folder_above_it(given: str, tmp_path: Path) -> None:
    aihub_folders(tmp_path / "data/aihub_kaist")
    assert len(aihub(tmp_path / given).query) == 3


# --------------------------------------------------------------------- counts and notes


def test_folders_with_other_counts_than_the_published_are_noted(tmp_path: Path) -> None:
    dataset = aihub(aihub_folders(tmp_path), train_folder=["bounding_box_train_1"])
    notes = dataset.notes()
    assert len(notes) == 3
    assert (
        "bounding_box_train_1: 3 identities, 3 images; the published folder has 188 and 20119"
        in notes
    )
    assert "query: 2 identities, 3 images; the published folder has 145 and 1065" in notes


def test_folders_with_the_published_counts_and_unknown_ones_are_not_noted(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    identities, images = OFFICIAL["sample_query_reduced"]
    names = [f"{i % identities + 1001:04d}_c01s42_{i:06d}.jpg" for i in range(images)]
    touch(tmp_path / "sample_query_reduced", names)
    touch(tmp_path / "mine", TRAIN)
    touch(tmp_path / "other", GALLERY)
    dataset = aihub(
        tmp_path, train_folder="mine", query_folder="sample_query_reduced", gallery_folder="other"
    )
    assert dataset.notes() == []
    (tmp_path / "sample_query_reduced" / names[0]).unlink()
    again = aihub(
        tmp_path, train_folder="mine", query_folder="sample_query_reduced", gallery_folder="other"
    )
    assert len(again.notes()) == 1


def test_a_few_odd_names_are_left_out_and_noted_once(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    good = [f"0001_c02s31_{frame:06d}.jpg" for frame in range(95)]
    touch(tmp_path / "mine", [*good, *(f"copy of {number}.jpg" for number in range(5))])
    dataset = aihub(tmp_path, train_folder="mine")
    assert len(dataset.train) == 95
    notes = [note for note in dataset.notes() if "left out" in note]
    assert notes == [
        f"{tmp_path / 'mine'}: 5 images left out, their names do not fit (copy of 0.jpg, ...)"
    ]
    # One more is more than one in twenty.
    touch(tmp_path / "mine", ["copy of 5.jpg"])
    words = message(aihub(tmp_path, train_folder="mine"), "train")
    assert "6 of 101 names are not like" in words and "copy of 0.jpg" in words


# --------------------------------------------------------------------- missing folders


def test_a_missing_root_is_an_error_that_names_it(tmp_path: Path) -> None:
    words = message(aihub(tmp_path / "nowhere"))
    assert "there is no" in words and "--dataset.root" in words and "nowhere" in words


def test_a_missing_folder_is_an_error_that_names_the_others(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    words = message(aihub(tmp_path, train_folder="bounding_box_train_3"), "train")
    assert "bounding_box_train_3 is missing" in words
    assert "it holds bounding_box_test, bounding_box_train_1, query" in words


@pytest.mark.parametrize("inside", ["", "aihub_kaist"], ids=["the-root", "a-folder-in-it"])
def test_an_archive_beside_a_missing_folder_is_named_with_the_command(
    inside: str, tmp_path: Path
) -> None:
    folder = aihub_folders(tmp_path / "my data" / inside)
    for path in (folder / "query").iterdir():
        path.unlink()
    (folder / "query").rmdir()
    with zipfile.ZipFile(folder / "query.zip", "w") as archive:
        archive.writestr("query/1001_c04s43_000750.jpg", b"")
    words = message(aihub(tmp_path / "my data"))
    assert f"{folder / 'query'} is missing, but query.zip is there" in words
    command = words.partition("`")[2].rpartition("`")[0]
    assert shlex.split(command)[:2] == ["unzip", "-n"]
    assert shlex.split(command)[2:] == [str(folder / "query.zip"), "-d", str(folder)]
    # What the command does, without running it.
    with zipfile.ZipFile(shlex.split(command)[2]) as archive:
        archive.extractall(shlex.split(command)[4])
    assert ids(aihub(tmp_path / "my data").query) == [(1001, 4)]


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    touch(tmp_path / "bounding_box_test_2", ["notes.txt"])
    words = message(aihub(tmp_path, gallery_folder="bounding_box_test_2"), "gallery")
    assert "bounding_box_test_2 holds no images" in words


def test_a_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    aihub_folders(tmp_path)
    (tmp_path / "train").write_text("")
    assert "train is missing" in message(aihub(tmp_path, train_folder="train"), "train")


def test_a_split_is_read_only_when_it_is_used(tmp_path: Path) -> None:
    touch(tmp_path / "query", QUERY)
    assert len(aihub(tmp_path).query) == 3


# --------------------------------------------------------------------- Market-1501


def market_folders(root: Path) -> Path:
    touch(root / "bounding_box_train", ["0002_c1s1_000451_03.jpg", "1500_c6s3_086567_01.jpg"])
    touch(root / "query", ["0001_c1s1_001051_00.jpg", "0002_c6s1_001051_00.jpg"])
    gallery = ["-1_c1s1_000401_03.jpg", "0000_c2s1_000151_01.jpg", "0001_c3s1_002301_02.jpg"]
    touch(root / "bounding_box_test", gallery)
    return root


def market(root: Path) -> Dataset:
    return DATASETS.build("market1501", root=str(root))


def test_market_counts_cameras_from_zero_and_keeps_junk_and_distractors(tmp_path: Path) -> None:
    dataset = market(market_folders(tmp_path))
    assert ids(dataset.train) == [(2, 0), (1500, 5)]
    assert ids(dataset.query) == [(1, 0), (2, 5)]
    assert ids(dataset.gallery) == [(-1, 0), (0, 1), (1, 2)]


@pytest.mark.parametrize(
    "inside", ["", "Market-1501-v15.09.15", "market1501", "market1501/Market-1501-v15.09.15"]
)
def test_market_is_found_where_it_is_usually_unpacked(inside: str, tmp_path: Path) -> None:
    folder = market_folders(tmp_path / inside)
    dataset = market(tmp_path)
    assert len(dataset.query) == 2
    assert dataset.folders()["gallery"] == str(folder / "bounding_box_test")


def test_market_notes_junk_distractors_and_other_counts_than_the_published(tmp_path: Path) -> None:
    notes = market(market_folders(tmp_path)).notes()
    assert notes[0] == "the gallery holds 1 junk images (left out) and 1 distractors"
    assert notes[1:] == [
        "train: 2 images; the published split has 12936",
        "query: 2 images; the published split has 3368",
        "gallery: 3 images; the published split has 19732",
    ]


def test_names_of_aihub_are_not_names_of_market(tmp_path: Path) -> None:
    touch(tmp_path / "query", QUERY)
    assert "3 of 3 names are not like 0002_c1s1_000451_03.jpg" in message(market(tmp_path))


# --------------------------------------------------------------------- size


def test_the_whole_of_aihub_is_read_in_less_than_three_seconds(tmp_path: Path) -> None:
    folders = [f"bounding_box_train_{number}" for number in (1, 2, 3)]
    first_pid = 0
    for folder in [*folders, "query", "bounding_box_test"]:
        identities, images = OFFICIAL[folder]
        first_pid = 1001 if folder in ("query", "bounding_box_test") else first_pid
        touch(
            tmp_path / folder,
            (
                f"{first_pid + i % identities:04d}_c{i % 16 + 1:02d}s31_{i:06d}.jpg"
                for i in range(images)
            ),
        )
        first_pid += identities
    # A second try, in case other processes were using the machine.
    for _ in range(2):
        start = time.perf_counter()
        dataset = aihub(tmp_path, train_folder=folders)
        counts = [
            split_statistics(split) for split in (dataset.train, dataset.query, dataset.gallery)
        ]
        notes = dataset.notes()
        seconds = time.perf_counter() - start
        if seconds < 3:
            break
    assert counts == [(538, 57_090, 16), (145, 1_065, 16), (145, 15_385, 16)]
    assert sum(images for _, images, _ in counts) == 73_540
    assert notes == []
    assert seconds < 3
