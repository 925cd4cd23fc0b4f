"""Several processes as one run: who takes part, what they exchange, and how all end together.

A process alone is a world of size 1, in which every function here gives back what it was given.

There are two groups of processes. The default group carries tensors, by NCCL where they are on CUDA
devices and by gloo where they are not; in it all wait for each other at the same place of a step,
so what takes long there is a process that hangs. The host group carries objects and features by
gloo, and waits as long as the first process ranks, writes or draws: as long as all live, which a
thread of each process shows and looks after.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from reidreg.distributed.liveness import Identity, Neighbour, neighbours
from reidreg.errors import RankError, ReidregError
from reidreg.machine.cores import count_cores
from reidreg.machine.devices import current
from reidreg.machine.world import World, world_from_env
from reidreg.values import Output, Sample

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)  # for what the first process does alone
_CONNECT = timedelta(seconds=60)
_GRACE = 5.0  # seconds in which a process ends by itself once another has failed
_POLL = 1.0  # seconds between signs of life, and between looks at the others

_world = World()
_host: Any = None


def world() -> World:
    """The world that this process has joined; one of its own outside of `joined`."""
    return _world


@contextlib.contextmanager
def joined(device: torch.device, timeout: float) -> Iterator[World]:
    """Work as one of the processes that the launcher started, for the length of the block.

    Args:
        device: Where the tensors are that all exchange.
        timeout: Seconds that processes wait for each other within a step.

    Raises:
        RankError: Another process has ended, or does not answer.
    """
    global _world, _host
    place = world_from_env()
    if place.size == 1 or _world.size > 1:
        with current(device):
            yield _world
        return
    over = threading.Event()
    watch: threading.Thread | None = None
    backend = "gloo"
    options: dict[str, Any] = {}
    if device.type == "cpu":
        _use_cores(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, options["device_id"] = "cpu:gloo,cuda:nccl", device
    try:
        with _lost_processes():
            dist.init_process_group(
                backend,
                store=PrefixStore(f"groups/{place.restarts}", _store(place)),
                rank=place.rank,
                world_size=place.size,
                timeout=timedelta(seconds=timeout),
                **options,
            )
            _host = dist.new_group(backend="gloo", timeout=_PATIENCE)
            _world = place
            others = neighbours(place.rank, gather(Identity.own(place.rank)))
            watch = threading.Thread(target=_watch, args=(place, others, over), daemon=True)
            watch.start()
            yield place
            wait()
    except BaseException:
        # Before the connections close, which others would take for the first failure.
        is_first_failure()
        raise
    finally:
        over.set()
        if watch is not None:
            watch.join(_GRACE)  # a thread inside torch would abort the interpreter at its end
        _world, _host = World(), None
        if dist.is_initialized():
            dist.destroy_process_group()


def _use_cores(place: World) -> None:
    """Share this machine's cores among its processes, where they compute on the CPU.

    torchrun allows each a single thread unless OMP_NUM_THREADS says otherwise.
    """
    if place.local_size > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(max(count_cores() // place.local_size, 1))


# --------------------------------------------------------------------- telling each other


def wait() -> None:
    """Wait for all others, however long they take."""
    if _world.size > 1:
        dist.barrier(group=_host)


def broadcast(value: T) -> T:
    """The first process's value; what the others give is not looked at."""
    if _world.size == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=_host)
    return values[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in each of them."""
    if _world.size == 1:
        return [value]
    values: list[Any] = [None] * _world.size
    dist.all_gather_object(values, value, group=_host)
    return values


def together(items: Iterable[T]) -> Iterator[T]:
    """Items in turn, the first one when every process has its own: loading starts unevenly."""
    for position, item in enumerate(items):
        if position == 0:
            wait()
        yield item


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """Let the first process of each machine through the block before its others."""
    if _world.local_rank == 0:
        yield
        wait()
    else:
        wait()
        yield


def collect_rows(rows: Tensor, count: int) -> Tensor:
    """The rows of all processes, in order, in the first one; the others keep theirs.

    Args:
        rows: (n, D), on the CPU: this process's `World.share` of the rows.
        count: N, the rows in all.

    Returns:
        (N, D) in the first process, `rows` in the others.
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
        # Straight to where they belong: nothing is padded, and nothing is copied.
        dist.recv(found[_world.share(count, rank)], src=rank, group=_host)
    return found


class Agreement:
    """A number that every process may raise, and that all come to know at the same step.

    It never falls again. It travels while the next step computes, so that nobody waits, and is
    known one step late.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, Any] | None = None

    def highest(self, value: int, at_once: bool = False) -> int:
        """The highest number that any process gave.

        Args:
            value: This process's number.
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


# --------------------------------------------------------------------- training


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of parameters over all processes, in one piece.

    A process in which a parameter has none counts as one with zeros.
    """
    if _world.size == 1 or not parameters:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat.div_(_world.size))
    for parameter, mean in zip(
        parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True
    ):
        # In the parameter's memory layout: fused optimizers walk both side by side, and on a GPU
        # refuse to where they differ.
        parameter.grad = torch.empty_like(parameter).copy_(mean.view_as(parameter))


def count_true(flags: Sequence[bool]) -> list[int]:
    """In how many processes each of several flags is set."""
    counts = torch.tensor(flags, dtype=torch.int64)
    if _world.size > 1:
        dist.all_reduce(counts)
    found: list[int] = counts.tolist()
    return found


def broadcast_state(*modules: nn.Module) -> None:
    """Give every process the first one's parameters and buffers."""
    if _world.size == 1:
        return
    for module in modules:
        for tensor in module.state_dict().values():
            sent = tensor.contiguous()  # a channels_last one is not
            dist.broadcast(sent, src=0)
            tensor.copy_(sent)


def mean_over_processes(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means of named scalars over all processes, which have to have the same names."""
    if _world.size == 1 or not values:
        return dict(values)
    flat = torch.stack(list(values.values())) / _world.size
    dist.all_reduce(flat)
    return dict(zip(values, flat.unbind(), strict=True))


def stack_over_processes(tensor: Tensor) -> Tensor:
    """The tensors of all processes by rank, (W, ...), without gradients; their shapes are equal."""
    found = tensor.new_empty(_world.size, *tensor.shape)
    dist.all_gather(list(found), tensor.contiguous())
    return found


class _Gather(torch.autograd.Function):
    """Rows of all processes, (B, ...) to (W B, ...), for a loss that each computes from all.

    Each process's loss is the same function of the same rows, so the gradient of its own rows is
    there already and need not be sent. It is multiplied by W: gradients of parameters are averaged
    over the processes afterwards, and are to come out as their sum.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.own = slice(_world.rank * len(rows), (_world.rank + 1) * len(rows))
        return stack_over_processes(rows).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0][ctx.own] * _world.size


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all processes by rank, (W B, ...), differentiable; B is the same in each."""
    if _world.size == 1:
        return rows
    gathered: Tensor = _Gather.apply(rows)
    return gathered


def gather_output(output: Output) -> Output:
    """The output of the whole world's batch, as one process would have computed it."""
    if _world.size == 1:
        return output
    return Output(
        features=gather_rows(output.features),
        embeddings=gather_rows(output.embeddings),
        logits=None if output.logits is None else gather_rows(output.logits),
        branches=tuple((gather_output(branch), weight) for branch, weight in output.branches),
    )


# --------------------------------------------------------------------- the same run everywhere


def check_same_run(config: Mapping[str, Any], splits: Mapping[str, Sequence[Sample]]) -> None:
    """Make sure that all processes are about to do the same.

    Args:
        config: The configuration, as plain values.
        splits: The samples by split; where their files lie may differ.

    Raises:
        RankError: A process has another configuration, or sees other data.
    """
    if _world.size == 1:
        return
    own: dict[str, Any] = {
        "host": socket.gethostname(),
        "config": config,
        "splits": {split: (len(samples), _digest(samples)) for split, samples in splits.items()},
    }
    first, *others = gather(own)
    for rank, other in enumerate(others, start=1):
        who = f"rank {rank} on {other['host']}"
        for split, (count, digest) in other["splits"].items():
            expected, expected_digest = first["splits"][split]
            if digest != expected_digest:
                raise RankError(
                    f"{who} sees another {split} split than rank 0 on {first['host']}: {count:,} "
                    f"images, not {expected:,}, or others; give every machine the same data"
                )
        if other["config"] != first["config"]:
            key = _first_difference(first["config"], other["config"])
            raise RankError(
                f"{who} has another configuration than rank 0 on {first['host']}: {key}; start "
                "all processes with the same files and flags"
            )


def _digest(samples: Sequence[Sample]) -> str:
    text = json.dumps([[os.path.basename(s.path), s.pid, s.camid] for s in samples])
    return hashlib.sha256(text.encode()).hexdigest()


def _first_difference(one: Any, other: Any, path: str = "") -> str:
    """The first key in which two trees differ, with both values."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            if one.get(key) != other.get(key):
                return _first_difference(one.get(key), other.get(key), f"{path}.{key}".lstrip("."))
    return f"{path} is {other}, not {one}"


# --------------------------------------------------------------------- ending together


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    """Turn torch's errors about a process that is gone or silent into a RankError of one line."""
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        text = str(error)
        if isinstance(error, ReidregError) or not (
            isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text
        ):
            raise
        silent = "timed out" in text.lower() or "timeout" in text.lower()
        what = "has not answered within train.rank_timeout" if silent else "has ended"
        raise RankError(
            f"another process of this run {what}, so all end; --resume auto goes on from the last "
            "checkpoint"
        ) from error


def _connect(place: World, host: bool) -> TCPStore:
    """A connection to the key-value store of the launcher, or of the first process."""
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=place.size,
        is_master=host,
        timeout=_CONNECT,
        wait_for_workers=False,
        multi_tenant=True,
    )


@functools.cache
def _store(place: World) -> TCPStore:
    # torchrun keeps a store of its own; with other launchers the first process does.
    launcher_has_one = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return _connect(place, host=place.is_main and not launcher_has_one)


def _key(place: World, name: str) -> str:
    return f"reidreg/{place.restarts}/{name}"


def is_first_failure(store: TCPStore | None = None) -> bool:
    """Whether this process is the first of its world to fail, and so the one to say why.

    Any other waits until that was said: a launcher ends those that are left once one is gone.

    Args:
        store: The connection to use; None takes the main thread's.
    """
    place = world_from_env()
    if place.size == 1:
        return True
    try:
        store = store or _store(place)
        mark = str(place.rank)
        if store.compare_set(_key(place, "failed"), "", mark).decode() == mark:
            return True
        deadline = time.monotonic() + _GRACE
        while not store.check([_key(place, "said")]) and time.monotonic() < deadline:
            time.sleep(0.05)
    except (RuntimeError, dist.DistError):
        pass  # the store is gone with its process, which has said why
    return False


def tell_failure(
    error: BaseException, tell: Callable[[], str], store: TCPStore | None = None
) -> None:
    """Tell why this process fails, unless another one has failed first.

    torchrun is told too, whose summary names the first failure, and the others may end then.

    Args:
        error: What was raised.
        tell: Prints a text, and returns it.
        store: The connection to use; None takes the main thread's.
    """
    if not is_first_failure(store):
        return
    text, place = tell(), world_from_env()
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file is not None:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        content = {"message": {"message": type(error).__name__, "extraInfo": extra}}
        with contextlib.suppress(OSError), open(file, "w", encoding="utf-8") as stream:
            json.dump(content, stream)
    if place.size > 1:
        with contextlib.suppress(RuntimeError, dist.DistError):
            (store or _store(place)).set(_key(place, "said"), "1")


def _watch(place: World, others: Sequence[Neighbour], over: threading.Event) -> None:
    """Show that this process lives, and end it soon after another has failed or is silent.

    Whatever it is doing or waiting for.
    """
    try:
        # A connection of its own: the other one may be waiting.
        store = _connect(place, host=False)
        while not over.wait(_POLL) and not store.check([_key(place, "failed")]):
            store.add(_key(place, f"signs/{place.rank}"), 1)
            for other in others:
                if other.given_up(store.add(_key(place, f"signs/{other.identity.rank}"), 0)):
                    _end_without(other, store)
    except (RuntimeError, dist.DistError):
        pass  # the launcher itself is gone
    if not over.wait(_GRACE):
        os._exit(1)


def _end_without(silent: Neighbour, store: TCPStore) -> None:
    """End this process at once, and a silent one if it is on this machine; say why.

    The main thread may be anywhere, and cannot be asked. All files are written aside and renamed.
    """
    error = RankError(
        f"{silent.identity} is stopped or hangs: no sign of life for {silent.patience} s, so all "
        "end; --resume auto goes on from the last checkpoint"
    )

    def tell() -> str:
        line = f"reidreg: {error}"
        print(line, file=sys.stderr, flush=True)
        return line

    tell_failure(error, tell, store)
    # After the line, since torchrun ends all as soon as one is gone; and in another second, since
    # it names as the cause what failed first by a clock of whole seconds.
    time.sleep(1)
    silent.end()
    os._exit(error.exit_code)
