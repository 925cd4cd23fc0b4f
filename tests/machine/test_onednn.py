"""Convolutions in bfloat16 on a CPU are right, whatever freed memory held before."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from reidreg.machine.devices import autocast
from worlds import FORKING

CPU = torch.device("cpu")
Convolution = tuple[tuple[int, int, int, int], dict[str, Any]]  # (B, C, H, W), nn.Conv2d's options

# torch alone computed each of these wrong on a Xeon with AMX; the names say where they occur.
WRONG: dict[str, Convolution] = {
    "the last stage of a ResNet at 64 x 32": (
        (8, 256, 4, 2),
        {"out_channels": 512, "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "the same with groups": (
        (8, 1024, 4, 2),
        {"out_channels": 1024, "kernel_size": 3, "stride": 2, "padding": 1, "groups": 32},
    ),
    "the last stage of an EdgeNeXt at 96 x 48": (
        (2, 160, 6, 3),
        {"out_channels": 304, "kernel_size": 2, "stride": 2},
    ),
    "an input one pixel wide": (
        (1, 128, 8, 1),
        {"out_channels": 64, "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "the stem of a RepVGG": ((1, 3, 128, 64), {"out_channels": 48, "kernel_size": 1, "stride": 2}),
    "a wide kernel on few channels": ((8, 12, 15, 34), {"out_channels": 64, "kernel_size": 8}),
    "a stride above the kernel": (
        (4, 16, 14, 15),
        {"out_channels": 24, "kernel_size": 7, "stride": 8, "padding": 3},
    ),
    "a dilated depthwise one": (
        (2, 16, 39, 33),
        {"out_channels": 16, "kernel_size": 3, "dilation": 2, "groups": 16},
    ),
}
RIGHT: dict[str, Convolution] = {
    "the stem of a ResNet": (
        (1, 3, 64, 32),
        {"out_channels": 64, "kernel_size": 7, "stride": 2, "padding": 3},
    ),
    "a step down": (
        (1, 64, 16, 8),
        {"out_channels": 64, "kernel_size": 3, "stride": 2, "padding": 1},
    ),
    "its shortcut": ((1, 64, 16, 8), {"out_channels": 128, "kernel_size": 1, "stride": 2}),
    "patches of a ViT": ((1, 3, 64, 32), {"out_channels": 64, "kernel_size": 16, "stride": 16}),
    "one pixel wide without strides": (
        (1, 64, 4, 1),
        {"out_channels": 64, "kernel_size": 3, "padding": 1},
    ),
    "padding by name": (
        (1, 64, 8, 4),
        {"out_channels": 64, "kernel_size": 3, "padding": "same"},
    ),
}


def spoil_free_memory() -> None:
    """Fill freed memory with NaN, so that reading outside a tensor shows in the result."""
    blocks = [torch.full((2**power + 7,), math.nan) for power in range(5, 21)]
    del blocks


def drawn(shape: tuple[int, ...], options: dict[str, Any]) -> tuple[nn.Conv2d, Tensor]:
    """A convolution and images whose numbers bfloat16 represents exactly."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(shape[1], **options).to(memory_format=torch.channels_last)
    with torch.no_grad():
        for parameter in convolution.parameters():
            parameter.copy_(parameter.bfloat16())
    images = torch.randn(shape).bfloat16().float()
    return convolution, images.to(memory_format=torch.channels_last)


def with_the_workaround() -> AbstractContextManager[Any]:
    return autocast(CPU, torch.bfloat16)


def torch_alone() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


def passes(
    convolution: nn.Conv2d, images: Tensor, precision: Callable[[], AbstractContextManager[Any]]
) -> list[Tensor]:
    """The output, and the gradients of the sum of its squares for parameters and images."""
    images = images.detach().requires_grad_(images.shape[1] > 4)  # first layers need none
    convolution.zero_grad()
    spoil_free_memory()
    with precision():
        output = convolution(images)
    spoil_free_memory()
    output.double().square().sum().backward()  # type: ignore[no-untyped-call]
    leaves = [*convolution.parameters(), images]
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def assert_right(
    shape: tuple[int, int, int, int],
    options: dict[str, Any],
    precision: Callable[[], AbstractContextManager[Any]] = with_the_workaround,
) -> None:
    """The bfloat16 result is that of float64, which oneDNN does not compute, up to rounding."""
    convolution, images = drawn(shape, options)
    expected = passes(copy.deepcopy(convolution).double(), images.double(), nullcontext)
    for _ in range(2):
        computed = passes(convolution, images, precision)
        assert computed[0].dtype == torch.bfloat16
        for wanted, got in zip(expected, computed, strict=True):
            difference = torch.linalg.vector_norm(got.double() - wanted)
            assert difference <= 0.03 * torch.linalg.vector_norm(wanted)


def share_of_float32(shape: tuple[int, int, int, int], options: dict[str, Any]) -> float:
    """The share of the outputs that equal those of float32 rounded to bfloat16."""
    convolution, images = drawn(shape, options)
    images = images * math.pi  # numbers that bfloat16 rounds
    with torch.no_grad():
        with autocast(CPU, torch.bfloat16):
            output = convolution(images)
        return float((output == convolution(images).bfloat16()).float().mean())


@pytest.mark.parametrize("name", [*WRONG, *RIGHT])
def test_results_do_not_depend_on_what_memory_held(name: str) -> None:
    assert_right(*{**WRONG, **RIGHT}[name])


@pytest.mark.parametrize("name", WRONG)
def test_affected_shapes_are_computed_in_float32(name: str) -> None:
    assert share_of_float32(*WRONG[name]) > 0.99


@pytest.mark.parametrize("name", RIGHT)
def test_other_shapes_stay_in_bfloat16(name: str) -> None:
    assert share_of_float32(*RIGHT[name]) < 0.9


def right_in_torch_alone(convolution: Convolution) -> bool:
    """Whether torch gets a convolution right without our workaround; it may also crash."""
    right = functools.partial(assert_right, precision=torch_alone)
    process = FORKING.Process(target=right, args=convolution)
    process.start()
    process.join()
    return process.exitcode == 0


@pytest.mark.skipif(
    not getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16"),
    reason="the defect shows on CPUs with AMX for bfloat16, and this one has none",
)
def test_torch_still_needs_the_workaround() -> None:
    assert all(map(right_in_torch_alone, RIGHT.values()))  # or the comparison itself fails
    assert not all(map(right_in_torch_alone, WRONG.values())), (
        f"torch {torch.__version__} computes all of these right: remove reidreg/machine/onednn.py, "
        "its use in reidreg/machine/devices.py and this file, if older versions need not work"
    )


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    kernel = draw(st.sampled_from([1, 2, 3, 4, 5, 7, 8]))
    padding = draw(st.sampled_from([0, kernel // 2]))
    groups = draw(st.sampled_from([1, 1, 1, 4]))
    options = {
        "out_channels": draw(st.sampled_from([8, 16, 24, 64, 96])),
        "kernel_size": kernel,
        "stride": draw(st.sampled_from([1, 2, 2, 3, 4])),
        "padding": padding,
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    channels = groups * draw(st.sampled_from([3, 4, 8, 12, 16, 24, 32, 48, 64]))
    height, width = (draw(st.integers(max(1, kernel - 2 * padding), 24)) for _ in range(2))
    return (draw(st.sampled_from([1, 2, 8])), channels, height, width), options


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_any_convolution_is_right(convolution: Convolution) -> None:
    assert_right(*convolution)


def test_a_narrow_model_gives_the_same_twice() -> None:
    """The last stage of a ResNet with stride 32 is one pixel wide at 64 x 32."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, 16, 3), nn.ReLU(), nn.Conv2d(64, 256, 3, 2, 1), nn.Flatten()
    ).to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 64, 32).to(memory_format=torch.channels_last)
    outputs = []
    for _ in range(3):
        spoil_free_memory()
        with torch.no_grad(), autocast(CPU, torch.bfloat16):
            outputs.append(model(images))
    assert outputs[0].isfinite().all()
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])
