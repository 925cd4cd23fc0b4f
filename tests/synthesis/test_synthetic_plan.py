"""The plan of a drawn data set: names, splits and counts."""

from __future__ import annotations

import re
from collections import defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg.synthesis.plan import Crop, Plan, plan
from reidreg.synthesis.request import Request

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
def test_train_and_test_share_no_identity_and_all_identities_are_there(request: Request) -> None:
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


def test_each_camera_that_sees_an_identity_takes_the_wanted_number_of_images() -> None:
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


def test_the_sample_folders_hold_a_part_of_the_large_ones() -> None:
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
