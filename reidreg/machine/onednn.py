"""Convolutions in bfloat16 that a CPU gets wrong, and float32 right.

oneDNN, by which torch computes on x86 processors, has kernels of its own for bfloat16. For a few
shapes, most of them with strides, these read or write memory that is not theirs: what comes out is
arbitrary, differs from run to run, may be NaN, and the process may crash. Seen with torch 2.14 on a
Xeon with AMX, and in part with AVX512-BF16 alone, against float64 in shapes drawn at random and in
those of 18 of timm's models. In models they are the last ones of narrow inputs, whose output is one
pixel wide (any ResNet of stride 32 at 64 x 32), and the stem of RepVGG.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Sizes = int | Sequence[int]


class SoundConvolutions(TorchFunctionMode):
    """Computes 2D convolutions in float32, inside autocast to bfloat16, where that goes wrong."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            call = Conv2dCall(*args, **kwargs)
            if call.goes_wrong():
                return call.in_float32()
        return func(*args, **kwargs)


@dataclass(frozen=True)
class Conv2dCall:
    """The arguments of torch.conv2d."""

    input: Tensor
    weight: Tensor
    bias: Tensor | None = None
    stride: Sizes = 1
    padding: Sizes | str = 0
    dilation: Sizes = 1
    groups: int = 1

    def goes_wrong(self) -> bool:
        """Whether it is of a shape for which bfloat16 came out wrong, or is near to one."""
        _, channels, height, width = self.weight.shape
        if 4 < channels < 32 and (height % 4 == 0 or width % 4 == 0):
            return True
        if channels == 1 and max(_pair(self.dilation)) > 1:
            return True
        down, across = _pair(self.stride)
        if down == across == 1:
            return False
        if height == width == 1:
            return channels < 16
        return self._columns() == 1 or down > height or across > width

    def in_float32(self) -> Tensor:
        """The output, rounded to bfloat16 at the end."""
        images, stride = self.input, self.stride
        if self.weight.shape[2:] == (1, 1) and self.padding in (0, (0, 0), "valid"):
            # Of few channels, the gradient of strided weights crashes in float32 as well.
            down, across = _pair(stride)
            images, stride = images[..., ::down, ::across], 1
        with torch.autocast("cpu", enabled=False):
            output = torch.conv2d(
                images.float(),
                self.weight.float(),
                None if self.bias is None else self.bias.float(),
                stride,
                self.padding,
                self.dilation,
                self.groups,
            )
        return output.to(torch.bfloat16)

    def _columns(self) -> int:
        """The width of the output."""
        _, across = _pair(self.stride)
        reach = _pair(self.dilation)[1] * (self.weight.shape[3] - 1) + 1
        border = 0 if isinstance(self.padding, str) else _pair(self.padding)[1]  # "valid"
        return int((self.input.shape[3] + 2 * border - reach) // across + 1)


def _pair(sizes: Sizes) -> tuple[int, int]:
    if isinstance(sizes, int):
        return sizes, sizes
    return sizes[0], sizes[-1]
