"""From the drawn scene to the JPEG of a camera: light, colour, blur, noise and compression."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageFilter

from reidreg.synthesis.cameras import Camera
from reidreg.synthesis.canvas import HEIGHT, SUPERSAMPLING, WIDTH


@lru_cache(maxsize=128)
def _illumination(camera: Camera) -> Image.Image:
    """Side light and vignetting, as a factor for each pixel."""
    y, x = np.mgrid[-1.0 : 1.0 : HEIGHT * 1j, -1.0 : 1.0 : WIDTH * 1j]
    field = 1.0 + 0.5 * camera.light * x - 0.1 * y - 0.1 * (x * x + y * y)
    field = np.clip(field / field.max(), 0.25, 1.0)
    return Image.fromarray(np.round(255 * field).astype(np.uint8)).convert("RGB")


def _curve(camera: Camera, exposure: float) -> list[int]:
    """The tone curve as a table of 256 levels."""
    table = []
    for level in range(256):
        value = min(1.0, level / 255 * exposure) ** camera.gamma
        value = camera.black + (camera.white - camera.black) * value
        table.append(min(255, max(0, round(255 * value))))
    return table


def _matrix(camera: Camera, drift: Sequence[float]) -> tuple[float, ...]:
    """Saturation and colour cast, as the rows of a colour matrix."""
    rows: list[float] = []
    luma = (0.299, 0.587, 0.114)
    for k, gain in enumerate(camera.gains):
        keep = [camera.saturation * (k == j) for j in range(3)]
        mix = [(1 - camera.saturation) * weight for weight in luma]
        rows += [gain * drift[k] * (a + b) for a, b in zip(keep, mix, strict=True)]
        rows.append(0.0)
    return tuple(rows)


def develop(rng: np.random.Generator, image: Image.Image, camera: Camera) -> Image.Image:
    """Turn the drawn canvas into the image that a camera's sensor takes."""
    image = image.reduce(SUPERSAMPLING)
    detail = camera.detail * float(rng.uniform(0.75, 1.0))
    small = (max(16, round(WIDTH * detail)), max(32, round(HEIGHT * detail)))
    image = image.resize(small, Image.Resampling.BILINEAR)
    image = image.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    image = ImageChops.multiply(image, _illumination(camera))
    image = image.convert("RGB", _matrix(camera, rng.uniform(0.95, 1.05, 3).tolist()))
    image = image.point(_curve(camera, float(rng.uniform(0.8, 1.2))) * 3)
    image = image.filter(ImageFilter.GaussianBlur(camera.blur * float(rng.uniform(0.6, 1.4))))
    pixels = np.asarray(image, dtype=np.float32)
    luma = rng.standard_normal((HEIGHT, WIDTH, 1), dtype=np.float32) * camera.noise
    chroma = rng.standard_normal((HEIGHT, WIDTH, 3), dtype=np.float32) * (0.5 * camera.noise)
    return Image.fromarray(np.clip(pixels + luma + chroma, 0, 255).astype(np.uint8))


def encode(image: Image.Image, quality: int) -> bytes:
    """The bytes of a JPEG."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
