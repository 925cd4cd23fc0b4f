"""What a model draws at random: for a batch the same, whatever the number of processes."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from test_distributed import WHOLE, Values, at_most_apart, killed_and_resumed
from test_training import differing, lines_of
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.checkpoint import checkpoint

from reidreg import Embeddings, fit, load_config
from reidreg.distributed import group as distributed
from reidreg.distributed.group import joined, world
from reidreg.distributed.random_state import draw_alike, seed_everything
from reidreg.distributed.shared_rng import SharedDraws, WholeBatch
from reidreg.machine.world import World
from reidreg_plugins.backbones.timm import TimmBackbone
from reidreg_plugins.evaluators.retrieval import Retrieval
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
    "dropout, tokens first": (lambda x: F.dropout(tokens_first(x), 0.5), 1),
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
        lambda x: attend("attention, tokens first", tokens_first(x), True),
        1,
    ),
    "encoder": (lambda x: through("encoder", six(x)), 0),
    "encoder, tokens first": (
        lambda x: through("encoder, tokens first", tokens_first(x).contiguous()),
        1,
    ),
    "bernoulli": (lambda x: torch.bernoulli(x - 1), 0),
    "bernoulli_ by a tensor": (lambda x: torch.empty_like(x).bernoulli_(x - 1), 0),
    "bernoulli_ by channel": (lambda x: torch.empty_like(x).bernoulli_(channels(x)), 0),
    "bernoulli_ by as many channels": (
        lambda x: x.new_empty(len(x), 5, 2, 2).bernoulli_(channels(x, 5)),
        0,
    ),
    "rand": (lambda x: torch.rand(len(x), 3, device=x.device), 0),
    "rand of one each": (lambda x: torch.rand(len(x), device=x.device), 0),
    "randn": (lambda x: torch.randn((len(x), 40), device=x.device), 0),
    "randint": (lambda x: torch.randint(2, 50, (len(x), 7), device=x.device), 0),
    "rand_like": (lambda x: torch.rand_like(x), 0),
    "randn_like": (lambda x: torch.randn_like(x), 0),
    "uniform_": (lambda x: torch.empty_like(x).uniform_(2, 3), 0),
    "normal_": (lambda x: x.new_empty(len(x), 1, 1, 1).normal_(1, 2), 0),
    "normal around": (lambda x: torch.normal(x, 2.0), 0),
    "normal by channel": (lambda x: torch.normal(x, channels(x)), 0),
    "random_": (lambda x: torch.empty_like(x).random_(0, 90), 0),
    "gumbel_softmax": (lambda x: F.gumbel_softmax(x), 0),
}


def six(x: Tensor) -> Tensor:
    """(B, 3, 8, 8) as (B, 32, 6) tokens."""
    return x.flatten(1).view(len(x), 32, 6)


def tokens_first(x: Tensor) -> Tensor:
    """(B, 3, 8, 8) as (31, B, 6): no number of images that a process has divides 31."""
    return six(x).transpose(0, 1)[:31]


def channels(x: Tensor, count: int = 3) -> Tensor:
    """(C, 1, 1), the same whatever the images are."""
    return torch.linspace(0.2, 0.9, count, device=x.device).view(count, 1, 1)


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
        # A share may be of windows, so that there are several for each image.
        expected = whole.chunk(size, dimension)[rank]
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
        model[2].eval()
        draws.begin()
        assert step() and not draws.watched
    draws.begin()
    assert not step()  # one process
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_module_that_a_pass_leaves_out_is_watched_on() -> None:
    class Skipping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Dropout(0.5), nn.Dropout(0.5)

        def forward(self, x: Tensor, which: str) -> Tensor:
            found: Tensor = getattr(self, which)(x)
            return found

    model = Skipping()
    draws = SharedDraws(model)
    draws.begin()
    x = images("cpu", 40)
    for which in ("one", "other", "one"):
        torch.manual_seed(2)
        whole = model(x, which)
        torch.manual_seed(2)
        with place(1, 2), draws.shared():
            draws.expect(5)
            assert torch.equal(model(x[5:], which), whole[5:])
        assert draws.watched == [model.one, model.other]


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


# --------------------------------------------------------------------- whole runs

VIT = {
    **WHOLE,
    "backbone.model": "test_vit",
    "backbone.drop_path": 0.2,
    "train.log_every": 1,
    "train.epochs": 2,
    "train.eval_every": 1,
}
DROPS = {"pos_drop_rate": 0.1, "proj_drop_rate": 0.1, "attn_drop_rate": 0.1}


def trained(values: Values, resume: str | None = None) -> set[str]:
    """Train a transformer that drops whatever it can; gives what draws in it.

    Loading weights and ranking draw too, which the first process does alone.
    """
    create, begin, evaluate = timm.create_model, SharedDraws.begin, Retrieval.evaluate
    made: list[SharedDraws] = []

    def noted(self: SharedDraws) -> None:
        made.append(self)
        begin(self)

    def loaded(self: TimmBackbone) -> None:
        torch.rand(3)

    def evaluated(self: Retrieval, query: Embeddings, gallery: Embeddings) -> Values:
        torch.rand(3)
        return evaluate(self, query, gallery)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", functools.partial(create, **DROPS))
        patch.setattr(SharedDraws, "begin", noted)
        patch.setattr(TimmBackbone, "load_pretrained", loaded)
        patch.setattr(Retrieval, "evaluate", evaluated)
        fit(load_config("aihub_kaist", values), resume)
    return {type(module).__name__ for module in made[-1]._drawing}


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_several_processes_drop_what_one_drops(tiny: Values, tmp_path: Path, size: int) -> None:
    values = {**tiny, **VIT}
    trained({**values, "output_dir": str(tmp_path / "one")})
    found = in_processes(size, trained, {**values, "output_dir": str(tmp_path / "all")})
    assert all(kinds == {"Dropout", "DropPath", "Attention"} for kinds in found)
    at_most_apart(lines_of(tmp_path / "all"), lines_of(tmp_path / "one"), rel=1e-4)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_drop_the_same(tiny: Values, tmp_path: Path) -> None:
    values = {**tiny, **VIT, "train.epochs": 4, "train.eval_every": 2}
    in_processes(2, trained, {**values, "output_dir": str(tmp_path / "whole")})
    killed = {**values, "output_dir": str(tmp_path / "killed")}
    killed_and_resumed(killed, 2, "epoch 3/4 step 3/", trained)
    assert "at step 10" in (tmp_path / "killed/train.log").read_text()
    paths = [tmp_path / name / "checkpoints/last.ckpt" for name in ("whole", "killed")]
    assert not differing(*paths)


@pytest.mark.parametrize(("before", "after"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_another_number_of_processes_goes_on_to_drop_the_same(
    tiny: Values, tmp_path: Path, before: int, after: int
) -> None:
    values = {**tiny, **VIT}
    trained({**values, "output_dir": str(tmp_path / "whole")})
    cut = {**values, "output_dir": str(tmp_path / "cut")}
    in_processes(before, trained, {**cut, "train.epochs": 1})
    in_processes(after, trained, cut, "auto")
    log = (tmp_path / "cut/train.log").read_text()
    assert f"resumed by {after} processes, saved by {before}" in log
    at_most_apart(lines_of(tmp_path / "cut"), lines_of(tmp_path / "whole"), rel=1e-4)


# --------------------------------------------------------------------- generators


def drawn_alike() -> list[Any]:
    with joined(CPU, 20.0) as here:
        seed_everything(here.rank)
        draw_alike(CPU)
        return [random.random(), np.random.rand(), torch.rand(()).item()]


def test_all_draw_on_from_where_the_first_stands() -> None:
    seed_everything(0)
    expected = [random.random(), np.random.rand(), torch.rand(()).item()]
    assert in_processes(2, drawn_alike) == [expected, expected]
