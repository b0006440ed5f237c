"""Faults in the log: what kind and where, without values or texts, which could quote a key or an update."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import structlog

log = structlog.get_logger()


def log_fault(event: str, error: BaseException, **facts: Any) -> None:
    """Log an exception that nobody expected."""
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    log.error(event, error=type(error).__name__, where=where, **facts)
