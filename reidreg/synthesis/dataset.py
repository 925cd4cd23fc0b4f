"""Drawn re-identification data in the layouts of real data sets, for any number of people.

`plan` decides which crops there are and what their files are called; `synthesize` draws and writes
them. Images go to a hidden folder beside the output first, which takes the output's name once it
is whole: a reader never sees half a data set, and a call after a killed one goes on from there.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from reidreg.errors import ConfigError, DataError
from reidreg.machine.cores import count_cores
from reidreg.synthesis.crops import draw_distractor, draw_junk, draw_person

Layout = Literal["aihub_kaist", "market1501"]
Kind = Literal["person", "distractor", "junk"]
Counts = dict[str, tuple[int, int, int]]
Progress = Callable[[int, int], None]
# pid, camid, number of images
Sighting = tuple[int, int, int]

MARKER = "synthetic.json"
# Part of the marker: images of one folder never come from two versions of the drawing.
DRAWING = 1

# The official AIHub KAIST folders: identities and images.
_TRAIN_FOLDERS = {
    "bounding_box_train_1": (188, 20_119),
    "bounding_box_train_2": (175, 18_476),
    "bounding_box_train_3": (175, 18_495),
}
# Test identities, query images, gallery images: those of the quick folders, and the others.
_TEST_GROUPS = ((100, 732, 11_047), (45, 333, 4_338))
_QUICK_TRAIN, _QUICK_QUERY, _QUICK_GALLERY = 2_838, 382, 1_199
_OFFICIAL_CAMERAS = 16
_FIRST_TEST_PID = 1001

# Streams of random numbers; those of the drawing are numbered from 0.
_NAMES, _CAMERAS, _OFFICIAL = 100, 101, 102
# Below this number of images a process takes longer to start than to draw.
_IMAGES_PER_PROCESS = 100
_WORKER = "from reidreg.synthesis.dataset import work; work()"
_WORKER_OS_ERROR = 74


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be drawn.

    Args:
        layout: Folders and file names: those of AIHub KAIST or of Market-1501.
        identities: People, training and test together.
        cameras: Cameras; each person is seen by at least two.
        images_per_camera: Images of a person from each camera that sees him.
        seed: Other seeds give other people, cameras and scenes.
        full_size: The official counts of AIHub KAIST, whatever the three numbers above say.

    Raises:
        ConfigError: A number is too small or does not fit the layout.
    """

    layout: Layout = "aihub_kaist"
    identities: int = 80
    cameras: int = 6
    images_per_camera: int = 4
    seed: int = 0
    full_size: bool = False

    def __post_init__(self) -> None:
        if self.layout not in get_args(Layout):
            raise ConfigError(f"--layout {self.layout!r}: choose {' or '.join(get_args(Layout))}")
        aihub = self.layout == "aihub_kaist"
        if self.full_size and not aihub:
            raise ConfigError("--full_size has counts for aihub_kaist only: drop it, or the layout")
        least = 8 if aihub else 4
        _at_least("identities", self.identities, least, "two to train per folder, two to test")
        _at_least("cameras", self.cameras, 2, "retrieval looks for people in another camera")
        _at_least("images_per_camera", self.images_per_camera, 1, "a sighting is an image")
        _at_least("seed", self.seed, 0, "random streams have no negative numbers")
        most = 99 if aihub else 9
        if self.cameras > most:
            raise ConfigError(
                f"--cameras {self.cameras} is too many: {self.layout} names hold {most} at most"
            )

    def parameters(self) -> dict[str, Any]:
        """What decides about the images, for the marker; numbers that are not used are null."""
        values = asdict(self)
        if self.full_size:
            values.update(identities=None, cameras=None, images_per_camera=None)
        # The size comes first: it says more about a difference than a null does.
        return {"full_size": self.full_size, **values, "drawing": DRAWING}


def _at_least(flag: str, value: int, least: int, why: str) -> None:
    if value < least:
        raise ConfigError(f"--{flag} {value} is too few: at least {least} ({why})")


@dataclass(frozen=True, slots=True)
class Crop:
    """One image to draw.

    Args:
        folder: The folder that holds it.
        name: Its file name.
        kind: An identity, a distractor (pid 0 in Market-1501), or junk (pid -1).
        pid: The number in its name.
        camid: The camera, from 1.
        index: Which of the images of this pid from this camera.
    """

    folder: str
    name: str
    kind: Kind
    pid: int
    camid: int
    index: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a data set holds.

    Args:
        crops: The images to draw.
        copies: Further folders, and which of the images they hold once more.
    """

    crops: tuple[Crop, ...]
    copies: dict[str, tuple[Crop, ...]]

    def counts(self) -> Counts:
        """Folder -> (identities, images, cameras); distractors and junk are no identities."""
        folders: dict[str, list[Crop]] = defaultdict(list)
        for crop in self.crops:
            folders[crop.folder].append(crop)
        folders.update({name: list(crops) for name, crops in self.copies.items()})
        return {
            name: (
                len({crop.pid for crop in crops if crop.kind == "person"}),
                len(crops),
                len({crop.camid for crop in crops}),
            )
            for name, crops in folders.items()
        }


# ---------------------------------------------------------------------------- the plan


def plan(request: Request) -> Plan:
    """Decide which images there are, without drawing any.

    Args:
        request: What is to be drawn.
    """
    train, test = _official(request.seed) if request.full_size else _small(request)
    crops = [crop for folder, seen in train.items() for crop in _crops(request, folder, seen)]
    query, gallery = _split_test(_crops(request, "", test))
    copies: dict[str, tuple[Crop, ...]] = {}
    if request.layout == "aihub_kaist":
        copies = _quick_folders(request, crops, query, gallery)
    else:
        gallery += _clutter(request, len(gallery))
    return Plan((*crops, *query, *gallery), copies)


def _shares(total: int, weights: Sequence[float], least: int) -> list[int]:
    """Whole numbers that add up to a total, near the weights' proportions, by largest remainder."""
    parts = np.asarray(weights, dtype=np.float64)
    parts = parts / parts.sum() * (total - least * len(parts))
    whole = np.floor(parts).astype(np.int64)
    rest = total - least * len(parts) - int(whole.sum())
    whole[np.argsort(whole - parts, kind="stable")[:rest]] += 1
    return [int(count) + least for count in whole]


def _small(request: Request) -> tuple[dict[str, list[Sighting]], list[Sighting]]:
    """Sightings for the numbers of a request: three people to train for each one to test."""
    tested = max(2, round(request.identities / 4))
    trained = request.identities - tested
    if request.layout == "aihub_kaist":
        # Should there be more than a thousand people to train, the test pids start further up.
        start, first_test = 0, math.ceil(max(1, trained - 1) / 1000) * 1000 + 1
        sizes = _shares(trained, [people for people, _ in _TRAIN_FOLDERS.values()], least=2)
        folders = dict(zip(_TRAIN_FOLDERS, sizes, strict=True))
    else:
        start, first_test, folders = 1, trained + 1, {"bounding_box_train": trained}
    train = {}
    for folder, people in folders.items():
        train[folder] = _seen(request, range(start, start + people))
        start += people
    return train, _seen(request, range(first_test, first_test + tested))


def _seen(request: Request, pids: range) -> list[Sighting]:
    """Which cameras see each person; together the people are seen by as many as possible."""
    sightings = []
    for position, pid in enumerate(pids):
        rng = np.random.default_rng([request.seed, _CAMERAS, pid])
        first = position % request.cameras + 1
        others = [camid for camid in range(1, request.cameras + 1) if camid != first]
        fewest = max(1, math.ceil(0.6 * request.cameras) - 1)
        count = int(rng.integers(fewest, len(others) + 1))
        chosen = rng.permutation(others)[:count].tolist()
        sightings += [(pid, camid, request.images_per_camera) for camid in sorted([first, *chosen])]
    return sightings


def _official(seed: int) -> tuple[dict[str, list[Sighting]], list[Sighting]]:
    """Sightings that add up to the counts of AIHub KAIST."""
    rng = np.random.default_rng([seed, _OFFICIAL])
    train = {}
    start = 0
    for folder, (people, images) in _TRAIN_FOLDERS.items():
        widths = rng.integers(5, 12, people).tolist()
        train[folder] = _spread(rng, start, widths, images, least=1)
        start += people
    test = []
    start = _FIRST_TEST_PID
    for people, queries, gallery in _TEST_GROUPS:
        # Each camera that sees somebody gives one query image and at least one for the gallery.
        widths = _shares(queries, rng.uniform(0.6, 1.4, people).tolist(), least=2)
        test += _spread(rng, start, widths, queries + gallery, least=2)
        start += people
    return train, test


def _spread(
    rng: np.random.Generator, start: int, widths: Sequence[int], images: int, least: int
) -> list[Sighting]:
    """Spread images over people, the n-th of whom is seen by `widths[n]` cameras."""
    pairs = [
        (start + position, int(camid) + 1)
        for position, width in enumerate(widths)
        for camid in sorted(rng.permutation(_OFFICIAL_CAMERAS)[:width])
    ]
    counts = _shares(images, rng.uniform(0.2, 1.0, len(pairs)).tolist(), least)
    return [(pid, camid, count) for (pid, camid), count in zip(pairs, counts, strict=True)]


def _crops(request: Request, folder: str, sightings: Iterable[Sighting]) -> list[Crop]:
    """The images of people; an empty folder stands for the test split."""
    sequences = (42, 43) if not folder else (31, 32, 34)
    return [
        Crop(folder, name, "person", pid, camid, index)
        for pid, camid, count in sightings
        for index, name in enumerate(_names(request, pid, camid, count, sequences))
    ]


def _names(
    request: Request, pid: int, camid: int, count: int, sequences: Sequence[int]
) -> list[str]:
    """File names of one person before one camera: rising frames of one sequence."""
    rng = np.random.default_rng([request.seed, _NAMES, pid + 1, camid])
    first = int(rng.integers(1, 280))
    frames = (25 * (first + np.cumsum(rng.integers(1, 5, count)))).tolist()
    if request.layout == "aihub_kaist":
        sequence = sequences[int(rng.integers(len(sequences)))]
        return [f"{pid:04d}_c{camid:02d}s{sequence:02d}_{frame:06d}.jpg" for frame in frames]
    person = "-1" if pid == -1 else f"{pid:04d}"
    sequence = int(rng.integers(1, 7))
    boxes = rng.integers(1, 8, count).tolist()
    return [
        f"{person}_c{camid}s{sequence}_{frame + 1:06d}_{box:02d}.jpg"
        for frame, box in zip(frames, boxes, strict=True)
    ]


def _split_test(crops: Iterable[Crop]) -> tuple[list[Crop], list[Crop]]:
    """Query: the first image from each camera. Gallery: the rest.

    Where a camera took a single image, only the person's first camera gives a query.
    """
    query: list[Crop] = []
    gallery: list[Crop] = []
    for _, group in itertools.groupby(crops, key=lambda crop: crop.pid):
        person = list(group)
        several = {crop.camid for crop in person if crop.index > 0}
        for crop in person:
            asks = crop.index == 0 and (crop.camid in several or crop is person[0])
            folder = "query" if asks else "bounding_box_test"
            moved = Crop(folder, crop.name, crop.kind, crop.pid, crop.camid, crop.index)
            (query if asks else gallery).append(moved)
    return query, gallery


def _clutter(request: Request, gallery: int) -> list[Crop]:
    """What a detector adds to the gallery of Market-1501: distractors and junk."""
    crops: list[Crop] = []
    kinds: tuple[tuple[Kind, int, int], ...] = (("distractor", 0, 8), ("junk", -1, 12))
    for kind, pid, part in kinds:
        counts = _shares(max(4, gallery // part), [1.0] * request.cameras, least=0)
        for camid, count in enumerate(counts, start=1):
            names = _names(request, pid, camid, count, ())
            crops += [
                Crop("bounding_box_test", name, kind, pid, camid, index)
                for index, name in enumerate(names)
            ]
    return crops


def _quick_folders(
    request: Request, train: Sequence[Crop], query: Sequence[Crop], gallery: Sequence[Crop]
) -> dict[str, tuple[Crop, ...]]:
    """The small folders beside the large ones: fewer people, fewer images of each."""
    pids = sorted({crop.pid for crop in train})
    count = min(100, max(2, math.ceil(len(pids) / 2)))
    chosen = {pids[position * len(pids) // count] for position in range(count)}
    some_train = [crop for crop in train if crop.pid in chosen]
    tested = sorted({crop.pid for crop in query})
    tested = tested[: min(100, max(2, math.ceil(len(tested) * 100 / 145)))]
    some_query = [crop for crop in query if crop.pid in tested]
    some_gallery = [crop for crop in gallery if crop.pid in tested]
    full = request.full_size
    each = 1 / max(1, request.images_per_camera - 1)
    return {
        "sample_train": _thin(some_train, 1 / 2, _QUICK_TRAIN if full else None, least=2),
        "sample_query": tuple(some_query),
        "sample_test": tuple(some_gallery),
        "sample_query_reduced": _thin(some_query, 1 / 2, _QUICK_QUERY if full else None, least=1),
        "sample_test_reduced": _thin(some_gallery, each, _QUICK_GALLERY if full else None, least=2),
    }


def _thin(crops: Sequence[Crop], share: float, total: int | None, least: int) -> tuple[Crop, ...]:
    """A share of each person's images, or a total of them all; the cameras take turns.

    With two images or more in the gallery, from two cameras, every query keeps a match.
    """
    people: dict[int, list[Crop]] = defaultdict(list)
    for crop in crops:
        people[crop.pid].append(crop)
    counts = [len(images) for images in people.values()]
    if total is None:
        sizes = [max(least, math.ceil(count * share)) for count in counts]
    else:
        sizes = _shares(total, counts, least)
    kept: list[Crop] = []
    for start, (images, size) in enumerate(zip(people.values(), sizes, strict=True)):
        kept += _in_turns(images, start)[:size]
    return tuple(kept)


def _in_turns(images: Sequence[Crop], start: int) -> list[Crop]:
    """One person's images, a first one of each camera, a second one of each, and so on.

    Each person starts with another camera, so that few images of many people show all cameras.
    """
    cameras = sorted({crop.camid for crop in images})
    turn = {camid: (rank + start) % len(cameras) for rank, camid in enumerate(cameras)}
    return sorted(images, key=lambda crop: (crop.index, turn[crop.camid]))


# ---------------------------------------------------------------------------- the files


def synthesize(
    output: str | Path,
    *,
    layout: Layout = "aihub_kaist",
    identities: int = 80,
    cameras: int = 6,
    images_per_camera: int = 4,
    seed: int = 0,
    full_size: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Counts:
    """Draw a data set, unless the same one is there already.

    The same arguments give the same bytes, whatever the number of processes.

    Args:
        output: The folder that will hold `query/`.
        layout: Folders and file names: those of AIHub KAIST or of Market-1501.
        identities: People, training and test together; about a quarter is for the test.
        cameras: Cameras; each person is seen by at least two.
        images_per_camera: Images of a person from each camera that sees him.
        seed: Other seeds give other people, cameras and scenes.
        full_size: The official counts of AIHub KAIST, whatever the three numbers above say.
        workers: Processes that draw; by default one for each processor. A few hundred images are
            drawn in this process.
        progress: Called now and then with the number of images so far and their total.

    Returns:
        Folder -> (identities, images, cameras); distractors and junk are no identities.

    Raises:
        ConfigError: A number is too small or does not fit the layout.
        DataError: The output holds something else, or cannot be written.
    """
    request = Request(layout, identities, cameras, images_per_camera, seed, full_size)
    if workers is not None:
        _at_least("workers", workers, 1, "somebody has to draw")
    target = Path(output).expanduser().resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        counts = _finished(target, request)
        if counts is None:
            counts = _write_all(partial, target, request, workers or count_cores(), progress)
    except OSError as error:
        # Another process may have drawn the same and been faster; the partial folder is then gone.
        if _read_marker(target) is None:
            raise DataError(
                f"cannot write {target}: {error}; free the space or choose another --output"
            ) from error
        counts = _finished(target, request)
        shutil.rmtree(partial, ignore_errors=True)
    return counts or {}


def _finished(target: Path, request: Request) -> Counts | None:
    """The counts of a finished output, or None where there is none yet.

    Raises:
        DataError: Something else is there, or the output lost files since.
    """
    if target.is_dir() and not any(target.iterdir()):
        return None
    if not os.path.lexists(target):
        return None
    marker = _read_marker(target)
    if marker is None:
        raise DataError(
            f"{target} already holds other files: choose another --output or move them away"
        )
    theirs, ours = marker["parameters"], request.parameters()
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise DataError(
                f"{target} was drawn with {key} {theirs.get(key)}, not {value}: "
                "choose another --output, or delete it to have it drawn anew"
            )
    counts: Counts = {name: (n[0], n[1], n[2]) for name, n in marker["folders"].items()}
    for name, (_, images, _) in counts.items():
        found = len(_images(target / name))
        if found < images:
            raise DataError(
                f"{target / name} has {found} of its {images} images: "
                f"delete {target} to have it drawn anew"
            )
    return counts


def _images(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".jpg")] if folder.is_dir() else []


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a folder of ours, else None."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(marker, dict) and {"parameters", "folders"} <= marker.keys()
    return marker if ours else None


def _write_marker(folder: Path, request: Request, counts: Counts) -> None:
    marker = {"parameters": request.parameters(), "folders": counts}
    _write(folder / MARKER, (json.dumps(marker, indent=2) + "\n").encode())


def _write(path: Path, content: bytes) -> None:
    """Write a file that is whole or not there; others may be writing the same one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


def _write_all(
    partial: Path, target: Path, request: Request, workers: int, progress: Progress | None
) -> Counts:
    """Draw into the partial folder, then give it the target's name."""
    wanted = plan(request)
    counts = wanted.counts()
    _open_partial(partial, request)
    for folder in counts:
        (partial / folder).mkdir(exist_ok=True)
    processes = min(workers, len(wanted.crops) // _IMAGES_PER_PROCESS)
    if processes > 1 and sys.executable:
        _draw_in_processes(partial, request, processes, len(wanted.crops), progress)
    else:
        for done, _ in enumerate(_draw(partial, request.seed, wanted.crops), start=1):
            if progress is not None:
                progress(done, len(wanted.crops))
    for folder, crops in wanted.copies.items():
        for crop in crops:
            _copy(partial / crop.folder / crop.name, partial / folder / crop.name)
    _write_marker(partial, request, counts)
    if target.is_dir():
        target.rmdir()
    partial.rename(target)
    # Only now: before, a draft may be another process's that draws the same.
    for draft in target.glob("*/.*"):
        draft.unlink(missing_ok=True)
    return counts


def _open_partial(partial: Path, request: Request) -> None:
    """Go on with what a killed run of the same request left, or start with an empty folder."""
    if partial.is_dir() and any(path.name[0] != "." for path in partial.iterdir()):
        marker = _read_marker(partial)
        if marker is None:
            raise DataError(f"{partial} is in the way and not ours: move it away")
        if marker["parameters"] == request.parameters():
            return
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write_marker(partial, request, {})


def _copy(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no such names."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        _write(target, source.read_bytes())


def _draw(folder: Path, seed: int, crops: Iterable[Crop]) -> Iterable[Crop]:
    """Draw the crops that are not there yet, and hand each one on when its file is whole."""
    for crop in crops:
        path = folder / crop.folder / crop.name
        if not path.exists():
            _write(path, _pixels(seed, crop))
        yield crop


def _pixels(seed: int, crop: Crop) -> bytes:
    if crop.kind == "person":
        return draw_person(seed, crop.pid, crop.camid, crop.index)
    draw = draw_distractor if crop.kind == "distractor" else draw_junk
    return draw(seed, crop.camid, crop.index)


# Python's own process pools run the caller's main module once more in each process, which starts a
# script without a `__main__` guard all over again. These processes import this module and no other.
# Each writes one byte for an image into a pipe that all share; the pipe's end is the end of all of
# them, and a process whose parent was killed finds the pipe closed and ends too.


def _draw_in_processes(
    folder: Path, request: Request, processes: int, total: int, progress: Progress | None
) -> None:
    """Draw with several processes, none of which outlives this call."""
    read_end, write_end = os.pipe()
    children: list[subprocess.Popen[bytes]] = []
    with open(read_end, "rb", buffering=0) as ticks, tempfile.TemporaryFile() as errors:
        try:
            try:
                for part in range(processes):
                    job = [str(folder), asdict(request), part, processes]
                    children.append(_start(job, write_end, errors.fileno()))
            finally:
                os.close(write_end)
            done = 0
            while step := ticks.read(1 << 16):
                done += len(step)
                if progress is not None:
                    progress(done, total)
            codes = [child.wait() for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        if any(codes):
            errors.seek(0)
            text = errors.read().decode(errors="replace").strip()
            kind = OSError if _WORKER_OS_ERROR in codes else RuntimeError
            raise kind(text.splitlines()[-1] if text else f"a process ended with {codes}")


def _start(job: list[Any], ticks: int, errors: int) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-c", _WORKER, json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stdout=ticks,
        stderr=errors,
        env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        # Ctrl-C reaches the parent alone, which then ends its processes without their tracebacks.
        start_new_session=True,
    )


def work() -> None:
    """Draw one part of a data set; the job is the command line's argument, as JSON."""
    folder, values, part, parts = json.loads(sys.argv[1])
    request = Request(**values)
    try:
        for _ in _draw(Path(folder), request.seed, plan(request).crops[part::parts]):
            os.write(1, b".")
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_WORKER_OS_ERROR)
