"""Gallery indexes: exact and approximate search, their files, and the command line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Command, small_run
from reidreg import (
    Embeddings,
    GalleryIndex,
    extract,
    fit,
    load_checkpoint,
    load_config,
    ranked_lists,
)
from reidreg.cli.main import main
from reidreg.errors import ConfigError, DataError
from reidreg.files import exclusive
from reidreg.index import tuning
from reidreg.index.approximate import MIN_ITEMS, choose_type
from reidreg.index.files import MANIFEST, manifest_digest
from reidreg.index.gallery import add_to_index
from reidreg.index.records import FeatureModel, Threshold
from reidreg.index.source import Source
from reidreg.model.checkpoint import save_checkpoint
from reidreg.model.feature_files import save_features
from reidreg.retrieval.index_search import Vectors

APPROXIMATE = ("ivf", "hnsw", "pq")
TYPES = ("flat", *APPROXIMATE)


def clustered(count: int, dim: int = 32, seed: int = 0, cameras: int = 4) -> Embeddings:
    """Features in clusters, one for each person, as a model extracts them."""
    rng = np.random.default_rng(seed)
    people = rng.standard_normal((count // 10, dim))
    pids = rng.integers(0, len(people), count)
    features = people[pids] + 0.5 * rng.standard_normal((count, dim))
    return Embeddings(
        torch.from_numpy(features.astype(np.float32)),
        torch.from_numpy(pids),
        torch.from_numpy(rng.integers(0, cameras, count)),
        tuple(f"{number:05d}.jpg" for number in range(count)),
    )


def unlabelled(features: Any, paths: tuple[str, ...] = ()) -> Embeddings:
    features = torch.as_tensor(features, dtype=torch.float32)
    unknown = torch.full((len(features),), -1)
    return Embeddings(features, unknown, unknown, paths)


def part(embeddings: Embeddings, rows: slice) -> Embeddings:
    return Embeddings(
        embeddings.features[rows],
        embeddings.pids[rows],
        embeddings.camids[rows],
        embeddings.paths[rows],
    )


def exact(
    features: torch.Tensor, gallery: Embeddings, k: int, metric: str, camids: Any = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranked lists that leave out all items of a camera: every item gets the same pid."""
    width = min(k, len(gallery.pids))
    query = Embeddings(
        features,
        torch.zeros(len(features), dtype=torch.int64),
        torch.as_tensor(camids) if camids is not None else torch.full((len(features),), -9),
    )
    one_pid = replace(gallery, pids=torch.zeros_like(gallery.pids))
    return ranked_lists(query, one_pid, k=width, metric=metric)


@pytest.fixture(scope="module")
def gallery() -> Embeddings:
    return clustered(900)


@pytest.fixture(scope="module")
def indexes(gallery: Embeddings) -> dict[str, GalleryIndex]:
    """One index of each type; tests must not change them."""
    return {name: GalleryIndex.build(gallery, index_type=name, recall=0.9) for name in TYPES}


# --------------------------------------------------------------------- exact search


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    metric=st.sampled_from(["cosine", "euclidean"]),
    exclude=st.booleans(),
)
def test_flat_equals_ranked_lists_also_with_ties(
    data: st.DataObject, metric: str, exclude: bool
) -> None:
    dim = data.draw(st.integers(1, 3))
    vector = st.lists(st.integers(-2, 2), min_size=dim, max_size=dim).filter(any)
    rows = data.draw(st.lists(vector, min_size=2, max_size=60))
    queries = torch.tensor(data.draw(st.lists(vector, min_size=1, max_size=4)), dtype=torch.float32)
    k = data.draw(st.integers(1, len(rows) + 3))
    camids = torch.tensor([number % 3 for number in range(len(rows))])
    items = replace(unlabelled(rows), camids=camids)
    cut = data.draw(st.integers(1, len(rows) - 1))
    index = GalleryIndex.build(part(items, slice(0, cut)), metric=metric)
    index.add(part(items, slice(cut, None)))
    cameras = torch.arange(len(queries)) % 4 if exclude else None
    numbers, scores = index.search(queries, k, cameras)
    wanted, distances = exact(queries, items, k, metric, cameras)
    assert torch.equal(numbers, wanted)
    shown = 1 - distances if metric == "cosine" else distances
    torch.testing.assert_close(scores, shown, rtol=0, atol=1e-6)


def test_flat_is_exact_where_float32_products_are_equal() -> None:
    # 300 items with differences below the precision of float32 products, and 300 equal ones.
    rng = np.random.default_rng(0)
    base = np.ones((1, 64), dtype=np.float32)
    near = base + rng.integers(0, 3, (300, 64)) * np.float32(2**-22)
    items = unlabelled(np.concatenate([near, np.repeat(base, 300, axis=0)]))
    index = GalleryIndex.build(items, metric="euclidean")
    query = torch.from_numpy(base)
    assert torch.equal(index.search(query, 20)[0], exact(query, items, 20, "euclidean")[0])
    assert index.search(query, 3)[0].tolist() == [[300, 301, 302]]


@pytest.mark.parametrize("length", [1e-30, 1e-20, 1e18])
def test_flat_is_exact_for_features_of_any_length(length: float, gallery: Embeddings) -> None:
    scaled = replace(gallery, features=gallery.features * length)
    index = GalleryIndex.build(scaled, metric="euclidean")
    query = scaled.features[:5]
    assert torch.equal(index.search(query, 8)[0], exact(query, scaled, 8, "euclidean")[0])


def test_the_search_is_exact_for_a_query_far_longer_than_the_items() -> None:
    # The squares overflow float32, in which candidates are compared.
    items = unlabelled(1e-3 * np.random.default_rng(0).standard_normal((200, 4)))
    index = GalleryIndex.build(items, metric="euclidean")
    query = torch.full((1, 4), 1e18)
    assert torch.equal(index.search(query, 5)[0], exact(query, items, 5, "euclidean")[0])
    tiny = GalleryIndex.build(unlabelled(np.full((1, 4), 1e-3)), metric="euclidean")
    with pytest.raises(DataError, match="rebuild it from all features"):
        tiny.add(unlabelled(np.full((1, 4), 3e38)))
    assert len(tiny) == 1 and tiny.search(torch.ones(1, 4))[0].tolist() == [[0]]


def test_half_precision_features_keep_their_values(
    gallery: Embeddings,
) -> None:
    half = replace(gallery, features=gallery.features.to(torch.bfloat16))
    index = GalleryIndex.build(half)
    query = half.features[:4]
    wanted = exact(query.float(), replace(half, features=half.features.float()), 6, "cosine")
    assert torch.equal(index.search(query, 6)[0], wanted[0])


def test_vectors_in_pieces_are_read_as_one_array() -> None:
    rows = np.arange(22, dtype=np.float32).reshape(11, 2)
    vectors = Vectors([rows[:4], rows[4:5], rows[5:]])
    wanted = np.array([10, 0, 4, 3, 4, 5])
    assert np.array_equal(vectors.take(wanted), rows[wanted])
    starts, blocks = zip(*vectors.blocks(3), strict=True)
    assert starts == (0, 3, 4, 5, 8)
    assert np.array_equal(np.concatenate(blocks), rows)


# --------------------------------------------------------------------- approximate search


@pytest.mark.parametrize("name", APPROXIMATE)
def test_the_measured_recall_equals_a_naive_count(
    name: str, indexes: dict[str, GalleryIndex], gallery: Embeddings
) -> None:
    index = indexes[name]
    assert index.recall is not None
    assert (index.recall.k, index.recall.queries, index.recall.items) == (10, 900, 900)
    truth = exact(gallery.features, gallery, 11, "cosine")[0].tolist()
    found = index.search(gallery.features, 11)[0].tolist()
    shares = []
    for item, (right, got) in enumerate(zip(truth, found, strict=True)):
        nearest = [other for other in right if other != item][:10]
        shares.append(len(set(nearest) & {other for other in got if other != item}) / 10)
    assert index.recall.reached == pytest.approx(np.mean(shares), abs=1e-9)
    assert index.recall.reached >= index.recall.wanted == 0.9


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_results_have_exact_order_and_scores(
    name: str, indexes: dict[str, GalleryIndex], gallery: Embeddings
) -> None:
    numbers, scores = indexes[name].search(gallery.features[:50], 5)
    assert torch.equal(numbers[:, 0], torch.arange(50))
    unit = torch.nn.functional.normalize(gallery.features.double())
    cosines = (unit[:50, None] * unit[numbers]).sum(dim=2)
    torch.testing.assert_close(scores.double(), cosines, rtol=0, atol=1e-6)
    assert bool((scores.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_a_higher_recall_is_reached_by_searching_more(name: str, metric: str) -> None:
    # Without clusters, the nearest items are spread over many cells.
    items = unlabelled(np.random.default_rng(1).standard_normal((700, 8)))
    low = GalleryIndex.build(items, index_type=name, metric=metric, recall=0.3)
    high = GalleryIndex.build(items, index_type=name, metric=metric, recall=0.99)
    assert low.recall is not None and high.recall is not None
    assert high.recall.reached >= 0.99 and high.recall.reached >= low.recall.reached
    assert all(high.settings[key] >= low.settings[key] for key in low.settings)
    assert high.settings != low.settings or low.recall.reached >= 0.99


def test_a_recall_out_of_reach_is_logged(
    gallery: Embeddings, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tuning, "search_settings", lambda index: [{"nprobe": 1}])
    index = GalleryIndex.build(gallery, index_type="ivf", recall=1.0)
    assert index.recall is not None and 0.5 < index.recall.reached < 1
    (line,) = caplog.messages
    assert f"ivf reaches a recall@10 of {index.recall.reached:.3f} at most, not 1" in line


@pytest.mark.parametrize("name", TYPES)
def test_excluding_a_camera_still_finds_all_other_items(name: str, gallery: Embeddings) -> None:
    # All but five items are by camera 0; searching a few cells, or the graph, may miss the five.
    camids = torch.zeros(900, dtype=torch.int64)
    camids[torch.tensor([3, 250, 500, 750, 899])] = 1
    items = replace(gallery, camids=camids)
    index = GalleryIndex.build(items, index_type=name, recall=0.3)
    query = gallery.features[:20]
    numbers, scores = index.search(query, 10, torch.zeros(20))
    wanted, _ = exact(query, items, 10, "cosine", torch.zeros(20, dtype=torch.int64))
    assert torch.equal(numbers, wanted)
    assert bool((numbers[:, 5:] == -1).all()) and bool(scores[:, 5:].isinf().all())
    assert bool(scores[:, :5].isfinite().all())


@pytest.mark.parametrize("name", TYPES)
def test_a_k_beyond_the_size_gives_all_items_in_order(
    name: str, indexes: dict[str, GalleryIndex], gallery: Embeddings
) -> None:
    numbers, _ = indexes[name].search(gallery.features[:3], 5000)
    assert torch.equal(numbers, exact(gallery.features[:3], gallery, 5000, "cosine")[0])


@pytest.mark.parametrize("name", TYPES)
def test_each_query_excludes_its_own_camera(
    name: str, indexes: dict[str, GalleryIndex], gallery: Embeddings
) -> None:
    numbers, _ = indexes[name].search(gallery.features[:60], 8, gallery.camids[:60])
    assert not bool((gallery.camids[numbers] == gallery.camids[:60, None]).any())


@pytest.mark.parametrize("name", TYPES)
def test_the_same_gallery_gives_the_same_files(
    name: str, indexes: dict[str, GalleryIndex], gallery: Embeddings, tmp_path: Path
) -> None:
    again = GalleryIndex.build(gallery, index_type=name, recall=0.9)
    for index, folder in ((indexes[name], "one"), (again, "two")):
        index.save(tmp_path / folder)
    one, two = ((tmp_path / folder / MANIFEST).read_text() for folder in ("one", "two"))
    assert one == two


def test_building_prints_nothing(gallery: Embeddings, capfd: pytest.CaptureFixture[str]) -> None:
    # faiss writes its warnings to the file descriptors of stdout and stderr.
    for name in TYPES:
        count = MIN_ITEMS[name]
        GalleryIndex.build(part(gallery, slice(0, count)), index_type=name)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("dim", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("name", APPROXIMATE)
def test_features_of_few_dimensions_can_be_indexed(name: str, dim: int) -> None:
    items = unlabelled(np.random.default_rng(0).standard_normal((700, dim)))
    index = GalleryIndex.build(items, index_type=name, metric="euclidean")
    assert index.search(items.features[:9], 1)[0].flatten().tolist() == list(range(9))


def test_auto_chooses_the_type_by_size_and_recall() -> None:
    million = 2**20
    assert choose_type("auto", million, 512, 0.95) == "flat"
    assert choose_type("auto", million + 1, 512, 0.95) == "ivf"
    assert choose_type("auto", 16 * million, 512, 0.95) == "ivf"
    assert choose_type("auto", 16 * million + 1, 512, 0.95) == "pq"
    assert choose_type("auto", 16 * million + 1, 512, 1.0) == "flat"
    for name in APPROXIMATE:
        assert choose_type(name, MIN_ITEMS[name], 8, 0.95) == name
        assert choose_type(name, MIN_ITEMS[name] - 1, 8, 0.95) == "flat"
    with pytest.raises(ConfigError, match="did you mean 'ivf'"):
        choose_type("ivff", 10, 8, 0.95)


def test_with_too_few_items_to_train_the_index_is_flat_and_says_so(
    gallery: Embeddings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "reidreg")
    index = GalleryIndex.build(part(gallery, slice(0, 100)), index_type="pq")
    assert index.index_type == "flat" and index.recall is None
    assert caplog.messages == ["100 items are too few to train pq; the index is flat"]


# --------------------------------------------------------------------- files


@pytest.mark.parametrize("name", TYPES)
def test_a_loaded_index_equals_the_saved_one_and_can_grow(
    name: str, indexes: dict[str, GalleryIndex], gallery: Embeddings, tmp_path: Path
) -> None:
    index = indexes[name]
    index.save(tmp_path)
    loaded = GalleryIndex.load(tmp_path)
    assert loaded.facts() == index.facts() and loaded.items.paths == gallery.paths
    for one, two in zip(
        loaded.search(gallery.features[:40], 7), index.search(gallery.features[:40], 7), strict=True
    ):
        assert torch.equal(one, two)
    more = clustered(200, seed=7)
    added = add_to_index(tmp_path, more)
    loaded = GalleryIndex.load(tmp_path)
    assert len(loaded) == 1100 and loaded.facts() == added.facts()
    assert loaded.search(more.features, 1)[0].flatten().tolist() == list(range(900, 1100))
    assert loaded.items.pids[900:].tolist() == more.pids.tolist()
    if name != "flat":
        assert loaded.recall is not None and loaded.recall.items == 1100
        assert loaded.recall.reached >= 0.9
    assert all("000002" in path.name for path in tmp_path.glob("*-*"))


def test_paths_of_any_bytes_are_restored(tmp_path: Path) -> None:
    paths = ("a b.jpg", "카메라/1.jpg", os.fsdecode(b"\xff\xfe.jpg"))
    GalleryIndex.build(unlabelled(torch.eye(3), paths)).save(tmp_path)
    assert GalleryIndex.load(tmp_path).items.paths == paths
    nul = unlabelled(torch.eye(3), ("a.jpg", "b.jpg", "c\0d.jpg"))
    with pytest.raises(DataError, match="NUL"):
        GalleryIndex.build(nul)
    index = GalleryIndex.load(tmp_path)
    with pytest.raises(DataError, match="NUL"):
        index.add(nul)
    assert sorted(index.search(torch.eye(3)[:1], 9)[0].flatten().tolist()) == [0, 1, 2]


def test_index_files_respect_the_umask(tmp_path: Path, gallery: Embeddings) -> None:
    before = os.umask(0o027)
    try:
        GalleryIndex.build(gallery, index_type="ivf").save(tmp_path / "index")
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "index").glob("*-*")}
    assert modes == {0o640} and (tmp_path / "index").stat().st_mode & 0o777 == 0o750


class Killed(BaseException):
    """Stands for SIGKILL: no `except Exception` catches it."""


@pytest.mark.parametrize("moment", range(4))
@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")])
def test_an_interrupted_write_leaves_the_old_index(
    moment: int, error: BaseException, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = clustered(20, seed=3)
    real, calls = os.replace, []

    def failing(source: Any, target: Any) -> None:
        calls.append(target)
        if len(calls) > moment:
            raise error
        real(source, target)

    # Three files and the manifest.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises((Killed, DataError)) as caught:
            add_to_index(on_disk, more)
    if isinstance(error, OSError):
        assert "No space left on device" in str(caught.value)
        assert len(list(on_disk.glob("*-*"))) == 3
    assert len(GalleryIndex.load(on_disk)) == 900
    # The next write deletes the leftover files.
    assert len(add_to_index(on_disk, more)) == 920
    assert len(list(on_disk.glob("*-*"))) == 3
    assert len(GalleryIndex.load(on_disk)) == 920


def test_a_reader_retries_when_a_writer_replaces_the_index(
    gallery: Embeddings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reidreg.index import files

    GalleryIndex.build(gallery).save(tmp_path)
    stale = files.read_manifest(tmp_path)
    add_to_index(tmp_path, clustered(10, seed=1))
    fresh = iter([stale])
    real = files.read_manifest
    monkeypatch.setattr(files, "read_manifest", lambda folder: next(fresh, None) or real(folder))
    assert len(GalleryIndex.load(tmp_path)) == 910


def test_a_second_concurrent_writer_is_refused(gallery: Embeddings, tmp_path: Path) -> None:
    index = GalleryIndex.build(gallery)
    index.save(tmp_path)
    with exclusive(tmp_path, "index", ""), pytest.raises(ConfigError, match="in use by process"):
        index.save(tmp_path)
    with exclusive(tmp_path, "index", ""), pytest.raises(ConfigError, match="in use by process"):
        add_to_index(tmp_path, gallery)
    assert len(GalleryIndex.load(tmp_path)) == 900


@pytest.fixture
def on_disk(indexes: dict[str, GalleryIndex], tmp_path: Path) -> Path:
    indexes["ivf"].save(tmp_path / "index")
    return tmp_path / "index"


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0, 0.5, 1])
@pytest.mark.parametrize(
    "name", ["vectors-000001.npy", "items-000001.npz", "candidates-000001.faiss"]
)
def test_a_damaged_file_is_a_one_line_error_and_faiss_never_reads_it(
    name: str, place: float, on_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faiss

    monkeypatch.setattr(faiss, "read_index", lambda *given: pytest.fail("faiss was called"))
    flip(on_disk / name, place)
    with pytest.raises(DataError, match=f"damaged: {name} does not match its checksum") as caught:
        GalleryIndex.load(on_disk)
    assert "\n" not in str(caught.value)
    content = (on_disk / name).read_bytes()
    (on_disk / name).write_bytes(content[: int(place * (len(content) - 1))])
    with pytest.raises(DataError, match=f"damaged: {name} has"):
        GalleryIndex.load(on_disk)
    (on_disk / name).unlink()
    with pytest.raises(DataError, match=f"damaged: {name} is missing"):
        GalleryIndex.load(on_disk)


def test_a_damaged_manifest_is_a_one_line_error(on_disk: Path) -> None:
    path = on_disk / MANIFEST
    text = path.read_text()
    for damaged in (text.replace('"nprobe": ', '"nprobe": 1'), text.replace("cosine", "cosinf")):
        path.write_text(damaged)
        with pytest.raises(DataError, match="manifest.json does not match its checksum"):
            GalleryIndex.load(on_disk)
    path.write_text(text[:100])
    with pytest.raises(DataError, match="damaged: manifest.json cannot be read"):
        GalleryIndex.load(on_disk)
    path.write_text(text.replace('"version": 1', '"version": 2'))
    with pytest.raises(DataError, match="reads up to 1: upgrade"):
        GalleryIndex.load(on_disk)
    path.write_text("[]")
    with pytest.raises(DataError, match="not the manifest of a reidreg index"):
        GalleryIndex.load(on_disk)


@pytest.mark.parametrize("foreign", ["../vectors-000001.npy", "/etc/passwd"])
def test_a_manifest_may_only_name_files_of_its_folder(foreign: str, on_disk: Path) -> None:
    manifest = json.loads((on_disk / MANIFEST).read_text())
    manifest["files"][foreign] = manifest["files"].pop("vectors-000001.npy")
    manifest.pop("sha256")
    manifest["sha256"] = manifest_digest(manifest)
    (on_disk / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="which is not a file of an index"):
        GalleryIndex.load(on_disk)


def test_files_of_two_indexes_are_refused(on_disk: Path, gallery: Embeddings) -> None:
    other = on_disk.parent / "other"
    GalleryIndex.build(part(gallery, slice(0, 800))).save(other)
    manifest, second = (json.loads((folder / MANIFEST).read_text()) for folder in (on_disk, other))
    name = "items-000001.npz"
    (on_disk / name).write_bytes((other / name).read_bytes())
    manifest["files"][name] = second["files"][name]
    manifest.pop("sha256")
    (on_disk / MANIFEST).write_text(json.dumps({**manifest, "sha256": manifest_digest(manifest)}))
    with pytest.raises(DataError, match="do not go together"):
        GalleryIndex.load(on_disk)


def test_a_folder_without_an_index_is_an_error(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(DataError, match="no index at .*`reidreg index build` makes one"):
            GalleryIndex.load(folder)
        with pytest.raises(DataError, match="no index at"):
            add_to_index(folder, unlabelled(torch.eye(2)))
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------- wrong input


def test_the_error_names_features_that_cannot_be_compared(gallery: Embeddings) -> None:
    index = GalleryIndex.build(part(gallery, slice(0, 20)))
    bad = gallery.features[:3].clone()
    bad[1, 0] = torch.nan
    with pytest.raises(DataError, match=r"gallery features: 1 of 3 are not finite.* b\.jpg"):
        GalleryIndex.build(unlabelled(bad, ("a.jpg", "b.jpg", "c.jpg")))
    with pytest.raises(DataError, match=r"query features: 1 of 3 are not finite.* b\.jpg"):
        index.search(bad, paths=("a.jpg", "b.jpg", "c.jpg"))
    with pytest.raises(DataError, match="not finite"):
        index.add(unlabelled(bad))
    with pytest.raises(DataError, match="zero, which has no cosine"):
        index.search(torch.zeros(1, 32))
    assert len(index) == 20 and index.search(gallery.features[:1], 1)[0].item() == 0


@pytest.mark.parametrize("name", ["flat", "ivf"])
def test_features_of_another_width_are_refused(name: str, indexes: dict[str, GalleryIndex]) -> None:
    with pytest.raises(DataError, match="query features have 31 values each, those of the index"):
        indexes[name].search(torch.ones(1, 31))
    with pytest.raises(DataError, match="gallery features have 31 values each"):
        indexes[name].add(unlabelled(torch.ones(1, 31)))


def test_invalid_options_are_errors(gallery: Embeddings) -> None:
    index = GalleryIndex.build(part(gallery, slice(0, 20)))
    with pytest.raises(ConfigError, match="k: 0 is too small"):
        index.search(gallery.features, 0)
    for recall in (0, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="recall: .* at most 1"):
            GalleryIndex.build(gallery, recall=recall)
    with pytest.raises(ConfigError, match="did you mean 'cosine'"):
        GalleryIndex.build(gallery, metric="cosin")
    with pytest.raises(DataError, match="5 queries, but .4,. cameras"):
        index.search(gallery.features[:5], 1, [0, 0, 0, 0])
    with pytest.raises(DataError, match="do not go together"):
        GalleryIndex.build(replace(gallery, pids=gallery.pids[:5]))
    with pytest.raises(DataError, match="the shape is"):
        GalleryIndex.build(unlabelled(torch.empty(0, 4)))


def test_an_index_of_one_item_works(tmp_path: Path) -> None:
    for name in TYPES:
        index = GalleryIndex.build(unlabelled(torch.ones(1, 4)), index_type=name)
        index.save(tmp_path / name)
        numbers, scores = GalleryIndex.load(tmp_path / name).search(torch.ones(2, 4), 3)
        assert numbers.tolist() == [[0], [0]] and scores.tolist() == [[1.0], [1.0]]


def test_features_of_two_models_are_not_mixed(gallery: Embeddings, tmp_path: Path) -> None:
    one, two = (FeatureModel(f"/{name}.ckpt", name, {}) for name in ("one", "two"))
    GalleryIndex.build(gallery, model=one).save(tmp_path)
    with pytest.raises(DataError, match="/two.ckpt is another model"):
        add_to_index(tmp_path, gallery, model=two)
    assert len(add_to_index(tmp_path, gallery, model=one)) == 1800
    # A file of features does not name its model.
    assert len(add_to_index(tmp_path, gallery)) == 2700
    assert GalleryIndex.load(tmp_path).model == one


def test_a_threshold_is_a_minimum_cosine_or_a_maximum_distance(gallery: Embeddings) -> None:
    scores = torch.tensor([0.1, 0.5, 0.9])
    cosine = GalleryIndex.build(part(gallery, slice(0, 5)))
    euclidean = GalleryIndex.build(part(gallery, slice(0, 5)), metric="euclidean")
    assert cosine.passes(scores, 0.5).tolist() == [False, True, True]
    assert euclidean.passes(scores, 0.5).tolist() == [True, True, False]


# --------------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def run(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint after one epoch, with a threshold, and files of its features."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config("aihub_kaist", small_run(aihub_root, folder / "run"))
    fit(config)
    checkpoint = load_checkpoint(folder / "run/checkpoints/best.ckpt")
    checkpoint.metrics["verification"] = {"threshold": 0.97, "far": 1e-3}
    save_checkpoint(checkpoint, folder / "best.ckpt")
    for key in checkpoint.model:
        if key.endswith("conv1.weight"):
            checkpoint.model[key] = checkpoint.model[key] * 1.01
    save_checkpoint(checkpoint, folder / "other.ckpt")
    for split in ("query", "gallery"):
        save_features(extract(folder / "best.ckpt", split=split), folder / f"{split}.npz")
    return folder


@pytest.fixture(scope="module")
def built(run: Path) -> Iterator[Path]:
    assert main(["index", "build", "--ckpt", f"{run}/best.ckpt", "--split", "gallery",
                 "--output", f"{run}/index"]) == 0  # fmt: skip
    yield run / "index"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one-line error of a command."""
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.slow
def test_search_in_a_subprocess(
    built: Path,
    aihub_root: Path,
    reidreg: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(built, tmp_path / "index")
    assert main(["index", "info", "--index", f"{tmp_path}/index"]) == 0
    about = capsys.readouterr().out
    assert "flat, exact" in about and "threshold: 0.9700" in about
    images = aihub_root / "aihub_kaist/query"
    found = reidreg("search", "--index", "index", "--query", str(images), "--top", "3", "--json")
    assert found.returncode == 0 and found.stderr == "", found.stderr
    document = json.loads(found.stdout)
    assert (document["metric"], document["threshold"], document["far"]) == ("cosine", 0.97, 1e-3)
    names = [query["query"] for query in document["queries"]]
    assert names == sorted(str(path) for path in images.iterdir())
    first = document["queries"][0]["results"]
    assert [result["rank"] for result in first] == [1, 2, 3]
    assert all(result["same"] == (result["score"] >= 0.97) for result in first)
    assert Path(first[0]["path"]).is_file() and first[0]["pid"] >= 0
    flip(tmp_path / "index/vectors-000001.npy", 0.5)
    assert "checksum" in said(capsys, "search", "--index", tmp_path / "index", "--query", images)


def test_images_and_their_features_give_the_same_results(
    run: Path, built: Path, aihub_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = []
    for query in (f"{run}/query.npz", str(aihub_root / "aihub_kaist/query")):
        assert main(["search", "--index", str(built), "--query", query, "--json"]) == 0
        answers.append(json.loads(capsys.readouterr().out)["queries"])
    assert answers[0] == answers[1]
    with np.load(run / "gallery.npz") as file:
        pids = file["pids"]
    assert all(pids[r["item"]] == r["pid"] for q in answers[0] for r in q["results"])


def test_the_table_has_a_line_for_each_result(
    run: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--query", f"{run}/query.npz", "--top", "2", "--threshold"]
    assert main(["search", "--index", str(built), *options, "0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "score: cosine similarity; threshold 0.5000"
    with np.load(run / "query.npz") as file:
        assert len(lines) == 1 + 5 * len(file["pids"])
    assert lines[2].startswith("query: ") and lines[3].split()[:3] == ["rank", "score", "same"]
    assert lines[4].split()[0] == "1" and lines[4].split()[2] == "yes"
    assert main(["search", "--index", str(built), *options, "none"]) == 0
    assert "same" not in capsys.readouterr().out


def test_search_can_exclude_the_camera_of_the_query(
    run: Path, built: Path, aihub_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["search", "--index", str(built), "--json", "--exclude_same_camera", "--query"]
    assert main([*search, f"{run}/query.npz"]) == 0
    queries = json.loads(capsys.readouterr().out)["queries"]
    with np.load(run / "query.npz") as file:
        for camid, query in zip(file["camids"], queries, strict=True):
            assert query["results"] and all(r["camid"] != camid for r in query["results"])
    image = str(next((aihub_root / "aihub_kaist/query").iterdir()))
    assert "give --query_camid N" in said(capsys, *search, image)
    assert main([*search, image, "--query_camid", "2"]) == 0
    (query,) = json.loads(capsys.readouterr().out)["queries"]
    assert all(result["camid"] != 2 for result in query["results"])


def test_camid_sets_the_camera_of_a_folder_of_images(
    run: Path, aihub_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, folder = aihub_root / "aihub_kaist/query", tmp_path / "index"
    build = ["index", "build", "--ckpt", f"{run}/best.ckpt", "--images", str(images)]
    assert main([*build, "--output", str(folder)]) == 0
    one = ["search", "--index", str(folder), "--query", str(next(images.iterdir()))]
    exclude = ["--exclude_same_camera", "--query_camid", "7"]
    assert "the index knows no cameras" in said(capsys, *one, *exclude)
    add = ["index", "add", "--index", str(folder), "--images", str(images), "--camid", "7"]
    assert main(add) == 0
    assert main([*one, *exclude, "--json", "--top", "999"]) == 0
    out = capsys.readouterr().out
    (query,) = json.loads(out[out.index("{") :])["queries"]
    assert {result["camid"] for result in query["results"]} == {-1}
    assert len(query["results"]) == len(list(images.iterdir()))
    assert query["results"][0]["score"] == pytest.approx(1, abs=1e-5)


def test_an_index_can_be_built_from_a_file_of_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], gallery: Embeddings
) -> None:
    np.savez(tmp_path / "f.npz", features=gallery.features.numpy())
    folder = tmp_path / "index"
    build = ["index", "build", "--features", str(tmp_path / "f.npz"), "--output", str(folder)]
    assert main([*build, "--type", "ivf", "--metric", "euclidean", "--recall", "0.9"]) == 0
    out = capsys.readouterr().out
    assert "ivf (nprobe" in out and "recall@10: 0.9" in out and "squared Euclidean" in out
    assert main(["index", "add", "--index", str(folder), "--features", f"{tmp_path}/f.npz"]) == 0
    assert "added: 900 items" in capsys.readouterr().out
    assert main(["index", "info", "--index", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["items"], facts["type"], facts["model"]) == (1800, "ivf", None)
    query = ["--query", f"{tmp_path}/f.npz", "--top", "2"]
    assert main(["search", "--index", str(folder), *query]) == 0
    out = capsys.readouterr().out
    assert f"query: {tmp_path}/f.npz#899" in out and "0.0000" in out
    image = ["--query", str(tmp_path)]
    assert "holds no images" in said(capsys, "search", "--index", folder, *image)
    (tmp_path / "x.jpg").write_bytes(b"")
    assert "knows no model; give --ckpt" in said(capsys, "search", "--index", folder, *image)


def test_another_model_is_a_one_line_error(
    run: Path, built: Path, aihub_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = str(aihub_root / "aihub_kaist/query")
    other, search = f"{run}/other.ckpt", ["search", "--index", built, "--query", images]
    assert "other.ckpt is another model" in said(capsys, *search, "--ckpt", other)
    assert "another model, or has other" in said(capsys, *search, "--head.feature", "before")
    add = ["index", "add", "--index", built, "--images", images, "--ckpt", other]
    assert "other.ckpt is another model" in said(capsys, *add)
    assert main([str(word) for word in [*search, "--train.device", "cpu"]]) == 0


def test_the_checkpoint_may_move_and_be_evaluated_again(
    run: Path, built: Path, aihub_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = load_checkpoint(run / "best.ckpt")
    checkpoint.metrics["verification"]["threshold"] = 0.5
    save_checkpoint(checkpoint, tmp_path / "moved.ckpt")
    image = str(next((aihub_root / "aihub_kaist/query").iterdir()))
    search = ["search", "--index", str(built), "--query", image, "--ckpt"]
    assert main([*search, str(tmp_path / "moved.ckpt")]) == 0
    assert "no checkpoint at" in said(capsys, *search, tmp_path / "gone.ckpt")


def test_a_threshold_is_stored_only_for_its_metric_and_options(run: Path, tmp_path: Path) -> None:
    ckpt, stored = run / "best.ckpt", Threshold(0.97, 1e-3)
    assert Source.of(ckpt).threshold("cosine") == stored
    assert Source.of(ckpt).threshold("euclidean") is None
    assert Source.of(ckpt, {"train.device": "cpu"}).threshold("cosine") == stored
    assert Source.of(ckpt, {"head.feature": "before"}).threshold("cosine") is None
    checkpoint = load_checkpoint(ckpt)
    checkpoint.metrics["verification"] = {"threshold": 0.5, "metric": "euclidean"}
    save_checkpoint(checkpoint, tmp_path / "euclidean.ckpt")
    source = Source.of(tmp_path / "euclidean.ckpt")
    assert source.threshold("cosine") is None
    assert source.threshold("euclidean") == Threshold(0.5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["index"], "usage: reidreg index build|add|info"),
        (["index", "bild"], "did you mean 'build'"),
        (["index", "build"], "--output"),
        (["index", "build", "--output", "x"], "give one of --features FILE"),
        (["index", "build", "--output", "x", "--images", "y"], "give --ckpt FILE"),
        (["index", "build", "--output", "x", "--features", "none.npz"], "no feature file at none"),
        (["index", "build", "--output", "x", "--features", "f", "--images", "y"], "give one of"),
        (["index", "build", "--output", "x", "--features", "f", "--ckpt", "c"], "leave --ckpt out"),
        (["index", "build", "--output", "x", "--features", "f", "--a.b", "1"], "--a.b: features"),
        (["index", "build", "--output", "x", "--features", "f", "--recal", "1"], "mean recall"),
        (["index", "add", "--index", "x", "--features", "none.npz"], "no feature file"),
        (["index", "info", "--index", "x"], "no index at x"),
        (["search", "--index", "x", "--query", "y"], "no index at x"),
        (["search", "--index", "x", "--query", "y", "--top", "0"], "--top: 0 is too small"),
        (["search", "--query", "y"], "--index"),
    ],
)
def test_invalid_arguments_are_a_one_line_error(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert words in (output.err or output.out)
    assert len(output.err.strip().splitlines()) == (1 if len(arguments) > 1 else 0)
    assert not list(tmp_path.iterdir())


def test_invalid_queries_are_a_one_line_error(
    run: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = ["search", "--index", built, "--query"]
    assert "nope.jpg: there is no such image" in said(capsys, *search, "nope.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    assert "broken.jpg: cannot be decoded" in said(capsys, *search, tmp_path / "broken.jpg")
    (tmp_path / "empty").mkdir()
    assert "holds no images" in said(capsys, *search, tmp_path / "empty")
    features = run / "query.npz"
    assert "one file of features" in said(capsys, *search, features, features)
    assert "features need no model" in said(capsys, *search, features, "--ckpt", "x")
    assert "a number, auto or none" in said(capsys, *search, features, "--threshold", "x")
    build = ["index", "build", "--features", features, "--output", built]
    assert "holds an index already" in said(capsys, *build)
