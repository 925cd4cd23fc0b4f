"""What a model draws at random: for a batch the same, whatever the number of processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from reidreg import distributed, fit, load_checkpoint, load_config
from reidreg.distributed import joined, world
from reidreg.generators import draw_alike, random_state
from reidreg.shared_draws import SharedDraws, WholeBatch
from reidreg.world import World
from test_distributed import WHOLE, Values, at_most_apart, killed_and_resumed
from test_training import differing, lines_of
from worlds import in_processes

CPU = torch.device("cpu")
BATCH = 10
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@contextmanager
def place(rank: int, size: int) -> Iterator[None]:
    """Pretend to be one of several processes, none of which talks to the others."""
    before, distributed._world = distributed._world, World(rank, size)
    try:
        yield
    finally:
        distributed._world = before


def state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


# --------------------------------------------------------------------- operations


def images(device: str, *shape: int) -> Tensor:
    """(10, ...) numbers, all of them far from zero."""
    generator = torch.Generator().manual_seed(9)
    return (1 + torch.rand(BATCH, *shape, generator=generator)).to(device)


@functools.cache
def layers(device: str) -> dict[str, nn.Module]:
    torch.manual_seed(7)
    made = {
        "path": DropPath(0.5),
        "attention": nn.MultiheadAttention(6, 2, dropout=0.5, batch_first=True),
        "attention, tokens first": nn.MultiheadAttention(6, 2, dropout=0.5),
        "encoder": nn.TransformerEncoderLayer(6, 2, 12, dropout=0.5, batch_first=True),
        "encoder, tokens first": nn.TransformerEncoderLayer(6, 2, 12, dropout=0.5),
    }
    return {name: layer.to(device) for name, layer in made.items()}


def attend(layer: str, tokens: Tensor, weights: bool) -> Tensor:
    found: Tensor = layers(str(tokens.device.type))[layer](
        tokens, tokens, tokens, need_weights=weights
    )[0]
    return found


def through(layer: str, x: Tensor) -> Tensor:
    found: Tensor = layers(str(x.device.type))[layer](x)
    return found


def windows(x: Tensor) -> Tensor:
    """(B, C, 8, 8) images as (B 4, 16, C) windows, as swin makes them."""
    pieces = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1)
    return pieces.reshape(-1, 16, x.shape[1])


# What is computed from (B, 3, 8, 8) images, and which dimension of the result counts images.
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "dropout": (lambda x: F.dropout(x, 0.5), 0),
    "dropout of rows": (lambda x: F.dropout(x.flatten(1), 0.3), 0),
    "dropout in place": (lambda x: F.dropout(x * 1.0, 0.5, inplace=True), 0),
    "dropout of channels last": (
        lambda x: F.dropout(x.to(memory_format=torch.channels_last), 0.5),
        0,
    ),
    "dropout of a transposed": (lambda x: F.dropout(x.flatten(2).transpose(1, 2), 0.5), 0),
    "dropout of windows": (lambda x: F.dropout(windows(x), 0.5), 0),
    "dropout, tokens first": (lambda x: F.dropout(x.flatten(2).permute(2, 0, 1), 0.5), 1),
    "dropout in half": (lambda x: F.dropout(x.bfloat16(), 0.5), 0),
    "torch.dropout": (lambda x: torch.dropout(x, 0.5, True), 0),
    "dropout1d": (lambda x: F.dropout1d(x.flatten(2), 0.5), 0),
    "dropout2d": (lambda x: F.dropout2d(x, 0.5), 0),
    "dropout3d": (lambda x: F.dropout3d(x.unsqueeze(2), 0.5), 0),
    "alpha_dropout": (lambda x: F.alpha_dropout(x, 0.5, training=True), 0),
    "feature_alpha_dropout": (lambda x: F.feature_alpha_dropout(x, 0.5, training=True), 0),
    "drop path": (lambda x: through("path", x), 0),
    "scaled_dot_product_attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.5),
        0,
    ),
    "attention with weights": (lambda x: attend("attention", six(x), True), 0),
    "attention without": (lambda x: attend("attention", six(x), False), 0),
    "attention, tokens first": (
        lambda x: attend("attention, tokens first", six(x).transpose(0, 1), True),
        1,
    ),
    "encoder": (lambda x: through("encoder", six(x)), 0),
    "encoder, tokens first": (
        lambda x: through("encoder, tokens first", six(x).transpose(0, 1).contiguous()),
        1,
    ),
    "bernoulli": (lambda x: torch.bernoulli(x - 1), 0),
    "bernoulli_ by a tensor": (lambda x: torch.empty_like(x).bernoulli_(x - 1), 0),
    "bernoulli_ by channel": (lambda x: torch.empty_like(x).bernoulli_(x[0, :, :1, :1] - 1), 0),
    "rand": (lambda x: torch.rand(len(x), 3, device=x.device), 0),
    "rand of one each": (lambda x: torch.rand(len(x), device=x.device), 0),
    "randn": (lambda x: torch.randn((len(x), 40), device=x.device), 0),
    "randint": (lambda x: torch.randint(2, 50, (len(x), 7), device=x.device), 0),
    "rand_like": (lambda x: torch.rand_like(x), 0),
    "randn_like": (lambda x: torch.randn_like(x), 0),
    "uniform_": (lambda x: torch.empty_like(x).uniform_(2, 3), 0),
    "normal_": (lambda x: x.new_empty(len(x), 1, 1, 1).normal_(1, 2), 0),
    "normal around": (lambda x: torch.normal(x, 2.0), 0),
    "normal by channel": (lambda x: torch.normal(x, x[0, :, :1, :1]), 0),
    "random_": (lambda x: torch.empty_like(x).random_(0, 90), 0),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x), 0),
}


def six(x: Tensor) -> Tensor:
    """(B, 3, 8, 8) as (B, 32, 6) tokens."""
    return x.flatten(1).view(len(x), 32, 6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [2, 5])
@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_a_share_is_what_one_process_computes_for_it(name: str, size: int, device: str) -> None:
    if device == "cuda" and name in {"scaled_dot_product_attention", "attention without"}:
        pytest.skip("drawn inside a kernel")
    function, dimension = FUNCTIONS[name]
    x = images(device, 3, 8, 8)
    layers(device)
    torch.manual_seed(3)
    before = state(device)
    whole = function(x)
    after = state(device)
    assert not torch.equal(before, after)
    for rank in range(size):
        with place(rank, size), WholeBatch() as mode:
            own = world().share(BATCH)
            mode.count = BATCH // size
            torch.manual_seed(3)
            found = function(x[own])
        expected = whole.narrow(dimension, own.start, BATCH // size)
        # Products of matrices of another size may round otherwise.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(found == 0, expected == 0)
        assert torch.equal(state(device), after)


def test_images_have_masks_of_their_own() -> None:
    masks = []
    for rank in range(2):
        with place(rank, 2), WholeBatch() as mode:
            mode.count = 5
            torch.manual_seed(3)
            masks += [mask.tolist() for mask in F.dropout(torch.ones(5, 40), 0.5)]
    assert len({tuple(mask) for mask in masks}) == BATCH


def drawn(rank: int, function: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What a function draws twice in a row as one of two processes, and the generator's state."""
    with place(rank, 2), WholeBatch() as mode:
        mode.count = 5
        torch.manual_seed(3)
        return function(), function(), torch.get_rng_state()


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.randperm(5),
        lambda: torch.rand(3, 7),
        lambda: torch.rand(()),
        lambda: torch.bernoulli(torch.full((1, 10, 1, 1), 0.5)),
    ],
)
def test_what_is_of_no_batch_is_alike(function: Callable[[], Tensor]) -> None:
    torch.manual_seed(3)
    alone = function()
    for rank in range(2):
        assert torch.equal(drawn(rank, function)[0], alone)


@pytest.mark.parametrize(
    "function",
    [
        # By rejection, and for negative numbers alone: how many are drawn depends on the values.
        lambda: torch.poisson(torch.full((5, 20), 3.0)),
        lambda: F.rrelu(torch.linspace(-2, 1, 50).view(5, 10) - world().rank, training=True),
        lambda: torch.multinomial(torch.ones(5, 30), 20),
    ],
)
def test_what_cannot_be_cut_differs_and_leaves_the_generators_alike(
    function: Callable[[], Tensor],
) -> None:
    first, second, after = drawn(0, function)
    other, _, same = drawn(1, function)
    assert not torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(after, same)
    assert torch.equal(first, drawn(0, function)[0])


def test_attention_that_drops_nothing_draws_nothing() -> None:
    noted: list[int] = []
    q = images("cpu", 2, 6, 4)
    with WholeBatch(lambda: noted.append(1)):
        F.scaled_dot_product_attention(q, q, q)
        F.rrelu(q, training=False)
        torch.ops.aten.native_dropout(q, 0.5, False)
    assert not noted


# --------------------------------------------------------------------- modules


class Blocks(nn.Module):
    """Layers that draw and layers that do not, and checkpointed ones."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again
        self.conv = nn.Conv2d(3, 6, 3)
        self.drop = nn.Dropout2d(0.5)
        self.block = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 6))
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(self.conv(x)).mean(dim=(2, 3))
        x = checkpoint(self.block, x, use_reentrant=False) if self.again else self.block(x)
        result: Tensor = self.last(x)
        return result


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    loss = model(x).square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("again", [False, True], ids=["kept", "checkpointed"])
def test_gradients_are_those_of_one_process_and_modules_that_draw_are_found(again: bool) -> None:
    torch.manual_seed(0)
    model, x = Blocks(again), images("cpu", 3, 8, 8)
    model.train()
    torch.manual_seed(1)
    alone = [gradients(model, x) for _ in range(3)]
    sums: list[list[Tensor]] = [[torch.zeros_like(p) for p in model.parameters()] for _ in alone]
    for rank in range(2):
        draws = SharedDraws(model)
        draws.begin()
        torch.manual_seed(1)
        with place(rank, 2):
            for step in sums:
                with draws.shared():
                    draws.expect(5)
                    found = gradients(model, x[world().share(BATCH)])
                for total, gradient in zip(step, found, strict=True):
                    total += gradient
        assert draws.watched == [model.drop, model.block[2]]
    for expected, step in zip(alone, sums, strict=True):
        torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone[0][0], alone[1][0])


def test_a_model_that_draws_nothing_is_left_alone_after_the_first_pass() -> None:
    entered: list[bool] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            entered.append(_get_current_dispatch_mode() is not None)
            return x * 2

    model = nn.Sequential(Seen(), nn.Dropout(0.0), nn.Dropout(0.5).eval())
    draws = SharedDraws(model)

    def step() -> bool:
        with draws.shared():
            draws.expect(4)
            model(torch.ones(4, 2))
        return entered.pop()

    draws.begin()
    with place(0, 2):
        assert step() and not draws.watched
        assert not step()
        model[2].train()
        draws.begin()
        assert step() and draws.watched == [model[2]]
        assert not step() and draws.watched == [model[2]]
    draws.begin()
    assert not step()  # one process
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_leaves_nothing_behind() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    model = nn.Sequential(nn.Dropout(0.5), nn.Sequential(Broken()))
    draws = SharedDraws(model)
    draws.begin()
    with place(1, 2), pytest.raises(ZeroDivisionError), draws.shared():
        model(torch.ones(4, 2))
    assert _get_current_dispatch_mode() is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
