"""`batch_size: auto`: the search for the largest batch, and how the option is parsed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import small_run
from reidreg import fit, load_checkpoint, load_config
from reidreg.distributed.group import joined
from reidreg.errors import ConfigError, DataError, DeviceError
from reidreg.machine.memory import GIB
from reidreg.training import batch_size as batch_size_module
from reidreg.training.batch_size import largest, with_batch_size
from reidreg.training.step_memory import StepProbe
from worlds import in_processes


class FakeMemory:
    """A device whose peak memory is proportional to the images of a step."""

    def __init__(self, images: float) -> None:
        self.limit = images  # of 0.1 GiB each that fit into 85 %
        self.images = 0

    def reset(self) -> None:
        self.images = 0

    def peak(self) -> int:
        return int(0.1 * self.images * GIB)

    def available(self) -> int:
        return int(0.1 * self.limit / 0.85 * GIB) + 2**20


@pytest.fixture
def auto(aihub_root: Path, tmp_path: Path) -> dict[str, Any]:
    values = small_run(aihub_root, tmp_path / "run")
    values["sampler"] = {"batch_size": "auto", "instances": 2}
    values["optimizer.name"] = "sgd"
    values["optimizer.momentum"] = 0.0
    return values


def on_a_device_of(images: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let the search find a device with memory for `images`; returns the sizes that it tries."""
    memory, tried = FakeMemory(images), []

    def step(self: StepProbe, pids: torch.Tensor) -> None:
        tried.append(len(pids))
        memory.images = len(pids)
        if len(pids) > images * 1.17:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(StepProbe, "step", step)
    monkeypatch.setattr(batch_size_module, "memory_of", lambda device: memory)
    return tried


# --------------------------------------------------------------------- the search


@given(
    unit=st.integers(1, 8),
    limit=st.integers(2, 5000),
    most=st.integers(2, 5000),
)
def test_the_search_finds_the_largest_to_an_eighth(unit: int, limit: int, most: int) -> None:
    tried: list[int] = []

    def batch_of(size: int) -> list[int]:
        if size > most * unit:
            raise DataError("too few images")
        return [0] * size

    def fits(batch: list[int]) -> bool:
        tried.append(len(batch))
        return len(batch) <= limit * unit

    found = largest(unit, batch_of, fits)
    true = min(limit, most) * unit
    assert found is not None and found % unit == 0
    assert found <= true < found + max(found / 8 + unit, unit + 1)
    assert len(tried) == len(set(tried)) <= 20 and max(tried) <= most * unit


def test_it_finds_nothing_if_the_smallest_batch_does_not_fit() -> None:
    assert largest(4, lambda size: [0] * size, lambda batch: False) is None


def test_the_error_of_a_sampler_that_can_make_no_batch_is_raised() -> None:
    def refuse(size: int) -> list[int]:
        raise DataError(f"no {size}")

    with pytest.raises(DataError, match="no 8"):
        largest(4, refuse, lambda batch: True)


# --------------------------------------------------------------------- in a run


@pytest.mark.parametrize(("images", "expected"), [(9, 8), (5, 4), (7, 6), (1000, 12)])
def test_the_largest_batch_that_fits_is_taken(
    auto: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    images: int,
    expected: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "reidreg")
    tried = on_a_device_of(images, monkeypatch)
    config = load_config("aihub_kaist", auto)
    # 6 identities of 2 images a batch are all that the data have.
    assert with_batch_size(config).sampler.options == {"batch_size": expected, "instances": 2}
    assert tried[0] == 4 and max(tried) <= 12
    assert f"auto: a step of {expected} images fits" in caplog.text
    assert "optimizer.lr 0.00035 is not scaled" in caplog.text


def test_with_accumulation_only_a_part_of_the_batch_has_to_fit(
    auto: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = on_a_device_of(5, monkeypatch)
    config = load_config("aihub_kaist", auto, {"train.accumulate": 2})
    assert with_batch_size(config).sampler.options["batch_size"] == 8
    assert tried[0] == 4


def test_a_random_batch_is_at_most_the_data(
    auto: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_device_of(1e6, monkeypatch)
    config = load_config("aihub_kaist", auto, {"sampler": {"name": "random", "batch_size": "auto"}})
    assert 32 <= with_batch_size(config).sampler.options["batch_size"] <= 40


def test_a_device_too_small_for_the_smallest_batch_is_an_error(
    auto: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_device_of(3, monkeypatch)
    monkeypatch.setattr(batch_size_module, "describe_shortage", lambda device: "too small")
    with pytest.raises(DeviceError, match="too small"):
        with_batch_size(load_config("aihub_kaist", auto))


def test_a_number_is_not_changed(auto: dict[str, Any]) -> None:
    config = load_config("aihub_kaist", auto, flags=["--sampler.batch_size", "4"])
    assert with_batch_size(config) is config


def test_a_run_saves_the_number_and_keeps_it_on_a_resume(
    auto: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = on_a_device_of(9, monkeypatch)
    fit(load_config("aihub_kaist", auto))
    assert load_config(tmp_path / "run/config.yaml").sampler.options["batch_size"] == 8
    last = tmp_path / "run/checkpoints/last.ckpt"
    assert load_checkpoint(last).config["sampler"]["batch_size"] == 8
    on_a_device_of(5, monkeypatch)
    tried.clear()
    fit(load_config("aihub_kaist", auto, {"train.epochs": 2}), resume="auto")
    assert load_checkpoint(last).config["sampler"]["batch_size"] == 8 and not tried


def test_without_cuda_it_is_the_samplers_default(
    auto: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "reidreg")
    config = load_config("aihub_kaist", auto, {"train.device": "cpu"})
    assert with_batch_size(config).sampler.options["batch_size"] == 64
    assert "auto: 64, the sampler's default" in caplog.text


# --------------------------------------------------------------------- the option


def test_auto_survives_a_round_trip_and_later_values_win() -> None:
    config = load_config("aihub_kaist", {"sampler.batch_size": "auto", "sampler.instances": 3})
    assert config.sampler.options == {"batch_size": "auto", "instances": 3}
    assert load_config(config.as_dict()) == config
    numbered = load_config(config.as_dict(), flags=["--sampler.batch_size=6"])
    assert numbered.sampler.options == {"batch_size": 6, "instances": 3}
    again = load_config(numbered.as_dict(), flags=["--sampler.batch_size", "auto"])
    assert again == config


@pytest.mark.parametrize("flag", ["--sampler.batch_size=atuo", "--sampler.instances=auto"])
def test_no_other_word_and_no_other_option_is_accepted(flag: str) -> None:
    key = flag[2:].partition("=")[0]
    with pytest.raises(ConfigError, match=f"^{key}: expected a whole number"):
        load_config("aihub_kaist", flags=[flag])


def test_the_default_is_lowered_until_it_divides_evenly(auto: dict[str, Any]) -> None:
    changes = {"sampler.instances": 3, "train.accumulate": 2, "train.device": "cpu"}
    sized = with_batch_size(load_config("aihub_kaist", auto, changes))
    assert sized.sampler.options["batch_size"] == 60


# --------------------------------------------------------------------- several processes


def sized(values: dict[str, Any], limits: tuple[float, ...]) -> tuple[int, list[int]]:
    """The size that each of several processes finds on its own device, and the sizes it tried."""
    with pytest.MonkeyPatch.context() as monkeypatch, joined(torch.device("cpu"), 20.0) as place:
        limit = limits[place.rank]
        tried = on_a_device_of(limit, monkeypatch) if limit else []
        config = with_batch_size(load_config("aihub_kaist", values))
        return config.sampler.options["batch_size"], tried


def test_processes_agree_on_what_fits_on_the_smallest_device(auto: dict[str, Any]) -> None:
    # The data have identities for batches of twelve images, six in each process.
    (one, here), (other, there) = in_processes(2, sized, auto, (1000.0, 5.0))
    assert (one, other) == (8, 8) and here == there and max(there) == 6


def test_without_cuda_processes_agree_on_a_size_that_divides_evenly(auto: dict[str, Any]) -> None:
    values = {**auto, "train": {**auto["train"], "device": "cpu"}}
    assert in_processes(3, sized, values, (0, 0, 0)) == [(60, [])] * 3
