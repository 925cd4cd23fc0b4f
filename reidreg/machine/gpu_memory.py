"""GPU memory: how much is free, which processes hold the rest, and the out-of-memory message."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reidreg.machine.memory import size_in_text

_LISTED = 3  # processes that the message names


@dataclass(frozen=True)
class Holder:
    """A process that holds GPU memory.

    Args:
        pid: Its process id.
        command: The first words of its command line; empty where this process may not see it.
        held: The bytes that it holds, or None where the driver does not say.
    """

    pid: int
    command: str
    held: int | None

    def __str__(self) -> str:
        own = self.pid == os.getpid()
        name = "this run" if own else f"pid {self.pid} {self.command}".rstrip()
        return f"{name} holds {'memory' if self.held is None else size_in_text(self.held)}"


def peak_memory(device: torch.device) -> int | None:
    """The peak memory of this process in bytes: on the device for CUDA, else in main memory.

    Loader workers are not counted. None where the system does not say.

    Args:
        device: The device.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Preferred to getrusage, whose peak after a fork includes the parent's.
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _peak_by_rusage()
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(sizes[0]) * 1024 if sizes else None


def _peak_by_rusage() -> int | None:
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class CudaMemory:
    """The memory of a CUDA device, as seen by this process.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Release cached memory, and measure the peak from now on."""
        gc.collect()  # the traceback of an error may hold the tensors of its step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The peak of the bytes in tensors since `reset`."""
        return torch.cuda.max_memory_allocated(self.device)

    def available(self) -> int:
        """The bytes that this process can use in all: those it reserved and those that are free."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)


def memory_of(device: torch.device) -> CudaMemory | None:
    """The memory of a CUDA device; None for other devices, whose limits are not known."""
    return CudaMemory(device) if device.type == "cuda" else None


# --------------------------------------------------------------------- processes that hold it


def holders(device: torch.device) -> list[Holder]:
    """The processes that hold memory of a CUDA device, the largest first.

    Empty where nvidia-smi is missing, slow, or shows none; in a container it may see no other
    process than this one.
    """
    found = compute_apps(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return sorted(found, key=lambda holder: holder.held or 0, reverse=True)


def compute_apps(uuid: str) -> list[Holder]:
    """The processes on a GPU according to nvidia-smi; empty where it fails.

    Args:
        uuid: The UUID of the GPU, `GPU-...`.
    """
    query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        # By UUID, since nvidia-smi ignores how CUDA_VISIBLE_DEVICES renumbers devices.
        answer = subprocess.run(
            ["nvidia-smi", f"--id={uuid}", *query],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return parse_compute_apps(answer.stdout)


def parse_compute_apps(text: str) -> list[Holder]:
    """The processes in nvidia-smi's `pid, MiB` lines; other lines are skipped."""
    found = []
    for line in text.splitlines():
        pid, _, held = (cell.strip() for cell in line.partition(","))
        if pid.isdecimal():
            # Instead of a number it may print `[N/A]` or `[Insufficient Permissions]`.
            size = int(held) * 2**20 if held.isdecimal() else None
            found.append(Holder(int(pid), command_of(int(pid)), size))
    return found


def command_of(pid: int) -> str:
    """The first words of a process's command line, without folders; empty if it is not visible."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""
    words = [word for word in line.split("\0") if word]
    # No more of them: the arguments may contain secrets.
    first = [word.rpartition("/")[2][:30] for word in words[:3]]
    return " ".join([*first, *(["..."] if len(words) > 3 else [])])


# --------------------------------------------------------------------- out of memory

_FIXES = "add --config overlays/low_memory, or lower --sampler.batch_size or --input.size"


def describe_shortage(device: torch.device, need: int | None = None) -> str:
    """The message for a CUDA device whose memory does not suffice.

    Args:
        device: The device.
        need: The bytes that a step needs, if that is known.
    """
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    asked = f"a step needs {size_in_text(need)}" if need else f"this run used {size_in_text(peak)}"
    return format_shortage(str(device), asked, free, total, holders(device))


def format_shortage(name: str, asked: str, free: int, total: int, held: Sequence[Holder]) -> str:
    """Format the message of `describe_shortage`.

    Args:
        name: The device.
        asked: What was needed, in words.
        free: The free bytes.
        total: The bytes of the device.
        held: The processes that hold the rest.
    """
    shown = [str(holder) for holder in held[:_LISTED]]
    if len(held) > _LISTED:
        shown.append(f"{len(held) - _LISTED} more processes hold memory")
    holding = f"; {', '.join(shown)}" if shown else ""
    left = f"{size_in_text(free)} of {size_in_text(total)} are free"
    return f"{name} is out of memory: {asked}, {left}{holding}; {_FIXES}"
