"""Memory that is used again: only when nobody sees it any more."""

from __future__ import annotations

import gc

import torch

from reidreg.data.buffer_pool import Buffers


def test_memory_comes_again_once_it_is_let_go() -> None:
    buffers = Buffers()
    first = buffers.empty(1000, 1000)
    place = first.data_ptr()
    del first
    assert buffers.empty(1000, 1000).data_ptr() == place


def test_what_is_in_use_is_never_handed_out_however_many_there_are() -> None:
    buffers = Buffers()
    held = [buffers.empty(100, 100).fill_(number) for number in range(20)]
    assert len({tensor.data_ptr() for tensor in held}) == 20
    assert all((tensor == number).all() for number, tensor in enumerate(held))


def test_a_view_and_a_graph_hold_the_memory() -> None:
    buffers = Buffers()
    weight = torch.ones(100, requires_grad=True)
    images = buffers.empty(50, 100).fill_(2)
    loss = (images * weight).sum()
    row = buffers.empty(50, 100).fill_(3)[7]
    del images
    gc.collect()
    for _ in range(6):
        buffers.empty(50, 100).fill_(-1)
    assert (row == 3).all()
    loss.backward()
    assert weight.grad is not None and (weight.grad == 100).all()


def test_shapes_may_change_and_old_ones_are_given_up() -> None:
    buffers = Buffers()
    for size in range(1, 30):
        assert buffers.empty(size, 4).shape == (size, 4)
    assert len(buffers._blocks) == 1
