"""What ranks exchange: objects, rows, gradients, and whether all do the same."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from reidreg import Output, Sample
from reidreg.distributed.gradients import average_gradients, gather_output, mean_over_processes
from reidreg.distributed.group import (
    Agreement,
    broadcast,
    collect_rows,
    gather,
    joined,
    main_first,
    start_together,
    world,
)
from reidreg.distributed.same_run import check_same_run
from reidreg.errors import RankError
from reidreg.machine.world import World
from worlds import in_processes

CPU = torch.device("cpu")
Values = dict[str, Any]


def test_without_a_launcher_joining_changes_nothing() -> None:
    with joined(CPU, 1.0) as alone:
        assert alone == World() and alone.is_main


def exchanged() -> dict[str, Any]:
    with joined(CPU, 20.0) as place:
        agreement = Agreement()
        with main_first():
            passed = time.monotonic_ns()
        return {
            "world": (place, world()),
            "broadcast": broadcast({"rank": place.rank}),
            "gather": gather(place.rank),
            # Rank 1 raises it in the second call: all ranks learn it in the third.
            "agreed": [agreement.highest(7 if n == 1 and place.rank == 1 else 0) for n in range(4)],
            "at once": agreement.highest(7 + place.rank, at_once=True),
            "mean": mean_over_processes({"a": torch.tensor(float(place.rank))})["a"].item(),
            "together": list(start_together(iter("ab"))),
            "passed": passed,
        }


def test_every_rank_gets_what_the_others_exchange() -> None:
    found = in_processes(3, exchanged)
    for rank, one in enumerate(found):
        assert one["world"] == (World(rank, 3, rank, 3),) * 2
        assert one["broadcast"] == {"rank": 0}
        assert one["gather"] == [0, 1, 2]
        assert one["agreed"] == [0, 0, 7, 7]
        assert one["at once"] == 9
        assert one["mean"] == pytest.approx(1.0)
        assert one["together"] == ["a", "b"]
    assert found[0]["passed"] < min(found[1]["passed"], found[2]["passed"])


def test_a_single_process_gets_back_what_it_gave() -> None:
    rows = torch.rand(3, 2)
    output = Output(rows, rows)
    assert broadcast("x") == "x" and gather("x") == ["x"]
    assert collect_rows(rows, 3) is rows and gather_output(output) is output
    assert Agreement().highest(5) == 5
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    average_gradients([parameter])
    assert torch.equal(parameter.grad, torch.ones(2))


def stepped_once() -> tuple[Tensor, Tensor]:
    """A channels_last filter after a step with averaged gradients and after one with their mean."""
    with joined(CPU, 20.0) as place:
        gradients = torch.randn(2, 4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
        moved = []
        for gradient, averaged in ((gradients[place.rank], True), (gradients.mean(0), False)):
            parameter = nn.Parameter(torch.zeros(4, 3, 3, 3).to(memory_format=torch.channels_last))
            parameter.grad = gradient.contiguous(memory_format=torch.channels_last)
            if averaged:
                average_gradients([parameter])
                assert parameter.grad.stride() == parameter.stride()
            torch.optim.SGD([parameter], lr=1.0, fused=True).step()
            moved.append(parameter.detach())
        return moved[0], moved[1]


def test_averaged_gradients_have_the_memory_format_of_their_parameters() -> None:
    for found, expected in in_processes(2, stepped_once):
        assert torch.allclose(found, expected)


def collected(count: int) -> Tensor:
    everything = torch.arange(count * 3.0).view(count, 3)
    with joined(CPU, 20.0) as place:
        return collect_rows(everything[place.share(count)], count)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_rank_0_collects_the_rows_in_order_without_padding(count: int) -> None:
    first, *others = in_processes(3, collected, count)
    everything = torch.arange(count * 3.0).view(count, 3)
    assert torch.equal(first, everything)
    shares = [everything[World(rank, 3).share(count)] for rank in (1, 2)]
    assert all(map(torch.equal, others, shares))


def difference_found(differences: dict[int, Values]) -> str | None:
    with joined(CPU, 20.0) as place:
        samples = [Sample(f"/data{place.rank}/{n}.jpg", n // 2, n % 2) for n in range(6)]
        changes = differences.get(place.rank, {})
        config = {"train": {"seed": changes.get("seed", 0)}}
        try:
            check_same_run(config, {"train": samples[: changes.get("images", 6)]})
        except RankError as error:
            return str(error)
        return None


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ({}, None),
        ({1: {"images": 5}}, "sees another train split than rank 0"),
        ({1: {"seed": 3}}, "train.seed is 3, not 0"),
    ],
    ids=["same", "data", "configuration"],
)
def test_ranks_with_other_data_or_configuration_are_named(
    differences: dict[int, Values], words: str | None
) -> None:
    for line in in_processes(2, difference_found, differences):
        assert line is None if words is None else words in line and "rank 1" in line
