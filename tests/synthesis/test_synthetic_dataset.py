"""Writing a drawn data set: equal bytes each time, complete or not there, in several processes."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from reidreg.errors import ConfigError, DataError
from reidreg.synthesis.dataset import MARKER, synthesize
from reidreg.synthesis.plan import plan
from reidreg.synthesis.request import Layout, Request


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.jpg"))
    }


def small(output: Path, seed: int = 0, layout: Layout = "aihub_kaist") -> dict[str, object]:
    return dict(
        synthesize(
            output,
            layout=layout,
            identities=8,
            cameras=2,
            images_per_camera=2,
            seed=seed,
            workers=1,
        )
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"identities": 7}, r"--identities 7 is too few: at least 8"),
        ({"identities": 3, "layout": "market1501"}, r"--identities 3 is too few: at least 4"),
        ({"cameras": 1}, r"--cameras 1 is too few: at least 2"),
        ({"cameras": 10, "layout": "market1501"}, r"--cameras 10 is too many: .* 9 at most"),
        ({"images_per_camera": 0}, r"--images_per_camera 0 is too few"),
        ({"seed": -1}, r"--seed -1"),
        ({"workers": 0}, r"--workers 0 is too few"),
        ({"layout": "msmt17"}, r"--layout 'msmt17': choose aihub_kaist or market1501"),
        ({"full_size": True, "layout": "market1501"}, r"--full_size has counts for aihub_kaist"),
    ],
)
def test_an_impossible_request_is_an_error_that_names_the_flag(
    tmp_path: Path, values: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        synthesize(tmp_path / "out", **values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["aihub_kaist", "market1501"])
def test_the_folders_hold_what_the_counts_say(tmp_path: Path, layout: Layout) -> None:
    ticks: list[tuple[int, int]] = []
    counts = synthesize(
        tmp_path / "deep" / "out",
        layout=layout,
        identities=8,
        cameras=2,
        images_per_camera=2,
        progress=lambda done, total: ticks.append((done, total)),
    )
    request = Request(layout=layout, identities=8, cameras=2, images_per_camera=2)
    assert counts == plan(request).counts()
    for folder, (_, images, _) in counts.items():
        assert len(list((tmp_path / "deep" / "out" / folder).iterdir())) == images
    drawn = len(plan(request).crops)
    assert ticks == [(done, drawn) for done in range(1, drawn + 1)]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    for path in (tmp_path / "deep" / "out" / "bounding_box_test").iterdir():
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))


def test_the_sample_folders_hold_the_same_bytes_under_the_same_names(tmp_path: Path) -> None:
    small(tmp_path / "out")
    files = digests(tmp_path / "out")
    large = {name.split("/")[1]: digest for name, digest in files.items() if name[0] != "s"}
    quick = {name: digest for name, digest in files.items() if name[0] == "s"}
    assert quick
    assert all(large[name.split("/")[1]] == digest for name, digest in quick.items())


def test_the_bytes_depend_on_the_seed_and_not_on_the_number_of_processes(tmp_path: Path) -> None:
    def drawn(name: str, workers: int, seed: int = 0) -> dict[str, str]:
        synthesize(
            tmp_path / name,
            layout="market1501",
            identities=16,
            cameras=4,
            images_per_camera=4,
            seed=seed,
            workers=workers,
        )
        return digests(tmp_path / name)

    one, two, other = drawn("one", 1), drawn("two", 2), drawn("other", 1, seed=1)
    assert len(one) >= 200  # enough for two processes
    assert one == two
    assert not set(one.values()) & set(other.values())


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from reidreg.synthesis.dataset import synthesize\n"
        "print('started')\n"
        f"synthesize({str(tmp_path / 'out')!r}, identities=16, workers=2)\n"
        "import sys\n"
        "print('torch' in sys.modules)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "started\nFalse\n", "")
    assert (tmp_path / "out" / MARKER).exists()


def test_the_same_call_again_writes_nothing(tmp_path: Path) -> None:
    first = small(tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert small(tmp_path / "out") == first
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == times


def test_an_output_of_other_parameters_is_an_error_that_names_the_difference(
    tmp_path: Path,
) -> None:
    small(tmp_path / "out")
    with pytest.raises(DataError, match=r"out was drawn with seed 0, not 1: choose another"):
        small(tmp_path / "out", seed=1)
    with pytest.raises(DataError, match=r"was drawn with full_size False, not True"):
        synthesize(tmp_path / "out", full_size=True)
    with pytest.raises(DataError, match=r"was drawn with layout aihub_kaist, not market1501"):
        small(tmp_path / "out", layout="market1501")
    small(tmp_path / "out")


def test_an_output_that_lost_images_is_an_error(tmp_path: Path) -> None:
    small(tmp_path / "out")
    next((tmp_path / "out" / "query").iterdir()).unlink()
    with pytest.raises(DataError, match=r"query has \d+ of its \d+ images: delete"):
        small(tmp_path / "out")


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "out" / "query" / "1001_c04s43_000750.jpg"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"already holds other files: choose another --output"):
        small(tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [foreign]
    assert foreign.read_bytes() == b"mine"


def test_a_file_in_place_of_the_output_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(DataError, match="already holds other files"):
        small(tmp_path / "out")
    with pytest.raises(DataError, match="cannot write"):
        small(tmp_path / "out" / "below")
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert small(tmp_path / "out")
    assert (tmp_path / "out" / MARKER).exists()


def test_a_failure_keeps_what_is_drawn_and_the_next_call_continues(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 5:
            raise Killed

    values = {"identities": 8, "cameras": 2, "images_per_camera": 2, "workers": 1}
    with pytest.raises(Killed):
        synthesize(tmp_path / "out", progress=stop, **values)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
    partial = tmp_path / ".out.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.rglob("*.jpg")}
    assert len(kept) == 5
    small(tmp_path / "out")
    small(tmp_path / "whole")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("b*/*.jpg")}
    assert kept.items() <= now.items()
    assert not partial.exists()


def test_what_a_killed_run_of_other_parameters_left_is_not_mixed_in(tmp_path: Path) -> None:
    small(tmp_path / "other", seed=1)
    (tmp_path / "other").rename(tmp_path / ".out.partial")
    small(tmp_path / "out", seed=0)
    small(tmp_path / "whole", seed=0)
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_folder_with_other_files_under_the_partial_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"\.out\.partial holds other files: move it away"):
        small(tmp_path / "out")
    assert (tmp_path / ".out.partial" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes in /proc")
def test_no_process_outlives_a_killed_call(tmp_path: Path, number: signal.Signals) -> None:
    code = (
        f"from reidreg.synthesis.dataset import synthesize; synthesize({str(tmp_path / 'out')!r}, "
    )
    code += "identities=2000, workers=2)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    parent = subprocess.Popen(
        [sys.executable, "-c", code],
        env=env,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        # A shell's background jobs ignore SIGINT, and children inherit that.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )

    def processes() -> int:
        found = 0
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found += str(tmp_path).encode() in path.read_bytes()
            except OSError:
                continue
        return found

    def wait_for(count: int) -> None:
        limit = time.monotonic() + 20
        while processes() != count and time.monotonic() < limit:
            time.sleep(0.05)
        assert processes() == count

    wait_for(3)
    while not any((tmp_path / ".out.partial").rglob("*.jpg")):
        time.sleep(0.05)
    parent.send_signal(number)
    assert parent.wait(timeout=20) != 0
    wait_for(0)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_write_that_fails_is_one_line_for_any_number_of_processes(
    tmp_path: Path, workers: int
) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "from reidreg.errors import DataError; from reidreg.synthesis.dataset import synthesize\n"
        f"try: synthesize({str(tmp_path / 'out')!r}, workers={workers})\n"
        "except DataError as error: print(error)\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert re.fullmatch(r"cannot write .*out: .*File too large.*; free the space.*\n", done.stdout)
    assert not (tmp_path / "out").exists()


def test_two_calls_at_once_both_succeed(tmp_path: Path) -> None:
    code = (
        f"from reidreg.synthesis.dataset import synthesize; synthesize({str(tmp_path / 'out')!r}, "
    )
    code += "identities=12, workers=1)"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    calls = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    errors = [call.communicate(timeout=60)[1] for call in calls]
    assert ([call.returncode for call in calls], errors) == ([0, 0], [b"", b""])
    counts = plan(Request(identities=12)).counts()
    for folder, (_, images, _) in counts.items():
        assert len(list((tmp_path / "out" / folder).glob("*.jpg"))) == images


def test_the_marker_holds_the_parameters_and_the_counts(tmp_path: Path) -> None:
    counts = small(tmp_path / "out")
    marker = json.loads((tmp_path / "out" / MARKER).read_text())
    assert {key: tuple(value) for key, value in marker["folders"].items()} == counts
    assert marker["parameters"]["identities"] == 8
    assert marker["parameters"]["seed"] == 0
