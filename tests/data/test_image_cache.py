"""The cache of decoded training images: in memory, on disk or none; sharing, renewal, cleanup."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections import namedtuple
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reidreg.config.sections import CacheSetting
from reidreg.data import image_cache as module
from reidreg.data.cache_key import cache_folder, describe_images
from reidreg.data.image_cache import ImageCache, open_image_cache
from reidreg.data.images import load_images
from reidreg.errors import ConfigError, DataError

SIZE = (32, 16)
linux = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="memory is shared on Linux only")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A separate cache folder for each test."""
    monkeypatch.setenv("REIDREG_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """More images than a block has, each of another size and content."""
    rng = np.random.default_rng(0)
    (tmp_path / "train").mkdir()
    found = []
    for number in range(70):
        pixels = rng.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        path = tmp_path / "train" / f"{number:03}.png"
        Image.fromarray(pixels).save(path, compress_level=0)
        found.append(str(path))
    return found


def opened(setting: CacheSetting, paths: list[str], size: tuple[int, int] = SIZE) -> ImageCache:
    cache = open_image_cache(setting, paths, size)
    assert cache is not None
    return cache


def files(folder: Path) -> list[str]:
    """All but the lock and the notice of who holds the images in memory."""
    beside = (".lock", ".holder")
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(beside))


# --------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("setting", ["memory", "disk", "auto"])
def test_a_cache_holds_what_decoding_gives(setting: CacheSetting, paths: list[str]) -> None:
    cache = opened(setting, paths)
    assert cache.images.shape == (70, *SIZE, 3)
    assert np.array_equal(cache.images, load_images(paths, SIZE).numpy())
    taken = cache.take([69, 0, 33, 33])
    assert taken.dtype == torch.uint8 and taken.is_contiguous()
    assert np.array_equal(taken.numpy(), cache.images[[69, 0, 33, 33]])
    taken.zero_()  # a copy
    assert cache.images[33].any()


def test_none_is_none(paths: list[str], folder: Path) -> None:
    assert open_image_cache("none", paths, SIZE) is None
    assert not folder.exists()


@pytest.mark.parametrize("setting", ["memory", "disk", "auto"])
def test_a_bad_image_is_named_and_nothing_is_kept(
    setting: CacheSetting, paths: list[str], folder: Path
) -> None:
    Path(paths[40]).write_bytes(b"no image")
    threads = torch.get_num_threads()
    with pytest.raises(DataError, match=r"040\.png: cannot be decoded"):
        open_image_cache(setting, paths, SIZE)
    assert files(folder) == [] and torch.get_num_threads() == threads
    Path(paths[40]).unlink()
    with pytest.raises(DataError, match=r"040\.png: the image is gone"):
        open_image_cache(setting, paths, SIZE)


def test_the_folder_is_where_the_environment_says(folder: Path, tmp_path: Path) -> None:
    assert folder == tmp_path / "cache" / "images"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other cache folders")
def test_the_folder_is_in_the_users_cache_folder_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("REIDREG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "reidreg" / "images"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "reidreg" / "images"


# --------------------------------------------------------------------- on disk


def no_building(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "load_images", None)


@pytest.mark.parametrize("setting", ["disk", "auto"])
def test_a_file_is_used_again(
    setting: CacheSetting, paths: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened("disk", paths)
    no_building(monkeypatch)
    assert np.array_equal(opened(setting, paths).images, first.images)


def test_changed_images_are_decoded_again_and_the_old_file_is_deleted(
    paths: list[str], folder: Path
) -> None:
    opened("disk", paths)
    names = [files(folder)]
    Image.new("RGB", (9, 9), (1, 2, 3)).save(paths[5])
    assert (opened("disk", paths).images[5] == (1, 2, 3)).all()
    names.append(files(folder))
    os.utime(paths[7], ns=(0, 0))
    opened("disk", paths)
    names.append(files(folder))
    opened("disk", paths[:-1])
    names.append(files(folder))
    opened("disk", paths[::-1])
    names.append(files(folder))
    assert all(len(found) == 1 for found in names) and len(set(map(tuple, names))) == 5


def test_other_sizes_and_other_folders_have_their_own_files(
    paths: list[str], folder: Path, tmp_path: Path
) -> None:
    opened("disk", paths)
    assert opened("disk", paths, (16, 8)).images.shape[1:3] == (16, 8)
    other = shutil.copytree(tmp_path / "train", tmp_path / "query")
    opened("disk", [str(path) for path in sorted(other.iterdir())])
    assert len(files(folder)) == 3


@pytest.mark.parametrize("keep", [0, 50, 1000])
def test_a_damaged_file_is_rebuilt(keep: int, paths: list[str], folder: Path) -> None:
    expected = opened("disk", paths).images.copy()
    (name,) = files(folder)
    with open(folder / name, "r+b") as file:
        file.truncate(keep)
    assert np.array_equal(opened("disk", paths).images, expected)


def test_what_a_killed_build_left_is_deleted(paths: list[str], folder: Path) -> None:
    wanted = describe_images(paths, SIZE)
    folder.mkdir(parents=True)
    (folder / f".{wanted.file.name}.12345.partial").write_bytes(bytes(100))
    opened("disk", paths)
    assert files(folder) == [wanted.file.name]


@pytest.mark.parametrize("setting", ["disk", "memory"])
def test_files_are_for_their_owner_alone(
    setting: CacheSetting, paths: list[str], folder: Path
) -> None:
    opened(setting, paths)
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())


# --------------------------------------------------------------------- too little room

Usage = namedtuple("Usage", "total used free")


def room(monkeypatch: pytest.MonkeyPatch, memory: int | None, disk: int) -> None:
    monkeypatch.setattr(module, "available_memory", lambda: memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: Usage(disk, 0, disk))


@pytest.mark.parametrize(
    ("memory", "disk", "expected"),
    [
        (2.1, 10**12, "cached in memory"),
        (1.9, 10**12, "cached in /"),
        (None, 10**12, "cached in /"),
        (1.9, 2**30, "not cached"),
        (0, 0, "not cached"),
    ],
)
def test_auto_depends_on_the_available_memory_and_disk(
    memory: float | None,
    disk: int,
    expected: str,
    paths: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    need = 70 * 32 * 16 * 3
    room(monkeypatch, None if memory is None else int(memory * need), disk)
    with caplog.at_level(logging.INFO, "reidreg"):
        cache = open_image_cache("auto", paths, SIZE)
    assert (cache is None) == (expected == "not cached")
    assert expected in caplog.messages[-1] and "0.1 MiB" in caplog.messages[-1]


@pytest.mark.parametrize("setting", ["memory", "disk"])
def test_too_little_room_is_an_error_of_one_line(
    setting: CacheSetting, paths: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room(monkeypatch, 1000, 1000)
    with pytest.raises(ConfigError, match=r"train\.cache: .*0\.1 MiB") as caught:
        open_image_cache(setting, paths, SIZE)
    assert "\n" not in str(caught.value) and "none" in str(caught.value)
    assert files(folder) == []


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_an_error_of_one_line_and_auto_caches_nothing(
    paths: list[str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Full:
        def write(self, content: object) -> int:
            with open("/dev/full", "wb", buffering=0) as file:
                return file.write(bytes(1))

    build = module._build
    monkeypatch.setattr(module, "_build", lambda wanted, target: build(wanted, Full()))
    with pytest.raises(ConfigError, match=r"train\.cache: no room.*No space left") as caught:
        open_image_cache("disk", paths, SIZE)
    assert "\n" not in str(caught.value) and files(folder) == []
    monkeypatch.setattr(module, "available_memory", lambda: 0)
    with caplog.at_level(logging.INFO, "reidreg"):
        assert open_image_cache("auto", paths, SIZE) is None
    assert "not cached" in caplog.messages[-1]


@pytest.mark.parametrize("missing", ["memfd", "folder"])
def test_without_shared_memory_or_a_folder_each_process_has_its_own_copy(
    missing: str, paths: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if missing == "memfd":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    else:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("REIDREG_CACHE", str(tmp_path / "file"))
    cache = opened("memory", paths)
    assert np.array_equal(cache.images, load_images(paths, SIZE).numpy())


# --------------------------------------------------------------------- shared


class Holder:
    """A process that opens a cache in memory and holds it until it is killed.

    Args:
        paths: The images.
        delay: Seconds by which to delay building.
    """

    def __init__(self, paths: list[str], delay: float = 0) -> None:
        context = multiprocessing.get_context("fork")  # torch is not imported again
        self.said, theirs = context.Pipe()
        self.process = context.Process(target=hold, args=(theirs, paths, delay), daemon=True)
        self.process.start()
        theirs.close()

    def message(self) -> object:
        assert self.said.poll(60)
        return self.said.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def hold(said: Connection, paths: list[str], delay: float) -> None:
    build = module._build

    def slow(*arguments: Any) -> None:
        said.send("building")
        time.sleep(delay)
        build(*arguments)

    module._build = slow
    cache = opened("memory", paths)
    said.send(total(cache.images))
    time.sleep(600)


def total(images: Any) -> int:
    return int(np.asarray(images).sum(dtype=np.int64))


@linux
def test_two_processes_share_what_one_of_them_builds(paths: list[str]) -> None:
    first, second = Holder(paths, 0.3), Holder(paths, 0.3)
    try:
        said = [[first.message()], [second.message()]]
        builder = said.index(["building"])
        said[builder].append((first, second)[builder].message())
        expected = total(load_images(paths, SIZE))
        assert sorted(said, key=len) == [[expected], ["building", expected]]
        found = {file.stat().st_ino for one in (first, second) for file in memory_files(one)}
        assert len(found) == 1
    finally:
        first.kill()
        second.kill()


def memory_files(holder: Holder | None = None) -> list[Path]:
    """Our anonymous files that a process, or this one, has open."""
    number = holder.process.pid if holder else os.getpid()
    return [
        link for link in Path(f"/proc/{number}/fd").iterdir() if "memfd:reidreg" in target(link)
    ]


def target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


@linux
def test_sigkill_of_the_builder_leaves_no_files_and_others_go_on(
    paths: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = Holder(paths)
    try:
        assert holder.message() == "building"
        expected = holder.message()
        with monkeypatch.context() as patch:
            no_building(patch)
            shared = opened("auto", paths)
        assert memory_files()
    finally:
        holder.kill()
    assert total(shared.images) == expected
    assert files(folder) == []
    assert not list(Path("/dev/shm").glob("*reidreg*"))
    del shared
    # No process holds the images any more, and the notice names one that has ended.
    assert memory_files() == []
    assert total(opened("memory", paths).images) == expected


@linux
def test_after_a_builder_is_killed_the_next_process_builds(
    paths: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    holder = Holder(paths, delay=600)
    try:
        assert holder.message() == "building"
        killer = threading.Timer(0.5, holder.process.kill)
        killer.start()
        with caplog.at_level(logging.INFO, "reidreg"):
            cache = opened("memory", paths)
        killer.join()
    finally:
        holder.kill()
    assert "waiting" in caplog.messages[0] and "cached in memory" in caplog.messages[1]
    assert np.array_equal(cache.images, load_images(paths, SIZE).numpy())


@linux
@pytest.mark.parametrize(
    "notice", ["", "nonsense", "1 2 3", "-1 0", "999999999 3", "OURS 0", "9" * 5000]
)
def test_a_notice_that_names_anything_else_is_ignored(notice: str, paths: list[str]) -> None:
    opened("memory", paths)
    (holder,) = cache_folder().glob(".*.holder")
    holder.write_text(notice.replace("OURS", str(os.getpid())))
    cache = opened("memory", paths)
    assert np.array_equal(cache.images, load_images(paths, SIZE).numpy())


@linux
def test_changed_images_are_not_shared(paths: list[str]) -> None:
    kept = opened("memory", paths)
    Image.new("RGB", (9, 9), (1, 2, 3)).save(paths[5])
    assert (opened("memory", paths).images[5] == (1, 2, 3)).all()
    assert not (kept.images[5] == (1, 2, 3)).all()
