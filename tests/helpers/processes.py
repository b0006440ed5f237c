"""Real processes that run the command line, and ways to wait for what they do."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from common.cli import main

PATIENCE_SECONDS = 240.0
"""Far more than anything here takes; a bound on waiting, never a measure."""


def wait_until(condition: Callable[[], object], *, process: subprocess.Popen[str] | None = None) -> None:
    """Return once `condition` holds.

    Raises:
        AssertionError: It did not come true, or the process that was to bring it about ended before.
    """
    end, pause = time.monotonic() + PATIENCE_SECONDS, threading.Event()
    while not condition():
        if process is not None and process.poll() is not None and not condition():
            output = process.communicate()
            raise AssertionError(f"the process ended with {process.returncode}: {output}")
        if time.monotonic() > end:
            raise AssertionError("it never came true")
        pause.wait(0.02)  # leaves the processor to those who are waited for


@contextmanager
def started(arguments: Sequence[str], *, folder: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`coterie ARGUMENTS` as a process group of its own, as a terminal starts it; gone when the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "common.cli", *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _living() -> Iterator[tuple[int, int, int]]:
    """Process, parent and group of all that lives; a process that is only waiting to be reaped does not."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                state, parent, group, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if state not in {"Z", "X"}:
                yield int(entry.name), int(parent), int(group)


def members(process_group: int) -> set[int]:
    """Living processes of a group."""
    return {process for process, _, group in _living() if group == process_group}


def children(process: int | None = None) -> set[int]:
    """Living descendants of a process, by default of this one."""
    parents = {child: parent for child, parent, _ in _living()}
    found: set[int] = set()
    wanted = {process or os.getpid()}
    while wanted:
        wanted = {child for child, parent in parents.items() if parent in wanted} - found
        found |= wanted
    return found


def coterie(*arguments: str | Path) -> int:
    """The command line in this process; its exit code."""
    try:
        main([str(argument) for argument in arguments])
    except SystemExit as e:
        return int(e.code or 0)
    return 0
