"""A pool of processes that answer messages: the model goes out once a round through a mapped file, replies come back.

Workers are forked from a server process that has imported everything and done nothing, so that one starts in
milliseconds and no thread or random state is inherited. A client that hangs loses its worker; the others never notice.
"""

from __future__ import annotations

import itertools
import json
import mmap
import multiprocessing
import operator
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic
from typing import Final

from flwr.app import Array, ArrayRecord, Error, Message, RecordDict

from client.memory import keep_freed_memory
from client.mods import guard_mod
from common.errors import FailureCode, RunError
from common.flower import ARRAYS, client_context, failure_reply, prepare_process, stamp
from common.transport.records import decode_records, encode_records
from common.transport.sealed import BLOB
from server.grids.base import FIRST_NODE
from simulations.inline import AppFactory
from simulations.interrupt import check_interrupt
from simulations.logs import begin_worker

_SHARED: Final = (ARRAYS, BLOB)
"""Records of a message that are the same for all clients of a round, and large."""

_LOOK_UP_SECONDS: Final = 1.0
"""How long to wait for replies before looking whether the user wants to stop."""


@dataclass(kw_only=True)
class _Worker:
    process: BaseProcess
    connection: Connection
    ready: bool = False
    message: Message | None = None
    arrays: Path | None = None
    since: float = 0.0


class WorkerPool:
    """Answers messages over worker processes; each works on one client at a time."""

    def __init__(self, factory: AppFactory, workers: int) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["simulations.inline", "simulations.workers"])
        self._factory = factory
        self._broadcast = _Broadcast()
        self._states: dict[int, bytes] = {}
        started = [self._start() for _ in range(workers)]
        self._workers = [_Worker(process=process, connection=connection) for process, connection in started]

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:
        """Replies as they arrive; a client that takes longer than `timeout` wall seconds is ended and replaced."""
        queue = deque(messages)
        for worker in self._workers:
            self._give(worker, queue)
        while busy := [worker for worker in self._workers if worker.message is not None]:
            check_interrupt()
            left = _LOOK_UP_SECONDS
            if timeout is not None:
                left = min(left, max(0.0, min(w.since for w in busy) + timeout - monotonic()))
            ready = set(wait([w.connection for w in busy], left))
            for worker in busy:
                reply = None
                if worker.connection in ready:
                    reply = self._receive(worker)
                elif timeout is not None and monotonic() - worker.since >= timeout:
                    reply = self._replace(worker, FailureCode.DEADLINE_EXCEEDED)
                if reply is not None:
                    worker.message = None
                    self._give(worker, queue)
                    yield reply

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            _end(worker)
        self._workers.clear()
        self._broadcast.close()

    def _start(self) -> tuple[BaseProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self._factory, self._broadcast.folder), daemon=True)
        process.start()
        theirs.close()
        return process, ours

    def _give(self, worker: _Worker, queue: deque[Message]) -> None:
        if not queue:
            return
        if not worker.ready:  # what a worker needs to start is not on its first client's clock
            try:
                worker.connection.recv_bytes()
            except EOFError as e:
                raise RunError("a worker process could not start", hint="its own message stands above") from e
            worker.ready = True
        message = queue.popleft()
        worker.message, worker.since = message, monotonic()
        node = message.metadata.dst_node_id
        shared: dict[str, ArrayRecord] = {}
        rest = RecordDict()
        for key, record in message.content.items():
            if key in _SHARED and isinstance(record, ArrayRecord):
                shared[key] = record
            else:
                rest[key] = record
        worker.arrays = self._broadcast.publish(shared) if shared else None
        self._broadcast.keep({busy.arrays for busy in self._workers if busy.message is not None})
        header = {
            "node": node,
            "id": message.metadata.message_id,
            "type": message.metadata.message_type,
            "broadcast": None if worker.arrays is None else str(worker.arrays),
        }
        with suppress(BrokenPipeError, ConnectionResetError):  # `_receive` finds the worker gone
            worker.connection.send_bytes(json.dumps(header).encode())
            worker.connection.send_bytes(b"".join(encode_records(rest)))
            worker.connection.send_bytes(self._states.get(node, b""))

    def _receive(self, worker: _Worker) -> Message:
        message = _waiting(worker)
        try:
            header = json.loads(worker.connection.recv_bytes())
            content, state = worker.connection.recv_bytes(), worker.connection.recv_bytes()
        except (EOFError, OSError):
            return self._replace(worker, FailureCode.CLIENT_LOST)
        if state:
            self._states[message.metadata.dst_node_id] = state
        if header["error"] is not None:
            return Message(Error(**header["error"]), reply_to=message)
        return Message(decode_records(content), reply_to=message)

    def _replace(self, worker: _Worker, failure: FailureCode) -> Message:
        """End a worker, start another in its place, and answer for its client."""
        message = _waiting(worker)
        _end(worker)
        worker.process, worker.connection = self._start()
        worker.ready = False
        return failure_reply(message, failure)


class _Broadcast:
    """What every message of a round carries, arrays or their ciphertext, in a file that all workers map."""

    def __init__(self) -> None:
        memory = Path("/dev/shm")  # noqa: S108 - a folder of our own is made in it
        self._temporary = tempfile.TemporaryDirectory(prefix="coterie-", dir=memory if memory.is_dir() else None)
        self.folder = Path(self._temporary.name)
        self._numbers = itertools.count(1)
        self._files: list[Path] = []
        self._current: list[Array] = []

    def publish(self, records: Mapping[str, ArrayRecord]) -> Path:
        """A file with these records; written once for the same arrays."""
        arrays = [array for record in records.values() for array in record.values()]
        if len(arrays) != len(self._current) or not all(map(operator.is_, arrays, self._current)) or not self._files:
            path = self.folder / f"{next(self._numbers)}.records"
            with path.open("xb") as file:
                file.writelines(encode_records(RecordDict(dict(records))))
            self._files.append(path)
            self._current = arrays
        return self._files[-1]

    def keep(self, needed: Container[Path | None]) -> None:
        """Remove files but the current one and those that a busy worker may not have opened yet."""
        for path in [path for path in self._files[:-1] if path not in needed]:
            path.unlink()
            self._files.remove(path)

    def close(self) -> None:
        self._temporary.cleanup()


def _waiting(worker: _Worker) -> Message:
    if worker.message is None:
        raise RuntimeError("an idle worker answered")
    return worker.message


def _end(worker: _Worker) -> None:
    worker.process.kill()
    worker.process.join()
    worker.process.close()
    worker.connection.close()


def _end_with_parent(folder: Path) -> None:
    """End when the parent was killed, even while a client hangs; a living parent ends its workers itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _work(connection: Connection, factory: AppFactory, folder: Path) -> None:
    """A worker's life: answer messages until the pool ends it."""
    import torch

    begin_worker()
    watch = threading.Thread(target=_end_with_parent, args=(folder,), daemon=True)
    watch.start()
    torch.set_num_threads(1)
    keep_freed_memory()
    prepare_process()
    app = factory()
    connection.send_bytes(b"ready")
    mapped = ("", RecordDict())
    with suppress(EOFError, OSError):
        while True:
            header = json.loads(connection.recv_bytes())
            content = decode_records(connection.recv_bytes())
            state = connection.recv_bytes()
            path = header["broadcast"]
            if path is not None:
                if path != mapped[0]:
                    mapped = (path, decode_records(_map(path)))
                for key, record in mapped[1].items():
                    content[key] = record
            node = header["node"]
            context = client_context(
                node_id=node, partition=node - FIRST_NODE, state=decode_records(state) if state else None
            )
            message = stamp(Message(content, node, header["type"]), message_id=header["id"])
            reply = guard_mod(message, context, app)
            error = {"code": reply.error.code, "reason": reply.error.reason} if reply.has_error() else None
            connection.send_bytes(json.dumps({"error": error}).encode())
            connection.send_bytes(b"" if error else b"".join(encode_records(reply.content)))
            connection.send_bytes(b"".join(encode_records(context.state)) if context.state else b"")
    watch.join()  # the connection ends with the parent


def _map(path: str) -> memoryview:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
    finally:
        os.close(descriptor)
