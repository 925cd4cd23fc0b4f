"""The process group of a run: join it, and exchange objects and tensors.

Without a launcher the world has size 1, and every function here returns what it was given.

There are two process groups. The default group carries tensors, by NCCL on CUDA devices and by gloo
otherwise; all ranks reach the same place of a step, so a rank that takes long there hangs, and the
timeout is short. The host group carries objects and features by gloo, and waits for as long as
rank 0 ranks, writes or plots; whether all ranks are alive is what `failure.Watch` finds out.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from reidreg.distributed.failure import Watch, errors_of_ranks, is_first_failure
from reidreg.distributed.liveness import RankProcess, peers_of
from reidreg.distributed.store import main_store
from reidreg.machine.cores import count_cores
from reidreg.machine.devices import on_device
from reidreg.machine.world import World, world_from_env

T = TypeVar("T")

_HOST_TIMEOUT = timedelta(hours=12)  # for what rank 0 does alone

_world = World()
_host: Any = None


def world() -> World:
    """The world that this process has joined; one of size 1 outside of `joined`."""
    return _world


@contextlib.contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[World]:
    """Join the process group of the launcher for the length of the block.

    Args:
        device: The device of the tensors that ranks exchange.
        timeout: Seconds that ranks wait for each other within a step.

    Raises:
        RankError: Another rank has ended, or does not answer.
    """
    global _world, _host
    place = world_from_env()
    if place.size == 1 or _world.size > 1:
        with on_device(device):
            yield _world
        return
    watch: Watch | None = None
    _set_up(device, place)
    try:
        with errors_of_ranks():
            _host = _start_groups(device, place, timeout)
            _world = place
            watch = Watch(place, peers_of(place.rank, gather(RankProcess.current(place.rank))))
            watch.start()
            yield place
            wait()
    except BaseException:
        # Before the connections close, which other ranks would take for the first failure.
        is_first_failure()
        raise
    finally:
        if watch is not None:
            watch.stop()
        _world, _host = World(), None
        if dist.is_initialized():
            dist.destroy_process_group()


def _set_up(device: torch.device, place: World) -> None:
    """Make the device current; on the CPU, share the cores among the processes of this machine."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun gives each process a single thread unless OMP_NUM_THREADS is set.
    elif device.type == "cpu" and place.local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(count_cores() // place.local_size, 1))


def _start_groups(device: torch.device, place: World, timeout: float) -> Any:
    """Start the default group, and return the host group."""
    options: dict[str, Any] = {"backend": "gloo"}
    if device.type == "cuda":
        options = {"backend": "cpu:gloo,cuda:nccl", "device_id": device}
    dist.init_process_group(
        store=PrefixStore(f"groups/{place.restarts}", main_store(place)),
        rank=place.rank,
        world_size=place.size,
        timeout=timedelta(seconds=timeout),
        **options,
    )
    return dist.new_group(backend="gloo", timeout=_HOST_TIMEOUT)


# --------------------------------------------------------------------- objects


def wait() -> None:
    """Wait for all other ranks, however long they take."""
    if _world.size > 1:
        dist.barrier(group=_host)


def broadcast(value: T) -> T:
    """Rank 0's value, in every rank; the values of other ranks are ignored."""
    if _world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all ranks in order, in every rank."""
    if _world.size == 1:
        return [value]
    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value, group=_host)
    return values


def start_together(items: Iterable[T]) -> Iterator[T]:
    """Yield items, the first once every rank has its own: data loading starts unevenly."""
    for position, item in enumerate(items):
        if position == 0:
            wait()
        yield item


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Run the block in the first rank of each machine, then in its others."""
    if _world.local_rank == 0:
        yield
        wait()
    else:
        wait()
        yield


class Agreement:
    """A number that every rank may raise, and that all ranks learn at the same step.

    It never decreases. The all-reduce runs while the next step computes, so no rank waits for it,
    and the result arrives one step late.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, Any] | None = None

    def highest(self, value: int, at_once: bool = False) -> int:
        """The highest number that any rank gave.

        Args:
            value: This rank's number.
            at_once: Wait for this step's numbers; otherwise those of the last call count.
        """
        if _world.size == 1:
            return value
        answer = self._answer()
        number = torch.tensor(max(value, answer))
        work = dist.all_reduce(number, dist.ReduceOp.MAX, async_op=True)
        self._asked = number, work
        return self._answer() if at_once else answer

    def _answer(self) -> int:
        if self._asked is None:
            return 0
        number, work = self._asked
        work.wait()
        self._asked = None
        return int(number)


# --------------------------------------------------------------------- tensors


def collect_rows(rows: Tensor, count: int) -> Tensor:
    """Collect the rows of all ranks in rank 0, in order; other ranks keep their own.

    Args:
        rows: (n, D), on the CPU: this rank's `World.share` of the rows.
        count: N, the number of rows of all ranks together.

    Returns:
        (N, D) in rank 0, `rows` in the others.
    """
    if not _world.is_main:
        if len(rows):
            dist.send(rows.contiguous(), dst=0, group=_host)
        return rows
    if _world.size == 1:
        return rows
    found = rows.new_empty(count, *rows.shape[1:])
    found[_world.share(count)] = rows
    for rank in range(1, min(_world.size, count)):
        # Received in place, without padding or copies.
        dist.recv(found[_world.share(count, rank)], src=rank, group=_host)
    return found


def broadcast_state(*modules: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to every rank."""
    if _world.size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            sent = tensor.contiguous()  # a channels_last tensor is not
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def stack_over_processes(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, (W, ...), without gradients; their shapes have to be equal."""
    found = tensor.new_empty(_world.size, *tensor.shape)
    dist.all_gather(list(found), tensor.contiguous())
    return found
