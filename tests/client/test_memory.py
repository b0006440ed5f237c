"""The allocator of a process that trains."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource
import torch
from client.memory import keep_freed_memory
keep_freed_memory()
torch.set_num_threads(1)
def step():
    for values in [torch.ones(2**18) for _ in range(4)]:
        values += 1
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_buffers_of_a_step_are_kept_for_the_next():
    """Four buffers of a megabyte are 1,024 pages: fifty steps fault in fewer than two steps' worth of them."""
    result = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 2 * 1024
