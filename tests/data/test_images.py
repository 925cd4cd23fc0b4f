"""Image files to pixels: every format, its errors, and that no damage silently becomes grey."""

from __future__ import annotations

import io
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reidreg import DataError
from reidreg.data.images import load_images, read_image, read_pixels, resize

NOISE = np.random.default_rng(0).integers(0, 256, (24, 12, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


JPEG = encoded(Image.fromarray(NOISE), "JPEG")


def decode(content: bytes, folder: Path, name: str = "image.jpg") -> Image.Image:
    (folder / name).write_bytes(content)
    return read_image(str(folder / name))


# --------------------------------------------------------------------- images


@pytest.mark.parametrize("kind", ["PNG", "BMP", "WEBP"])
def test_lossless_images_are_read_as_they_are_whatever_their_suffix(
    kind: str, tmp_path: Path
) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode(encoded(Image.fromarray(NOISE), kind, **options), tmp_path)
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), NOISE)


def test_a_jpeg_is_nearly_what_was_saved(tmp_path: Path) -> None:
    smooth = Image.fromarray(np.full((24, 12, 3), (200, 100, 50), dtype=np.uint8))
    image = decode(encoded(smooth, "JPEG"), tmp_path)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(smooth).astype(int)).max() <= 3


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65_535, 24 * 12).reshape(24, 12).astype(np.uint16)
    image = decode(encoded(Image.fromarray(ramp), "PNG"), tmp_path)
    expected = (ramp / 257).round()
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0] - expected).max() <= 1
    assert np.asarray(image).mean() == pytest.approx(127.5, abs=1)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_rgb(mode: str, tmp_path: Path) -> None:
    source = Image.fromarray(NOISE)
    if mode == "I;16":
        source = Image.fromarray(NOISE[..., 0].astype(np.uint16) * 257)
    else:
        source = source.convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    image = decode(encoded(source, kind), tmp_path)
    assert image.mode == "RGB" and image.size == (12, 24)


def test_grey_has_three_equal_channels_and_alpha_is_dropped(tmp_path: Path) -> None:
    grey = np.asarray(decode(encoded(Image.fromarray(NOISE[..., 0]), "PNG"), tmp_path))
    assert all(np.array_equal(grey[..., channel], NOISE[..., 0]) for channel in range(3))
    alpha = np.dstack([NOISE, np.arange(288).reshape(24, 12).astype(np.uint8)])
    colours = decode(encoded(Image.fromarray(alpha), "PNG"), tmp_path)
    assert np.array_equal(np.asarray(colours), NOISE)


def test_a_palette_gives_its_colours_with_transparency_too(tmp_path: Path) -> None:
    source = Image.fromarray(NOISE).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    for options in ({}, {"transparency": 3}, {"transparency": bytes(range(16))}):
        image = decode(encoded(source, "PNG", **options), tmp_path)
        assert np.array_equal(np.asarray(image), np.asarray(source.convert("RGB")))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        JPEG[:20],
        JPEG[: len(JPEG) // 2],
        JPEG[:-2],
        b"<!DOCTYPE html><html><body>403</body></html>",
        encoded(Image.fromarray(NOISE), "PNG")[:200],
        encoded(Image.fromarray(NOISE), "GIF"),
        encoded(Image.fromarray(NOISE), "TIFF"),
        bytes(1000),
    ],
    ids=["empty", "head", "half", "no-end", "html", "half-png", "gif", "tiff", "zeros"],
)
def test_a_file_that_cannot_be_decoded_is_an_error_that_names_it(
    content: bytes, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        decode(content, tmp_path, "0001_c02s31_000475.jpg")
    assert "0001_c02s31_000475.jpg" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("width", "height"), [(7_100, 7_100), (10_000, 10_000), (20_000, 20_000)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int, tmp_path: Path) -> None:
    content = encoded(Image.new("1", (width, height)), "PNG")
    assert len(content) < 100_000
    with pytest.raises(DataError, match="pixels") as caught:
        decode(content, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_image_and_a_folder_are_errors_that_name_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg: the image is gone"):
        read_image(str(tmp_path / "gone.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DataError, match=r"folder\.jpg: cannot be decoded"):
        read_image(str(tmp_path / "folder.jpg"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP"])
def test_random_damage_is_an_image_or_a_data_error_and_nothing_else(
    kind: str, tmp_path: Path
) -> None:
    whole, rng, refused = encoded(Image.fromarray(NOISE), kind), random.Random(0), 0
    for _ in range(250):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 20)):
            damaged[rng.randrange(min(len(damaged), 300))] = rng.randrange(256)
        try:
            assert decode(bytes(damaged), tmp_path).mode == "RGB"
        except DataError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 50


# --------------------------------------------------------------------- JPEGs


def smooth(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image that JPEG changes little: a few coarse blobs."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def by_pillow(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


JPEG_KINDS = {
    "baseline": ("RGB", {}),
    "progressive": ("RGB", {"progressive": True}),
    "grey": ("L", {}),
    "full colour": ("RGB", {"subsampling": 0, "quality": 95}),
    "halved": ("RGB", {"subsampling": 1, "quality": 40}),
    "own tables": ("RGB", {"optimize": True, "comment": b"by hand", "dpi": (72, 72)}),
    "restarts": ("RGB", {"restart_marker_rows": 1}),
    "not converted": ("RGB", {"keep_rgb": True}),
}


@pytest.mark.parametrize("kind", JPEG_KINDS)
@pytest.mark.parametrize("size", [(128, 64), (37, 21), (8, 8), (1, 1)])
def test_usual_jpegs_do_not_need_pillow_and_have_its_pixels(
    kind: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mode, options = JPEG_KINDS[kind]
    content = encoded(smooth(*size).convert(mode), "JPEG", **options)
    (tmp_path / "image.png").write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)  # Pillow is not used
        pixels = read_pixels(str(tmp_path / "image.png"))
    assert pixels.dtype == torch.uint8 and pixels.shape == (3, *size)
    assert np.abs(pixels.permute(1, 2, 0).numpy() - by_pillow(content)).max() <= 1


def test_unusual_jpegs_have_pillows_pixels_too(tmp_path: Path) -> None:
    cmyk = encoded(smooth(32, 16).convert("CMYK"), "JPEG")
    assert np.array_equal(np.asarray(decode(cmyk, tmp_path)), by_pillow(cmyk))
    trailing = encoded(smooth(32, 16), "JPEG") + b"written by a camera"
    assert np.array_equal(np.asarray(decode(trailing, tmp_path)), by_pillow(trailing))


def test_the_orientation_in_exif_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    content = encoded(smooth(32, 16), "JPEG", exif=exif)
    assert decode(content, tmp_path).size == (16, 32)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_cut_anywhere_is_an_error_and_never_grey(progressive: bool, tmp_path: Path) -> None:
    thumbnail = encoded(smooth(16, 8, seed=1), "JPEG")
    exif = b"Exif\0\0" + thumbnail  # which has an end marker too
    whole = encoded(smooth(64, 32), "JPEG", progressive=progressive, exif=exif)
    assert whole.count(b"\xff\xd9") >= 2
    inner = whole.index(b"\xff\xd9") + 2
    cuts = {*range(0, len(whole), 7), inner, *range(len(whole) - 8, len(whole))}
    for cut in sorted(cuts):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(whole[:cut], tmp_path)
    assert decode(whole, tmp_path).size == (32, 64)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_whose_pixels_end_early_is_an_error_and_never_grey(
    progressive: bool, tmp_path: Path
) -> None:
    whole = encoded(smooth(64, 32), "JPEG", progressive=progressive)
    scan = whole.index(b"\xff\xda") + 14
    for cut in range(scan, len(whole) - 40, 9):
        try:
            found = np.asarray(decode(whole[:cut] + b"\xff\xd9", tmp_path))
        except DataError as error:
            assert "cannot be decoded" in str(error) and "\n" not in str(error)
        else:  # without its last scans a progressive one is less sharp, but not grey
            assert progressive and all(strip.std() > 10 for strip in np.split(found, 4))


def test_a_jpeg_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    content = bytearray(JPEG)
    frame = content.index(b"\xff\xc0")
    content[frame + 5 : frame + 9] = (65_000).to_bytes(2, "big") * 2
    with pytest.raises(DataError, match="pixels"):
        decode(bytes(content), tmp_path)


@pytest.mark.parametrize("length", [0, 1, 7])
def test_a_segment_with_a_wrong_length_does_not_hang(length: int, tmp_path: Path) -> None:
    content = bytearray(JPEG)
    content[4:6] = length.to_bytes(2, "big")
    try:
        assert decode(bytes(content), tmp_path).mode == "RGB"
    except DataError as error:
        assert "\n" not in str(error)


# --------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("source", "target"),
    [((128, 64), (256, 128)), ((300, 140), (256, 128)), ((91, 45), (64, 32)), ((5, 900), (40, 20))],
)
def test_resizing_is_within_one_level_of_pillows(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*source, 3), dtype=np.uint8)
    expected = Image.fromarray(image).resize(target[::-1], Image.Resampling.BILINEAR)
    found = resize(torch.from_numpy(image).permute(2, 0, 1), target)
    assert found.dtype == torch.uint8 and found.shape == (3, *target)
    gap = np.abs(found.permute(1, 2, 0).numpy().astype(int) - np.asarray(expected))
    assert gap.max() <= 1


def test_files_of_any_size_and_kind_are_one_batch(tmp_path: Path) -> None:
    paths = []
    for number, kind in enumerate(["JPEG", "PNG", "BMP", "WEBP"]):
        path = tmp_path / str(number)
        path.write_bytes(encoded(smooth(40 + number, 20 + number), kind))
        paths.append(str(path))
    images = load_images(paths, (32, 16))
    assert images.shape == (4, 32, 16, 3) and images.dtype == torch.uint8
    assert images.is_contiguous()
    for image, path in zip(images, paths, strict=True):
        assert torch.equal(image.permute(2, 0, 1), resize(read_pixels(path), (32, 16)))
    assert load_images([], (32, 16)).shape == (0, 32, 16, 3)
