"""Memory: how much is free, who holds the rest, and what to say when it is too little."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reidreg.machine.sizes import size_in_text

_LISTED = 3  # processes that one line names


@dataclass(frozen=True)
class Holder:
    """A process that holds memory of a device.

    Args:
        pid: Its number.
        command: The first words of its command line; empty where it cannot be seen from here.
        held: Bytes, or None where the driver does not say.
    """

    pid: int
    command: str
    held: int | None

    def __str__(self) -> str:
        own = self.pid == os.getpid()
        name = "this run" if own else f"pid {self.pid} {self.command}".rstrip()
        return f"{name} holds {'memory' if self.held is None else size_in_text(self.held)}"


def peak_memory(device: torch.device) -> int | None:
    """The most memory that this process has held, in bytes: of a CUDA device, or else its own.

    None where the system does not say. Of the process's own memory loading processes are no part.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        # Not getrusage where this is there: after a fork that one remembers the parent's peak.
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
    """The memory of a CUDA device, as this process sees it.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def reset(self) -> None:
        """Give back what is not in use, and start a new peak."""
        gc.collect()  # an error's traceback may hold the tensors of its step
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """The most bytes that tensors held since `reset`."""
        return torch.cuda.max_memory_allocated(self.device)

    def available(self) -> int:
        """The bytes that this process could hold in all: those it has, and those that are free."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device)


def memory_of(device: torch.device) -> CudaMemory | None:
    """The memory of a device whose limits can be known; None for others."""
    return CudaMemory(device) if device.type == "cuda" else None


# --------------------------------------------------------------------- who holds it


def holders(device: torch.device) -> list[Holder]:
    """The processes that hold memory of a CUDA device, the largest first.

    Empty where nvidia-smi is missing, slow, or shows none; in a container it may see no other.
    """
    found = _ask_nvidia_smi(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    return sorted(found, key=lambda holder: holder.held or 0, reverse=True)


def _ask_nvidia_smi(uuid: str) -> list[Holder]:
    query = ["--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        # By its UUID: CUDA_VISIBLE_DEVICES renumbers devices, and nvidia-smi does not follow it.
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
    """The processes in nvidia-smi's `pid, MiB` lines; a line of another form is passed over."""
    found = []
    for line in text.splitlines():
        pid, _, held = (cell.strip() for cell in line.partition(","))
        if pid.isdecimal():
            # `[N/A]` and `[Insufficient Permissions]` stand where there is no number.
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
    # The rest may hold what is nobody's business, such as keys.
    first = [word.rpartition("/")[2][:30] for word in words[:3]]
    return " ".join([*first, *(["..."] if len(words) > 3 else [])])


# --------------------------------------------------------------------- too little of it

_FIXES = "add --config overlays/low_memory, or lower --sampler.batch_size or --input.size"


def describe_shortage(device: torch.device, need: int | None = None) -> str:
    """What to say when a device's memory does not suffice.

    Args:
        device: The device, a CUDA one.
        need: Bytes that a step needs, if that is known.
    """
    free, total = torch.cuda.mem_get_info(device)
    peak = torch.cuda.max_memory_allocated(device)
    asked = f"a step needs {size_in_text(need)}" if need else f"this run used {size_in_text(peak)}"
    return shortage(str(device), asked, free, total, holders(device))


def shortage(name: str, asked: str, free: int, total: int, held: Sequence[Holder]) -> str:
    """The line of `describe_shortage`.

    Args:
        name: The device.
        asked: What was needed, in words.
        free: Bytes that are free.
        total: Bytes that there are.
        held: Who holds the rest.
    """
    shown = [str(holder) for holder in held[:_LISTED]]
    if len(held) > _LISTED:
        shown.append(f"{len(held) - _LISTED} more processes hold memory")
    who = f"; {', '.join(shown)}" if shown else ""
    room = f"{size_in_text(free)} of {size_in_text(total)} are free"
    return f"{name} is out of memory: {asked}, {room}{who}; {_FIXES}"
