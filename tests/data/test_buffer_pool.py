"""The buffer pool: memory is reused only when nothing refers to it any more."""

from __future__ import annotations

import gc

import torch

from reidreg.data.buffer_pool import BufferPool


def test_memory_is_reused_once_it_is_released() -> None:
    pool = BufferPool()
    first = pool.empty(1000, 1000)
    address = first.data_ptr()
    del first
    assert pool.empty(1000, 1000).data_ptr() == address


def test_memory_in_use_is_never_returned_again_however_many_tensors_there_are() -> None:
    pool = BufferPool()
    held = [pool.empty(100, 100).fill_(number) for number in range(20)]
    assert len({tensor.data_ptr() for tensor in held}) == 20
    assert all((tensor == number).all() for number, tensor in enumerate(held))


def test_a_view_and_a_graph_hold_the_memory() -> None:
    pool = BufferPool()
    weight = torch.ones(100, requires_grad=True)
    images = pool.empty(50, 100).fill_(2)
    loss = (images * weight).sum()
    row = pool.empty(50, 100).fill_(3)[7]
    del images
    gc.collect()
    for _ in range(6):
        pool.empty(50, 100).fill_(-1)
    assert (row == 3).all()
    loss.backward()
    assert weight.grad is not None and (weight.grad == 100).all()


def test_blocks_of_another_shape_are_replaced() -> None:
    pool = BufferPool()
    for size in range(1, 30):
        assert pool.empty(size, 4).shape == (size, 4)
    assert len(pool) == 1
