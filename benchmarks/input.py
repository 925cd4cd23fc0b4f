"""How fast training images reach the model, beside the usual way of reid-strong-baseline.

    python benchmarks/input.py                          # 1,024 drawn JPEGs of 128 x 64
    python benchmarks/input.py --images 4096 --repeats 9
    python benchmarks/input.py --size 384 128

From files to normalised, augmented batches at 256 x 128, on one core and without loading processes:
the usual way (Pillow, torchvision's transforms an image at a time, a Python random erasing, a
stack), ours without a cache, and ours with one. All are run in turn in one process; the median
of the CPU seconds counts, so that other work on the machine disturbs little. Below come the stages
of each, in microseconds an image, and what the bytes alone would cost.

The images are drawn.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from reidreg import DATASETS, SAMPLERS, load_plugins, synthesize
from reidreg.config.sections import InputConfig
from reidreg.data.image_cache import open_image_cache
from reidreg.data.images import read_pixels, resize, stack_resized
from reidreg.data.labels import labels_of, training_samples
from reidreg.data.loading import TrainLoader
from reidreg.data.transforms import Augmentation, Normalisation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = 64


def main() -> None:
    options = parse()
    torch.set_num_threads(1)
    load_plugins()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["REIDREG_CACHE"] = folder
        root = Path(folder) / "data"
        synthesize(
            root / "aihub_kaist",
            identities=max(8, options.images // 8),
            cameras=4,
            images_per_camera=4,
        )
        samples = training_samples(DATASETS.build("aihub_kaist", root=str(root)))
        size = (options.size[0], options.size[1])
        compare(samples, size, options.repeats)
        stages([sample.path for sample in samples], size, options.repeats)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Training images: ours beside the usual way.")
    parser.add_argument("--images", type=int, default=1024, help="training images, about")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 128), help="height and width")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


# --------------------------------------------------------------------- the usual way


class RandomErasing:
    """The baseline's, on a normalised tensor, in place."""

    def __call__(self, image: Tensor) -> Tensor:
        if random.uniform(0, 1) >= 0.5:
            return image
        _, height, width = image.shape
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * height * width
            ratio = random.uniform(0.3, 1 / 0.3)
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w < width and h < height:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                for channel in range(3):
                    image[channel, top : top + h, left : left + w] = MEAN[channel]
                return image
        return image


def usual_steps(size: tuple[int, int]) -> dict[str, list[Callable[[object], object]]]:
    return {
        "resize": [transforms.Resize(list(size), interpolation=InterpolationMode.BILINEAR)],
        "flip, pad, crop": [
            transforms.RandomHorizontalFlip(0.5),
            transforms.Pad(10),
            transforms.RandomCrop(list(size)),
        ],
        "to float, normalise": [transforms.ToTensor(), transforms.Normalize(MEAN, STD)],
        "erase": [RandomErasing()],
    }


def usual_way(paths: Sequence[str], size: tuple[int, int]) -> Iterator[Tensor]:
    view = transforms.Compose([step for steps in usual_steps(size).values() for step in steps])
    order = torch.randperm(len(paths)).tolist()
    for start in range(0, len(order) - BATCH + 1, BATCH):
        batch = [view(open_image(paths[i])) for i in order[start : start + BATCH]]
        yield torch.stack(batch)


def open_image(path: str) -> Image.Image:
    return Image.open(path).convert("RGB")


# --------------------------------------------------------------------- the comparison


def compare(samples: list, size: tuple[int, int], repeats: int) -> None:
    augmentation = Augmentation(InputConfig(size=size), Normalisation(MEAN, STD))

    def loader(cache: str) -> TrainLoader:
        sampler = SAMPLERS.build("random", pids=[s.pid for s in samples], batch_size=BATCH, seed=0)
        made = TrainLoader(
            samples,
            labels_of(samples),
            sampler,
            augmentation,
            seed=0,
            device=torch.device("cpu"),
            workers=0,
            cache=cache,
        )
        made.prepare()
        return made

    start = time.process_time()
    loaders = {"not cached": loader("none"), "cached in memory": loader("memory")}
    building = (time.process_time() - start) / len(samples)
    loaders["cached on disk"] = loader("disk")
    epochs = iter(range(1_000_000))
    ways: dict[str, Callable[[], Iterable[object]]] = {
        "usual way": lambda: usual_way([sample.path for sample in samples], size),
        **{
            name: lambda made=made: made.epoch(next(epochs))  # type: ignore[misc]
            for name, made in loaders.items()
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            start = time.process_time()
            images = BATCH * sum(1 for _ in way())
            seconds[name].append((time.process_time() - start) / images)
    usual = statistics.median(seconds["usual way"])
    weight = statistics.mean(os.path.getsize(sample.path) for sample in samples)
    print(f"{len(samples)} JPEGs of {weight / 1000:.1f} KB, {size[0]} x {size[1]}, one core")
    print(f"{'':<18} {'images/s':>9} {'ratio':>6}   runs, images/s")
    for name, runs in seconds.items():
        median = statistics.median(runs)
        shown = " ".join(f"{1 / run:,.0f}" for run in runs)
        print(f"{name:<18} {1 / median:>9,.0f} {usual / median:>6.1f}   {shown}")
    print(f"{'building the cache':<18} {1 / building:>9,.0f}  (once)")


# --------------------------------------------------------------------- stages


def stages(paths: list[str], size: tuple[int, int], repeats: int) -> None:
    """Print what each step takes, measured by itself."""
    some = paths[: 4 * BATCH]
    print(f"\n{'usual way':<34} us/image")
    images = [open_image(path) for path in some]
    show("open, decode (Pillow)", repeats, lambda: [open_image(path) for path in some], some)
    for name, steps in usual_steps(size).items():
        step = transforms.Compose(steps)
        show(name, repeats, lambda step=step, images=images: list(map(step, copies(images))), some)  # type: ignore[misc]
        images = [step(image) for image in images]
    show("stack", repeats, lambda: torch.stack(images[:BATCH]), some[:BATCH])

    print(f"\n{'ours':<34} us/image")
    files = [Path(path).read_bytes() for path in some]
    pixels = [read_pixels(path) for path in some]
    show("read, check, decode", repeats, lambda: [read_pixels(path) for path in some], some)
    show("  of which read", repeats, lambda: [read(path) for path in some], some)
    show(
        "  of which decode",
        repeats,
        lambda: [simplejpeg.decode_jpeg(content, "RGB") for content in files],
        some,
    )
    show("resize", repeats, lambda: [resize(image, size) for image in pixels], some)
    show("resize into a batch", repeats, lambda: stack_resized(pixels, len(some), size), some)
    cache = open_image_cache("memory", paths, size)
    assert cache is not None
    order = np.random.default_rng(0).permutation(len(paths))[:BATCH].tolist()
    show("take from the cache", repeats, lambda: cache.take(order), order)
    batch = cache.take(order).permute(0, 3, 1, 2)
    augmentation = Augmentation(InputConfig(size=size), Normalisation(MEAN, STD))
    views = augmentation.draw(BATCH, (0, 0, 0))
    show("draw views", repeats, lambda: augmentation.draw(BATCH, (0, 0, 0)), order)
    show("flip, crop, normalise, erase", repeats, lambda: augmentation(batch, views), order)
    show("  of which normalise", repeats, lambda: augmentation.normalisation(batch), order)
    show("the same by index", repeats, lambda: augmentation.apply_together(batch, views), order)

    print(f"\n{'floor':<34} us/image")
    floats = torch.empty(BATCH, 3, *size)
    show("write float32", repeats, lambda: floats.fill_(1), order)
    show("copy uint8", repeats, lambda: batch.clone(), order)


def copies(images: list) -> list:
    """Copies of tensors, since erasing works in place; images as they are."""
    return [image.clone() if isinstance(image, Tensor) else image for image in images]


def read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.read()


def show(name: str, repeats: int, work: Callable[[], object], images: Sequence[object]) -> None:
    work()
    runs = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        runs.append(time.process_time() - start)
    print(f"{name:<34} {statistics.median(runs) / len(images) * 1e6:8.1f}")


if __name__ == "__main__":
    main()
