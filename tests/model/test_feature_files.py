"""Files of features: what is saved is read again, and everything else is refused."""

from __future__ import annotations

import json
import os
import stat
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.torch import save_file

from reidreg import (
    Embeddings,
    load_features,
    match_positions,
    save_features,
)
from reidreg.cli.main import main
from reidreg.errors import ConfigError, DataError
from reidreg.evaluation.evaluate import evaluate_features, write_metrics
from reidreg.files import replacing
from reidreg.parts.interfaces import EVALUATORS


def some_embeddings(count: int = 6, width: int = 5, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(
        torch.randn(count, width, generator=generator),
        torch.arange(count) % 3,
        torch.arange(count) % 2,
        tuple(f"카메라/{number}.jpg" for number in range(count)),
    )


def arrays(count: int = 4, **others: Any) -> dict[str, Any]:
    """The arrays of a feature file, some of them replaced."""
    own = {
        "features": np.arange(count * 3, dtype=np.float32).reshape(count, 3),
        "pids": np.arange(count),
        "camids": np.zeros(count, np.int64),
    }
    return {**own, **others}


# --------------------------------------------------------------------- files


@settings(max_examples=30, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6),
        elements=st.floats(-6e4, 6e4, width=32),
    ),
    st.sampled_from(["float32", "float16"]),
    st.data(),
)
def test_what_is_saved_is_read_again(
    tmp_path_factory: pytest.TempPathFactory,
    features: NDArray[np.float32],
    dtype: Any,
    data: st.DataObject,
) -> None:
    count = len(features)
    ids = hnp.arrays(np.int64, count)
    names = st.lists(st.text("ab가/.\n'", min_size=1), min_size=count, max_size=count)
    saved = Embeddings(
        torch.from_numpy(features),
        torch.from_numpy(data.draw(ids)),
        torch.from_numpy(data.draw(ids)),
        tuple(data.draw(names)),
    )
    path = tmp_path_factory.mktemp("saved") / "f.npz"
    save_features(saved, path, dtype)
    loaded = load_features(path)
    wanted = saved.features.to(getattr(torch, dtype))
    assert loaded.features.dtype == wanted.dtype and torch.equal(loaded.features, wanted)
    assert torch.equal(loaded.pids, saved.pids) and torch.equal(loaded.camids, saved.camids)
    assert loaded.paths == saved.paths


def test_stored_features_have_the_promised_arrays_and_are_private(tmp_path: Path) -> None:
    save_features(some_embeddings(), tmp_path / "new folder/f.npz")
    with np.load(tmp_path / "new folder/f.npz", allow_pickle=False) as file:
        assert file["features"].dtype == np.float32 and file["features"].shape == (6, 5)
        assert file["pids"].dtype == np.int64 and file["camids"].dtype == np.int64
        assert file["paths"][1] == "카메라/1.jpg"
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["f.npz"]
    if os.name == "posix":
        assert stat.S_IMODE((tmp_path / "new folder/f.npz").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        ("float32", torch.float32),
        ("float16", torch.float16),
        ("float64", torch.float32),
        (">f4", torch.float32),
        (">f2", torch.float16),
        ("longdouble", torch.float32),
        ("int8", torch.float32),
        ("uint8", torch.float32),
        ("int64", torch.float32),
    ],
)
@pytest.mark.parametrize("order", ["C", "F"])
def test_every_kind_of_number_is_read(dtype: str, kept: Any, order: Any, tmp_path: Path) -> None:
    values = (np.arange(12).reshape(4, 3) * 10).astype(dtype, order=order)
    np.savez(tmp_path / "f.npz", **arrays(features=values))
    features = load_features(tmp_path / "f.npz").features
    assert features.dtype == kept and features.is_contiguous()
    assert features.tolist() == values.astype(np.float64).tolist()


@pytest.mark.parametrize(
    ("dtype", "kept"),
    [
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float8_e4m3fn, torch.float32),
        (torch.int8, torch.float32),
    ],
)
def test_tensors_are_read_from_safetensors(dtype: Any, kept: Any, tmp_path: Path) -> None:
    values = torch.tensor([[1.0, -2.0], [4.0, 8.0]]).to(dtype)
    ids = torch.tensor([3, 2**62])
    # Ids in bfloat16 are absurd, but these are whole numbers that cannot have been rounded.
    tensors = {"features": values, "pids": ids, "camids": torch.ones(2, dtype=torch.bfloat16)}
    save_file({**tensors, "more": torch.zeros(1)}, tmp_path / "f.safetensors")
    loaded = load_features(tmp_path / "f.safetensors")
    assert loaded.features.dtype == kept
    assert torch.equal(loaded.features.double(), values.double())
    assert torch.equal(loaded.pids, ids) and loaded.camids.tolist() == [1, 1]
    assert loaded.paths == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_disk_gives_the_figures_of_the_same_numbers(
    dtype: Any, tmp_path: Path
) -> None:
    evaluator = EVALUATORS.build("retrieval")
    figures = []
    for name, convert in (("half", dtype), ("full", torch.float32)):
        for side, seed in (("query", 1), ("gallery", 2)):
            made = some_embeddings(40, 16, seed)
            cameras = torch.full((40,), seed)
            save_file(
                {
                    "features": made.features.to(dtype).to(convert),
                    "pids": made.pids,
                    "camids": cameras,
                },
                tmp_path / f"{name}-{side}.safetensors",
            )
        files = (tmp_path / f"{name}-{side}.safetensors" for side in ("query", "gallery"))
        figures.append(evaluate_features(*files, evaluator).figures)
    assert figures[0] == figures[1] and 0 < figures[0]["mAP"] < 1


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (np.array([1.0, 2.0, -1.0, 2.0**53]), [1, 2, -1, 2**53]),
        (np.array([1, 2, 3, 4], np.uint64), [1, 2, 3, 4]),
        (np.array([1, 2, 3, 4], ">i2"), [1, 2, 3, 4]),
        (np.array([-(2**63), 2**63 - 1, 0, 1]), [-(2**63), 2**63 - 1, 0, 1]),
    ],
)
def test_whole_numbers_are_ids_whatever_their_type(
    ids: NDArray[Any], expected: list[int], tmp_path: Path
) -> None:
    np.savez(tmp_path / "f.npz", **arrays(pids=ids))
    assert load_features(tmp_path / "f.npz").pids.tolist() == expected


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "text": (
        arrays(pids=np.array(["0001", "2", "3", "4"])),
        r"pids are <U4 \(4,\), not \(N,\) who",
    ),
    "fractions": (arrays(pids=np.array([1, 2, 3, 4.5])), "pids are float64"),
    "not a number": (arrays(camids=np.array([1, 2, 3, np.nan])), "camids are float64"),
    "rounded": (arrays(pids=np.array([1, 2, 3, 2**60], np.float32)), "pids are float32"),
    "too large": (arrays(pids=np.array([1, 2, 3, 2**64 - 1], np.uint64)), "pids are uint64"),
    "true or false": (arrays(pids=np.ones(4, bool)), "pids are bool"),
    "two columns": (arrays(pids=np.ones((4, 2), int)), r"pids are int64 \(4, 2\)"),
    "a column": (arrays(camids=np.ones((4, 1), int)), r"camids are int64 \(4, 1\)"),
    "few pids": (arrays(pids=np.ones(3, int)), "there are 4 features, but 3 pids"),
    "many camids": (arrays(camids=np.ones(5, int)), "there are 4 features, but 5 camids"),
    "one vector": (arrays(features=np.ones(4)), r"features are float64 \(4,\), not \(N, D\) num"),
    "a map": (arrays(features=np.ones((4, 3, 2, 2))), "features are float64"),
    "complex": (arrays(features=np.ones((4, 3), complex)), "features are complex128"),
    "bits": (arrays(features=np.ones((4, 3), bool)), "features are bool"),
    "words": (arrays(features=np.full((4, 3), "1")), "features are <U1"),
    "raw bfloat16": (arrays(features=np.ones((4, 3), "V2")), "numpy has no bfloat16, .safetensors"),
    "few paths": (arrays(paths=np.array(["a", "b"])), r"paths are <U1 \(2,\), not \(4,\) texts"),
    "numbered paths": (arrays(paths=np.arange(4)), "paths are int64"),
    "objects": (arrays(features=np.array([[object()]] * 4)), "no .npz file of plain arrays .*pick"),
}


@pytest.mark.parametrize("case", WRONG)
def test_arrays_that_are_wrong_are_refused_in_one_line(case: str, tmp_path: Path) -> None:
    content, reason = WRONG[case]
    np.savez(tmp_path / "f.npz", **content)
    with pytest.raises(DataError, match=reason) as caught:
        load_features(tmp_path / "f.npz")
    assert "\n" not in str(caught.value) and "f.npz" in str(caught.value)


def test_unknown_arrays_are_not_read_even_if_they_hold_objects(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", **arrays(), extra=np.array([object()], dtype=object))
    assert len(load_features(tmp_path / "f.npz").pids) == 4


def test_missing_cameras_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    content = arrays()
    del content["camids"]
    np.savez(tmp_path / "f.npz", **content)
    with pytest.raises(DataError, match=r"lacks camids; .*numpy.zeros\(4, int\).*same_camera keep"):
        load_features(tmp_path / "f.npz")
    # The advice works: with zeros and that option, there are figures.
    for side in ("query", "gallery"):
        np.savez(tmp_path / f"{side}.npz", **content, camids=np.zeros(4, int))
    evaluator = EVALUATORS.build("retrieval", same_camera="keep")
    files = tmp_path / "query.npz", tmp_path / "gallery.npz"
    figures = evaluate_features(*files, evaluator).figures
    assert figures["mAP"] == 1
    with pytest.raises(DataError, match="lacks pids"):
        np.savez(tmp_path / "f.npz", features=content["features"])
        load_features(tmp_path / "f.npz")


def test_a_search_needs_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", features=np.ones((2, 3)))
    loaded = load_features(tmp_path / "f.npz", labelled=False)
    assert loaded.pids.tolist() == loaded.camids.tolist() == [-1, -1]
    with pytest.raises(DataError, match="lacks features; it holds vectors"):
        np.savez(tmp_path / "f.npz", vectors=np.ones((2, 3)))
        load_features(tmp_path / "f.npz", labelled=False)


def hostile(folder: Path) -> dict[str, Path]:
    """Files that are damaged or malicious, by name."""
    whole = folder / "whole.npz"
    np.savez(whole, **arrays(200))
    data = whole.read_bytes()
    made = {
        "empty.npz": b"",
        "html.npz": b"<html>",
        "cut.npz": data[: len(data) // 2],
        "no_end.npz": data[:-30],
        "flipped.npz": data[:300] + bytes([data[300] ^ 1]) + data[301:],
        "pickle.npz": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "empty.safetensors": b"",
        "cut.safetensors": b"",
        "long_header.safetensors": struct.pack("<Q", 2**62) + b"{}",
        "lying.safetensors": b"",
    }
    header = json.dumps(
        {"features": {"dtype": "F32", "shape": [2**40, 2**20], "data_offsets": [0, 16]}}
    ).encode()
    made["lying.safetensors"] = struct.pack("<Q", len(header)) + header + bytes(16)
    for name, content in made.items():
        (folder / name).write_bytes(content)
    save_file({"features": torch.ones(9, 9)}, folder / "good.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:-20])
    huge = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
    huge += b"{'descr': '<f4', 'fortran_order': False, 'shape': (10000000000000, 512), }".ljust(118)
    with zipfile.ZipFile(folder / "huge.npz", "w") as archive:
        archive.writestr("features.npy", huge + bytes(64))
    with zipfile.ZipFile(folder / "raw.npz", "w") as archive:
        archive.writestr("features", b"no array")
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("features.npy", "w", force_zip64=True) as member:
            member.write(huge[:10])
            for _ in range(9):
                member.write(bytes(2**20))
    np.save(folder / "plain.npy", np.ones((2, 3)))
    (folder / "folder.npz").mkdir()
    names = [*made, "huge.npz", "raw.npz", "bomb.npz", "plain.npy", "folder.npz"]
    return {name: folder / name for name in (*names, "missing.npz", "missing.safetensors")}


def test_damaged_and_malicious_files_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reidreg.model.feature_files.UNPACKED_BYTES", 2**20)
    np.savez(tmp_path / "query.npz", **arrays())
    for name, path in hostile(tmp_path).items():
        assert main(["evaluate", "--query", f"{tmp_path}/query.npz", "--gallery", str(path)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and name in lines[0], lines
        assert len(lines[0]) < 400 + len(str(tmp_path))
    with pytest.raises(DataError, match="would unpack from"):
        load_features(tmp_path / "bomb.npz")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "f.npz")
    with pytest.raises(DataError, match="not a feature file"):
        load_features(tmp_path / "f.npz")


def test_features_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="written as .npz"):
        save_features(some_embeddings(), tmp_path / "f.safetensors")
    with pytest.raises(ConfigError, match="float32 or float16"):
        save_features(some_embeddings(), tmp_path / "f.npz", "bfloat16")  # type: ignore[arg-type]
    large = replace(some_embeddings(), features=torch.full((6, 5), 1e5))
    with pytest.raises(DataError, match="1e.05 do not fit float16"):
        save_features(large, tmp_path / "f.npz", "float16")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write"):
        save_features(some_embeddings(), tmp_path / "file/f.npz")
    (tmp_path / "f.npz").mkdir()
    with pytest.raises(DataError, match="cannot write"):
        save_features(some_embeddings(), tmp_path / "f.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.npz", "file"]


def test_figures_that_cannot_be_written_are_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write .*give another --output"):
        write_metrics({"mAP": 1.0}, tmp_path / "file/metrics.json")


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), replacing(path) as file:
        file.write(b"half of the n")
        raise RuntimeError
    assert path.read_bytes() == b"old" and [*tmp_path.iterdir()] == [path]


_KILLED = """
import os, sys
from pathlib import Path
from reidreg.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half of the new")
    file.flush()
    os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "f.npz"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", _KILLED, str(path)], capture_output=True)
    assert done.returncode == -9, done.stderr
    assert path.read_bytes() == b"old"
    (left,) = [other.name for other in tmp_path.iterdir() if other != path]
    assert left.startswith(".f.npz.") and left.endswith(".partial")


def test_half_precision_features_are_ranked_as_they_are(tmp_path: Path) -> None:
    # They stay in half precision until the distances convert a few vectors at a time.
    save_features(some_embeddings(30), tmp_path / "f.npz", "float16")
    loaded = load_features(tmp_path / "f.npz")
    assert loaded.features.dtype == torch.float16
    wide = replace(loaded, features=loaded.features.float())
    assert (
        match_positions(loaded, loaded, same_camera="keep").positions.tolist()
        == match_positions(wide, wide, same_camera="keep").positions.tolist()
    )
