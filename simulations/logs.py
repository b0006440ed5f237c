"""Where the processes of a simulation log: stderr, and only what went wrong. Results alone go to stdout."""

from __future__ import annotations

import logging
import signal
import sys

import structlog


def log_to_stderr(*, quiet: bool) -> None:
    """Show warnings, or where the user wants none only errors."""
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR if quiet else logging.WARNING),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # the stderr of the moment, not of this one
    )


def begin_worker() -> None:
    """What every worker process does first: Ctrl-C reaches all processes of a terminal, and only the parent decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log_to_stderr(quiet=True)
