"""The feature cache: when features are extracted again, and when they are not."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import Command, small_run
from reidreg import (
    Embeddings,
    Sample,
    evaluate,
    load_checkpoint,
    load_config,
    load_features,
)
from reidreg.cli.main import main
from reidreg.errors import DataError
from reidreg.evaluation.evaluate import evaluate_checkpoint
from reidreg.model.checkpoint import save_checkpoint
from reidreg.model.embedder import Embedder
from reidreg.model.feature_cache import FeatureCache, describe_embedder, prune
from reidreg.model.restore import caching_embedder, open_checkpoint, restore_embedder
from reidreg.training.run import build_run
from reidreg.training.state import capture


@pytest.fixture(scope="module")
def model(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights."""
    path = tmp_path_factory.mktemp("model") / "best.ckpt"
    config = load_config("aihub_kaist", small_run(aihub_root, path.parent))
    save_checkpoint(capture(build_run(config), resumable=False), path)
    return path


@pytest.fixture
def data(aihub_root: Path, tmp_path: Path) -> Path:
    """A copy of the data, for a test to change."""
    for name in ("query", "bounding_box_test"):
        shutil.copytree(aihub_root / "aihub_kaist" / name, tmp_path / "data/aihub_kaist" / name)
    return tmp_path / "data"


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The splits that are extracted, in order."""
    seen: list[str] = []
    embed = Embedder.embed

    def recording(embedder: Embedder, samples: Any, what: str) -> Embeddings:
        seen.append(what)
        return embed(embedder, samples, what)

    monkeypatch.setattr(Embedder, "embed", recording)
    return seen


def cache_of(ckpt: Path, folder: Path, options: dict[str, Any] | None = None) -> FeatureCache:
    """The feature cache of a checkpoint, with overrides of its configuration."""
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
    root, folder = {"dataset.root": str(data)}, tmp_path / "cache"
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
    cache = cache_of(model, tmp_path)
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


def test_another_model_extracts_again_and_says_so(
    model: Path, samples: list[Sample], tmp_path: Path, extracted: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    folder = tmp_path / "cache"
    first = cache_of(model, folder).embed(samples, "query")
    checkpoint = load_checkpoint(model)
    save_checkpoint(replace(checkpoint, epoch=99), tmp_path / "m.ckpt")
    again = cache_of(tmp_path / "m.ckpt", folder).embed(samples, "query")
    assert extracted == ["query"] and torch.equal(again.features, first.features)
    assert "another model" not in caplog.text
    weight = next(name for name in checkpoint.model if name.startswith("backbone."))
    checkpoint.model[weight] = checkpoint.model[weight] * 1.001
    save_checkpoint(checkpoint, tmp_path / "m.ckpt")
    other = cache_of(tmp_path / "m.ckpt", folder).embed(samples, "query")
    assert extracted == ["query", "query"] and not torch.equal(other.features, first.features)
    assert "cached features of the query are of another model, other options or" in caplog.text


def test_a_changed_image_extracts_its_split_again(
    model: Path, data: Path, tmp_path: Path, extracted: list[str]
) -> None:
    root, folder = {"dataset.root": str(data)}, tmp_path / "cache"
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


def test_an_edited_plugin_extracts_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_nothing_is_stored_for_a_class_without_source(
    model: Path, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(model, tmp_path / "cache")
    monkeypatch.setattr(type(cache.embedder.model.head), "__module__", "typed_here")
    monkeypatch.setitem(sys.modules, "typed_here", types.ModuleType("typed_here"))
    assert len(cache.embed(samples, "query").features) == len(samples)
    assert not (tmp_path / "cache").exists()


def test_damaged_and_replaced_files_are_never_used(
    model: Path, samples: list[Sample], tmp_path: Path, extracted: list[str], caplog: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    cache = cache_of(model, tmp_path / "cache")
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
        # Intact archives of other features.
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
        assert f"{query} is damaged or was replaced; extracting the features again" in caplog.text
    extracted.clear()
    assert torch.equal(cache.embed(samples, "query").features, features) and not extracted


def test_a_folder_that_cannot_be_written_to_is_a_line_in_the_log(
    model: Path, samples: list[Sample], tmp_path: Path, caplog: Any, monkeypatch: Any
) -> None:
    caplog.set_level(logging.INFO, "reidreg")
    (tmp_path / "file").write_text("in the way")
    cache = cache_of(model, tmp_path / "file")
    assert len(cache.embed(samples, "query").features) == len(samples)
    assert "features are not cached: cannot write to" in caplog.text

    def full(file: Any, **arrays: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    cache = cache_of(model, tmp_path / "full")
    assert len(cache.embed(samples, "query").features) == len(samples)
    assert "No space left on device" in caplog.text
    assert not [*cache.folder.iterdir()]


def test_temporary_files_of_a_killed_process_are_removed(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / ".query-0123456789abcdef.npz.77.partial").write_bytes(b"half")
    cache_of(model, folder).embed(samples, "query")
    (kept,) = folder.iterdir()
    assert kept.suffix == ".npz"


def test_the_least_recently_used_features_go_when_the_folder_is_full(tmp_path: Path) -> None:
    def put(name: str, size: int, used: int) -> Path:
        path = tmp_path / f"{name}-{'0' * 15}{used}.npz"
        path.write_bytes(bytes(size))
        os.utime(path, (used, used))
        return path

    files = [put("gallery", 40, used) for used in range(5)]
    mine = tmp_path / "gallery-features.npz"  # not a file of the cache
    mine.write_bytes(bytes(1000))
    prune(tmp_path, {files[0]}, limit=130)
    assert sorted(tmp_path.iterdir()) == sorted([mine, files[0], files[3], files[4]])
    prune(tmp_path, {files[3], files[4]}, limit=1)
    assert sorted(tmp_path.iterdir()) == sorted([mine, files[3], files[4]])


def test_reading_features_is_a_use_of_them(
    model: Path, samples: list[Sample], tmp_path: Path
) -> None:
    cache_of(model, tmp_path / "cache").embed(samples, "query")
    (kept,) = (tmp_path / "cache").iterdir()
    os.utime(kept, (1, 1))
    cache_of(model, tmp_path / "cache").embed(samples, "query")
    assert kept.stat().st_mtime > 1


def test_a_missing_image_is_an_error_of_the_extraction(model: Path, tmp_path: Path) -> None:
    cache = cache_of(model, tmp_path / "cache")
    with pytest.raises(DataError, match="the image is gone"):
        cache.embed([Sample(str(tmp_path / "x.jpg"), 1, 1)], "query")
    with pytest.raises(DataError, match="no images"):
        cache.embed([], "query")
    assert not (tmp_path / "cache").exists()


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
def test_a_wrong_output_is_an_error_before_anything_is_extracted(
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
