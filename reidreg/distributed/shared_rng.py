"""What a model draws at random, for the batch of all processes together.

Dropout, stochastic depth and the like draw a number for each image, or for parts of it. Where
several processes share a batch, each draws the numbers of the whole batch, from generators that are
in the same state everywhere, and takes the rows of its share. So the same is dropped from an image
whatever the number of processes, and nothing is exchanged.

Numbers are drawn by few of torch's operations, whatever function or layer asks for them, and torch
marks those operations: that is where they are met here, by a TorchDispatchMode. It costs some
microseconds for each operation, so it is entered around the modules that draw, and no others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from reidreg.distributed.group import world

# Operations that draw as many numbers for an element, in an order that its place among all gives,
# whatever the values are. Others, such as rejection sampling, would leave the generators apart.
_EVEN = {
    *("bernoulli", "bernoulli_", "native_dropout", "_fused_dropout"),
    *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like"),
    *("random_", "uniform_", "normal", "normal_", "exponential_", "geometric_"),
    *("cauchy_", "log_normal_"),
}
# By these arguments, operations that could draw say that they do not.
_SWITCHES = {"dropout_p", "train", "training"}


class SharedDraws:
    """Has the modules of a model draw for the batch of all processes, and take their share.

    All modules are watched after `begin`, each until it has been called and drew nothing: one that
    a pass leaves out may draw in a later one.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._inside: list[nn.Module] = []
        self._called: set[nn.Module] = set()
        self._drawing: set[nn.Module] = set()
        self._mode = WholeBatch(self._note)
        self.watched: list[nn.Module] = []

    def begin(self) -> None:
        """Find out anew which modules draw; called whenever that may have changed."""
        self.watched = list(self._model.modules())
        self._called.clear()
        self._drawing.clear()

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share what the model draws in a forward and a backward pass.

        Backward too, since checkpointed modules are computed again there.
        """
        if world().size == 1:
            yield
            return
        with contextlib.ExitStack() as hooks:
            for module in self.watched:
                hooks.enter_context(module.register_forward_pre_hook(self._enter))
                hooks.enter_context(module.register_forward_hook(self._leave, always_call=True))
            yield
        self.watched = [m for m in self.watched if m in self._drawing or m not in self._called]

    def expect(self, count: int) -> None:
        """Say how many images this process computes with; all processes have as many."""
        self._mode.count = count

    def _enter(self, module: nn.Module, arguments: Any) -> None:
        self._called.add(module)
        self._inside.append(module)
        if len(self._inside) == 1:
            self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, module: nn.Module, arguments: Any, output: Any) -> None:
        self._inside.pop()
        if not self._inside:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _note(self) -> None:
        self._drawing.add(self._inside[-1])


class WholeBatch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Draws random numbers for the images of all processes, and gives this one its own.

    A tensor is of the batch if its first dimension is a multiple of the number of images, as the
    windows or attention heads of images are; or else if its second one is that number, as where
    tokens come first. What is of no batch, such as a permutation, comes out alike in all processes.

    Args:
        note: Is called whenever numbers are drawn.
    """

    def __init__(self, note: Callable[[], None] = lambda: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 1
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        named = {argument.name: argument.default_value for argument in func._schema.arguments}
        given = {**dict(zip(named, args, strict=False)), **kwargs}
        if any((named | given).get(name) == 0 for name in _SWITCHES):
            return func(**given)
        self._note()
        if func.overloadpacket.__name__ in _EVEN:
            return self._share(func, given)
        if any(self._dimension(tensor.shape) is not None for tensor in _tensors(given)):
            return _draw_apart(func, given)
        return func(**given)

    def _dimension(self, shape: Sequence[int]) -> int | None:
        """In which dimension a shape counts images, or parts of them; None for no batch."""
        if len(shape) > 0 and shape[0] % self.count == 0:
            return 0
        return 1 if len(shape) > 2 and shape[1] == self.count else None

    def _share(self, func: Any, given: dict[str, Any]) -> Any:
        """Draw for the whole batch, and take this process's share of the result."""
        shape = given.get("size") or np.broadcast_shapes(*(t.shape for t in _tensors(given)))
        dimension = self._dimension(shape)
        if dimension is None or 0 in shape:
            return func(**given)
        rows, last = shape[dimension], dimension - len(shape)  # counted from the last dimension
        written = [argument.name for argument in func._schema.arguments if argument.is_write]
        whole = dict(given)
        for name, value in given.items():
            if name == "size":
                whole[name] = [*shape[:dimension], rows * world().size, *shape[dimension + 1 :]]
            # What is broadcast along the batch is the same for all.
            elif isinstance(value, Tensor) and value.dim() >= -last and value.shape[last] == rows:
                whole[name] = _widened(value, last, filled=name not in written)
        result = func(**whole)
        own = world().share(rows * world().size)

        def cut(tensor: Tensor) -> Tensor:
            return tensor.narrow(dimension, own.start, rows)

        for name in written:
            return given[name].copy_(cut(whole[name]))
        return tree_map_only(Tensor, cut, result)


def _tensors(given: dict[str, Any]) -> list[Tensor]:
    return [value for value in given.values() if isinstance(value, Tensor)]


def _widened(own: Tensor, dimension: int, filled: bool) -> Tensor:
    """A tensor of all processes' rows, with this one's numbers in all of them if it is filled.

    It lies in memory as the tensor does: numbers are drawn in the order of the memory.
    """
    shape = list(own.shape)
    shape[dimension] *= world().size
    order = sorted(range(own.dim()), key=own.stride, reverse=True)
    whole = torch.empty_permuted(shape, order, dtype=own.dtype, device=own.device)
    if filled:
        for rows in whole.chunk(world().size, dimension):
            rows.copy_(own)
    return whole


def _draw_apart(func: Any, given: dict[str, Any]) -> Any:
    """Draw numbers that no other process draws, from a generator that then stands as before.

    For kernels that draw within themselves, where nothing can be cut.
    """
    common = int(torch.randint(2**62, ()))  # the same in all processes, and another one each time
    seed = np.random.SeedSequence((common, world().rank)).generate_state(1, np.uint64)
    generator = given.get("generator") or _generator(_tensors(given)[0].device)
    state = generator.get_state()
    try:
        generator.manual_seed(int(seed[0]) >> 1)
        return func(**given)
    finally:
        generator.set_state(state)


def _generator(device: torch.device) -> torch.Generator:
    """The global generator of a device."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index]
    return torch.default_generator
