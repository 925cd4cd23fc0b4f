"""Drawn data and small configurations that the tests share."""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Before anything imports torch or wandb: small work runs fastest on one thread, also side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["WANDB_MODE"] = "disabled"

from reidreg import synthesize
from reidreg.cli.main import main
from reidreg.logs.console import logger

Command = Callable[..., subprocess.CompletedProcess[str]]

# The rooms of `reidreg` by level: each imports from its own level or below.
LEVELS = {
    **dict.fromkeys(["errors", "values"], 1),
    **dict.fromkeys(["files", "machine", "parts"], 2),
    **dict.fromkeys(["config", "distributed", "retrieval", "synthesis"], 3),
    "logs": 4,
    "data": 5,
    **dict.fromkeys(["model", "tools"], 6),
    "evaluation": 7,
    **dict.fromkeys(["index", "report", "training"], 8),
    "cli": 9,
}

# Half a million parameters; a ResNet-18 has eleven million, and a test would wait for its files.
SMALL_BACKBONE = {
    "backbone.name": "timm",
    "backbone.model": "test_resnet",
    "backbone.pretrained": "none",
}


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where runs keep decoded images: no test writes to the home folder."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REIDREG_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def aihub_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny drawn data set in the layout of AIHub KAIST, below a `data` folder."""
    root = tmp_path_factory.mktemp("drawn") / "data"
    synthesize(root / "aihub_kaist", identities=24, cameras=4, images_per_camera=2, seed=1)
    return root


@pytest.fixture(scope="session")
def market_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny drawn data set in the layout of Market-1501."""
    root = tmp_path_factory.mktemp("drawn_market") / "Market-1501-v15.09.15"
    synthesize(root, layout="market1501", identities=16, cameras=3, images_per_camera=2, seed=2)
    return root


@pytest.fixture(params=["pretended", pytest.param("real", marks=pytest.mark.gpu)])
def cuda(request: pytest.FixtureRequest) -> Iterator[str]:
    """A CUDA device: one that is pretended, and where tests marked `gpu` run a real one, too."""
    if request.param == "real":
        yield "cuda"
        return
    from pretended import pretended_cuda

    with pretended_cuda():
        yield "cuda"


@pytest.fixture
def tiny(aihub_root: Path, tmp_path: Path) -> dict[str, Any]:
    """What makes `configs/aihub_kaist.yaml` a matter of seconds."""
    return {
        "dataset.root": str(aihub_root),
        "input.size": [64, 32],
        "input.padding": 3,
        "sampler.batch_size": 8,
        "sampler.instances": 2,
        **SMALL_BACKBONE,
        "schedule.warmup_epochs": 1,
        "schedule.milestones": [2],
        "train.epochs": 1,
        "train.log_every": 2,
        "train.workers": 0,
        "train.precision": "fp32",
        "wandb.mode": "disabled",
        "output_dir": str(tmp_path / "run"),
    }


def small_run(aihub_root: Path, output: Path) -> dict[str, Any]:
    """Layers on `configs/aihub_kaist.yaml` that make one epoch a matter of a second."""
    return {
        "dataset.root": str(aihub_root),
        "input.size": [64, 32],
        "sampler": {"batch_size": 8, "instances": 2},
        **SMALL_BACKBONE,
        "train": {"epochs": 1, "workers": 0, "precision": "fp32"},
        "wandb.mode": "disabled",
        "output_dir": str(output),
    }


def as_flags(values: dict[str, Any]) -> list[str]:
    """Dotted keys and values as command-line flags."""
    return [f"--{key}={value}" for key, value in values.items()]


@pytest.fixture
def reidreg(tmp_path: Path) -> Command:
    """Runs the command line as a user does: in a process of its own, in an empty folder."""

    def run(*arguments: str, timeout: float = 120, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "reidreg", *arguments],
            cwd=tmp_path,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    return run


def run_here(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line in this process, which saves the imports of a new one."""
    handlers, level = list(logger.handlers), logger.level
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*arguments])
    finally:
        logger.handlers[:] = handlers
        logger.setLevel(level)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture
def reidreg_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """As `reidreg`, but in this process."""
    monkeypatch.chdir(tmp_path)
    return run_here
