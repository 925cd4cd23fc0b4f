"""Small copies of images, as data URIs for the page."""

from __future__ import annotations

import base64
import io
import statistics

from PIL import Image

from reidreg.data.images import read_image
from reidreg.errors import DataError

# Larger than on the page, for high-density screens.
_LARGEST = (96, 192)


class Thumbnails:
    """The images of a page, each stored once however often it is shown.

    Metadata of the files (place, time, camera) is not copied.
    """

    def __init__(self) -> None:
        self.images: dict[str, str] = {}
        self.missing: list[str] = []
        self._names: dict[str, str | None] = {}
        self._shapes: list[float] = []

    def name(self, path: str) -> str | None:
        """The id of an image within the page, or None if its file cannot be read."""
        if path not in self._names:
            self._names[path] = self._add(path)
        return self._names[path]

    def tile_height(self, width: int) -> int:
        """The tile height for a width, by the median shape of the images, which may be of cars."""
        shape = statistics.median(self._shapes) if self._shapes else 2.0
        return round(width * min(max(shape, 0.5), 2.5))

    def _add(self, path: str) -> str | None:
        try:
            image = read_image(path)
        except DataError:
            self.missing.append(path)
            return None
        self._shapes.append(image.height / image.width)
        name = f"image-{len(self.images)}"
        self.images[name] = data_uri(image)
        return name


def data_uri(image: Image.Image) -> str:
    """An image as a data URI: a WebP of at most 96 x 192 pixels."""
    small = image.copy()
    small.thumbnail(_LARGEST, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80, method=4, exif=b"", icc_profile=b"", xmp=b"")
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
