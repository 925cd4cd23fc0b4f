"""What the process of a command keeps of the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library is left as it is"
)

# Blocks as large as activations, taken and freed as the layers of a step do.
COUNT = """
import resource, sys
from reidreg.cli.main import main

def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [b"x" * ({mib} * 2**20) for _ in range(3)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

sys.argv[1:] = {arguments}
main({given})
new_pages()
print("pages", new_pages())
"""


def pages(arguments: list[str], given: str = "", mib: int = 24) -> int:
    """How many pages three blocks take from the kernel after a command, once three were freed."""
    code = COUNT.format(arguments=arguments, given=given, mib=mib)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(ran.stdout.rsplit("pages", 1)[1])


@pytest.mark.parametrize("command", ["fit", "evaluate", "extract"])
def test_a_process_that_runs_a_model_keeps_them(command: str) -> None:
    assert pages([command, "--help"]) < 100


def test_large_tables_go_back_as_they_are_freed() -> None:
    assert pages(["fit", "--help"], mib=300) > 10_000


def test_the_process_of_others_is_left_as_it_is() -> None:
    # 40 MiB: of less, the C library itself begins to keep what is freed again and again.
    assert pages(["plugins", "--help"], mib=40) > 10_000
    assert pages([], given="['fit', '--help']", mib=40) > 10_000
