"""Available memory: what the machine and each cgroup leave."""

from __future__ import annotations

from pathlib import Path

import pytest

from reidreg.machine.memory import available_memory

GIB = 2**30


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A system with 8 GiB available, and no limits."""
    write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    write(tmp_path / "proc/self/cgroup", "0::/job/step\n")
    return tmp_path


def group(folder: Path, limit: str, used: int, files: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 1\ninactive_file {files}\n")


def test_without_limits_the_machines_memory_is_available(machine: Path) -> None:
    assert available_memory(machine) == 8 * GIB
    group(machine / "sys/fs/cgroup/job/step", "max", GIB)
    assert available_memory(machine) == 8 * GIB
    (machine / "proc/self/cgroup").unlink()
    assert available_memory(machine) == 8 * GIB


@pytest.mark.parametrize("place", ["", "job", "job/step"])
def test_the_limit_of_every_parent_cgroup_holds(place: str, machine: Path) -> None:
    for folder in ("", "job", "job/step"):
        limit = str(4 * GIB) if folder == place else "max"
        group(machine / "sys/fs/cgroup" / folder, limit, 3 * GIB, files=GIB)
    assert available_memory(machine) == 2 * GIB


def test_a_cgroup_over_its_limit_leaves_nothing(machine: Path) -> None:
    group(machine / "sys/fs/cgroup/job", str(GIB), 2 * GIB)
    assert available_memory(machine) == 0


def test_limits_of_cgroups_v1_hold_too(machine: Path) -> None:
    write(machine / "proc/self/cgroup", "5:cpu:/a\n4:memory:/docker/abc\n0::/\n")
    top = machine / "sys/fs/cgroup/memory"
    for folder, limit in ((top, 2**63 - 4096), (top / "docker/abc", 3 * GIB)):
        write(folder / "memory.limit_in_bytes", f"{limit}\n")
        write(folder / "memory.usage_in_bytes", f"{2 * GIB}\n")
        write(folder / "memory.stat", f"cache 5\ntotal_inactive_file {GIB}\n")
    assert available_memory(machine) == 2 * GIB


def test_without_proc_it_is_estimated_or_unknown(tmp_path: Path) -> None:
    guess = available_memory(tmp_path)
    assert guess is None or guess > 2**26


def test_this_machine_has_memory_available() -> None:
    found = available_memory()
    assert found is None or found > 2**26
