"""Labels and loaders: batches from any step on, on any rank, and errors while loading."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from reidreg import SAMPLERS, DataError, Dataset, Sample, Sampler
from reidreg.config.sections import CacheSetting, InputConfig
from reidreg.data import workers as worker_processes
from reidreg.data.labels import Labels, labels_of, training_samples
from reidreg.data.loading import TrainLoader, eval_loader
from reidreg.data.statistics import split_statistics
from reidreg.data.transforms import Augmentation, Normalisation
from reidreg.data.workers import count_workers
from reidreg.values import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CPU = torch.device("cpu")


# --------------------------------------------------------------------- labels


class Listed(Dataset):
    """A data set with the samples that it is given."""

    def __init__(self, train: list[Sample]) -> None:
        self._train = train

    @property
    def train(self) -> list[Sample]:
        return self._train

    @property
    def query(self) -> list[Sample]:
        return []

    @property
    def gallery(self) -> list[Sample]:
        return []


def test_labels_are_positions_among_the_sorted_ids() -> None:
    samples = [Sample("a", 40, 16), Sample("b", 0, 2), Sample("c", 7, 16), Sample("d", 40, 3)]
    labels = labels_of(samples)
    assert labels == Labels(pids=(0, 7, 40), camids=(2, 3, 16))
    assert labels.pid_labels(samples) == [2, 0, 1, 2]
    assert labels.camera_indices([*samples, Sample("e", 9, 4)]) == [2, 0, 2, 1, -1]


def test_junk_is_not_trained_on_but_person_zero_is() -> None:
    samples = [Sample("a", -1, 1), Sample("b", 0, 1), Sample("c", 3, 2)]
    assert training_samples(Listed(samples)) == samples[1:]


@pytest.mark.parametrize("pids", [[], [-1, -1], [5, 5, 5]])
def test_training_needs_two_identities(pids: list[int]) -> None:
    samples = [Sample(str(i), pid, 1) for i, pid in enumerate(pids)]
    with pytest.raises(DataError, match="at least 2 identities"):
        training_samples(Listed(samples))


def test_statistics_count_the_images_of_junk_but_no_identity() -> None:
    samples = [Sample("a", -1, 1), Sample("b", 0, 1), Sample("c", 3, 2), Sample("d", 3, 5)]
    assert split_statistics(samples) == (2, 4, 3)
    assert split_statistics([]) == (0, 0, 0)


# --------------------------------------------------------------------- loaders


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Twelve images of four people; the pixels of image n are 10 n."""
    folder = tmp_path_factory.mktemp("images")
    found = []
    for number in range(12):
        path = folder / f"{number}.png"
        Image.new("RGB", (16, 32), (10 * number,) * 3).save(path)
        found.append(Sample(str(path), pid=100 + number % 4, camid=number % 3))
    return found


def sampler_of(samples: list[Sample], seed: int = 0, **world: int) -> Sampler:
    pids = [sample.pid for sample in samples]
    return SAMPLERS.build("identity", pids=pids, batch_size=4, instances=2, seed=seed, **world)


def loader_of(
    samples: list[Sample],
    workers: int = 0,
    seed: int = 0,
    cache: CacheSetting = "none",
    **world: int,
) -> TrainLoader:
    config = InputConfig(size=(32, 16), padding=2)
    return TrainLoader(
        samples,
        labels_of(samples),
        sampler_of(samples, seed, **world),
        Augmentation(config, Normalisation(MEAN, STD)),
        seed=seed,
        device=CPU,
        workers=workers,
        cache=cache,
        **world,
    )


def same(one: Iterator[Batch] | list[Batch], other: Iterator[Batch] | list[Batch]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(
        torch.equal(a.images, b.images)
        and torch.equal(a.pids, b.pids)
        and torch.equal(a.camids, b.camids)
        for a, b in pairs
    )


def test_a_batch_has_the_labels_and_cameras_of_its_images(samples: list[Sample]) -> None:
    sampler = SAMPLERS.build("random", pids=[s.pid for s in samples], batch_size=5, seed=0)
    config = InputConfig(size=(32, 16), padding=0, flip_prob=0, erasing_prob=0)
    augmentation = Augmentation(config, Normalisation((0.0,) * 3, (1.0,) * 3))
    loader = TrainLoader(
        samples, labels_of(samples), sampler, augmentation, seed=0, device=CPU, workers=0
    )
    batches = list(loader.epoch(0))
    assert [batch.images.shape for batch in batches] == [(5, 3, 32, 16)] * 2
    for batch in batches:
        numbers = (batch.images[:, 0, 0, 0] * 25.5).round().long()
        assert torch.equal(batch.pids, numbers % 4) and torch.equal(batch.camids, numbers % 3)


def test_an_epoch_started_in_its_middle_gives_the_same_batches(samples: list[Sample]) -> None:
    whole = list(loader_of(samples).epoch(3))
    assert len(whole) == 4
    for start in range(len(whole) + 1):
        torch.manual_seed(start)
        assert same(loader_of(samples).epoch(3, start=start), whole[start:])


@pytest.mark.parametrize(
    ("workers", "cache"), [(1, "none"), (2, "none"), (0, "memory"), (2, "disk"), (1, "auto")]
)
def test_batches_are_the_same_however_images_are_loaded(
    workers: int, cache: CacheSetting, samples: list[Sample]
) -> None:
    alone, other = loader_of(samples), loader_of(samples, workers=workers, cache=cache)
    for epoch, start in ((0, 0), (1, 0), (0, 2)):
        assert same(alone.epoch(epoch, start), other.epoch(epoch, start))
    assert other.workers == (workers if cache == "none" else 0)


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_ranks_together_have_the_views_of_one_process(
    cache: CacheSetting, samples: list[Sample]
) -> None:
    whole = list(loader_of(samples).epoch(2))
    ranks = [
        list(loader_of(samples, cache=cache, rank=rank, world_size=2).epoch(2)) for rank in (0, 1)
    ]
    assert whole and len(ranks[0]) == len(ranks[1]) == len(whole)
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert torch.equal(batch.images, torch.cat([first.images, second.images]))
        assert torch.equal(batch.pids, torch.cat([first.pids, second.pids]))


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_batches_on_a_cuda_device_are_those_of_the_cpu(
    cache: CacheSetting, samples: list[Sample], cuda: str
) -> None:
    config = InputConfig(size=(32, 16), padding=2)
    loader = TrainLoader(
        samples,
        labels_of(samples),
        sampler_of(samples),
        Augmentation(config, Normalisation(MEAN, STD)),
        seed=0,
        device=torch.device(cuda),
        workers=2,
        cache=cache,
    )
    for epoch, start in ((0, 0), (1, 2)):
        found = [
            Batch(batch.images.cpu(), batch.pids.cpu(), batch.camids.cpu())
            for batch in loader.epoch(epoch, start)
        ]
        assert same(found, list(loader_of(samples).epoch(epoch, start)))


def test_views_differ_between_epochs_and_seeds_but_not_between_calls(
    samples: list[Sample],
) -> None:
    first = list(loader_of(samples).epoch(0))
    assert same(loader_of(samples).epoch(0), first)
    for other in (loader_of(samples).epoch(1), loader_of(samples, seed=1).epoch(0)):
        assert not same(other, first)


def test_loading_draws_nothing_from_the_global_generator(samples: list[Sample]) -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    list(loader_of(samples).epoch(0))
    list(loader_of(samples, cache="memory").epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("workers", "cache"), [(0, "none"), (2, "none"), (0, "memory"), (0, "disk"), (0, "auto")]
)
def test_a_damaged_image_is_a_data_error_in_training_and_evaluation(
    samples: list[Sample], workers: int, cache: CacheSetting, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    damaged = [*samples, Sample(str(broken), 103, 1)]
    bad = [Sample(str(broken), sample.pid, 1) for sample in samples]
    calls: list[Callable[[], object]] = [
        lambda: list(loader_of(bad, workers, cache=cache).epoch(0)),
        lambda: list(eval_loader(damaged, (32, 16), batch_size=3, workers=workers, pin=False)),
    ]
    for call in calls:
        with pytest.raises(DataError, match=r"broken\.jpg: cannot be decoded") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 0), (5, 0), (5, 2), (12, 0), (12, 2), (100, 0)]
)
def test_evaluation_sees_every_image_once_and_in_order(
    samples: list[Sample], batch_size: int, workers: int
) -> None:
    batches = list(
        eval_loader(samples, (32, 16), batch_size=batch_size, workers=workers, pin=False)
    )
    images = torch.cat(batches)
    assert images.dtype == torch.uint8 and images.shape == (12, 3, 32, 16)
    assert images[:, 0, 0, 0].tolist() == [10 * number for number in range(12)]
    assert all(len(batch) == batch_size for batch in batches[:-1])


@pytest.mark.parametrize("training", [True, False])
def test_no_loading_process_outlives_a_failure(
    training: bool, samples: list[Sample], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff")
    damaged = [Sample(str(broken), sample.pid, 1) for sample in samples]
    gc.collect()
    before, failed = set(multiprocessing.active_children()), False
    gc.disable()  # the processes must end without it
    try:
        if training:
            list(loader_of(damaged, workers=2).epoch(0))
        else:
            list(eval_loader(damaged, (32, 16), batch_size=3, workers=2, pin=False))
    except DataError:
        failed = True
    finally:
        gc.enable()
    assert failed and set(multiprocessing.active_children()) <= before


def test_no_images_are_no_batches() -> None:
    assert list(eval_loader([], (32, 16), batch_size=4, workers=2, pin=False)) == []


def test_a_worker_that_dies_before_torch_watches_it_is_noticed(
    samples: list[Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = "torch.utils.data._utils.signal_handling._set_SIGCHLD_handler"
    monkeypatch.setattr(watch, lambda: time.sleep(1))
    monkeypatch.setattr(worker_processes, "_TIMEOUT", 20)
    die = lambda worker: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(worker_processes, "_start_worker", die)
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    start = time.monotonic()
    try:
        with pytest.raises(DataError, match="loading process is gone"):
            list(loader_of(samples, workers=2).epoch(0))
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert time.monotonic() - start < 10


def test_workers_are_counted_and_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert count_workers(3) == 3 and count_workers(0) == 0
    for cores, local, expected in (
        (64, "1", 8),
        (6, "1", 6),
        (6, "2", 3),
        (6, "4", 1),
        (2, "8", 1),
    ):
        monkeypatch.setattr("reidreg.data.workers.count_cores", lambda cores=cores: cores)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert count_workers("auto") == expected and count_workers(5) == 5
