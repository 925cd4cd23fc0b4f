"""The checks before the first epoch, and that they do not change the run."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import small_run
from reidreg import (
    EVALUATORS,
    Embeddings,
    Evaluator,
    Sample,
    fit,
    load_checkpoint,
    load_config,
)
from reidreg.distributed.random_state import random_state
from reidreg.errors import ConfigError, DataError, DeviceError
from reidreg.machine.memory import GIB
from reidreg.training import preflight as preflight_module
from reidreg.training.optimizers import make_optimizer
from reidreg.training.preflight import check_memory, few_images, rehearse_evaluation, spread
from reidreg.training.run import Run, build_run
from reidreg.training.step_memory import StepProbe, missing_state, restoring_state


class FakeMemory:
    """A device of `available` GiB, whose peak grows linearly with the images of a step."""

    def __init__(self, available: float, per_image: float = 0.1, fixed: float = 1.0) -> None:
        self.size, self.per_image, self.fixed = available, per_image, fixed
        self.images = 0
        self.tried: list[int] = []

    def reset(self) -> None:
        self.images = 0

    def peak(self) -> int:
        return int((self.fixed + self.per_image * self.images) * GIB)

    def available(self) -> int:
        return int(self.size * GIB)

    def step(self, images: int) -> None:
        self.tried.append(images)
        self.images = images
        if self.peak() > self.available():
            raise torch.OutOfMemoryError("CUDA out of memory.")


def measured_by(memory: FakeMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let steps also use the fake's memory."""
    real = StepProbe.step

    def step(self: StepProbe, pids: torch.Tensor) -> None:
        memory.step(len(pids))
        real(self, pids)

    monkeypatch.setattr(StepProbe, "step", step)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.fixture(scope="module")
def run(aihub_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    values = small_run(aihub_root, tmp_path_factory.mktemp("unused"))
    return build_run(load_config("aihub_kaist", values))


# --------------------------------------------------------------------- nothing changes


def test_a_run_is_the_same_bits_with_and_without_preflight(
    aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(available=100)
    measured_by(memory, monkeypatch)
    monkeypatch.setattr(preflight_module, "memory_of", lambda device: memory)
    found = []
    for preflight in (True, False):
        values = small_run(aihub_root, tmp_path / str(preflight))
        values["train"]["preflight"] = preflight
        values["train"]["ema_decay"] = 0.9
        values["losses.center"] = {"name": "center", "weight": 0.0005}
        fit(load_config("aihub_kaist", values))
        found.append(load_checkpoint(tmp_path / str(preflight) / "checkpoints/last.ckpt"))
    assert memory.tried == [8]
    one, other = found
    assert one.training is not None and other.training is not None
    assert same(one.model, other.model) and same(one.training, other.training)
    assert "memory: a step needs" in (tmp_path / "True/train.log").read_text()
    assert "memory:" not in (tmp_path / "False/train.log").read_text()


def test_checks_restore_statistics_gradients_modes_and_random_states(run: Run) -> None:
    torch.nn.init.ones_(run.model.head.neck.running_mean)  # type: ignore[arg-type, union-attr]
    run.model.backbone.eval()
    before = copy.deepcopy(run.model.state_dict())
    modes = [module.training for module in run.model.modules()]
    random = random_state()
    memory = FakeMemory(available=100)
    check_memory(run, memory)
    after = run.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [module.training for module in run.model.modules()] == modes
    assert all(p.grad is None for p in [*run.model.parameters(), *run.objective.parameters()])
    assert same(random_state(), random)
    rehearse_evaluation(run, run.dataset)
    assert same(random_state(), random)
    assert [module.training for module in run.model.modules()] == modes
    run.model.train()


def test_the_state_is_restored_after_an_error_too(run: Run) -> None:
    norm = torch.nn.BatchNorm1d(3)
    with pytest.raises(ZeroDivisionError), restoring_state(norm):
        norm(torch.randn(4, 3)).sum().backward()
        raise ZeroDivisionError
    assert norm.running_mean is not None and not norm.running_mean.any()
    assert norm.weight.grad is None and norm.num_batches_tracked == 0


# --------------------------------------------------------------------- memory


def test_a_step_that_does_not_fit_is_an_error_with_an_estimate_of_its_need(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = []
    monkeypatch.setattr(
        preflight_module, "describe_shortage", lambda device, need: said.append(need) or "short"
    )
    monkeypatch.setattr(StepProbe, "step", lambda self, pids: memory.step(len(pids)))
    pids = torch.arange(64) // 4
    monkeypatch.setattr(run.loader, "pids_of", lambda indices: pids)
    memory = FakeMemory(available=4, per_image=0.1)
    with pytest.raises(DeviceError, match="short"):
        check_memory(run, memory)
    assert memory.tried == [64, 8, 16]
    state = missing_state(run.optimizer, run.config.optimizer)
    assert said[0] == pytest.approx((1 + 6.4) * GIB + state, rel=1e-6)


def test_the_optimizers_state_is_added_to_the_need(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = missing_state(run.optimizer, run.config.optimizer)
    monkeypatch.setattr(preflight_module, "describe_shortage", lambda device, need: "short")
    memory = FakeMemory(available=1 + state / GIB / 2, per_image=0)
    with pytest.raises(DeviceError):
        check_memory(run, memory)
    check_memory(run, FakeMemory(available=1.001 + state / GIB, per_image=0))


def test_with_accumulation_a_part_of_the_batch_is_tried(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = FakeMemory(available=100)
    measured_by(memory, monkeypatch)
    config = load_config(run.config.as_dict(), {"train.accumulate": 2})
    monkeypatch.setattr(run, "config", config)
    check_memory(run, memory)
    assert memory.tried == [4]


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "rmsprop", "lamb", "lion", "adafactor"])
def test_the_optimizers_state_is_predicted(name: str) -> None:
    config = load_config("aihub_kaist", {"optimizer.name": name}).optimizer
    weights = [torch.nn.Parameter(torch.randn(256, 128)), torch.nn.Parameter(torch.randn(64, 64))]
    optimizer = make_optimizer(config, [(f"w{i}", w) for i, w in enumerate(weights)])
    random = random_state()

    def held() -> int:
        states = [value for state in optimizer.state.values() for value in state.values()]
        return sum(value.nbytes for value in states if torch.is_tensor(value))

    predicted = held() + missing_state(optimizer, config)
    assert same(random_state(), random)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    parameters = sum(weight.nbytes for weight in weights)
    # To a few percent of the parameters: factored states shrink as matrices grow.
    assert abs(predicted - held()) < 0.05 * parameters
    assert missing_state(optimizer, config) < 0.05 * parameters


# --------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    "options",
    [
        {"bootstrap": 100},
        {"rerank": True, "k1": 500, "k2": 100},
        {"expansion": 40},
        {"verification": True, "far": 1e-6},
        {"cameras": True},
        {"protocol": "cuhk03", "rerank": True},
        {"max_rank": 5000, "metric": "euclidean"},
        {"same_camera": "keep"},
    ],
    ids=lambda options: "+".join(options),
)
def test_no_evaluation_fails_because_the_images_are_few(
    run: Run, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    counted = []
    evaluator = EVALUATORS.build("retrieval", **options)
    real = evaluator.evaluate

    def evaluate(query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
        counted.append((len(query.pids), len(gallery.pids)))
        return real(query, gallery)

    monkeypatch.setattr(evaluator, "evaluate", evaluate)
    monkeypatch.setattr(run, "evaluator", evaluator)
    rehearse_evaluation(run, run.dataset)
    assert len(counted) == 1 and counted[0][0] <= 8 and counted[0][1] <= 32


FIGURES = {"mAP": 0.5, "mINP": 0.5, "rank1": 0.5}


class Demanding(Evaluator):
    """An evaluator that needs a minimum of queries."""

    def __init__(self, least: int, figures: dict[str, Any]) -> None:
        self.least, self.figures = least, figures
        self.seen: list[int] = []

    def evaluate(self, query: Embeddings, gallery: Embeddings) -> dict[str, Any]:
        self.seen.append(len(query.pids))
        if len(query.pids) < self.least:
            raise DataError(f"{len(query.pids)} queries are too few")
        return self.figures

    def rank(self, query: Embeddings, gallery: Embeddings, k: int) -> Any:
        raise AssertionError("a rehearsal needs no ranked lists")


def test_an_evaluator_that_needs_more_images_gets_all_of_them(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = len(run.dataset.query)
    monkeypatch.setattr(run, "evaluator", Demanding(queries, FIGURES))
    rehearse_evaluation(run, run.dataset)
    assert run.evaluator.seen == [6, queries]  # type: ignore[attr-defined]
    monkeypatch.setattr(run, "evaluator", Demanding(queries + 1, FIGURES))
    with pytest.raises(DataError, match=f"{queries} queries are too few"):
        rehearse_evaluation(run, run.dataset)


def test_an_evaluator_without_the_figure_that_chooses_best_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "evaluator", Demanding(0, {"rank1": 0.5}))
    with pytest.raises(ConfigError, match=r"evaluator\.name: retrieval gives no mAP, mINP as"):
        rehearse_evaluation(run, run.dataset)


def test_figures_that_json_cannot_hold_are_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "evaluator", Demanding(0, {**FIGURES, "x": {1, 2}}))
    with pytest.raises(TypeError, match="not JSON serializable"):
        rehearse_evaluation(run, run.dataset)


def test_features_that_are_not_finite_are_only_warned_of(
    run: Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weight = next(run.model.backbone.parameters())
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[0] = torch.nan
        rehearse_evaluation(run, run.dataset)
        weight.copy_(kept)
    assert "features are not finite" in caplog.text


def test_a_failing_evaluation_ends_a_run_before_it_moves_an_earlier_runs_files(
    aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("aihub_kaist", small_run(aihub_root, tmp_path / "run"))
    fit(config)
    retrieval = EVALUATORS["retrieval"]

    def fail(*sides: Embeddings) -> dict[str, Any]:
        raise DataError("no figures today")

    monkeypatch.setattr(retrieval, "evaluate", fail)
    with pytest.raises(DataError, match="no figures today"):
        fit(config)
    assert (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert not list((tmp_path / "run").glob("earlier-*"))


def test_with_held_out_identities_the_test_set_is_checked_too(
    aihub_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {**small_run(aihub_root, tmp_path / "run"), "validation.identities": 0.4}
    values["sampler"] = {"batch_size": 4, "instances": 2}
    run = build_run(load_config("aihub_kaist", values))
    seen = []
    monkeypatch.setattr(
        preflight_module, "rehearse_evaluation", lambda run, data: seen.append(data)
    )
    preflight_module.preflight(run)
    assert seen == [run.validation, run.dataset] and run.validation is not run.dataset


# --------------------------------------------------------------------- which images


def samples(*ids: tuple[int, int]) -> list[Sample]:
    return [Sample(f"{pid}_{camid}_{n}.jpg", pid, camid) for n, (pid, camid) in enumerate(ids)]


def matched(query: Sequence[Sample], gallery: Sequence[Sample]) -> list[bool]:
    return [any(g.pid == q.pid and g.camid != q.camid for g in gallery) for q in query]


def test_each_query_has_a_match_by_another_camera() -> None:
    query = samples(*[(pid, 0) for pid in range(100)], *[(pid, 1) for pid in range(100)])
    gallery = samples(
        *[(-1, 0)] * 50, *[(pid, 1) for pid in range(100)], *[(pid, 2) for pid in range(50, 100)]
    )
    chosen, shown = few_images(query, gallery)
    assert len(chosen) == 8 and len({sample.pid for sample in chosen}) == 8
    assert all(matched(chosen, shown)) and len(shown) <= 32
    # Identities from all over the data, and others that match no query.
    assert max(sample.pid for sample in chosen) - min(sample.pid for sample in chosen) > 80
    assert {sample.pid for sample in shown} - {sample.pid for sample in chosen}
    assert few_images(query, gallery) == (chosen, shown)


def test_identities_seen_by_one_camera_are_taken_only_if_there_are_no_others() -> None:
    alone = samples(*[(pid, 0) for pid in range(20)])
    query, gallery = [*alone, *samples((50, 0))], [*alone, *samples((50, 1))]
    chosen, shown = few_images(query, gallery)
    assert [sample.pid for sample in chosen] == [50] and matched(chosen, shown) == [True]
    chosen, shown = few_images(alone, alone)
    assert len(chosen) == 8 and {q.pid for q in chosen} <= {g.pid for g in shown}


def test_without_any_match_there_are_still_queries() -> None:
    chosen, shown = few_images(samples((1, 0), (2, 0)), samples((3, 0)))
    assert [sample.pid for sample in chosen] == [1, 2] and [sample.pid for sample in shown] == [3]


@pytest.mark.parametrize(("size", "count"), [(0, 3), (2, 3), (3, 3), (10, 3), (100, 7)])
def test_items_are_spread_evenly(size: int, count: int) -> None:
    found = spread(range(size), count)
    assert len(found) == min(size, count) == len(set(found))
    gaps = [b - a for a, b in zip(found, found[1:], strict=False)]
    assert not gaps or max(gaps) - min(gaps) <= 1
