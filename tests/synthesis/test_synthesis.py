"""What a drawn data set promises: names, splits, counts, equal bytes each time, and its looks."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reidreg.errors import ConfigError, DataError
from reidreg.synthesis.cameras import camera_of
from reidreg.synthesis.canvas import HEIGHT, WIDTH
from reidreg.synthesis.crops import draw_distractor, draw_junk, draw_person
from reidreg.synthesis.dataset import MARKER, Crop, Layout, Plan, Request, plan, synthesize
from reidreg.synthesis.people import person_of

AIHUB_NAME = re.compile(r"(\d{4})_c(\d\d)s(\d\d)_(\d{6})\.jpg")
MARKET_NAME = re.compile(r"(-1|\d{4})_c(\d)s([1-6])_(\d{6})_(\d\d)\.jpg")
TRAIN = ("bounding_box_train_1", "bounding_box_train_2", "bounding_box_train_3")

requests = st.builds(
    Request,
    layout=st.sampled_from(["aihub_kaist", "market1501"]),
    identities=st.integers(8, 40),
    cameras=st.integers(2, 9),
    images_per_camera=st.integers(1, 5),
    seed=st.integers(0, 3),
)


def by_folder(wanted: Plan) -> dict[str, list[Crop]]:
    folders: dict[str, list[Crop]] = defaultdict(list)
    for crop in wanted.crops:
        folders[crop.folder].append(crop)
    for folder, crops in wanted.copies.items():
        folders[folder] += crops
    return folders


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.jpg"))
    }


def check_queries(wanted: Plan) -> None:
    folders = by_folder(wanted)
    splits = {
        "query": "bounding_box_test",
        "sample_query": "sample_test",
        "sample_query_reduced": "sample_test_reduced",
    }
    for query, gallery in splits.items():
        asked = [(crop.pid, crop.camid) for crop in folders[query]]
        assert len(set(asked)) == len(asked)
        assert not {crop.name for crop in folders[query]} & {crop.name for crop in folders[gallery]}
        cameras: dict[int, set[int]] = defaultdict(set)
        for crop in folders[gallery]:
            cameras[crop.pid].add(crop.camid)
        assert all(cameras[pid] - {camid} for pid, camid in asked)


def pixels(jpeg: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(jpeg)), dtype=np.float64)


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


# ---------------------------------------------------------------------------- the plan


@settings(max_examples=60, deadline=None)
@given(requests)
def test_every_name_follows_its_layouts_grammar_and_is_unique(request: Request) -> None:
    grammar = AIHUB_NAME if request.layout == "aihub_kaist" else MARKET_NAME
    wanted = plan(request)
    for crop in wanted.crops:
        found = grammar.fullmatch(crop.name)
        assert found is not None, crop.name
        assert int(found[1]) == crop.pid
        assert int(found[2]) == crop.camid
        assert 1 <= crop.camid <= request.cameras
        if request.layout == "aihub_kaist":
            train = crop.folder in TRAIN
            assert found[3] in (("31", "32", "34") if train else ("42", "43"))
            assert int(found[4]) % 25 == 0
            assert (crop.pid < 1001) == train
    assert len({(crop.folder, crop.name) for crop in wanted.crops}) == len(wanted.crops)


@settings(max_examples=60, deadline=None)
@given(requests)
def test_train_and_test_share_no_person_and_all_people_are_there(request: Request) -> None:
    folders = by_folder(plan(request))
    people = {
        folder: {crop.pid for crop in crops if crop.kind == "person"}
        for folder, crops in folders.items()
        if folder.startswith(("bounding_box", "query"))
    }
    train = [pids for folder, pids in people.items() if "train" in folder]
    assert all(len(pids) >= 2 for pids in train)
    assert sum(map(len, train)) == len(set().union(*train))
    assert people["query"] == people["bounding_box_test"]
    assert not set().union(*train) & people["query"]
    assert sum(map(len, train)) + len(people["query"]) == request.identities


@settings(max_examples=60, deadline=None)
@given(requests)
def test_each_query_is_alone_in_its_camera_and_has_a_match_in_another(request: Request) -> None:
    check_queries(plan(request))


def test_each_person_has_the_wanted_number_of_images_from_each_camera_that_sees_him() -> None:
    wanted = plan(Request(identities=20, cameras=5, images_per_camera=3))
    counts: dict[tuple[int, int], int] = defaultdict(int)
    for crop in wanted.crops:
        counts[crop.pid, crop.camid] += 1
    assert set(counts.values()) == {3}
    assert len({pid for pid, _ in counts}) == 20
    assert all(sum(pid == other for other, _ in counts) >= 2 for pid, _ in counts)


def test_pid_zero_is_a_person_in_aihub_kaist() -> None:
    crops = plan(Request()).crops
    assert {crop.kind for crop in crops if crop.pid == 0} == {"person"}
    assert all(crop.kind == "person" for crop in crops)


def test_market1501_has_junk_and_distractors_in_the_gallery_alone() -> None:
    folders = by_folder(plan(Request(layout="market1501")))
    kinds = {folder: {crop.kind for crop in crops} for folder, crops in folders.items()}
    assert kinds == {
        "bounding_box_train": {"person"},
        "query": {"person"},
        "bounding_box_test": {"person", "distractor", "junk"},
    }
    pids = {(crop.kind, crop.pid) for crop in folders["bounding_box_test"] if crop.pid < 1}
    assert pids == {("distractor", 0), ("junk", -1)}


def test_the_full_size_has_the_official_counts() -> None:
    wanted = plan(Request(full_size=True))
    counts = wanted.counts()
    assert {folder: n[:2] for folder, n in counts.items()} == {
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
    assert {n[2] for n in counts.values()} == {16}
    assert len(wanted.crops) == 73_540
    assert len({(crop.folder, crop.name) for crop in wanted.crops}) == 73_540


def test_each_query_of_the_full_size_has_a_match_in_another_camera() -> None:
    check_queries(plan(Request(full_size=True, seed=1)))


def test_the_quick_folders_hold_a_part_of_the_large_ones() -> None:
    folders = by_folder(plan(Request()))
    large = {
        "sample_train": [crop for folder in TRAIN for crop in folders[folder]],
        "sample_query": folders["query"],
        "sample_test": folders["bounding_box_test"],
        "sample_query_reduced": folders["sample_query"],
        "sample_test_reduced": folders["sample_test"],
    }
    for folder, crops in large.items():
        assert 0 < len(folders[folder]) < len(crops)
        assert set(folders[folder]) < set(crops)


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


# ---------------------------------------------------------------------------- the files


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


def test_the_quick_folders_hold_the_same_bytes_under_the_same_names(tmp_path: Path) -> None:
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


def test_a_strangers_folder_is_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "out" / "query" / "1001_c04s43_000750.jpg"
    stranger.parent.mkdir(parents=True)
    stranger.write_bytes(b"mine")
    with pytest.raises(DataError, match=r"already holds other files: choose another --output"):
        small(tmp_path / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [stranger]
    assert stranger.read_bytes() == b"mine"


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


def test_a_failure_keeps_what_is_drawn_and_the_next_call_goes_on(tmp_path: Path) -> None:
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


def test_a_strangers_folder_under_the_partial_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="in the way and not ours"):
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
        # A shell has what it runs in the background ignore Ctrl-C, and that is inherited.
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
def test_a_write_that_fails_is_one_line_whoever_draws(tmp_path: Path, workers: int) -> None:
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


# ---------------------------------------------------------------------------- the looks


def test_a_crop_depends_on_its_keys_alone() -> None:
    first = draw_person(0, 3, 2, 1)
    for pid in range(3):
        draw_person(0, pid, 1, 0)
    camera_of.cache_clear()
    person_of.cache_clear()
    assert draw_person(0, 3, 2, 1) == first
    others = [draw_person(*key) for key in ((1, 3, 2, 1), (0, 4, 2, 1), (0, 3, 1, 1), (0, 3, 2, 0))]
    assert first not in others
    assert pixels(first).shape == (HEIGHT, WIDTH, 3)


def test_crops_of_one_camera_share_its_light_and_cameras_differ() -> None:
    means = np.array(
        [
            [pixels(draw_person(0, pid, camid, 0)).mean((0, 1)) for pid in range(12)]
            for camid in range(1, 7)
        ]
    )
    between = means.mean(1)
    gaps = np.linalg.norm(between[:, None] - between[None], axis=-1)[~np.eye(6, dtype=bool)]
    assert gaps.min() > 8
    assert between.std(0).mean() > 1.5 * means.std(1).mean()


def test_people_can_be_told_apart_before_one_camera() -> None:
    crops = np.array(
        [
            [
                pixels(draw_person(0, pid, 3, k)).reshape(16, 8, 8, 8, 3).mean((1, 3))
                for k in range(12)
            ]
            for pid in range(10)
        ]
    ).reshape(10, 12, -1)
    known, asked = crops[:, :6].mean(1), crops[:, 6:].mean(1)
    distances = np.linalg.norm(asked[:, None] - known[None], axis=-1)
    assert np.mean(distances.argmin(1) == np.arange(10)) >= 0.8


def test_people_are_all_different() -> None:
    assert len({person_of(0, pid) for pid in range(500)}) == 500


def test_raw_colours_do_not_find_people_again_in_other_cameras() -> None:
    pids = range(16)
    features = np.array(
        [
            [pixels(draw_person(0, pid, camid, 0))[::4, ::4].ravel() for pid in pids]
            for camid in range(1, 7)
        ]
    )
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    first = [
        np.argmax(features[a] @ features[b].T, axis=1) == np.arange(len(pids))
        for a in range(6)
        for b in range(6)
        if a != b
    ]
    assert np.mean(first) < 0.5


@pytest.mark.parametrize("draw", [draw_junk, draw_distractor])
def test_clutter_is_drawn_anew_for_each_index_and_camera(
    draw: Callable[[int, int, int], bytes],
) -> None:
    crops = [draw(0, camid, index) for camid in (1, 2) for index in range(5)]
    assert len(set(crops)) == 10
    assert draw(0, 2, 4) == crops[-1]
    assert {pixels(crop).shape for crop in crops} == {(HEIGHT, WIDTH, 3)}
