"""Draw the images of a plan into a folder, in this process or in several."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reidreg.synthesis.crops import draw_distractor, draw_junk, draw_person
from reidreg.synthesis.plan import Crop, plan
from reidreg.synthesis.request import Request

Progress = Callable[[int, int], None]
# With fewer images, a process takes longer to start than to draw.
_IMAGES_PER_PROCESS = 100
_WORKER = "from reidreg.synthesis.workers import work; work()"
_WORKER_OS_ERROR = 74  # the exit status EX_IOERR of sysexits.h


def draw_images(
    folder: Path, request: Request, crops: Sequence[Crop], workers: int, progress: Progress | None
) -> None:
    """Draw the crops of a request into a folder; images that exist already are kept.

    Args:
        folder: It holds the folders of the crops.
        request: What the crops are planned from.
        crops: The images.
        workers: The largest number of processes; few images are drawn in this process.
        progress: Called with the number of images so far and their total.

    Raises:
        OSError: An image cannot be written.
    """
    processes = min(workers, len(crops) // _IMAGES_PER_PROCESS)
    if processes > 1 and sys.executable:
        _draw_in_processes(folder, request, processes, len(crops), progress)
        return
    for done, _ in enumerate(_draw_missing(folder, request.seed, crops), start=1):
        if progress is not None:
            progress(done, len(crops))


def _draw_missing(folder: Path, seed: int, crops: Iterable[Crop]) -> Iterable[Crop]:
    """Draw the crops whose files do not exist yet; yield each crop once its file is complete."""
    for crop in crops:
        path = folder / crop.folder / crop.name
        if not path.exists():
            write_whole(path, _pixels(seed, crop))
        yield crop


def _pixels(seed: int, crop: Crop) -> bytes:
    if crop.kind == "person":
        return draw_person(seed, crop.pid, crop.camid, crop.index)
    draw = draw_distractor if crop.kind == "distractor" else draw_junk
    return draw(seed, crop.camid, crop.index)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that appears complete or not at all; another process may write the same one."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)


# Python's process pools import the caller's main module in each process, which runs a script that
# has no `__main__` guard once more. These processes import this module instead. Each writes a byte
# per image into a shared pipe. The pipe ends when the last process does, and a process whose parent
# was killed can no longer write and ends too.


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
        # Ctrl-C reaches only the parent, which ends its processes without their tracebacks.
        start_new_session=True,
    )


def work() -> None:
    """Draw one part of a data set: the main function of a worker process, with a job in JSON."""
    folder, values, part, parts = json.loads(sys.argv[1])
    request = Request(**values)
    try:
        for _ in _draw_missing(Path(folder), request.seed, plan(request).crops[part::parts]):
            os.write(1, b".")
    except OSError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(_WORKER_OS_ERROR)
