"""Image files to 8-bit RGB pixels, and to the input size of a model.

JPEGs are decoded by simplejpeg, which takes a third of Pillow's time and, unlike Pillow, raises for
what libjpeg only warns of: the missing part of a damaged file would silently be grey. Pillow
decodes or refuses everything else. Both are built on libjpeg-turbo and give the same pixels.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from reidreg.errors import DataError
from reidreg.values import Sample

# Crops are small; a larger image is a mistake or a decompression bomb.
MAX_PIXELS = 50_000_000
FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
_MAX_BYTES = 2**24  # of files that are read whole; Pillow opens larger ones


def folder_samples(folder: Path) -> list[Sample]:
    """The images of a folder and its sub-folders, sorted, with pid and camid -1: unknown.

    Raises:
        DataError: It is not a folder, or holds no images.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise DataError(f"{folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [Sample(str(path), -1, -1) for path in paths]


def read_image(path: str) -> Image.Image:
    """Decode an image file to an 8-bit RGB Pillow image.

    Raises:
        DataError: As `read_pixels`.
    """
    return Image.fromarray(read_pixels(path).permute(1, 2, 0).numpy())


def read_pixels(path: str) -> Tensor:
    """Decode an image file.

    Returns:
        (3, H, W) uint8 in RGB, a view of (H, W, 3) in memory.

    Raises:
        DataError: The file is missing, empty, truncated, not a JPEG, PNG, BMP or WebP, or larger
            than 50 million pixels.
    """
    return _decode(path, _read(path))


def resize(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize by antialiased bilinear interpolation in integers; within one level of Pillow's.

    Args:
        pixels: (3, H, W) uint8.
        size: Height and width.

    Returns:
        (3, *size) uint8.
    """
    # One image in channels_last, also by its strides, for which torch has its fastest kernel.
    image = pixels.permute(1, 2, 0)[None].permute(0, 3, 1, 2)
    return functional.interpolate(image, size, mode="bilinear", antialias=True)[0]


def load_images(paths: Sequence[str], size: tuple[int, int]) -> Tensor:
    """Decode and resize image files.

    Args:
        paths: The files.
        size: Height and width.

    Returns:
        (B, H, W, 3) uint8 in RGB.

    Raises:
        DataError: One cannot be read.
    """
    # All are read before any is decoded: a system call slows down what the core runs next.
    contents = [_read(path) for path in paths]
    return stack_resized(map(_decode, paths, contents), len(paths), size)


def stack_resized(images: Iterable[Tensor], count: int, size: tuple[int, int]) -> Tensor:
    """Resize images of any sizes into one array.

    Args:
        images: (3, H, W) uint8 each.
        count: The number of images.
        size: Height and width.

    Returns:
        (count, H, W, 3) uint8.
    """
    stack = torch.empty(count, *size, 3, dtype=torch.uint8)
    for row, image in zip(stack, images, strict=True):
        row.copy_(resize(image, size).permute(1, 2, 0))
    return stack


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn errors about a file into a DataError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image is gone") from error
    # Pillow raises these for damaged files; SyntaxError for some broken PNGs.
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        reason = text.splitlines()[0].replace(f" '{path}'", "")
        raise DataError(f"{path}: cannot be decoded ({reason})") from error


def _read(path: str) -> bytes:
    """A file's bytes; none if it is too large for a crop."""
    with _named(path):
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            size = os.fstat(descriptor).st_size
            return os.read(descriptor, size) if size <= _MAX_BYTES else b""
        finally:
            os.close(descriptor)


def _decode(path: str, content: bytes) -> Tensor:
    with _named(path):
        if content.startswith(b"\xff\xd8"):
            pixels = _by_simplejpeg(content)
            if pixels is not None:
                return pixels
        return _by_pillow(path)


def _by_simplejpeg(content: bytes) -> Tensor | None:
    """A JPEG's pixels, or None if Pillow has to decode or refuse it.

    Raises:
        ValueError: The coded pixels end before the image does; the rest would be grey.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours == "CMYK" or height * width > MAX_PIXELS:
            return None
        return torch.from_numpy(simplejpeg.decode_jpeg(content, "RGB")).permute(2, 0, 1)
    except ValueError as error:
        if "premature end of data" in str(error):
            raise
        return None


def _by_pillow(path: str) -> Tensor:
    with warnings.catch_warnings():
        # Pillow warns of what is refused below, and of palettes that it converts anyway.
        warnings.simplefilter("ignore")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(f"{path}: {image.width} x {image.height} pixels are too many")
            if image.mode.startswith("I;16"):
                # convert() would clip 16-bit values to white.
                grey = (np.asarray(image) >> 8).astype(np.uint8)
                return torch.from_numpy(grey).expand(3, -1, -1)
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
