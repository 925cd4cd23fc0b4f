"""Checkpoints: what is saved is loaded again, and a damaged file is refused."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from reidreg import Checkpoint, load_checkpoint, load_config
from reidreg.data.labels import Labels
from reidreg.errors import CheckpointError
from reidreg.model.checkpoint import VERSION, remove_partial_files, save_checkpoint

Tree = Any


def checkpoint_of(training: Tree, model: dict[str, torch.Tensor] | None = None) -> Checkpoint:
    return Checkpoint(
        model={"a.weight": torch.arange(6.0).reshape(2, 3)} if model is None else model,
        config=load_config("quickstart").as_dict(),
        labels=Labels((0, 3, 7), (1, 2)),
        preprocessing={"size": [256, 128], "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]},
        epoch=3,
        step=120,
        metrics={"mAP": 0.5, "cmc": [0.25, 0.5]},
        training=training,
    )


def same(one: Tree, other: Tree) -> bool:
    """Whether two trees are equal bit by bit; tuples come back as lists."""
    if isinstance(one, torch.Tensor):
        # As bytes: NaN equals NaN there, and -0.0 differs from 0.0.
        return (
            isinstance(other, torch.Tensor)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and torch.equal(
                one.cpu().reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)
            )
        )
    if isinstance(one, dict):
        return (
            isinstance(other, dict)
            and list(one) == list(other)
            and [type(key) for key in one] == [type(key) for key in other]
            and all(same(one[key], other[key]) for key in one)
        )
    if isinstance(one, (list, tuple)):
        return (
            isinstance(other, list)
            and len(one) == len(other)
            and all(same(a, b) for a, b in zip(one, other, strict=True))
        )
    return type(one) is type(other) and repr(one) == repr(other)


def round_trip(tree: Tree, path: Path) -> Tree:
    save_checkpoint(checkpoint_of(tree), path)
    return load_checkpoint(path).training


# --------------------------------------------------------------------- round trips

SHARED = torch.arange(12.0)
TREES: dict[str, Tree] = {
    "none": None,
    "empty": {},
    "integers as keys": {"state": {0: {"step": 1}, 1: {"step": 2}}, "1": "text", 1: "number"},
    "tuples": {"random": (3, (1, 2, None), None)},
    "numbers": {"nan": float("nan"), "inf": [float("inf"), -float("inf")], "big": 2**80, "z": -0.0},
    "text": {"\u0000": "\u2028\n\"'\\", "päron": "梨", "": ""},
    "bools": [True, False, 1, 0, 1.0],
    "bfloat16": {"x": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16)},
    "scalars": [torch.tensor(3), torch.tensor(2.5), torch.tensor(True)],
    "no elements": [torch.empty(0), torch.empty(0, 4), torch.empty(2, 0, dtype=torch.int32)],
    "bool tensors": torch.tensor([[True, False], [False, False]]),
    "other types": [torch.tensor([1, 2]).to(t) for t in (torch.uint8, torch.int8, torch.float16)],
    "doubles": torch.tensor([0.1, float("nan")], dtype=torch.float64),
    "shared storage": [SHARED, SHARED[2:5], SHARED.view(3, 4), SHARED],
    "strides": [SHARED.view(3, 4).T, torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last)],
    "a parameter": torch.nn.Parameter(torch.ones(2)),
    "paths that meet": {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}},
    "keys that meet": {1: torch.tensor(3), "1": torch.tensor(4)},
    "our own marks": {"__tensor__": "model/a.weight", "__dict__": [["a", 1]]},
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TREES))
def test_a_tree_is_loaded_as_it_was_saved(name: str, tmp_path: Path) -> None:
    assert same(TREES[name], round_trip(TREES[name], tmp_path / "x.ckpt"))


scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
tensors = st.builds(
    lambda dtype, shape: torch.randint(0, 2, shape).to(dtype),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.lists(st.integers(0, 3), max_size=3),
)
trees = st.recursive(
    st.one_of(scalars.filter(lambda x: not isinstance(x, str) or x.isprintable()), tensors),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from("abc/."), st.integers(0, 2)), inner, max_size=3),
    ),
    max_leaves=8,
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(trees)
def test_any_tree_is_loaded_as_it_was_saved(tmp_path: Path, tree: Tree) -> None:
    assert same(tree, round_trip(tree, tmp_path / "x.ckpt"))


def test_every_field_of_a_checkpoint_is_loaded_again(tmp_path: Path) -> None:
    written = checkpoint_of({"sampler": {"epoch": 3}})
    save_checkpoint(written, tmp_path / "deep/folder/x.ckpt")
    read = load_checkpoint(str(tmp_path / "deep/folder/x.ckpt"))
    assert read.labels == written.labels and isinstance(read.labels.pids, tuple)
    for name in ("model", "config", "preprocessing", "epoch", "step", "metrics", "training"):
        assert same(getattr(written, name), getattr(read, name)), name
    assert read.resolved_config().as_dict() == load_config("quickstart").as_dict()


def test_a_checkpoint_may_have_no_tensors(tmp_path: Path) -> None:
    save_checkpoint(checkpoint_of(None, model={}), tmp_path / "x.ckpt")
    assert load_checkpoint(tmp_path / "x.ckpt").model == {}


def test_a_checkpoint_may_be_saved_onto_the_file_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save_checkpoint(checkpoint_of(TREES["doubles"]), path)
    for _ in range(2):
        save_checkpoint(load_checkpoint(path), path)
    assert same(TREES["doubles"], load_checkpoint(path).training)


# --------------------------------------------------------------------- damage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small checkpoint with tensors of several shapes, some without elements."""
    path = tmp_path_factory.mktemp("whole") / "x.ckpt"
    tree = {"m": torch.rand(20, 10), "v": [torch.empty(0, 4), torch.tensor(5)], "r": [1, None]}
    save_checkpoint(checkpoint_of(tree), path)
    return path.read_bytes()


def outcome(content: bytes, path: Path) -> Checkpoint | str:
    """The loaded checkpoint, or the error of one line."""
    path.write_bytes(content)
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        line = str(error)
        assert "\n" not in line and line.startswith(str(path)), line
        assert len(line) - len(str(path)) < 180
        return line


def test_every_truncation_is_refused(whole: bytes, tmp_path: Path) -> None:
    points = {len(whole) * percent // 100 for percent in range(100)}
    points |= {0, 1, 7, 8, 9, len(whole) - 1, len(whole) - 8}
    for point in sorted(points):
        line = outcome(whole[:point], tmp_path / "x.ckpt")
        assert isinstance(line, str) and f"({point:,} bytes; " in line


def test_bytes_too_many_are_refused(whole: bytes, tmp_path: Path) -> None:
    assert isinstance(outcome(whole + b"\0", tmp_path / "x.ckpt"), str)
    assert isinstance(outcome(whole + whole, tmp_path / "x.ckpt"), str)


def test_a_flipped_bit_never_changes_what_is_loaded(whole: bytes, tmp_path: Path) -> None:
    rng = random.Random(7)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [rng.randrange(len(whole) * 8) for _ in range(200)]
    # More of them in the header outside of our JSON: types, shapes, offsets, version, padding.
    start = whole.index(b"sha256")
    places += [rng.randrange(start * 8, header * 8) for _ in range(400)]
    path, refused = tmp_path / "x.ckpt", 0
    original = outcome(whole, path)
    assert isinstance(original, Checkpoint)
    for place in places:
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        found = outcome(bytes(content), path)
        if isinstance(found, str):
            refused += 1
        else:
            assert same(vars(original) | {"labels": 0}, vars(found) | {"labels": 0}), place
            assert found.labels == original.labels
    assert refused >= 0.99 * len(places)


@pytest.mark.parametrize("key", ["format", "version", "content", "sha256"])
def test_a_header_that_lacks_a_key_is_refused(whole: bytes, tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del header[key]
    save_file(tensors, path, metadata=header)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def rewritten(whole: bytes, path: Path, **changes: str) -> Path:
    """A checkpoint with other values in its header."""
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        header = {**file.metadata(), **changes}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(tensors, path, metadata=header)
    return path


def test_a_newer_format_asks_for_an_upgrade(whole: bytes, tmp_path: Path) -> None:
    path = rewritten(whole, tmp_path / "x.ckpt", version=str(VERSION + 1), content="?")
    with pytest.raises(CheckpointError, match=f"has format {VERSION + 1}, .*: upgrade reidreg$"):
        load_checkpoint(path)


def test_changed_text_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    path.write_bytes(whole)
    with safe_open(path, framework="pt") as file:
        content = file.metadata()["content"]
    changed = content.replace('"epoch", 3', '"epoch", 4')
    assert changed != content and json.loads(changed)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        load_checkpoint(rewritten(whole, path, content=changed))


# --------------------------------------------------------------------- foreign files


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def test_a_malicious_pickle_is_refused_and_not_executed(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    evil = Malicious(marker)
    torch.save({"state_dict": evil}, tmp_path / "zip.pth")
    torch.save(evil, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(evil))
    for name in ("zip.pth", "legacy.pth", "plain.ckpt"):
        with pytest.raises(CheckpointError, match="no checkpoint of reidreg"):
            load_checkpoint(tmp_path / name)
    assert not marker.exists()
    pickle.loads((tmp_path / "plain.ckpt").read_bytes())
    assert marker.exists(), "the payload works when it is unpickled"


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"<!DOCTYPE html>\n<html><body>404</body></html>", POINTER, b"\xff" * 4096],
    ids=["empty", "a byte", "html", "a pointer of git lfs", "noise"],
)
def test_a_file_that_is_no_checkpoint_is_refused_with_its_size(
    content: bytes, tmp_path: Path
) -> None:
    line = outcome(content, tmp_path / "x.ckpt")
    assert isinstance(line, str)
    assert f"is damaged or no checkpoint of reidreg ({len(content):,} bytes; " in line


def test_the_error_for_weights_of_another_system_names_the_right_option(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"conv1.weight": torch.ones(2)}, path)
    with pytest.raises(
        CheckpointError, match=r"safetensors file, but not a .*--backbone\.pretrained$"
    ):
        load_checkpoint(path)


def test_the_error_for_a_missing_file_names_other_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "best.ckpt")
    assert str(caught.value) == f"no checkpoint at {tmp_path}/best.ckpt (No such file or directory)"
    for name in ("last", "epoch_0040"):
        save_checkpoint(checkpoint_of(None), tmp_path / f"checkpoints/{name}.ckpt")
    for asked in ("checkpoints/best.ckpt", "best.ckpt", "checkpoints", "."):
        with pytest.raises(
            CheckpointError, match=r"; there is .*epoch_0040\.ckpt, .*last\.ckpt in"
        ):
            load_checkpoint(tmp_path / asked)
    for asked in ("~nobody-at-all/x.ckpt", "a" * 300, "/dev/null", "/dev/null/x"):
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            load_checkpoint(asked)


# --------------------------------------------------------------------- writing


def test_nothing_is_written_in_place(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    save_checkpoint(checkpoint_of(1), path)
    before, other_name = path.stat().st_ino, tmp_path / "hard link"
    os.link(path, other_name)
    content = path.read_bytes()
    save_checkpoint(checkpoint_of(2), path)
    assert path.stat().st_ino != before and other_name.read_bytes() == content
    assert {file.name for file in tmp_path.iterdir()} == {"x.ckpt", "hard link"}


def test_a_path_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.ckpt").mkdir()
    for path in (tmp_path / "file/x.ckpt", tmp_path / "folder.ckpt", Path("/proc/x/y.ckpt")):
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(checkpoint_of(None), path)
        assert str(caught.value).startswith(f"cannot write {path}: ")
        assert "\n" not in str(caught.value)
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "folder.ckpt"]


PROGRAM = """
import itertools, resource, signal, sys, torch
from pathlib import Path
from reidreg.model.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from reidreg.data.labels import Labels
from reidreg.errors import CheckpointError
def save(tree):
    save_checkpoint(Checkpoint({}, {}, Labels((), ()), {}, 0, 0, training=tree), path)
path = Path(sys.argv[1])
"""
FULL = """
save("before")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(torch.zeros(1_000_000))
except CheckpointError as error:
    print(error)
assert load_checkpoint(path).training == "before"
"""


def test_a_disk_that_is_full_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM + FULL, str(path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"cannot write {path}: ") and "large" in result.stdout
    assert list(tmp_path.iterdir()) == [path]


FOREVER = """
for number in itertools.count(1):
    save({"number": number, "x": torch.full((250_000,), float(number))})
    print(number, flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    path, seed = tmp_path / "x.ckpt", random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM + FOREVER, str(path)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            written = process.stdout.readline()
            for _ in range(3):  # while the process writes
                training = load_checkpoint(path).training
                assert training is not None and (training["x"] == training["number"]).all()
            time.sleep(rng.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
            last = int((written + process.stdout.read()).split()[-1])
        training = load_checkpoint(path).training
        assert training is not None and training["number"] in (last, last + 1)
        assert (training["x"] == training["number"]).all()
        remove_partial_files(tmp_path)
        assert list(tmp_path.iterdir()) == [path]


def test_only_partial_files_are_removed(tmp_path: Path) -> None:
    save_checkpoint(checkpoint_of(None), tmp_path / "last.ckpt")
    for name in (".last.ckpt.123.partial", ".last.partial", ".hidden", "x.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmp123").write_bytes(b"x")
    remove_partial_files(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"last.ckpt", ".hidden", "x.partial"}
    remove_partial_files(tmp_path / "no such folder")
