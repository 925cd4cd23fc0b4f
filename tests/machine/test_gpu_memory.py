"""The processes that hold GPU memory, and the out-of-memory message."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reidreg.machine.gpu_memory import (
    Holder,
    command_of,
    compute_apps,
    format_shortage,
    parse_compute_apps,
    peak_memory,
)
from reidreg.machine.memory import GIB


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fake nvidia-smi on the PATH, whose script a test writes."""
    script = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return script


def answering(script: Path, text: str) -> None:
    script.write_text(f"#!/bin/sh\n{text}\n")
    script.chmod(0o755)


def test_nvidia_smi_is_asked_for_one_device_by_its_uuid(nvidia_smi: Path, tmp_path: Path) -> None:
    asked = tmp_path / "asked"
    answering(nvidia_smi, f'echo "$@" > {asked}; echo "{os.getpid()}, 9318"; echo "1, 5"')
    held = compute_apps("GPU-123")
    assert [(holder.pid, holder.held) for holder in held] == [
        (os.getpid(), 9318 * 2**20),
        (1, 5 * 2**20),
    ]
    assert asked.read_text().split() == [
        "--id=GPU-123",
        "--query-compute-apps=pid,used_memory",
        "--format=csv,noheader,nounits",
    ]
    assert str(held[0]) == "this run holds 9.1 GiB"


@pytest.mark.parametrize("text", ["exit 9", "echo nonsense", "printf '\\377\\376, x'", ":"])
def test_a_broken_nvidia_smi_raises_nothing(nvidia_smi: Path, text: str) -> None:
    answering(nvidia_smi, text)
    assert compute_apps("GPU-123") == []


def test_a_missing_nvidia_smi_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compute_apps("GPU-123") == []


def test_lines_of_another_form_are_skipped() -> None:
    gone = 2**22 + 1  # above Linux's largest process id
    text = f"pid, used\n{gone}, [N/A]\n\nNo running processes found\n{gone},12\n-3, 4\n{gone}"
    held = parse_compute_apps(text)
    assert held == [Holder(gone, "", size) for size in (None, 12 * 2**20, None)]
    assert str(held[0]) == f"pid {gone} holds memory"


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="this system has no /proc")
def test_a_command_is_shortened_to_its_first_words_without_folders() -> None:
    code = "import time; print(flush=True); time.sleep(60)"
    arguments = [sys.executable, "-c", code, "--key", "secret"]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        shown = command_of(process.pid)
    finally:
        process.kill()
        process.communicate()
    assert shown.startswith(f"{Path(sys.executable).name} -c ") and shown.endswith("...")
    assert "secret" not in shown and len(shown) < 100


def test_the_message_names_need_free_memory_and_holders() -> None:
    held = [Holder(4711, "reidreg fit ...", int(9.1 * GIB)), Holder(12, "", None)]
    line = format_shortage("cuda:0", "a step needs 17.2 GiB", int(1.6 * GIB), int(14.6 * GIB), held)
    assert line == (
        "cuda:0 is out of memory: a step needs 17.2 GiB, 1.6 GiB of 14.6 GiB are free; "
        "pid 4711 reidreg fit ... holds 9.1 GiB, pid 12 holds memory; "
        "add --config overlays/low_memory, or lower --sampler.batch_size or --input.size"
    )


def test_the_message_stays_short_with_many_processes() -> None:
    held = [Holder(pid, "python ...", GIB) for pid in range(1, 40)]
    line = format_shortage("cuda:0", "a step needs 2.0 GiB", 0, GIB, held)
    assert "36 more processes hold memory" in line and len(line) < 400


def test_the_peak_of_a_process_grows_with_its_tensors() -> None:
    device = torch.device("cpu")
    before = peak_memory(device)
    ballast = torch.ones(2**26)  # 256 MiB
    after = peak_memory(device)
    assert before is not None and after is not None
    assert after >= before and after >= ballast.nbytes
