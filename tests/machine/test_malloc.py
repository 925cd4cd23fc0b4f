"""Which commands keep freed memory in the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="another C library is left as it is"
)

# Blocks of the size of activations, allocated and freed as in a training step.
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
    """The pages that three blocks fault in after a command, once three such blocks were freed."""
    code = COUNT.format(arguments=arguments, given=given, mib=mib)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(ran.stdout.rsplit("pages", 1)[1])


@pytest.mark.parametrize("command", ["fit", "evaluate", "extract"])
def test_commands_that_run_a_model_keep_freed_memory(command: str) -> None:
    assert pages([command, "--help"]) < 100


def test_large_blocks_go_back_when_freed() -> None:
    assert pages(["fit", "--help"], mib=300) > 10_000


def test_other_commands_and_callers_are_left_as_they_are() -> None:
    # 40 MiB: glibc by itself starts to keep smaller blocks that are freed repeatedly.
    assert pages(["plugins", "--help"], mib=40) > 10_000
    assert pages([], given="['fit', '--help']", mib=40) > 10_000
