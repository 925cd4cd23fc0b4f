"""Run functions in several processes at once, as a launcher starts them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

# Forks from a process without threads, which has the slow imports behind it.
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload(["torch", "torchvision", "reidreg.training.loop", "reidreg_plugins"])


@contextmanager
def started(
    count: int, function: Callable[..., Any], *arguments: Any, **environment: str
) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Start a function in `count` ranks of one world; those still alive at the end are killed.

    Args:
        count: The world size.
        function: A function at the top level of a module.
        arguments: Its arguments.
        environment: Additional environment variables.
    """
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            **environment,
        }
        ours, theirs = FORKING.Pipe()
        process = FORKING.Process(target=_work, args=(theirs, place, function, arguments))
        process.start()
        theirs.close()
        processes.append((process, ours))
    try:
        yield processes
    finally:
        for process, connection in processes:
            process.kill()
            process.join()
            connection.close()


def in_processes(
    count: int, function: Callable[..., Any], *arguments: Any, **environment: str
) -> list[Any]:
    """What a function returns in each of `count` ranks, by rank.

    Raises:
        AssertionError: The function raised in a rank; the message is the traceback.
    """
    with started(count, function, *arguments, **environment) as processes:
        results = []
        for process, connection in processes:
            assert connection.poll(60), f"{process.name} does not answer"
            trace, result = pickle.loads(connection.recv_bytes())
            assert trace is None, trace
            results.append(result)
        for process, _ in processes:
            process.join(30)
            assert process.exitcode == 0
        return results


def _work(
    connection: Connection,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        answer = None, function(*arguments)
    except BaseException:
        answer = traceback.format_exc(), None
    # Pickled here: a Connection would send tensors as shared memory, which ends with this process.
    connection.send_bytes(pickle.dumps(answer))
