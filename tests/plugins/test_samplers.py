"""Samplers: the content and number of batches, and that the seed determines them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reidreg import SAMPLERS, DataError, Sampler
from reidreg.errors import ConfigError
from reidreg_plugins.samplers.identity import count_batches


def identity(pids: Sequence[int], batch_size: int, instances: int, seed: int = 0) -> Sampler:
    return SAMPLERS.build(
        "identity", pids=pids, batch_size=batch_size, instances=instances, seed=seed
    )


def aihub_pids() -> list[int]:
    """188 identities of 20,119 images, some with twenty times as many as others."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 0.7, 188)
    counts = np.maximum((sizes / sizes.sum() * 20_119).astype(int), 2)
    counts[np.argmax(counts)] += 20_119 - counts.sum()
    assert counts.sum() == 20_119 and counts.max() > 10 * counts.min()
    pids = np.repeat(np.arange(188), counts)
    return list(map(int, rng.permutation(pids)))


AIHUB = aihub_pids()


def epoch_of(sampler: Sampler, epoch: int) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def check_batches(pids: Sequence[int], batches: list[list[int]], size: int, instances: int) -> None:
    """P different identities of K images each; no repeat of an image before all were used."""
    images = Counter(pids)
    seen: dict[int, set[int]] = {pid: set() for pid in images}
    for batch in batches:
        assert len(batch) == size
        assert set(Counter(pids[i] for i in batch).values()) == {instances}
        for index in batch:
            pid = pids[index]
            assert index not in seen[pid] or len(seen[pid]) == images[pid]
            seen[pid].add(index)


def greedy_batches(chunks: Sequence[int], identities: int) -> int:
    """The number of batches when each takes the identities with the most chunks left."""
    left, batches = sorted(chunks, reverse=True), 0
    while len(left) >= identities and left[identities - 1] > 0:
        left[:identities] = [count - 1 for count in left[:identities]]
        left.sort(reverse=True)
        batches += 1
    return batches


pid_lists = st.lists(st.integers(0, 9), min_size=4, max_size=80).filter(lambda x: len(set(x)) > 1)


@settings(deadline=None, max_examples=150)
@given(pids=pid_lists, instances=st.integers(1, 5), seed=st.integers(0, 99), data=st.data())
def test_any_data_gives_complete_batches_as_many_as_len_says(
    pids: list[int], instances: int, seed: int, data: st.DataObject
) -> None:
    identities = data.draw(st.integers(2, len(set(pids))))
    sampler = identity(pids, identities * instances, instances, seed)
    for epoch in (0, 3):
        batches = epoch_of(sampler, epoch)
        assert len(batches) == len(sampler) > 0
        check_batches(pids, batches, identities * instances, instances)
        assert epoch_of(sampler, epoch) == batches
    chunks = [-(-count // instances) for count in Counter(pids).values()]
    assert len(sampler) == greedy_batches(chunks, identities)


@settings(deadline=None, max_examples=300)
@given(chunks=st.lists(st.integers(1, 8), min_size=1, max_size=7), identities=st.integers(1, 7))
def test_the_number_of_batches_is_the_largest_that_exists(
    chunks: list[int], identities: int
) -> None:
    counted = count_batches(np.array(chunks), identities)
    assert counted == greedy_batches(chunks, identities)
    fitting = [b for b in range(60) if sum(min(c, b) for c in chunks) >= identities * b]
    assert counted == max(fitting)


@pytest.mark.parametrize(("batch_size", "instances"), [(64, 4), (48, 4), (32, 4), (128, 8)])
def test_an_epoch_of_the_aihub_data_uses_nearly_every_image(
    batch_size: int, instances: int
) -> None:
    sampler = identity(AIHUB, batch_size, instances)
    batches = epoch_of(sampler, 0)
    assert len(batches) == len(sampler)
    check_batches(AIHUB, batches, batch_size, instances)
    used = {index for batch in batches for index in batch}
    assert len(used) >= 0.95 * len(AIHUB)


def test_an_epoch_uses_all_images_where_all_identities_have_as_many() -> None:
    pids = [pid for pid in range(16) for _ in range(8)]
    batches = epoch_of(identity(pids, 16, 4), 0)
    assert sorted(index for batch in batches for index in batch) == list(range(128))


def test_seed_and_epoch_determine_the_batches_in_any_order_of_epochs() -> None:
    sampler, again = identity(AIHUB, 64, 4, seed=3), identity(AIHUB, 64, 4, seed=3)
    first = {epoch: epoch_of(sampler, epoch) for epoch in (0, 1, 2)}
    for epoch in (2, 0, 1):
        assert epoch_of(again, epoch) == first[epoch]
    assert first[0] != first[1] != first[2]
    assert epoch_of(identity(AIHUB, 64, 4, seed=4), 0) != first[0]


def test_the_state_of_a_sampler_is_its_epoch() -> None:
    sampler, other = identity(AIHUB, 64, 4), identity(AIHUB, 64, 4)
    sampler.set_epoch(7)
    other.load_state_dict(sampler.state_dict())
    assert list(other) == list(sampler)


def test_an_identity_with_fewer_images_than_instances_repeats_them() -> None:
    pids = [0, 1, 1, 2, 2, 2, 3, 3, 3, 3]
    for epoch in range(5):
        (batch,) = epoch_of(identity(pids, 16, 4), epoch)
        used = Counter(batch)
        assert used[0] == 4 and used[1] == used[2] == 2
        assert sorted(used[i] for i in (3, 4, 5)) == [1, 1, 2]
        assert all(used[i] == 1 for i in (6, 7, 8, 9))


def test_too_few_identities_are_an_error_with_a_batch_size_that_fits() -> None:
    with pytest.raises(
        DataError, match="need 16 identities, the train split has 3; use at most 12"
    ):
        identity([0, 1, 2] * 10, 64, 4)
    assert len(identity([0, 1, 2] * 10, 12, 4)) > 0


@pytest.mark.parametrize(
    ("batch_size", "instances", "words"),
    [
        (64, 5, "64 is not a multiple of sampler.instances 5; use 60 or 65"),
        (3, 4, "3 is not a multiple of sampler.instances 4; use 8"),
        (4, 4, "4 holds one identity of 4 images; use at least 8"),
        (1, 1, "1 is out of range; it must be at least 2"),
        (64, 0, "0 is out of range; it must be at least 1"),
    ],
)
def test_a_wrong_batch_size_is_refused_with_one_that_fits(
    batch_size: int, instances: int, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        identity(AIHUB, batch_size, instances)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_each_batch_without_overlap(world_size: int) -> None:
    alone = epoch_of(identity(AIHUB, 64, 4), 5)
    shards = []
    for rank in range(world_size):
        sampler = SAMPLERS.build(
            "identity",
            pids=AIHUB,
            batch_size=64,
            instances=4,
            seed=0,
            rank=rank,
            world_size=world_size,
        )
        assert len(sampler) == len(alone)
        shards.append(epoch_of(sampler, 5))
    for step, whole in enumerate(alone):
        parts = [shard[step] for shard in shards]
        assert all(len(part) == 64 // world_size for part in parts)
        people = [{AIHUB[i] for i in part} for part in parts]
        assert sum(len(p) for p in people) == len(set[int]().union(*people)) == 16
        assert [index for part in parts for index in part] == whole


def test_ranks_that_cannot_share_identities_evenly_are_refused() -> None:
    with pytest.raises(DataError, match="16 identities a batch cannot be shared evenly by 3"):
        SAMPLERS.build("identity", pids=AIHUB, batch_size=64, instances=4, rank=0, world_size=3)


def test_the_mix_of_identities_is_the_same_from_the_first_batch_to_the_last() -> None:
    # With uniform draws, identities of many images would be left for the end.
    sampler, sizes = identity(AIHUB, 64, 4), Counter(AIHUB)
    first, last, whole = [], [], []
    for epoch in range(6):
        batches = epoch_of(sampler, epoch)
        means = [float(np.mean([sizes[AIHUB[i]] for i in batch])) for batch in batches]
        first += means[:30]
        last += means[-30:]
        whole += means
    assert np.mean(first) == pytest.approx(np.mean(whole), rel=0.05)
    assert np.mean(last) == pytest.approx(np.mean(whole), rel=0.05)
    # Identities are used as often as they have images, so the mix is that of the data.
    data = np.mean([sizes[pid] for pid in AIHUB])
    assert np.mean(whole) == pytest.approx(data, rel=0.05)


def test_the_images_of_an_identity_are_grouped_differently_in_each_epoch() -> None:
    pids = [pid for pid in range(8) for _ in range(12)]
    sampler = identity(pids, 16, 4)
    pairs: Counter[tuple[int, int]] = Counter()
    for epoch in range(200):
        for batch in epoch_of(sampler, epoch):
            own = [i for i in batch if pids[i] == 0]
            pairs.update((a, b) for a in own for b in own if a < b)
    # 66 pairs; 3 of the 11 other images share a batch with an image: 200 * 3 / 11 times each.
    assert len(pairs) == 66
    assert all(30 < times < 85 for times in pairs.values())


@settings(deadline=None, max_examples=80)
@given(size=st.integers(2, 60), batch_size=st.integers(2, 70), epoch=st.integers(0, 5))
def test_random_batches_hold_every_image_at_most_once(
    size: int, batch_size: int, epoch: int
) -> None:
    sampler = SAMPLERS.build("random", pids=[0, 1] * size, batch_size=batch_size, seed=1)
    batches = epoch_of(sampler, epoch)
    assert len(batches) == len(sampler) == max(2 * size // batch_size, 1)
    flat = [index for batch in batches for index in batch]
    assert len(set(flat)) == len(flat) and set(flat) <= set(range(2 * size))
    assert all(len(batch) == min(batch_size, 2 * size) for batch in batches)
    assert 2 * size - len(flat) < batch_size
    assert epoch_of(sampler, epoch) == batches


def test_random_batches_leave_out_other_images_each_epoch() -> None:
    sampler = SAMPLERS.build("random", pids=list(range(10)), batch_size=4, seed=0)
    used: set[int] = set()
    orders = set()
    for epoch in range(20):
        flat = [index for batch in epoch_of(sampler, epoch) for index in batch]
        used |= set(flat)
        orders.add(tuple(flat))
    assert used == set(range(10)) and len(orders) == 20
