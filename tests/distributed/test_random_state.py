"""Random numbers with several processes: each rank's own, and the same again after a resume."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reidreg import load_checkpoint, load_config
from reidreg.distributed.group import joined
from reidreg.distributed.random_state import random_state, seed_process, set_random_state
from reidreg.training.run import build_run
from runs import Values, differing, killed_and_resumed, lines_of, trained
from worlds import in_processes

CPU = torch.device("cpu")
# A transformer whose blocks are left out at random, of a model that is exchanged in milliseconds.
VIT = {
    "backbone.model": "test_vit",
    "backbone.drop_path": 0.2,
    "train.gather": True,
    "train.log_every": 1,
    "train.epochs": 2,
    "train.eval_every": 1,
}


def drawn() -> list[float]:
    return [random.random(), float(np.random.rand()), torch.rand(()).item()]


def seeded(seed: int, step: int = 0) -> list[float]:
    with joined(CPU, 20.0):
        seed_process(seed, step)
        return drawn()


def test_each_rank_and_step_has_numbers_of_its_own_and_the_same_ones_again() -> None:
    first, second = in_processes(2, seeded, 3)
    numbers = [first, second, seeded(4), seeded(3, step=1)]
    for kind in zip(*numbers, strict=True):  # of each of the three generators
        assert len(set(kind)) == len(numbers)
    assert seeded(3) == first
    assert in_processes(2, seeded, 3) == [first, second]


def test_a_state_that_is_set_again_gives_the_same_numbers() -> None:
    state = random_state()
    expected = drawn()
    assert drawn() != expected
    set_random_state(state)
    assert drawn() == expected


# --------------------------------------------------------------------- whole runs


def mask_and_weights(values: Values) -> tuple[Tensor, Tensor]:
    """What a run's first dropout draws, and all weights of its model."""
    with joined(CPU, 20.0):
        run = build_run(load_config("aihub_kaist", values))
        mask = nn.functional.dropout(torch.ones(1000), 0.5)
        return mask, torch.cat([weight.detach().flatten() for weight in run.model.parameters()])


def test_ranks_begin_with_the_same_weights_and_draw_other_masks(tiny: Values) -> None:
    mask, weights = mask_and_weights({**tiny, **VIT})
    (first, same), (second, too) = in_processes(2, mask_and_weights, {**tiny, **VIT})
    assert torch.equal(weights, same) and torch.equal(weights, too)
    assert torch.equal(mask, first) and not torch.equal(mask, second)


def test_a_run_that_drops_goes_on_after_an_epoch_to_the_same_bits(
    tiny: Values, tmp_path: Path
) -> None:
    values = {**tiny, **VIT}
    in_processes(2, trained, {**values, "output_dir": str(tmp_path / "whole")})
    halves = {**values, "output_dir": str(tmp_path / "halves")}
    in_processes(2, trained, {**halves, "train.epochs": 1})
    in_processes(2, trained, halves, "auto")
    paths = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "halves")]
    assert not differing(*paths)
    assert lines_of(tmp_path / "whole") == lines_of(tmp_path / "halves")
    training = load_checkpoint(paths[0]).training
    assert training is not None
    states = [rank["random"]["torch"] for rank in (training, *training["others"])]
    assert len(states) == 2 and not torch.equal(*states)


@pytest.mark.slow
def test_a_killed_run_that_drops_goes_on_to_the_same_bits(tiny: Values, tmp_path: Path) -> None:
    values = {**tiny, **VIT, "train.epochs": 4, "train.eval_every": 2}
    in_processes(2, trained, {**values, "output_dir": str(tmp_path / "whole")})
    killed_and_resumed({**values, "output_dir": str(tmp_path / "killed")}, 2, "epoch 3/4 step 3/")
    assert "at step 10" in (tmp_path / "killed/train.log").read_text()
    paths = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "killed")]
    assert not differing(*paths)


def test_ranks_that_come_in_with_a_resume_draw_other_masks(tiny: Values, tmp_path: Path) -> None:
    trained({**tiny, **VIT, "train.epochs": 1})
    in_processes(2, trained, {**tiny, **VIT}, "auto")
    assert "resumed by 2 processes, saved by 1" in (tmp_path / "run/train.log").read_text()
    training = load_checkpoint(tmp_path / "run/checkpoints/last.ckpt").training
    assert training is not None
    states = [rank["random"]["torch"] for rank in (training, *training["others"])]
    assert len(states) == 2 and not torch.equal(*states)
