"""A simulated CUDA device: tensors that report `cuda` as their device, computed on the CPU.

It checks what can be checked without a GPU: that no operation mixes devices, that the host does not
synchronise with the device, that no stream uses memory that another may still be writing, and that
the code for a device computes the same as the code for the CPU. torch's autograd engine asks the
driver for streams, so `Tensor.backward` is replaced by a function that gives every parameter of the
graph some gradient. Kernels, drivers and memory limits can only be tested on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("cuda", 0)

# Operations whose result, or its size, the host needs before it can continue.
_WAITING = {
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}


class MixedDevices(AssertionError):
    """An operation has tensors on the device and on the host."""


class Race(AssertionError):
    """A stream uses memory that another stream may not be done with."""


Clock = dict["Stream", int]


class Stream:
    """A CUDA stream, as a vector clock: the steps of each stream that are done before its next."""

    def __init__(self, device: object = None) -> None:
        self.seen: Clock = {self: 0}

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        join(self.seen, event.seen)


class Event:
    """A CUDA event: the clock of a stream at the time of recording."""

    def __init__(self, enable_timing: bool = False) -> None:
        self.seen: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.seen = dict((stream or Pretended.current.stream).seen)


def join(clock: Clock, other: Clock) -> None:
    """Merge another clock into a clock: the later step of each stream."""
    for stream, step in other.items():
        clock[stream] = max(clock.get(stream, 0), step)


class Memory:
    """The streams that read and write a block of memory; tensors that share the block share this.

    When freed, it returns to the stream that allocated it, which may reuse it at once.
    """

    def __init__(self, device: Pretended) -> None:
        self.device, self.stream = device, device.stream
        self.writes: Clock = {}
        self.reads: Clock = {}
        self.recorded: set[Stream] = set()

    def __del__(self) -> None:
        known = {**self.stream.seen}
        join(known, self.device.host)
        for stream, place in (*self.reads.items(), *self.writes.items()):
            if stream not in self.recorded and known.get(stream, 0) < place:
                self.device.freed_early += 1


class OnDevice(Tensor):
    """A tensor on the simulated device that wraps one on the CPU."""

    held: Tensor
    memory: Memory

    @staticmethod
    def __new__(cls, held: Tensor, memory: Memory) -> OnDevice:
        made: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=DEVICE,
        )
        made.held, made.memory = held, memory
        return made

    def record_stream(self, stream: Any) -> None:
        self.memory.recorded.add(stream)

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = self.detach().clone().requires_grad_(self.requires_grad)
            copied._is_param = isinstance(self, torch.nn.Parameter)  # type: ignore[attr-defined]
            memo[id(self)] = copied
        return memo[id(self)]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return Pretended.current.run(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Runs and checks the operations of the simulated device; see `pretended_cuda`.

    `waits` lists what the host waited for, in order, until a test empties it; `freed_early` counts
    the blocks that were freed while another stream could still use them.
    """

    current: Pretended

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.freed_early = 0
        self.stream = Stream()
        self.host: Clock = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation."""
        if torch.is_inference_mode_enabled():  # operations arrive before decomposition
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        pin = kwargs.get("pin_memory")
        kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
        onto = kwargs.get("device")
        if not ours and (onto is None or torch.device(onto).type != "cuda"):
            result = func(*args, **kwargs)
            return pinned(result) if pin else result
        if onto is not None:
            kwargs["device"] = "cpu"
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            self._look_at_copy(name, args, kwargs, onto)
        else:
            self._look_at_devices(func, name, args, tensors)
        result = func(*tree_map(_real, args), **tree_map(_real, kwargs))
        step = self._step(func, args, kwargs, ours)
        if onto is not None and torch.device(onto).type == "cpu":
            return result
        return tree_map(lambda value: self._ours(value, ours, step), result)

    def _look_at_copy(self, name: str, args: Any, kwargs: dict[str, Any], onto: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        if name == "copy_":
            target = args[0].device
        else:
            target = source.device if onto is None else torch.device(onto)
        if target.type == source.device.type or (name == "copy_" and source.dim() == 0):
            return
        at_once = kwargs.get("non_blocking") or (name == "copy_" and args[2:] == (True,))
        if not (at_once and getattr(source, "is_pretended_pinned", False)):
            self._wait(f"a copy to {target.type}")

    def _look_at_devices(self, func: Any, name: str, args: Any, tensors: list[Tensor]) -> None:
        here = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim()]
        if name in _WAITING:
            self._wait(name)
        if name in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(not isinstance(index, OnDevice) for index in indices):
                self._wait("an index of the host")
            elif any(index.dtype == torch.bool for index in indices):
                if name == "index" or args[2].numel() > 1:  # one value needs no wait
                    self._wait("an index by a mask")
            here = [tensor for tensor in here if all(tensor is not index for index in indices)]
        if here:
            raise MixedDevices(f"{func} has tensors of the device and of the host")

    def _wait(self, reason: str) -> None:
        self.waits.append(reason)
        join(self.host, self.stream.seen)

    def _step(self, func: Any, args: Any, kwargs: dict[str, Any], ours: list[OnDevice]) -> int:
        """Append the operation to the current stream, and return its position."""
        stream = self.stream
        join(stream.seen, self.host)
        stream.seen[stream] += 1
        written = []
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                given = args[at] if at < len(args) else kwargs.get(argument.name)
                written += [leaf for leaf in tree_leaves(given) if isinstance(leaf, OnDevice)]
        for tensors, earlier in ((ours, "writes"), (written, "reads")):
            for tensor in tensors:
                for other, place in getattr(tensor.memory, earlier).items():
                    if stream.seen.get(other, 0) < place:
                        raise Race(f"{func} does not wait for {earlier} of another stream")
        for tensor in ours:
            tensor.memory.reads[stream] = stream.seen[stream]
        for tensor in written:
            tensor.memory.writes[stream] = stream.seen[stream]
        return stream.seen[stream]

    def _ours(self, value: Any, ours: list[OnDevice], step: int) -> Any:
        if not isinstance(value, Tensor):
            return value
        for tensor in ours:
            if value is tensor.held:
                return tensor
        place = value.untyped_storage().data_ptr()
        for tensor in ours:
            if place and place == tensor.held.untyped_storage().data_ptr():
                return OnDevice(value, tensor.memory)
        memory = Memory(self)
        memory.writes[self.stream] = step
        return OnDevice(value, memory)


def _real(value: Any) -> Any:
    return value.held if isinstance(value, OnDevice) else value


def pinned(tensor: Tensor) -> Tensor:
    """The tensor, marked as one in pinned memory."""
    tensor.is_pretended_pinned = True  # type: ignore[attr-defined]
    return tensor


def backward(loss: Tensor) -> None:
    """Add a gradient of ones to every parameter that a loss depends on."""
    seen, nodes = set(), [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        parameter = getattr(node, "variable", None)
        if parameter is not None:
            gradient = torch.ones_like(parameter)
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient


_module_to = torch.nn.Module.to


def _to(module: torch.nn.Module, *place: Any, **options: Any) -> torch.nn.Module:
    """Move a module in place: its parameters change their class and keep their identity."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _module_to(module, *place, **options)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


class _Generator(torch.Generator):
    def __new__(cls, device: object = None) -> _Generator:
        return super().__new__(cls)


@contextlib.contextmanager
def pretended_cuda() -> Iterator[Pretended]:
    """Simulate a machine with one CUDA device; no tensor of it may outlive the block."""
    if torch.cuda.is_available():
        torch.cuda.init()  # before it is replaced below
    elif not hasattr(torch._C, "_ensureCUDADeviceGuardSet"):
        pytest.skip("this torch lacks the private function that makes a driver unnecessary")
    else:
        torch._C._ensureCUDADeviceGuardSet()  # so that autograd does not ask the driver
    mode = Pretended.current = Pretended()

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        before, mode.stream = mode.stream, stream
        try:
            yield
        finally:
            mode.stream = before

    stand_ins: dict[str, Any] = {
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.get_device_capability": lambda device=None: (7, 5),
        "torch.cuda.mem_get_info": lambda device=None: (2**33, 2**34),
        "torch.cuda.max_memory_allocated": lambda device=None: 2**30,
        "torch.cuda.memory_reserved": lambda device=None: 2**30,
        "torch.cuda.reset_peak_memory_stats": lambda device=None: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.get_rng_state_all": lambda: [torch.get_rng_state()],
        "torch.cuda.set_rng_state": lambda state, device=None: None,
        "torch.cuda.device": lambda device: contextlib.nullcontext(),
        "torch.cuda.Stream": Stream,
        "torch.cuda.Event": Event,
        "torch.cuda.stream": on,
        "torch.cuda.current_stream": lambda device=None: mode.stream,
        "torch.nn.Module.to": _to,
        "torch.Tensor.pin_memory": lambda tensor: pinned(tensor.clone()),
        "torch.Tensor.backward": backward,
        "torch.Generator": _Generator,
    }
    no_cudnn = torch.backends.cudnn.flags(enabled=False)  # the CPU has no cuDNN operations
    with pytest.MonkeyPatch.context() as patch, no_cudnn, mode:
        for name, stand_in in stand_ins.items():
            patch.setattr(name, stand_in)
        yield mode
