"""Learning rates by epoch, against published values and recorded runs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reidreg import load_config
from reidreg.config.schedules import Cosine, MultiStep, warmup
from reidreg.errors import ConfigError
from reidreg.training.optimizers import make_schedule


@pytest.mark.parametrize(
    ("epoch", "rate"),
    [
        (1, 3.815e-5),
        (2, 7.28e-5),
        (5, 1.7675e-4),
        (9, 3.1535e-4),
        (10, 3.5e-4),
        (39, 3.5e-4),
        (40, 3.5e-5),
        (69, 3.5e-5),
        (70, 3.5e-6),
        (120, 3.5e-6),
    ],
)
def test_the_shipped_schedule_gives_the_published_rates(epoch: int, rate: float) -> None:
    config = load_config("aihub_kaist")
    factor = make_schedule(config).factor(epoch)
    assert config.optimizer.lr * factor == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize(
    ("base", "factor", "epochs", "epoch", "logged"),
    [
        (1e-4, 0.01, 10, 1, "1.09e-05"),
        (1e-4, 0.01, 10, 2, "2.08e-05"),
        (2e-4, 0.05, 20, 1, "1.95e-05"),
        (7.5e-5, 0.03, 20, 1, "5.89e-06"),
    ],
)
def test_warm_up_gives_the_rates_of_recorded_runs(
    base: float, factor: float, epochs: int, epoch: int, logged: str
) -> None:
    schedule = MultiStep(warmup_epochs=epochs, warmup_factor=factor)
    assert f"{base * schedule.factor(epoch):.2e}" == logged


def test_a_rate_decays_an_epoch_earlier_than_torch_which_steps_after_the_epoch() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=[4, 7], gamma=0.1)
    ours = MultiStep(milestones=(4, 7), warmup_epochs=0)
    for epoch in range(1, 12):
        assert ours.factor(epoch) == pytest.approx(0.1 ** ((epoch >= 4) + (epoch >= 7)))
        optimizer.step()
        theirs.step()
        # After its e-th step torch holds the rate of our epoch e.
        assert theirs.get_last_lr()[0] == pytest.approx(ours.factor(epoch))


@pytest.mark.parametrize("method", ["linear", "constant"])
def test_no_warm_up_is_safe(method: str) -> None:
    for schedule in (
        MultiStep(warmup_epochs=0, warmup_method=method),  # type: ignore[arg-type]
        Cosine(total_epochs=10, warmup_epochs=0, warmup_method=method),  # type: ignore[arg-type]
    ):
        assert schedule.factor(1) == 1.0


def test_a_constant_warm_up_holds_its_factor_until_the_last_of_its_epochs() -> None:
    schedule = MultiStep(warmup_epochs=10, warmup_factor=0.2, warmup_method="constant")
    assert [schedule.factor(epoch) for epoch in (1, 5, 9)] == [0.2] * 3
    assert schedule.factor(10) == 1.0


def test_milestones_within_the_warm_up_multiply() -> None:
    schedule = MultiStep(milestones=(3,), gamma=0.5, warmup_epochs=4, warmup_factor=0.2)
    assert schedule.factor(3) == pytest.approx(0.5 * (0.2 * 0.25 + 0.75))


@given(epoch=st.integers(1, 300), epochs=st.integers(0, 200), factor=st.floats(0.001, 1))
def test_warm_up_stays_between_its_factor_and_one(epoch: int, epochs: int, factor: float) -> None:
    value = warmup(epoch, epochs, factor, "linear")
    assert factor - 1e-9 <= value <= 1 + 1e-9
    assert value <= warmup(epoch + 1, epochs, factor, "linear") + 1e-12


def test_the_ends_of_the_cosine() -> None:
    schedule = Cosine(total_epochs=120, warmup_epochs=10, warmup_factor=0.01)
    assert schedule.factor(1) == pytest.approx(0.109)
    assert schedule.factor(10) == 1.0
    # 111 steps from epoch 10: half-way at 65.5, and one step above zero in the last epoch.
    assert (schedule.factor(65) + schedule.factor(66)) / 2 == pytest.approx(0.5)
    assert schedule.factor(120) == pytest.approx((1 + math.cos(math.pi * 110 / 111)) / 2)
    assert 0 < schedule.factor(120) < 0.001
    assert schedule.factor(121) == schedule.factor(500) == pytest.approx(0.0, abs=1e-12)


def test_a_cosine_falls_to_its_final_factor() -> None:
    schedule = Cosine(total_epochs=40, final_factor=0.1, warmup_epochs=5)
    values = [schedule.factor(epoch) for epoch in range(5, 41)]
    assert values == sorted(values, reverse=True) and len(set(values)) == len(values)
    assert values[0] == 1.0 and 0.1 < values[-1] < 0.11


def test_a_cosine_takes_the_epochs_of_the_run_by_default() -> None:
    flags = ["--schedule.name=cosine", "--train.epochs=37"]
    assert make_schedule(load_config("aihub_kaist", flags=flags)) == Cosine(total_epochs=37)
    longer = load_config("aihub_kaist", flags=[*flags, "--schedule.total_epochs=50"])
    assert make_schedule(longer) == Cosine(total_epochs=50)


def test_a_cosine_shorter_than_its_warm_up_never_leaves_it() -> None:
    schedule = Cosine(total_epochs=3, warmup_epochs=10, warmup_factor=0.5)
    assert [schedule.factor(epoch) for epoch in (1, 2, 3)] == pytest.approx([0.55, 0.6, 0.65])


@pytest.mark.parametrize("milestones", ["[70, 40]", "[40, 40]", "[0, 10]"])
def test_milestones_that_are_not_increasing_are_refused(milestones: str) -> None:
    with pytest.raises(ConfigError, match=r"schedule\.milestones"):
        load_config("aihub_kaist", flags=[f"--schedule.milestones={milestones}"])
