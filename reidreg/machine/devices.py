"""The device and the precision of a run."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from reidreg.errors import DeviceError
from reidreg.machine.onednn import Float32Fallback
from reidreg.machine.world import World, world_from_env

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(name: str) -> torch.device:
    """The torch device for `train.device`.

    With several ranks on a machine, each gets the CUDA device of its local rank.

    Args:
        name: auto, cpu, cuda, cuda:N or mps.

    Raises:
        DeviceError: It is not a device, or this machine does not have it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    place = world_from_env()
    if place.size > 1 and name != "cpu":
        name = _own_device(name, place)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(
            f"train.device: {name!r} is not a device; use auto, cpu, cuda, cuda:N or mps"
        ) from error
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not torch.cuda.is_available():
            raise DeviceError(
                f"train.device: {name} was asked for, but torch {torch.__version__} sees no CUDA "
                "device here; use auto or cpu (`reidreg doctor` shows what there is)"
            )
        if (device.index or 0) >= count:
            raise DeviceError(f"train.device: {name} was asked for, but there are {count} devices")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("train.device: mps was asked for, but this machine has none")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(f"train.device: {name!r} is not supported; use auto, cpu, cuda or mps")
    return device


def _own_device(name: str, place: World) -> str:
    """The CUDA device of this rank, one of several on the machine."""
    if name != "cuda":
        raise DeviceError(
            f"train.device: {name} is one device for {place.size} processes; use auto, cuda or cpu"
        )
    count = torch.cuda.device_count()
    if torch.cuda.is_available() and place.local_size > count:
        raise DeviceError(
            f"train.device: {place.local_size} processes on this machine need as many GPUs, there "
            f"are {count}; start torchrun with --nproc-per-node {count}, or use --train.device cpu"
        )
    return f"cuda:{place.local_rank}"


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which a CUDA device is torch's current device; any other device changes nothing.

    Events and pinned memory belong to the current device. Without this they would go to cuda:0, and
    take memory there.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def choose_precision(name: str, device: torch.device) -> torch.dtype:
    """The data type for `train.precision` on a device.

    auto is bf16 where the hardware supports it; fp16, which needs loss scaling, on CUDA cards whose
    tensor cores support nothing better, such as a T4; and fp32 otherwise.

    Args:
        name: auto, bf16, fp16 or fp32.
        device: The device.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= (8, 0):
            return torch.bfloat16
        return torch.float16 if capability >= (7, 0) else torch.float32
    if device.type == "cpu" and _cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def _cpu_has_bf16() -> bool:
    """Whether the CPU has bfloat16 instructions; emulated products are slower than float32."""
    capabilities: Any = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """A context in which a model computes in this data type."""
    with contextlib.ExitStack() as stack:
        if dtype != torch.float32:
            stack.enter_context(torch.autocast(device.type, dtype=dtype))
        if device.type == "cpu" and dtype == torch.bfloat16:
            stack.enter_context(Float32Fallback())
        yield
