"""Rank and world size from the environment, shares of rows, and the device of each rank."""

from __future__ import annotations

import pytest
import torch

from reidreg.cli.main import main
from reidreg.errors import ConfigError, DeviceError
from reidreg.machine.devices import choose_device
from reidreg.machine.world import World, world_from_env

CPU = torch.device("cpu")


def test_without_a_launcher_the_world_size_is_one() -> None:
    assert world_from_env({}) == World()
    assert world_from_env({"WORLD_SIZE": "4"}) == World()


def test_rank_and_world_size_are_read_from_the_launchers_variables() -> None:
    variables = {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "TORCHELASTIC_RESTART_COUNT": "2",
        "MASTER_ADDR": "one",
        "MASTER_PORT": "1",
    }
    place = world_from_env(variables)
    assert place == World(rank=5, size=8, local_rank=1, local_size=4, restarts=2)
    assert not place.is_main


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"RANK": "2"}, "RANK 2 of WORLD_SIZE 2"),
        ({"RANK": "one"}, "RANK: 'one' is not a number"),
        ({"LOCAL_RANK": "7"}, "LOCAL_RANK 7"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR and MASTER_PORT are not"),
    ],
)
def test_contradicting_variables_raise_an_error_of_one_line(
    changes: dict[str, str | None], words: str
) -> None:
    variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}
    variables |= {key: value for key, value in changes.items() if value is not None}
    for key in [key for key, value in changes.items() if value is None]:
        del variables[key]
    with pytest.raises(ConfigError, match=words) as caught:
        world_from_env(variables)
    assert "\n" not in str(caught.value) and "torchrun" in str(caught.value)


def test_a_command_prints_that_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["plugins"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("reidreg plugins: ") and "RANK: 'one' is not a number" in line


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 100])
def test_shares_cover_all_rows_once_in_order_and_evenly(count: int, size: int) -> None:
    rows = list(range(count))
    shares = [rows[World(rank, size).share(count)] for rank in range(size)]
    assert sum(shares, []) == rows
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1 and lengths[0] == max(lengths)
    assert shares == [rows[World(0, size).share(count, rank)] for rank in range(size)]


def test_one_device_for_several_ranks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(key, value)
    assert choose_device("cpu") == CPU
    with pytest.raises(DeviceError, match="cuda:0 is one device for 2 processes"):
        choose_device("cuda:0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(DeviceError, match="--nproc-per-node 1"):
        choose_device("auto")
