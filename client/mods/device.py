"""One process at a time trains on an accelerator, however many sites share the machine.

Simulated clients share it among themselves (`simulations.pool.device_share`), and with a site they
take turns: it trains when none of them does, however long that takes.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
import torch
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from client.request import parse_query
from client.trainer import resolve_device

log = structlog.get_logger()


def device_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Wait for the accelerator that a run trains on, and keep it for the round; on a CPU pass everything on.

    It belongs outside of the privacy mod: a round that waits has not been paid for yet.
    """
    device = resolve_device(parse_query(message).config.training.device)
    if device.type == "cpu":
        return call_next(message, context)
    with device_lock(device_name(device)):
        return call_next(message, context)


@contextmanager
def device_lock(name: str, folder: Path | None = None, *, shared: bool = False) -> Iterator[None]:
    """Hold the lock of a device; it ends with the process. Others who want it `shared` can hold it too.

    The file lies in the system's temporary folder, where all users of the machine find it. A lock that cannot be opened
    is done without: then two trainings share the device's memory.
    """
    path = (folder or Path(tempfile.gettempdir())) / f"coterie-{name}.lock"
    try:
        try:
            lock = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # another user's: reading is enough
        except FileNotFoundError:
            lock = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as e:
        log.warning("device_not_locked", path=str(path), reason=e.strerror)
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def device_name(device: torch.device) -> str:
    """What tells a device from others, for every process of this machine: an index means another one to each."""
    if device.type == "cuda":
        return f"gpu-{torch.cuda.get_device_properties(device).uuid}"
    return device.type
