"""Feature files in and out, features that are kept, and mirror images at test time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import struct
import subprocess
import sys
import types
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
from PIL import Image, ImageOps
from safetensors.torch import save_file

from conftest import Command, small_run
from reidreg import (
    Embeddings,
    FeatureExtractor,
    Sample,
    evaluate,
    load_checkpoint,
    load_config,
    load_features,
    match_positions,
    save_features,
)
from reidreg.cli.main import main
from reidreg.config.sections import config_from_dict
from reidreg.errors import ConfigError, DataError
from reidreg.evaluation.evaluate import evaluate_checkpoint, evaluate_features, write_metrics
from reidreg.files import replacing
from reidreg.model.checkpoint import save_checkpoint
from reidreg.model.embedder import Embedder
from reidreg.model.feature_cache import FeatureCache, describe_embedder, prune
from reidreg.model.restore import caching_embedder, open_checkpoint, restore_embedder
from reidreg.parts.interfaces import EVALUATORS
from reidreg.training.resuming import changes_between
from reidreg.training.run import build_run
from reidreg.training.state import capture


def some_embeddings(count: int = 6, width: int = 5, seed: int = 0) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(
        torch.randn(count, width, generator=generator),
        torch.arange(count) % 3,
        torch.arange(count) % 2,
        tuple(f"카메라/{number}.jpg" for number in range(count)),
    )


def arrays(count: int = 4, **others: Any) -> dict[str, Any]:
    """What a feature file holds, with some of it replaced."""
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
    # Ids of bfloat16 are absurd, but whole numbers that nothing was rounded to.
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


def test_objects_that_nobody_asked_for_are_not_even_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", **arrays(), extra=np.array([object()], dtype=object))
    assert len(load_features(tmp_path / "f.npz").pids) == 4


def test_missing_cameras_are_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    content = arrays()
    del content["camids"]
    np.savez(tmp_path / "f.npz", **content)
    with pytest.raises(DataError, match=r"lacks camids; .*numpy.zeros\(4, int\).*same_camera keep"):
        load_features(tmp_path / "f.npz")
    # What it says is right: with zeros and that option, there are figures.
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
    """Files that are damaged, or made to harm."""
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


def test_damaged_and_hostile_files_are_one_line_and_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reidreg.model.feature_files._LARGE", 2**20)
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


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
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


def test_figures_that_cannot_be_written_are_said_too(tmp_path: Path) -> None:
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


# --------------------------------------------------------------------- a model and its features


@pytest.fixture(scope="module")
def model(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    config = load_config("aihub_kaist", small_run(aihub_root, path.parent))
    save_checkpoint(capture(build_run(config), resumable=False), path)
    return path


@pytest.fixture
def data(aihub_root: Path, tmp_path: Path) -> Path:
    """A copy of the data that a test may change."""
    for name in ("query", "bounding_box_test"):
        shutil.copytree(aihub_root / "aihub_kaist" / name, tmp_path / "data/aihub_kaist" / name)
    return tmp_path / "data"


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that have been extracted."""
    seen: list[str] = []
    embed = Embedder.embed

    def watched(embedder: Embedder, samples: Any, what: str) -> Embeddings:
        seen.append(what)
        return embed(embedder, samples, what)

    monkeypatch.setattr(Embedder, "embed", watched)
    return seen


def keeping(ckpt: Path, folder: Path, options: dict[str, Any] | None = None) -> FeatureCache:
    """The cache of a checkpoint under some options."""
    found = caching_embedder(*open_checkpoint(ckpt, options or {}), folder)
    assert isinstance(found, FeatureCache)
    return found


@pytest.fixture
def samples(data: Path) -> list[Sample]:
    paths = sorted((data / "aihub_kaist/query").glob("*.jpg"))[:4]
    return [Sample(str(path), pid, pid + 7) for pid, path in enumerate(paths)]


def test_another_protocol_extracts_nothing_and_gives_the_same_bits(
    model: Path, data: Path, tmp_path: Path, extracted: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    root, folder = {"dataset.root": str(data)}, tmp_path / "kept"
    plain = evaluate(model, root)
    extracted.clear()
    assert evaluate(model, root, cache=folder) == plain and extracted == ["query", "gallery"]
    assert "cache" not in caplog.text
    extracted.clear()
    assert evaluate(model, root, cache=folder) == plain and extracted == []
    assert caplog.text.count("from the cache") == 2
    options = {"evaluator": {"metric": "euclidean", "same_camera": "keep", "rerank": True}}
    others = evaluate(model, root, options, cache=folder)
    assert extracted == [] and others == evaluate(model, root, options) != plain
    kept = [*folder.iterdir()]
    assert sorted(path.name.partition("-")[0] for path in kept) == ["gallery", "query"]
    if os.name == "posix":
        assert {stat.S_IMODE(path.stat().st_mode) for path in kept} == {0o600}


def test_each_option_that_changes_features_changes_the_key(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"head.feature": "before"},
        {"input.flip_test": True},
        {"input.size": [48, 24]},
        {"input.mean": [0.4, 0.5, 0.5]},
        {"input.std": [0.4, 0.5, 0.5]},
        {"train.precision": "bf16"},
        {"train.eval_batch_size": 7},
        {"backbone.tokens": "patch"},
    ]
    checkpoint = load_checkpoint(model)

    def key(change: dict[str, Any]) -> str:
        config = load_config(checkpoint.config, change)
        cache = caching_embedder(checkpoint, config, tmp_path)
        assert isinstance(cache, FeatureCache)
        return cache.key(samples)

    keys = [key(change) for change in changes]
    assert len(set(keys)) == len(changes)
    others = {
        "input.flip_prob": 0.1,
        "input.padding": 3,
        "train.seed": 3,
        "optimizer.lr": 0.1,
        "evaluator.metric": "euclidean",
    }
    assert key(others) == keys[0]


def test_each_change_of_the_data_changes_the_key(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    cache = keeping(model, tmp_path)
    key = cache.key(samples)
    assert cache.key([replace(sample, pid=99) for sample in samples]) == key
    assert cache.key(samples[1:]) != key and cache.key(samples[::-1]) != key
    known = cache.embedder.labels.camids[0]
    assert cache.key([replace(samples[0], camid=known), *samples[1:]]) != key
    image = Path(samples[0].path)
    status = image.stat()
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    touched = cache.key(samples)
    image.write_bytes(image.read_bytes() + b"x")
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len({key, touched, cache.key(samples)}) == 3


def test_another_model_extracts_anew_and_says_so(
    model: Path, samples: list[Sample], tmp_path: Path, extracted: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    folder = tmp_path / "kept"
    first = keeping(model, folder).embed(samples, "query")
    checkpoint = load_checkpoint(model)
    save_checkpoint(replace(checkpoint, epoch=99), tmp_path / "m.ckpt")
    again = keeping(tmp_path / "m.ckpt", folder).embed(samples, "query")
    assert extracted == ["query"] and torch.equal(again.features, first.features)
    assert "another model" not in caplog.text
    weight = next(name for name in checkpoint.model if name.startswith("backbone."))
    checkpoint.model[weight] = checkpoint.model[weight] * 1.001
    save_checkpoint(checkpoint, tmp_path / "m.ckpt")
    other = keeping(tmp_path / "m.ckpt", folder).embed(samples, "query")
    assert extracted == ["query", "query"] and not torch.equal(other.features, first.features)
    assert "cached features of the query are of another model, other options or" in caplog.text


def test_a_changed_image_extracts_its_split_anew(
    model: Path, data: Path, tmp_path: Path, extracted: list[str]
) -> None:
    root, folder = {"dataset.root": str(data)}, tmp_path / "kept"
    before = evaluate_checkpoint(*open_checkpoint(model, root), folder)
    image = sorted((data / "aihub_kaist/query").glob("*.jpg"))[0]
    with Image.open(image) as opened:
        changed = opened.convert("L").convert("RGB")
    changed.save(image)
    extracted.clear()
    after = evaluate_checkpoint(*open_checkpoint(model, root), folder)
    assert extracted == ["query"]
    differing = (before.query.features != after.query.features).any(dim=1)
    assert differing.nonzero().flatten().tolist() == [0]
    assert torch.equal(before.gallery.features, after.gallery.features)


def test_a_plugin_that_somebody_works_on_extracts_anew(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedder = restore_embedder(*open_checkpoint(model))
    code = describe_embedder(embedder)["code"]
    plugin = {"reidreg_plugins.backbones.timm", "reidreg_plugins.heads.pooling"}
    assert plugin | {
        "reidreg.data.transforms",
        "reidreg.data.loading",
        "reidreg.model.model",
    } <= set(code)
    assert not [name for name in code if "evaluators" in name or name.startswith(("torch", "abc"))]
    read = Path.read_bytes
    edited = "reidreg_plugins.heads.pooling"
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: read(path) + b"#" * (path.stem == "pooling")
    )
    changed = describe_embedder(embedder)["code"]
    assert {name for name in code if code[name] != changed[name]} == {edited}


def test_nothing_is_kept_of_a_class_without_source(
    model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = keeping(model, tmp_path / "kept")
    monkeypatch.setattr(type(cache.embedder.model.head), "__module__", "typed_here")
    monkeypatch.setitem(sys.modules, "typed_here", types.ModuleType("typed_here"))
    assert len(cache.embed(samples, "query").features) == len(samples)
    assert not (tmp_path / "kept").exists()


def test_damaged_and_swapped_files_are_never_used(
    model: Path, samples: list[Sample], tmp_path: Path, extracted: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    cache = keeping(model, tmp_path / "kept")
    features = cache.embed(samples, "query").features
    cache.embed(samples[::-1], "other")
    (query,) = cache.folder.glob("query-*.npz")
    (other,) = cache.folder.glob("other-*.npz")
    whole = query.read_bytes()
    with np.load(query) as file:
        content = dict(file)
    damages: list[bytes | dict[str, Any]] = [
        b"",
        b"PK",
        whole[:-40],
        whole[: len(whole) // 2],
        whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        # Whole archives, of other features.
        other.read_bytes(),
        {**content, "features": content["features"] + 1},
        {**content, "features": content["features"][::-1]},
        {**content, "features": content["features"][:2]},
        {**content, "features": np.array([object()])},
        {"features": content["features"]},
    ]
    for damage in damages:
        if isinstance(damage, bytes):
            query.write_bytes(damage)
        else:
            np.savez(query, **damage)
        extracted.clear()
        caplog.clear()
        assert torch.equal(cache.embed(samples, "query").features, features)
        assert extracted == ["query"]
        assert f"{query} is damaged, or not what its name says" in caplog.text
    extracted.clear()
    assert torch.equal(cache.embed(samples, "query").features, features) and not extracted


def test_a_folder_that_cannot_be_written_to_is_a_line_in_the_log(
    model: Path, samples: list[Sample], tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    (tmp_path / "file").write_text("in the way")
    cache = keeping(model, tmp_path / "file")
    assert len(cache.embed(samples, "query").features) == len(samples)
    assert "features are not cached: cannot write to" in caplog.text

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    cache = keeping(model, tmp_path / "full")
    assert len(cache.embed(samples, "query").features) == len(samples)
    assert "No space left on device" in caplog.text
    assert not [*cache.folder.iterdir()]


def test_what_a_kill_left_behind_is_removed(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    (folder / ".query-0123456789abcdef.npz.77.partial").write_bytes(b"half")
    keeping(model, folder).embed(samples, "query")
    (kept,) = folder.iterdir()
    assert kept.suffix == ".npz"


def test_the_oldest_features_go_when_the_folder_is_full(tmp_path: Path) -> None:
    def put(name: str, size: int, used: int) -> Path:
        path = tmp_path / f"{name}-{'0' * 15}{used}.npz"
        path.write_bytes(bytes(size))
        os.utime(path, (used, used))
        return path

    files = [put("gallery", 40, used) for used in range(5)]
    mine = tmp_path / "gallery-features.npz"  # not one of the cache's
    mine.write_bytes(bytes(1000))
    prune(tmp_path, {files[0]}, limit=130)
    assert sorted(tmp_path.iterdir()) == sorted([mine, files[0], files[3], files[4]])
    prune(tmp_path, {files[3], files[4]}, limit=1)
    assert sorted(tmp_path.iterdir()) == sorted([mine, files[3], files[4]])


def test_finding_features_is_a_use_of_them(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    keeping(model, tmp_path / "kept").embed(samples, "query")
    (kept,) = (tmp_path / "kept").iterdir()
    os.utime(kept, (1, 1))
    keeping(model, tmp_path / "kept").embed(samples, "query")
    assert kept.stat().st_mtime > 1


def test_a_missing_image_is_told_by_who_reads_it(model: Path, tmp_path: Path) -> None:
    cache = keeping(model, tmp_path / "kept")
    with pytest.raises(DataError, match="the image is gone"):
        cache.embed([Sample(str(tmp_path / "x.jpg"), 1, 1)], "query")
    with pytest.raises(DataError, match="no images"):
        cache.embed([], "query")
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_the_command_line_keeps_features_beside_the_run(
    model: Path, tmp_path: Path, reidreg: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    ckpt = str(shutil.copy(model, run / "checkpoints/best.ckpt"))
    query = ["extract", "--ckpt", ckpt, "--split", "query", "--output"]
    assert main([*query, str(tmp_path / "0.npz"), "--no_cache"]) == 0
    assert not (run / "feature_cache").exists()
    assert main([*query, str(tmp_path / "1.npz"), "--dtype", "float16"]) == 0
    assert "cache" not in capsys.readouterr().out
    done = reidreg("evaluate", "--ckpt", ckpt, "--output", "out")
    assert done.returncode == 0, done.stderr
    assert "features of the query from the cache" in done.stdout
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == evaluate(model)
    plain, half = (load_features(tmp_path / f"{name}.npz").features for name in (0, 1))
    assert half.dtype == torch.float16 and torch.equal(half, plain.half())


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--output", "f.txt"], "written as .npz"),
        (["--output", "f.npz", "--dtype", "bfloat16"], "dtype"),
    ],
)
def test_a_wrong_output_is_said_before_anything_is_extracted(
    arguments: list[str],
    word: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Embedder, "embed", None)
    assert main(["extract", "--ckpt", str(model), "--split", "query", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert word in line


# --------------------------------------------------------------------- mirror images


def mirrored_pair(folder: Path) -> list[Sample]:
    """An image that is not symmetric, of the input's very size, and its mirror image."""
    noise = np.random.default_rng(3).integers(0, 255, (64, 32, 3), dtype=np.uint8)
    noise[:, :16] //= 3
    image = Image.fromarray(noise)
    image.save(folder / "a.png")
    ImageOps.mirror(image).save(folder / "b.png")
    return [Sample(str(folder / name), 1, camid) for camid, name in enumerate(("a.png", "b.png"))]


def test_an_image_and_its_mirror_image_have_one_feature(model: Path, tmp_path: Path) -> None:
    samples = mirrored_pair(tmp_path)
    plain = restore_embedder(*open_checkpoint(model)).embed(samples, "query").features
    flipped = restore_embedder(*open_checkpoint(model, {"input.flip_test": True}))
    both = flipped.embed(samples, "query").features
    scale = plain.abs().max()
    assert torch.allclose(both[0], both[1], atol=1e-6 * scale, rtol=0)
    assert (plain[0] - plain[1]).abs().max() > 1e-2 * scale
    assert torch.allclose(both[0], plain.mean(dim=0), atol=1e-6 * scale, rtol=0)


def test_the_extractor_averages_mirror_images_as_its_checkpoint_says(
    model: Path, tmp_path: Path
) -> None:
    samples = mirrored_pair(tmp_path)
    paths = [sample.path for sample in samples]
    plain = FeatureExtractor(model, device="cpu")(paths)
    checkpoint = load_checkpoint(model)
    checkpoint.config["input"]["flip_test"] = True
    save_checkpoint(checkpoint, tmp_path / "flip.ckpt")
    both = FeatureExtractor(tmp_path / "flip.ckpt", device="cpu")(paths)
    assert torch.allclose(both[0], both[1], atol=1e-6)
    assert torch.allclose(both.norm(dim=1), torch.ones(2), atol=1e-6)
    assert not torch.allclose(plain[0], plain[1], atol=1e-3)


# --------------------------------------------------------------------- older checkpoints


def test_a_checkpoint_without_the_newer_options_is_read_as_before(
    model: Path, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(model)
    assert checkpoint.config["input"].pop("flip_test") is False
    newer = set(checkpoint.config["evaluator"]) - {"name", "metric", "max_rank", "same_camera"}
    for option in newer:
        del checkpoint.config["evaluator"][option]
    save_checkpoint(checkpoint, tmp_path / "old.ckpt")
    assert evaluate(tmp_path / "old.ckpt") == evaluate(model)
    old = load_checkpoint(tmp_path / "old.ckpt").resolved_config()
    assert old.input.flip_test is False
    assert config_from_dict(old.as_dict()) == old
    # A resume shows options that changed, not those that were not there yet.
    current = load_checkpoint(model).config
    assert changes_between(old.as_dict(), current) == []
    assert changes_between({**old.as_dict(), "gone": 1}, current)
    crops = [np.full((64, 32, 3), 90, np.uint8)]
    assert torch.equal(
        FeatureExtractor(tmp_path / "old.ckpt", "cpu")(crops),
        FeatureExtractor(model, "cpu")(crops),
    )


def test_loaded_features_are_ranked_without_another_copy(tmp_path: Path) -> None:
    # Half precision stays what it is until the distances take a few vectors at a time.
    save_features(some_embeddings(30), tmp_path / "f.npz", "float16")
    loaded = load_features(tmp_path / "f.npz")
    assert loaded.features.dtype == torch.float16
    wide = replace(loaded, features=loaded.features.float())
    assert (
        match_positions(loaded, loaded, same_camera="keep").positions.tolist()
        == match_positions(wide, wide, same_camera="keep").positions.tolist()
    )
