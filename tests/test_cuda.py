"""Training and evaluation on a CUDA device: on a pretended one, and on a real one where one is."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from conftest import small_run
from pretended import MixedDevices, Pretended, Race, Stream, pretended_cuda
from reidreg import LOSSES, fit, load_checkpoint, load_config
from reidreg.distributed import joined
from reidreg.run import Run, build_run
from reidreg.training import train_step
from reidreg.values import Batch, Output

CENTER = {"name": "center", "weight": 0.0005}
# What a step can do more than the guide's, all at once.
FULL = {
    "losses.center": CENTER,
    "losses.soft": {"name": "triplet", "weight": 1.0, "margin": None},
    "optimizer.clip_norm": 1.0,
    "optimizer.layer_decay": 0.9,
    "train.accumulate": 2,
    "train.ema_decay": 0.99,
    "train.freeze": ["conv1"],
    "train.freeze_epochs": 1,
}
STEPS: dict[str, dict[str, Any]] = {
    "guide": {},
    "full": FULL,
    "sgd": {**FULL, "optimizer.name": "sgd", "losses.center": CENTER},
    "adamw": {"optimizer.name": "adamw", "head": {"name": "linear", "pooling": "gem"}},
    "adagrad": {"optimizer.name": "adagrad", "head.pooling": "max"},
    "random": {"sampler": {"name": "random", "batch_size": 8}},
}


@pytest.fixture
def pretended() -> Iterator[Pretended]:
    with pretended_cuda() as device:
        yield device


def built(root: Path, output: Path, changes: dict[str, Any], **train: Any) -> Run:
    """A run that is about to make its first step."""
    values = small_run(root, output)
    values["train"] |= {"cache": "memory", **train}
    run = build_run(load_config("aihub_kaist", values, changes))
    run.model.train()
    run.freezer.begin(0)
    run.network.begin()
    return run


# --------------------------------------------------------------------- waiting for the device


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
@pytest.mark.parametrize("step", STEPS)
def test_no_step_waits_for_the_device_and_none_mixes_devices(
    step: str, precision: str, aihub_root: Path, tmp_path: Path, pretended: Pretended
) -> None:
    run = built(aihub_root, tmp_path, STEPS[step], device="cuda", precision=precision)
    assert run.scaler.is_enabled() == (precision == "fp16")
    seen = 0
    for seen, batch in enumerate(run.loader.epoch(0), start=1):
        if seen > 1:  # the first one brought tables over, and set its optimizer up
            assert pretended.waits == []
        train_step(run, batch)
        del batch
        assert seen == 1 or pretended.waits == []
        pretended.waits.clear()
    assert seen >= 4 and pretended.freed_early == 0
    run.guard.check()
    figures = run.meter.take(0.1, run.embedder.device)
    assert math.isfinite(figures["train/loss"]) and pretended.waits


@pytest.mark.parametrize("step", STEPS)
def test_no_backward_pass_has_a_value_looked_at(
    step: str, aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(aihub_root, tmp_path, STEPS[step], precision="fp16")
    monkeypatch.setattr(run.guard, "_at_once", False)  # as on other devices
    batch = next(run.loader.epoch(0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = (mode.from_tensor(part) for part in (batch.images, batch.pids, batch.camids))
        train_step(run, Batch(*parts))
        with pytest.raises(DataDependentOutputException):
            run.guard.check()


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_no_step_waits_for_a_real_device(
    step: str, precision: str, aihub_root: Path, tmp_path: Path
) -> None:
    run = built(aihub_root, tmp_path, STEPS[step], device="cuda", precision=precision)
    for seen, batch in enumerate(run.loader.epoch(0), start=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the mode may not see every wait
            torch.cuda.set_sync_debug_mode("error" if seen > 1 else "default")
            try:
                train_step(run, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    run.guard.check()


# --------------------------------------------------------------------- whole runs


def test_a_run_on_a_device_trains_evaluates_saves_and_resumes(
    aihub_root: Path, tmp_path: Path, pretended: Pretended
) -> None:
    values = small_run(aihub_root, tmp_path / "run")
    values["train"] |= {"device": "auto", "precision": "auto", "cache": "memory"}
    fit(load_config("aihub_kaist", values, FULL))
    values["train"]["epochs"] = 2
    figures = fit(load_config("aihub_kaist", values, FULL), resume="auto")
    assert figures["num_valid_queries"] == 21 and pretended.freed_early == 0
    log = (tmp_path / "run/train.log").read_text()
    assert "float16 on cuda" in log and "memory: a step needs 1.0 GiB of the 9.0 GiB" in log
    lines = [*map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines())]
    assert lines[-2]["train/peak_memory_gib"] == 1.0
    last = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert last.epoch == 2 and last.training is not None and last.training["scaler"]


def test_batches_of_all_epochs_are_made_on_one_stream(
    aihub_root: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Stream] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: made.append(Stream()) or made[-1])
    run = built(aihub_root, tmp_path, {}, device="cuda")
    for epoch in range(3):
        assert len(list(run.loader.epoch(epoch))) == len(run.sampler)
    assert len(made) == 1


def test_a_device_of_another_number_is_the_current_one_while_it_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places: list[torch.device | None] = [None]

    @contextlib.contextmanager
    def device(place: torch.device) -> Iterator[None]:
        places.append(place)
        yield
        places.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    with joined(torch.device("cuda", 1), timeout=5.0):
        assert places[-1] == torch.device("cuda", 1)
    with joined(torch.device("cpu"), timeout=5.0):
        assert places == [None]


# --------------------------------------------------------------------- what is seen is seen


def test_the_pretended_device_sees_what_it_is_there_for(pretended: Pretended) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    with pytest.raises(MixedDevices):
        there + here
    assert (there + torch.tensor(1.0)).device == there.device and pretended.waits == []
    for wait in (
        there.sum().item,
        lambda: bool((there > 0).all()),
        there.cpu,
        there.tolist,
        there.nonzero,
        lambda: there[there > 0],
        lambda: there[torch.tensor([0])],
        lambda: here.to("cuda", non_blocking=True),
        lambda: here.pin_memory().to("cuda"),
    ):
        pretended.waits.clear()
        wait()
        assert len(pretended.waits) == 1
    pretended.waits.clear()
    assert here.pin_memory().to("cuda", non_blocking=True).cpu().tolist() == [1, 1, 1]
    assert pretended.waits == ["a copy to cpu"]


def test_the_pretended_device_sees_streams_that_do_not_wait(pretended: Pretended) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made = torch.ones(3, device="cuda")
        event = stream.record_event()
    with pytest.raises(Race):
        made + 1
    torch.cuda.current_stream().wait_event(event)
    more = made + 1
    with torch.cuda.stream(stream), pytest.raises(Race):
        made.add_(1)  # which the addition may not have read yet
    assert more.tolist() == [2, 2, 2]
    with torch.cuda.stream(stream):
        made.add_(1)


@pytest.mark.parametrize("recorded", [True, False])
def test_the_pretended_device_sees_memory_that_is_freed_early(
    recorded: bool, pretended: Pretended
) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        made = torch.ones(3, device="cuda")
        event = stream.record_event()
    current = torch.cuda.current_stream()
    current.wait_event(event)
    made + 1
    if recorded:
        made.record_stream(current)
    del made
    assert pretended.freed_early == (0 if recorded else 1)


def test_a_loss_that_looks_at_a_value_is_noticed(
    aihub_root: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    triplet = LOSSES["triplet"]
    forward = triplet.forward

    def looking(self: Any, output: Output, pids: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = forward(self, output, pids)
        return value if value > 0 else value * 0

    monkeypatch.setattr(triplet, "forward", looking)
    run = built(aihub_root, tmp_path, {}, device="cuda", precision="fp16")
    batches = run.loader.epoch(0)
    train_step(run, next(batches))
    pretended.waits.clear()
    train_step(run, next(batches))
    assert pretended.waits == ["_local_scalar_dense"]
