"""Reading and writing files without holding up the plane's loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any, TypeVar

from grpc import aio

from common.transport.wire import FRAME_BYTES, Refusal
from server.plane.refusals import RefusedCallError

T = TypeVar("T")


Signature = tuple[int, int, int]


def signature(path: Path) -> Signature | None:
    """What changes when a file is replaced or written; None where there is none."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_ino, facts.st_size


class Files:
    """Runs what blocks in threads of its own."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call in a thread. If the caller is cancelled meanwhile, the call ends by itself, unseen."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def later(self, work: Callable[[], None]) -> None:
        """Call in a thread some time."""
        self._threads.submit(work)

    async def send(self, context: aio.ServicerContext[Any, Any], path: Path, *, size: int, offset: int) -> None:
        """Send a file in frames, from `offset` on.

        Raises:
            RefusedCallError: `unknown-blob`: it was removed meanwhile.
        """
        while offset < size:
            try:
                frame = await self.run(_read, path, offset, min(FRAME_BYTES, size - offset))
            except FileNotFoundError:
                raise RefusedCallError(Refusal.UNKNOWN_BLOB) from None
            if not frame:
                raise RefusedCallError(Refusal.FAILED)  # shorter than it was
            await context.write(frame)
            offset += len(frame)


def _read(path: Path, at: int, size: int) -> bytes:
    """Opened anew for each frame, so that a call that is cancelled within a read leaves no file open."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.pread(descriptor, size, at)
    finally:
        os.close(descriptor)
