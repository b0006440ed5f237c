"""A worker process: answers messages with a ClientApp until its pool ends it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, Final

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from client.memory import keep_freed_memory
from client.mods import guard_mod
from common.errors import FailureCode
from common.flower import client_context, prepare_process, stamp
from common.transport.records import decode_records, encode_records
from server.grids.base import FIRST_NODE
from simulations.inline import AppFactory
from simulations.logs import begin_worker
from simulations.pool.device_share import Turns, device_turns
from simulations.pool.mailbox import Writer, remove

_SACRIFICE: Final = "1000"
"""Where memory runs out, Linux ends a worker, whose client is then one failure, and not the coordinator."""

_IMPORTED: Final = ["simulations.cohort", "simulations.pool.pool"]
"""What every worker finds imported."""


def begin_importing() -> ForkServerContext:
    """Start the server that workers are forked from, and say what makes them.

    It imports for seconds, while the caller can load its data. A Ctrl-C is meant for this process: the server would
    print where it was importing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context


def work(connection: Connection, factory: AppFactory, folders: Sequence[Path], *, device: str, workers: int) -> None:
    """A worker's life.

    Args:
        connection: To the pool. A message is three parts: a header (JSON), records, and the client's state; so is a
            reply, and before the first message the worker says that it is ready.
        factory: Makes the ClientApp.
        folders: The pool's mailbox, which the worker removes if its pool was killed.
        device: What clients train on, as `training.device` names it.
        workers: How many workers the pool has.
    """
    import torch

    begin_worker()
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_SACRIFICE)
    watch = threading.Thread(target=_end_with_parent, args=(folders,), daemon=True)
    watch.start()
    torch.set_num_threads(1)
    keep_freed_memory()
    prepare_process()
    clients = _Clients(factory(), device_turns(device, folders[0], workers=workers))
    connection.send_bytes(b"ready")
    with suppress(EOFError, OSError):
        while True:
            header = json.loads(connection.recv_bytes())
            content, state = connection.recv_bytes(), connection.recv_bytes()
            for part in clients.answer(header, content, state):
                connection.send_bytes(part)
    watch.join()  # the connection ends with the parent


class _Clients:
    """The clients that this process is, one after the other."""

    def __init__(self, app: ClientApp, turns: Turns | None) -> None:
        self._app, self._turns = app, turns
        self._writer = Writer()

    def answer(self, header: dict[str, Any], content: bytes, state: bytes) -> tuple[bytes, bytes, bytes]:
        """The three parts of a reply; whatever fails, for want of memory too, is a failed client."""
        begin = perf_counter()
        told: dict[str, Any] = {"error": None, "size": None}
        records, kept = b"", b""
        try:
            context = client_context(
                node_id=header["node"],
                partition=header["node"] - FIRST_NODE,
                state=decode_records(state) if state else None,
            )
            reply = self._called(header, decode_records(content), context)
            if reply.has_error():
                told["error"] = {"code": reply.error.code, "reason": reply.error.reason}
            else:
                parts = encode_records(reply.content)
                told["size"] = self._writer.write(header["slot"], parts)
                records = b"" if told["size"] else b"".join(parts)
            kept = b"".join(encode_records(context.state)) if context.state else b""
        except Exception:  # noqa: BLE001 - the boundary: nothing may pass
            records, kept = b"", b""
            told["error"] = {"code": int(FailureCode.CLIENT_FAILED), "reason": FailureCode.CLIENT_FAILED.sentence}
            told["size"] = None
        told["seconds"], told["cpu_seconds"] = perf_counter() - begin, process_time()
        return json.dumps(told).encode(), records, kept

    def _called(self, header: dict[str, Any], records: RecordDict, context: Context) -> Message:
        """What the ClientApp answers; only training takes a turn on the device."""
        if header["published"] is not None:
            for key, record in self._writer.published(header["published"]).items():
                records[key] = record
        message = stamp(Message(records, header["node"], header["type"]), message_id=header["id"])
        trains = self._turns is not None and header["type"].startswith("train")
        with self._turns.turn() if self._turns is not None and trains else nullcontext():
            return guard_mod(message, context, self._app)


def _end_with_parent(folders: Sequence[Path]) -> None:
    """End when the parent was killed, even while a client hangs; a living parent ends its workers itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        remove(folders)
        os._exit(1)
