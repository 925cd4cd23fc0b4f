"""Training and evaluation on a CUDA device: a pretended one, and a real one if available."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.modules.batchnorm import _BatchNorm

import reidreg
from conftest import small_run
from pretended import MixedDevices, Pretended, Race, Stream, pretended_cuda
from reidreg import LOSSES, fit, load_checkpoint, load_config
from reidreg.distributed.group import joined
from reidreg.errors import DeviceError
from reidreg.machine import gpu_memory
from reidreg.machine.devices import choose_precision
from reidreg.machine.gpu_memory import Holder, describe_shortage
from reidreg.training.batch_size import with_batch_size
from reidreg.training.divergence import DivergenceCheck
from reidreg.training.loop import train_step
from reidreg.training.profiling import WARM_UP, Profile, Stopwatch
from reidreg.training.run import Run, build_run
from reidreg.training.trainable import synchronise_batchnorm
from reidreg.values import Batch, Output

# Everything that a step can do beyond the guide's configuration.
FULL = {
    "losses.center": {"name": "center", "weight": 0.0005},
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
    "sgd": {**FULL, "optimizer.name": "sgd"},
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
    run.forward.begin()
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
        if seen > 1:  # the first one copied tables to the device, and set up its optimizer
            assert pretended.waits == []
        train_step(run, batch)
        del batch
        assert seen == 1 or pretended.waits == []
        pretended.waits.clear()
    assert seen >= 4 and pretended.freed_early == 0
    run.divergence.check()
    figures = run.meter.take(0.1, run.embedder.device)
    assert math.isfinite(figures["train/loss"]) and pretended.waits


@pytest.mark.parametrize("step", STEPS)
def test_no_step_reads_a_value_from_the_device(
    step: str, aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = built(aihub_root, tmp_path, STEPS[step], precision="fp16")
    run.divergence = DivergenceCheck(torch.device("meta"))  # as on a GPU
    batch = next(run.loader.epoch(0))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        parts = (mode.from_tensor(part) for part in (batch.images, batch.pids, batch.camids))
        train_step(run, Batch(*parts))
        with pytest.raises(DataDependentOutputException):
            run.divergence.check()


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_no_step_waits_for_a_real_device(
    step: str, precision: str, aihub_root: Path, tmp_path: Path
) -> None:
    run = built(aihub_root, tmp_path, STEPS[step], device="cuda", precision=precision)
    for seen, batch in enumerate(run.loader.epoch(0), start=1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a warning that the mode may miss some waits
            torch.cuda.set_sync_debug_mode("error" if seen > 1 else "default")
            try:
                train_step(run, batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")
    run.divergence.check()


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


# --------------------------------------------------------------------- the pretended device


def test_the_pretended_device_detects_waits_and_mixed_devices(pretended: Pretended) -> None:
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


def test_the_pretended_device_detects_streams_that_do_not_wait(pretended: Pretended) -> None:
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
def test_the_pretended_device_detects_memory_that_is_freed_early(
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


def test_a_loss_that_reads_a_value_is_detected(
    aihub_root: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    triplet = LOSSES["triplet"]
    forward = triplet.forward

    def reading(self: Any, output: Output, pids: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = forward(self, output, pids)
        return value if value > 0 else value * 0

    monkeypatch.setattr(triplet, "forward", reading)
    run = built(aihub_root, tmp_path, {}, device="cuda", precision="fp16")
    batches = run.loader.epoch(0)
    train_step(run, next(batches))
    pretended.waits.clear()
    train_step(run, next(batches))
    assert pretended.waits == ["_local_scalar_dense"]


# --------------------------------------------------------------------- torch.cuda


def test_torch_cuda_has_the_functions_that_are_called_with_these_arguments() -> None:
    calls = 0
    for path in sorted(Path(reidreg.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            if name.startswith("torch.cuda."):
                function = getattr(torch.cuda, name.removeprefix("torch.cuda."))
                named = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                inspect.signature(function).bind(*node.args, **named)
                calls += 1
    assert calls > 20
    # Attributes of devices, streams and events, which the search above does not find.
    for kind, names in {
        torch._C._CudaDeviceProperties: ["uuid"],
        torch.cuda.Stream: ["record_event", "wait_event"],
        torch.cuda.Event: ["record", "elapsed_time"],
        torch.Tensor: ["record_stream", "pin_memory"],
    }.items():
        assert all(hasattr(kind, name) for name in names)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 1), torch.float32),  # GTX 1080
        ((7, 0), torch.float16),  # V100
        ((7, 5), torch.float16),  # T4
        ((8, 0), torch.bfloat16),  # A100
        ((12, 0), torch.bfloat16),  # RTX 5090
    ],
)
def test_precision_auto_is_chosen_by_compute_capability(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cuda")
    assert choose_precision("auto", device) == dtype
    assert choose_precision("fp32", device) == torch.float32


def test_a_shortage_names_the_memory_that_driver_and_torch_report(
    pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(uuid="12-34")
    asked: list[str] = []

    def holders(uuid: str) -> list[Holder]:
        asked.append(uuid)
        return [Holder(2**22 + 1, "small", 2**20), Holder(2**22 + 2, "large", 2**33)]

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(gpu_memory, "compute_apps", holders)
    line = describe_shortage(torch.device("cuda"), need=2**35)
    assert asked == ["GPU-12-34"]
    assert line.startswith(
        "cuda is out of memory: a step needs 32.0 GiB, 8.0 GiB of 16.0 GiB are free; "
        "pid 4194306 large holds 8.0 GiB, pid 4194305 small holds 1.0 MiB; "
    )
    assert "this run used 1.0 GiB" in describe_shortage(torch.device("cuda"))


def test_a_step_that_does_not_fit_is_refused_before_the_first_one(
    aihub_root: Path, tmp_path: Path, pretended: Pretended, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_memory, "holders", lambda device: [])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 2**34)
    values = small_run(aihub_root, tmp_path / "run")
    values["train"]["device"] = "cuda"
    with pytest.raises(DeviceError, match="cuda is out of memory: a step needs 16.0 GiB"):
        fit(load_config("aihub_kaist", values))


def test_a_batch_size_is_searched_on_the_device(
    aihub_root: Path, tmp_path: Path, pretended: Pretended
) -> None:
    values = small_run(aihub_root, tmp_path / "run")
    values["sampler"] = {"batch_size": "auto", "instances": 2}
    values["train"]["device"] = "cuda"
    config = with_batch_size(load_config("aihub_kaist", values))
    assert config.sampler.options["batch_size"] == 12  # the most that the data allow


@pytest.fixture
def device_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA events on a clock that counts them, once the device has reached them."""
    clock = itertools.count()
    queued: list[Any] = []

    class Timed:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at: float | None = None

        def record(self) -> None:
            queued.append(self)

        def elapsed_time(self, end: Timed) -> float:
            assert self.at is not None and end.at is not None
            return end.at - self.at

    def synchronize() -> None:
        for event in queued:
            event.at = next(clock)

    monkeypatch.setattr(torch.cuda, "Event", Timed)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)


@pytest.mark.usefixtures("device_clock")
def test_phases_on_a_device_are_timed_by_cuda_events() -> None:
    stopwatch = Stopwatch(torch.device("cuda"))
    for _ in range(2):
        stopwatch.begin("data")
        stopwatch.begin("forward")
        stopwatch.begin("other")
        stopwatch.end_step()
    assert stopwatch.milliseconds() == {"data": 2, "forward": 2, "other": 2}


@pytest.mark.usefixtures("device_clock")
def test_a_profile_of_a_device_is_written_and_reports_how_long_copies_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "reidreg")
    CPU, CUDA = torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA
    record = torch.profiler.profile

    def without_a_device(activities: list[Any]) -> Any:
        assert activities == [CPU, CUDA]
        return record(activities=[CPU])

    monkeypatch.setattr(torch.profiler, "profile", without_a_device)
    profile = Profile(2, tmp_path, torch.device("cuda"))
    for _ in range(WARM_UP + 4):
        profile.begin("forward")
        torch.ones(2) + 1
        profile.end_step()
    profile.close()
    assert "host to device: 0.00 ms a step, while other phases run" in caplog.messages
    assert "aten::add" in (tmp_path / "operators.txt").read_text()


def test_batch_normalisation_for_devices_keeps_its_parameters_and_names(
    aihub_root: Path, tmp_path: Path
) -> None:
    model = built(aihub_root, tmp_path, {}).model
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    synchronise_batchnorm(model)
    norms = [part for part in model.modules() if isinstance(part, _BatchNorm)]
    assert norms and all(isinstance(norm, torch.nn.SyncBatchNorm) for norm in norms)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[key], value) for key, value in state.items())
    # An optimizer built before or after holds the same parameters, in the same order.
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(model.get_parameter(name) is found for name, found in parameters.items())
    assert not model.get_parameter("head.neck.bias").requires_grad


def test_timms_batch_normalisation_keeps_its_activation() -> None:
    model = torch.nn.Sequential(BatchNormAct2d(4))
    rows = torch.randn(6, 4, 2, 2)
    expected = model.eval()(rows)
    synchronise_batchnorm(model)
    assert isinstance(model[0], torch.nn.SyncBatchNorm)
    assert expected.min() == 0 and torch.equal(model(rows), expected)
