"""Folders that one process at a time writes to."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from reidreg.errors import ConfigError
from reidreg.files import exclusive


def test_who_holds_a_folder_is_named_by_pid_and_machine(tmp_path: Path) -> None:
    holder = f"in use by process {os.getpid()} on {socket.gethostname()}; try another"
    with exclusive(tmp_path, "output_dir", "try another"):
        with pytest.raises(ConfigError, match=f"^output_dir: {tmp_path} is {holder}$"):
            with exclusive(tmp_path, "output_dir", "try another"):
                raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_an_unreadable_name_of_the_holder_is_left_out(tmp_path: Path) -> None:
    with exclusive(tmp_path, "index", ""):
        (tmp_path / ".lock.holder").unlink()
        with pytest.raises(ConfigError, match="in use by another process"):
            with exclusive(tmp_path, "index", ""):
                raise AssertionError


def test_a_killed_process_holds_no_folder(tmp_path: Path) -> None:
    code = f"""
import pathlib, time
from reidreg.files import exclusive
with exclusive(pathlib.Path({str(tmp_path)!r}), "index", ""):
    print("held", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match=f"process {process.pid} on"):
        with exclusive(tmp_path, "index", ""):
            raise AssertionError
    process.kill()
    process.communicate()
    with exclusive(tmp_path, "index", ""):
        pass


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_locked_is_an_error_of_one_line(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be locked"):
        with exclusive(tmp_path, "index", ""):
            raise AssertionError
