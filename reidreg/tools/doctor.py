"""`reidreg doctor`: check interpreter, packages, devices, memory, plugins and data."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from reidreg.errors import ReidregError
from reidreg.machine.memory import available_memory, size_in_text

PACKAGES = (
    "reidreg",
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pillow",
    "faiss-cpu",
    "safetensors",
    "jsonargparse",
    "wandb",
)


def examine(configs: list[str]) -> tuple[list[str], bool]:
    """Check interpreter, packages, devices, memory, W&B, plugins, disk, and data.

    Args:
        configs: Configuration files, whose data set is read; may be empty.

    Returns:
        The lines to print, and whether no problem was found.
    """
    lines = [
        f"python        {platform.python_version()} at {sys.executable}",
        f"system        {platform.platform()}",
    ]
    packages, missing = _packages()
    plugins, broken = _plugins()
    data, unreadable = _data(configs) if configs else ([], [])
    lines += [*packages, *_devices(), *_memory(), *_wandb(), *plugins, *_disk(), *data]
    problems = [*missing, *broken, *unreadable]
    lines += [f"problem       {problem}" for problem in problems] or ["all is well"]
    return lines, not problems


def _packages() -> tuple[list[str], list[str]]:
    lines, missing = [], []
    for name in PACKAGES:
        try:
            lines.append(f"{name:<13} {version(name)}")
        except PackageNotFoundError:
            missing.append(f"{name} is not installed: pip install {name}")
    return lines, missing


def _devices() -> list[str]:
    import torch

    from reidreg.machine.devices import choose_device, choose_precision
    from reidreg.machine.gpu_memory import holders

    lines = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        lines.append(
            f"cuda:{index}        {name}, {size_in_text(free)} of {size_in_text(total)} free"
        )
        # This process holds memory too, for having asked; it is freed when the process ends.
        held = holders(torch.device("cuda", index))
        lines += [f"{'':<13} {holder}" for holder in held if holder.pid != os.getpid()]
    if not lines:
        lines.append(f"cuda          none (torch built for CUDA {torch.version.cuda})")
    device = choose_device("auto")
    dtype = str(choose_precision("auto", device)).removeprefix("torch.")
    return [*lines, f"auto          device {device}, precision {dtype}"]


def _memory() -> list[str]:
    available = available_memory()
    known = "an unknown amount" if available is None else size_in_text(available)
    return [f"memory        {known} available to this process"]


def _wandb() -> list[str]:
    from reidreg.logs.wandb import wandb_obstacle

    obstacle = wandb_obstacle()
    return [f"W&B           {obstacle or 'logged in'}"]


def _plugins() -> tuple[list[str], list[str]]:
    from reidreg.parts.interfaces import REGISTRIES
    from reidreg.parts.plugins import broken_plugins, load_plugins

    loaded = load_plugins()
    parts = sum(len(registry) for registry in REGISTRIES.values())
    names = ", ".join(str(plugin) for plugin in loaded if plugin.error is None)
    broken = [f"plugin {plugin} failed to load: {plugin.error}" for plugin in broken_plugins()]
    return [f"plugins       {names or 'none'}: {parts} parts"], broken


def _disk() -> list[str]:
    free = shutil.disk_usage(Path.cwd()).free
    return [f"disk          {size_in_text(free)} free in {Path.cwd()}"]


def _data(configs: list[str]) -> tuple[list[str], list[str]]:
    from reidreg.config.parsing import load_config
    from reidreg.data.statistics import statistics_table
    from reidreg.parts.interfaces import DATASETS

    try:
        config = load_config(*configs)
        dataset = DATASETS.build(config.dataset.name, **config.dataset.options)
        return statistics_table(dataset), []
    except ReidregError as error:
        return [], [str(error)]
