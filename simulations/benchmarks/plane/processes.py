"""Processes that a benchmark starts, talks to over pipes, and ends."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog


@contextmanager
def module(name: str, *words: object, package: str = "plane") -> Iterator[subprocess.Popen[str]]:
    """`python -m simulations.benchmarks.PACKAGE.NAME WORDS`, gone when the block ends."""
    command = [sys.executable, "-m", f"simulations.benchmarks.{package}.{name}", *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # noqa: S603
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def line(process: subprocess.Popen[str]) -> str:
    """The next line that a process prints.

    Raises:
        RuntimeError: It ended; its errors are on stderr.
    """
    text = process.stdout.readline() if process.stdout else ""
    if not text:
        raise RuntimeError(f"{process.args!r} ended without an answer")
    return text.strip()


def tell(process: subprocess.Popen[str], text: str = "") -> None:
    """Send a line to a process."""
    if process.stdin:
        process.stdin.write(f"{text}\n")
        process.stdin.flush()


def log_errors_only() -> None:
    """On stderr: stdout is for answers, and whoever waits for none would let the pipe fill up."""
    level = structlog.make_filtering_bound_logger(logging.ERROR)
    structlog.configure(wrapper_class=level, logger_factory=structlog.PrintLoggerFactory(sys.stderr))


def peak_bytes() -> int:
    """The most memory that this process has had (VmHWM)."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The memory that this process has now (VmRSS)."""
    return _status("VmRSS")


def _status(key: str) -> int:
    for row in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if row.startswith(f"{key}:"):
            return int(row.split()[1]) << 10
    raise RuntimeError(f"this system does not tell {key}")
