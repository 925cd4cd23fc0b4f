"""Work around oneDNN's wrong convolutions in bfloat16 on x86 CPUs: compute those in float32.

What is wrong: for a few shapes, most of them strided, oneDNN's kernels for AMX, and in part those
for AVX512-BF16, read or write memory outside their tensors. The output is arbitrary, may be NaN and
differs from run to run, and the process may crash. In models it hits convolutions whose output is
one pixel wide (the last stage of any ResNet of stride 32 at 64 x 32) and the stem of RepVGG.

Seen with: torch 2.14 (oneDNN 3.12.0) on a Xeon with AMX, against float64, in random shapes and in
those of 18 timm models.

Upstream: we know of no issue that covers these 2D convolutions. Two entries look related, and were
not checked against the shapes here: pytorch issue 169688 (strided conv3d whose output is one pixel
wide) and oneDNN pull request 5494 (strides above the kernel size).

When it can go: once `test_torch_still_needs_the_workaround` fails on a CPU with AMX, for the oldest
torch that is supported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Sizes = int | Sequence[int]


class Float32Fallback(TorchFunctionMode):
    """Inside autocast to bfloat16, computes the affected 2D convolutions in float32."""

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
            if call.is_affected():
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

    def is_affected(self) -> bool:
        """Whether bfloat16 came out wrong for this shape, or for one close to it."""
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
        """The output computed in float32, rounded to bfloat16."""
        images, stride = self.input, self.stride
        if self.weight.shape[2:] == (1, 1) and self.padding in (0, (0, 0), "valid"):
            # With few channels, the weight gradient of a strided one crashes in float32 as well.
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
