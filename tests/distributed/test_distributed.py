"""Runs of several processes: the figures are those of one process, and all end together."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import as_flags
from reidreg import (
    DATASETS,
    LOSSES,
    SAMPLERS,
    Batch,
    Embeddings,
    Output,
    fit,
    load_checkpoint,
    load_config,
)
from reidreg.data.labels import labels_of
from reidreg.data.sampling import SharedSampler, build_sampler
from reidreg.distributed.group import (
    gather,
    joined,
    world,
)
from reidreg.errors import ConfigError, DataError, RankError
from reidreg.evaluation.evaluate import evaluate_checkpoint
from reidreg.machine.world import World
from reidreg.model.embedder import make_embedder
from reidreg.model.model import build_model
from reidreg.parts.interfaces import Sampler
from reidreg.training.forward import TrainingForward
from reidreg.training.objective import Objective
from reidreg.training.run import build_run
from runs import Values, at_most_apart, differing, killed_and_resumed, lines_of, trained
from worlds import in_processes, started

CPU = torch.device("cpu")


# --------------------------------------------------------------------- samplers

PIDS = [pid for pid in range(20) for _ in range(7)]
FACTS: Values = {"pids": PIDS, "camids": [0] * len(PIDS), "seed": 3}
OPTIONS: dict[str, Values] = {
    "identity": {"batch_size": 16, "instances": 2},
    "random": {"batch_size": 16},
}


def batches(name: str, place: World, epoch: int) -> list[list[int]]:
    sampler = build_sampler(name, OPTIONS[name], place, **FACTS)
    sampler.set_epoch(epoch)
    found = list(sampler)
    assert len(found) == len(sampler) > 0
    return found


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_batches_of_all_ranks_make_up_the_epoch_of_one_process(name: str, size: int) -> None:
    for epoch in (0, 3):
        whole = batches(name, World(), epoch)
        parts = [batches(name, World(rank, size), epoch) for rank in range(size)]
        assert [sum(shares, []) for shares in zip(*parts, strict=True)] == whole
        assert {len(share) for part in parts for share in part} == {16 // size}


def test_every_registered_sampler_is_tested_here() -> None:
    assert set(OPTIONS) == {name for name in SAMPLERS if SAMPLERS.plugin(name).name == "builtin"}


def test_no_identity_of_a_batch_is_split_between_ranks() -> None:
    for rank in range(4):
        for share in batches("identity", World(rank, 4), 0):
            assert {PIDS[index] for index in share} and len({PIDS[i] for i in share}) == 2


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_batch_size_that_cannot_be_shared_evenly_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(ConfigError, match=r"sampler\.batch_size: 16 .* 3 processes; use 15 or 18"):
        build_sampler(name, OPTIONS[name], World(0, 3), **FACTS)


class _Odd(Sampler):
    """Batches of two sizes, the second odd."""

    def __iter__(self) -> Any:
        yield from ([0, 1], [2, 3, 4])

    def __len__(self) -> int:
        return 2


def test_a_batch_of_uneven_size_is_an_error_of_one_line() -> None:
    shares = SharedSampler(_Odd(), World(1, 2))
    with pytest.raises(DataError, match="a batch of 3 images cannot be shared evenly"):
        list(shares)


def test_a_shared_sampler_resumes_as_the_sampler_itself_does() -> None:
    one = SharedSampler(_Odd(), World(1, 2))
    one.set_epoch(5)
    other = SharedSampler(_Odd(), World(1, 2))
    other.load_state_dict(one.state_dict())
    assert other.epoch == other.sampler.epoch == 5


# --------------------------------------------------------------------- gradients


class _Small(nn.Module):
    """A small model: images to all that losses see, with a layer that nothing uses.

    Args:
        branches: Whether the output has branches.
        by_batch: Normalise over the batch, and not over the channels of an image.
    """

    def __init__(self, branches: bool, by_batch: bool = True) -> None:
        super().__init__()
        self.branches = branches
        self.conv = nn.Conv2d(3, 6, 3)
        self.norm: nn.Module = nn.BatchNorm2d(6) if by_batch else nn.GroupNorm(2, 6)
        self.neck: nn.Module = nn.BatchNorm1d(6) if by_batch else nn.GroupNorm(2, 6)
        self.classifier = nn.Linear(6, 4, bias=False)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor, camids: Tensor | None = None) -> Output:
        pooled = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        normalised = self.neck(pooled)
        logits = self.classifier(normalised)
        whole = Output(pooled, normalised, logits)
        if not self.branches:
            return whole
        part = Output(pooled[:, :3], normalised[:, :3], logits)
        return Output(pooled, normalised, logits, ((whole, 1.0), (part, 0.5)))


def small_objective(branches: bool) -> Objective:
    names = ["cross_entropy", "triplet"] + ([] if branches else ["center"])
    terms = {name: LOSSES.build(name, num_classes=4, dim=6) for name in names}
    return Objective(terms, {name: 0.3 for name in names})


def small_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(16, 3, 8, 8, generator=generator), torch.arange(4).repeat_interleave(4)


def small_gradients(parts: int, shared: bool, branches: bool, steps: int = 2) -> dict[str, Tensor]:
    """The gradients of a step, in this process's place of the world."""
    torch.manual_seed(0)
    # The statistics of a share of a batch are other ones.
    model: Any = _Small(branches, by_batch=not shared)
    objective = small_objective(branches)
    with joined(CPU, 20.0) as place:
        network = TrainingForward(model, objective, torch.float32, gathered=shared)
        images, pids = small_batch()
        own = place.share(16)
        # The first step finds out what is used, the second goes by it.
        for _ in range(steps):
            model.zero_grad()
            objective.zero_grad()
            network.begin()
            pieces = zip(images[own].chunk(parts), pids[own].chunk(parts), strict=True)
            for number, (some, labels) in enumerate(pieces, start=1):
                with network.averaging(now=number == parts):
                    loss, _, _ = network(Batch(some, labels, labels))
                    (loss / parts).backward()
        found = {f"model.{n}": p.grad for n, p in model.named_parameters()}
        found |= {f"loss.{n}": p.grad for n, p in objective.named_parameters()}
        assert found.pop("model.unused.weight") is None and found.pop("model.unused.bias") is None
        found |= {n: b for n, b in model.named_buffers()}
        return {name: value.clone() for name, value in found.items() if value is not None}


@pytest.mark.parametrize(("size", "branches"), [(2, True), (4, False)])
def test_gathered_losses_have_the_gradients_of_one_process(size: int, branches: bool) -> None:
    whole = small_gradients(1, True, branches)
    for one in in_processes(size, small_gradients, 1, True, branches):
        assert one.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(one[name], value, rtol=1e-4, atol=2e-6, msg=name)


@pytest.mark.parametrize("parts", [1, 2])
def test_without_gathering_gradients_are_the_mean_of_those_of_all_parts(parts: int) -> None:
    first, second = in_processes(2, small_gradients, parts, False, False)
    torch.manual_seed(0)
    model, objective = _Small(False), small_objective(False)
    images, pids = small_batch()
    for some, labels in zip(images.chunk(2 * parts), pids.chunk(2 * parts), strict=True):
        (objective(model(some), labels)[0] / (2 * parts)).backward()
    expected = {f"model.{name}": p.grad for name, p in model.named_parameters()}
    expected |= {f"loss.{name}": p.grad for name, p in objective.named_parameters()}
    for name, gradient in expected.items():
        if gradient is not None:
            torch.testing.assert_close(first[name], gradient, msg=name)
            assert torch.equal(first[name], second[name]), name


def frozen_then_free() -> list[int]:
    torch.manual_seed(0)
    model: Any = _Small(False)
    # No loss looks at the logits, which the model gives all the same.
    objective = Objective({"triplet": LOSSES.build("triplet")}, {"triplet": 1.0})
    with joined(CPU, 20.0) as place:
        network, counts = TrainingForward(model, objective, torch.float32), []
        images, pids = (rows[place.share(16)] for rows in small_batch())
        for epoch in range(2):
            model.conv.requires_grad_(epoch > 0)
            for _ in range(3):
                model.zero_grad()
                network.begin()
                with network.averaging(now=True):
                    network(Batch(images, pids, pids))[0].backward()
                found = [p.grad for p in model.parameters() if p.grad is not None]
                counts.append(len(found))
                sums = gather([gradient.double().sum().item() for gradient in found])
                assert sums[0] == sums[1]
        return counts


def test_what_is_not_used_or_freed_later_is_averaged_as_it_should_be() -> None:
    assert in_processes(2, frozen_then_free) == [[2, 2, 2, 4, 4, 4]] * 2


# --------------------------------------------------------------------- batch normalisation


def refused(values: Values) -> str:
    with joined(CPU, 20.0):
        try:
            build_run(load_config("aihub_kaist", values))
        except ConfigError as error:
            return str(error)
        return "built"


def test_synchronised_batch_normalisation_needs_cuda_where_there_are_several_processes(
    tiny: Values,
) -> None:
    values = {**tiny, "train.sync_batchnorm": True, "train.device": "cpu"}
    assert refused(values) == "built"
    for line in in_processes(2, refused, values):
        assert line.startswith("train.sync_batchnorm: ") and "CUDA" in line and "\n" not in line
        assert "set it to false" in line


# --------------------------------------------------------------------- extraction and evaluation


@pytest.fixture
def small(tiny: Values) -> Values:
    """A run whose model is exchanged in milliseconds."""
    return {**tiny, "backbone.name": "timm", "backbone.model": "test_resnet"}


def embedded(values: Values, count: int) -> Embeddings:
    config = load_config("aihub_kaist", values)
    torch.manual_seed(0)
    with joined(CPU, 20.0):
        dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
        labels = labels_of(dataset.train)
        embedder = make_embedder(build_model(config, labels), labels, config)
        return embedder.embed(dataset.query[:count], "query")


@pytest.mark.parametrize("count", [10, pytest.param(1, marks=pytest.mark.slow)])
def test_extraction_is_shared_and_its_rows_are_in_order(small: Values, count: int) -> None:
    whole = embedded(small, count)
    first, second, third = in_processes(3, embedded, small, count)
    torch.testing.assert_close(first.features, whole.features, rtol=1e-4, atol=1e-5)
    assert torch.equal(first.pids, whole.pids) and torch.equal(first.camids, whole.camids)
    assert first.paths == whole.paths
    assert [len(second.paths), len(third.paths)] == ([0, 0] if count == 1 else [3, 3])
    assert len(second.features) == len(second.paths) and second.pids.dtype == torch.int64


def cached(values: Values, folder: Path) -> tuple[Values, int]:
    config = load_config("aihub_kaist", values)
    with joined(CPU, 20.0):
        checkpoint = load_checkpoint(Path(config.output_dir) / "checkpoints/last.ckpt")
        result = evaluate_checkpoint(checkpoint, config, folder)
        return result.figures, len(result.query.features)


def test_evaluation_is_shared_and_its_cache_too(small: Values, tmp_path: Path) -> None:
    config = load_config("aihub_kaist", small)
    figures = fit(config)
    for rows in ((21, 10), (21, 0)):  # extracted, then read from rank 0's cache
        results = in_processes(2, cached, small, tmp_path / "cache")
        assert [found for found, _ in results] == [figures, figures]
        assert tuple(count for _, count in results) == rows


# --------------------------------------------------------------------- whole runs

CENTER = {"losses.center.name": "center", "losses.center.weight": 0.0005}
# Models that compute each image by itself, as long as they are trained.
INDEPENDENT: dict[str, Values] = {
    "without": {"backbone.model": "test_vit", "head": {"name": "linear"}},
    "frozen": {"train.freeze": ["conv1", "bn", "downsample", "neck"], "train.freeze_epochs": 9},
}


def checked(values: Values, resume: str | None = None) -> Values:
    """As `trained`, for a run in which no batch normalisation is trained."""
    figures = trained(values, resume)
    model = load_checkpoint(Path(values["output_dir"]) / "checkpoints/last.ckpt").model
    assert not any(value.any() for key, value in model.items() if key.endswith("running_mean"))
    return figures


@pytest.mark.parametrize(
    ("size", "model"),
    [(2, "without"), (2, "frozen"), pytest.param(4, "without", marks=pytest.mark.slow)],
)
def test_several_processes_make_the_run_that_one_makes(
    small: Values, tmp_path: Path, size: int, model: str
) -> None:
    values = {**small, **INDEPENDENT[model], **CENTER, "train.gather": True}
    values |= {"train.log_every": 1, "train.epochs": 2}
    figures = checked({**values, "output_dir": str(tmp_path / "one")})
    shared = in_processes(size, checked, {**values, "output_dir": str(tmp_path / "all")})
    # Sums of other order differ by 1e-7, and every step makes more of it.
    at_most_apart(lines_of(tmp_path / "all"), lines_of(tmp_path / "one"), rel=1e-4)
    assert all(found == shared[0] for found in shared)
    assert shared[0]["mAP"] == pytest.approx(figures["mAP"], abs=0.02)
    assert shared[0]["num_valid_queries"] == figures["num_valid_queries"]
    one = load_checkpoint(tmp_path / "one/checkpoints/last.ckpt")
    both = load_checkpoint(tmp_path / "all/checkpoints/last.ckpt")
    assert one.model.keys() == both.model.keys()


def test_another_number_of_processes_goes_on_to_the_same_figures(
    small: Values, tmp_path: Path
) -> None:
    values = {**small, **INDEPENDENT["without"], "train.gather": True}
    values |= {"train.log_every": 1, "train.epochs": 2}
    trained({**values, "output_dir": str(tmp_path / "whole")})
    cut = {**values, "output_dir": str(tmp_path / "cut")}
    trained({**cut, "train.epochs": 1})
    in_processes(2, trained, cut, "auto")
    assert "resumed by 2 processes, saved by 1" in (tmp_path / "cut/train.log").read_text()
    at_most_apart(
        [line for line in lines_of(tmp_path / "cut") if "train/loss" in line],
        [line for line in lines_of(tmp_path / "whole") if "train/loss" in line],
        rel=1e-4,
    )


def test_a_killed_run_of_two_processes_goes_on_to_the_same_bits(
    small: Values, tmp_path: Path
) -> None:
    values = {**small, **CENTER, "train.epochs": 4, "train.log_every": 1, "train.ema_decay": 0.9}
    values["train.eval_every"] = 2
    in_processes(2, trained, {**values, "output_dir": str(tmp_path / "whole")})
    killed_and_resumed({**values, "output_dir": str(tmp_path / "killed")}, 2, "epoch 3/4 step 3/")
    log = (tmp_path / "killed/train.log").read_text()
    assert "resumed from" in log and "at step 10" in log
    paths = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "killed")]
    assert not differing(*paths)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "killed")
    assert len((load_checkpoint(paths[0]).training or {})["others"]) == 1


@pytest.mark.slow
def test_another_number_of_processes_may_go_on_and_is_told_what_that_means(
    small: Values, tmp_path: Path
) -> None:
    in_processes(2, trained, small)
    trained({**small, "train.epochs": 2}, "auto")
    assert "resumed by 1 processes, saved by 2" in (tmp_path / "run/train.log").read_text()
    in_processes(2, trained, {**small, "train.epochs": 3}, "auto")
    assert "resumed by 2 processes, saved by 1" in (tmp_path / "run/train.log").read_text()
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt").epoch == 3


# --------------------------------------------------------------------- ending together


def hanging(values: Values) -> str:
    from reidreg_plugins.losses.triplet import Triplet

    forward = Triplet.forward

    def hang(self: Triplet, output: Output, pids: Tensor) -> Tensor:
        time.sleep(1000 if world().rank == 1 else 0)
        return forward(self, output, pids)

    Triplet.forward = hang  # type: ignore[method-assign]
    try:
        trained(values)
    except RankError as error:
        return str(error)
    return "ended well"


def test_a_rank_that_hangs_in_a_step_is_reported_and_ended(small: Values) -> None:
    values = {**small, "train.rank_timeout": 2.0}
    with started(2, hanging, values) as ((first, told), (second, _)):
        assert told.poll(40)
        trace, line = pickle.loads(told.recv_bytes())
        assert trace is None and "has not answered within train.rank_timeout" in line
        first.join(10)
        second.join(10)
        # Asleep in the middle of a step, it was ended by its own watching thread.
        assert (first.exitcode, second.exitcode) == (0, 1)


def launch(
    size: int, values: Values, *options: str, resume: str | None = None
) -> subprocess.Popen[str]:
    """Start a run of `size` processes with torchrun."""
    command = ["-m", "torch.distributed.run", f"--nproc-per-node={size}", *options]
    run = ["-m", "reidreg", "fit", "--config", "aihub_kaist", *as_flags(values)]
    run += ["--resume", resume] if resume else []
    return subprocess.Popen(
        [sys.executable, *command, *run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def processes_of(values: Values) -> dict[str, int]:
    """The process ids of a run by rank, without torchrun itself."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (folder / "cmdline").read_text().split("\0")
            if f"--output_dir={values['output_dir']}" in command and "fit" in command:
                variables = (folder / "environ").read_text().split("\0")
                ranks = [v.removeprefix("RANK=") for v in variables if v.startswith("RANK=")]
                if ranks:
                    found[ranks[0]] = int(folder.name)
    return found


def wait_for(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(process.communicate()[1])


def our_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if line.startswith("reidreg fit")]


@pytest.mark.slow
def test_under_torchrun_one_rank_prints_and_writes(small: Values, tmp_path: Path) -> None:
    process = launch(2, small)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    steps = [line for line in output.splitlines() if line.startswith("epoch 1/1 step")]
    assert len(steps) == len(set(steps)) == 3
    assert output.count("results:") == output.count("train folder:") == 1
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 5, 5]


@pytest.mark.slow
def test_a_rank_that_fails_ends_all_and_its_error_is_printed_once(
    small: Values, tmp_path: Path
) -> None:
    root = tmp_path / "copy"
    shutil.copytree(small["dataset.root"], root)
    victim = next((root / "aihub_kaist/bounding_box_train_1").glob("*.jpg"))
    victim.write_bytes(victim.read_bytes()[:200])
    values = {**small, "dataset.root": str(root), "train.epochs": 50}
    process = launch(2, values)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = our_lines(errors)
    assert victim.name in line
    summary = errors[errors.index("Root Cause") :]
    assert victim.name in summary and "exitcode  : 2" in summary
    assert not processes_of(values)


def errors_after(number: signal.Signals, values: Values) -> str:
    """What a run of two prints after rank 1 got a signal; all ranks end within a minute."""
    process = launch(2, values)
    wait_for(process, f"epoch 1/{values['train.epochs']} step 2/")
    os.kill(processes_of(values)["1"], number)
    start = time.monotonic()
    _, errors = process.communicate(timeout=90)
    assert time.monotonic() - start < 60 and process.returncode == 1
    assert not processes_of(values)
    return errors


@pytest.mark.slow
def test_a_rank_that_is_killed_ends_all(small: Values) -> None:
    errors = errors_after(signal.SIGKILL, {**small, "train.epochs": 50})
    assert "Signal 9 (SIGKILL)" in errors[errors.index("Root Cause") :]


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_a_step_ends_all_within_a_minute(small: Values) -> None:
    values = {**small, "train.epochs": 10_000, "train.workers": 1}
    errors = errors_after(signal.SIGSTOP, values)
    (line,) = [line for line in errors.splitlines() if line.startswith(("reidreg:", "reidreg fit"))]
    assert "rank 1 on " in line and "is stopped or hangs" in line


STOPPED = """
import os, signal, sys, torch
from reidreg.distributed.group import joined, wait

with joined(torch.device("cpu"), 45.0) as place:
    if place.rank == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGSTOP)
    wait()  # for up to twelve hours, as during an evaluation
"""


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_is_stopped_outside_of_a_step_ends_all_too(tmp_path: Path, rank: int) -> None:
    script = tmp_path / "stopped.py"
    script.write_text(STOPPED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=3"]
    start = time.monotonic()
    ended = subprocess.run(
        [*torchrun, str(script), str(rank)], capture_output=True, text=True, timeout=90
    )
    assert time.monotonic() - start < 60 and ended.returncode == 1
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("reidreg: ")]
    assert f"rank {rank} on " in line and "no heartbeat for 30 s" in line
    assert line.removeprefix("reidreg: ") in ended.stderr[ended.stderr.index("Root Cause") :]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_after_a_signal_to_torchrun_the_run_resumes_to_the_same_bits(
    small: Values, tmp_path: Path, number: signal.Signals
) -> None:
    values = {**small, "train.epochs": 3, "train.log_every": 1, "train.workers": 1}
    alone = {**values, "train.workers": 0, "train.cache": "none"}  # neither changes a bit
    in_processes(2, trained, {**alone, "output_dir": str(tmp_path / "whole")})
    process = launch(2, values)
    wait_for(process, "epoch 2/3 step 1/")
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    (line,) = our_lines(errors)
    assert "--resume auto goes on from there" in line
    assert not processes_of(values)
    stopped = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt")
    assert 5 < stopped.step < 15
    in_processes(2, trained, alone, "auto")
    paths = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "run")]
    assert not differing(*paths)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "run")


@pytest.mark.slow
def test_ranks_that_torchrun_restarts_resume_from_the_last_checkpoint(
    small: Values, tmp_path: Path
) -> None:
    values = {**small, "train.epochs": 3, "train.log_every": 1}
    in_processes(2, trained, {**values, "output_dir": str(tmp_path / "whole")})
    # An earlier run in the same folder must not be resumed.
    trained({**values, "train.epochs": 1})
    process = launch(2, values, "--max-restarts=1")
    wait_for(process, "epoch 2/3 step 2/")
    os.kill(processes_of(values)["1"], signal.SIGKILL)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "resumed from" in (tmp_path / "run/train.log").read_text()
    assert (tmp_path / "run/earlier-1").exists() and not (tmp_path / "run/earlier-2").exists()
    paths = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "run")]
    assert not differing(*paths)


@pytest.mark.gpu
@pytest.mark.parametrize("together", [False, True], ids=["shares", "gathered"])
def test_gpus_train_evaluate_and_resume(small: Values, tmp_path: Path, together: bool) -> None:
    changes = {"train.gather": together, "train.sync_batchnorm": together}
    values = {**small, **CENTER, **changes, "train.device": "cuda", "train.precision": "auto"}
    for epochs in (1, 2):
        size = min(torch.cuda.device_count(), 2)
        process = launch(size, {**values, "train.epochs": epochs}, resume="auto")
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    assert load_checkpoint(tmp_path / "run/checkpoints/last.ckpt").epoch == 2
    validation = [line for line in lines_of(tmp_path / "run") if "val/mAP" in line]
    assert [line["epoch"] for line in validation] == [1, 2]


@pytest.mark.slow
def test_a_wrong_option_is_reported_by_one_rank(small: Values) -> None:
    process = launch(2, {**small, "sampler.batch_size": 6, "sampler.instances": 2})
    _, errors = process.communicate(timeout=60)
    (line,) = our_lines(errors)
    assert "3 identities a batch cannot be shared evenly by 2 processes" in line
