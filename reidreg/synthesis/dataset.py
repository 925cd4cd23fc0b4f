"""Write a drawn data set to disk: the door of this package.

Images go to a hidden folder beside the output, which takes the output's name once it is complete.
A reader never sees half a data set, and a call after a killed one continues from there.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from reidreg.errors import DataError
from reidreg.machine.cores import count_cores
from reidreg.synthesis.plan import Counts, plan
from reidreg.synthesis.request import Layout, Request, check_at_least
from reidreg.synthesis.workers import Progress, draw_images, write_whole

MARKER = "synthetic.json"


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
    """Draw a data set, unless the same one exists already.

    The same arguments give the same bytes, whatever the number of processes.

    Args:
        output: The folder that will hold `query/`.
        layout: Folders and file names: those of AIHub KAIST or of Market-1501.
        identities: Identities, training and test together; about a quarter is for the test.
        cameras: Cameras; each identity is seen by at least two.
        images_per_camera: Images of an identity from each camera that sees them.
        seed: Other seeds give other people, cameras and scenes.
        full_size: The official counts of AIHub KAIST instead of the three numbers above.
        workers: Processes that draw; by default one for each processor. Fewer than 200 images are
            drawn in this process.
        progress: Called from time to time with the number of images so far and their total.

    Returns:
        Folder -> (identities, images, cameras); distractors and junk are not identities.

    Raises:
        ConfigError: A number is too small or does not fit the layout.
        DataError: The output holds something else, or cannot be written.
    """
    request = Request(layout, identities, cameras, images_per_camera, seed, full_size)
    if workers is not None:
        check_at_least("workers", workers, 1, "one process draws")
    target = Path(output).expanduser().resolve()
    partial = target.with_name(f".{target.name}.partial")
    try:
        counts = _finished(target, request)
        if counts is None:
            counts = _write_all(partial, target, request, workers or count_cores(), progress)
    except OSError as error:
        # Another process may have finished the same data set first, and moved the partial folder.
        if _read_marker(target) is None:
            raise DataError(
                f"cannot write {target}: {error}; free the space or choose another --output"
            ) from error
        counts = _finished(target, request)
        shutil.rmtree(partial, ignore_errors=True)
    return counts or {}


def _finished(target: Path, request: Request) -> Counts | None:
    """The counts of a complete output, or None if there is none yet.

    Raises:
        DataError: The folder holds something else, or images are missing.
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
                "choose another --output, or delete it to draw it again"
            )
    counts: Counts = {name: (n[0], n[1], n[2]) for name, n in marker["folders"].items()}
    for name, (_, images, _) in counts.items():
        found = len(_images(target / name))
        if found < images:
            raise DataError(
                f"{target / name} has {found} of its {images} images: "
                f"delete {target} to draw it again"
            )
    return counts


def _images(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.endswith(".jpg")] if folder.is_dir() else []


def _read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a folder that `synthesize` wrote, else None."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    ours = isinstance(marker, dict) and {"parameters", "folders"} <= marker.keys()
    return marker if ours else None


def _write_marker(folder: Path, request: Request, counts: Counts) -> None:
    marker = {"parameters": request.parameters(), "folders": counts}
    write_whole(folder / MARKER, (json.dumps(marker, indent=2) + "\n").encode())


def _write_all(
    partial: Path, target: Path, request: Request, workers: int, progress: Progress | None
) -> Counts:
    """Draw into the partial folder, then rename it to the target."""
    wanted = plan(request)
    counts = wanted.counts()
    _open_partial(partial, request)
    for folder in counts:
        (partial / folder).mkdir(exist_ok=True)
    draw_images(partial, request, wanted.crops, workers, progress)
    for folder, crops in wanted.copies.items():
        for crop in crops:
            _copy(partial / crop.folder / crop.name, partial / folder / crop.name)
    _write_marker(partial, request, counts)
    if target.is_dir():
        target.rmdir()
    partial.rename(target)
    # Not earlier: a temporary file could belong to another process that draws the same data set.
    for draft in target.glob("*/.*"):
        draft.unlink(missing_ok=True)
    return counts


def _open_partial(partial: Path, request: Request) -> None:
    """Continue with what a killed run of the same request left, or start with an empty folder."""
    if partial.is_dir() and any(path.name[0] != "." for path in partial.iterdir()):
        marker = _read_marker(partial)
        if marker is None:
            raise DataError(f"{partial} holds other files: move it away")
        if marker["parameters"] == request.parameters():
            return
        shutil.rmtree(partial)
    partial.mkdir(parents=True, exist_ok=True)
    _write_marker(partial, request, {})


def _copy(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no hard links."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        write_whole(target, source.read_bytes())
