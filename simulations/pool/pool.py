"""A pool of processes that answer messages, longest first; models and updates travel through files in memory.

Workers are forked from a server process that has imported everything and done nothing, so that one starts in
milliseconds and no thread or random state is inherited. A client that hangs, or is killed by the system because memory
ran out, loses its worker; the others never notice.
"""

from __future__ import annotations

import json
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from time import monotonic, process_time
from typing import Any, Final

import structlog
from flwr.app import ArrayRecord, Error, Message, RecordDict

from common.errors import FailureCode, RunError
from common.flower import ARRAYS, failure_reply
from common.transport.records import decode_records, encode_records
from common.transport.sealed import BLOB
from server.grids.base import FIRST_NODE
from simulations.inline import AppFactory
from simulations.interrupt import check_interrupt
from simulations.pool.longest_first import LongestFirst, SizeOf
from simulations.pool.mailbox import Mailbox
from simulations.pool.worker import begin_importing, work
from simulations.states import ClientStates

log = structlog.get_logger()

_SHARED: Final = (ARRAYS, BLOB)
"""Records of a message that are the same for all clients of a round, and large."""

_LOOK_UP_SECONDS: Final = 1.0
"""How long to wait for replies before looking whether the user wants to stop."""

_EXIT_SECONDS: Final = 1.0
"""How long a process that has let go of its connection may take to end."""


@dataclass(kw_only=True)
class _Worker:
    """One process.

    Attributes:
        ready: It has loaded what it needs, and can be given a message.
        message: What it works on.
        wanted: Whether anybody still waits for the reply to `message`.
        published: The file that `message` goes with.
        slot: The file that it may write its reply into.
        since: When it was given `message`.
        cpu_seconds: What it has used until its last reply.
    """

    process: BaseProcess
    connection: Connection
    ready: bool = False
    message: Message | None = None
    wanted: bool = False
    published: Path | None = None
    slot: Path | None = None
    since: float = 0.0
    cpu_seconds: float = 0.0


class WorkerPool:
    """Answers messages over worker processes; each works on one message at a time.

    Guarantee: replies do not depend on the number of workers, nor on which of them answers. A client whose worker ends
    is one failed reply (`CLIENT_LOST`; of a chunk's members, all), is not tried a second time in the round, and its
    worker is replaced, however often that happens. A worker that cannot be replaced is missing until the next round
    tries again; without any worker the run ends with an error.
    """

    def __init__(
        self,
        factory: AppFactory,
        workers: int,
        *,
        states: ClientStates | None = None,
        examples: SizeOf | None = None,
        device: str = "cpu",
    ) -> None:
        """Start the processes.

        Args:
            factory: Makes the ClientApp, in each of them.
            workers: How many.
            states: What clients keep between rounds; None keeps it as long as the pool.
            examples: How many training examples a client has.
            device: What clients train on; of a GPU several have a share at a time, as many as its memory is enough for.
        """
        self._context = begin_importing()
        self._factory, self._size, self._device = factory, workers, device
        self._mailbox = Mailbox()
        self._own_states = ClientStates() if states is None else None
        self._states = states or self._own_states or ClientStates()
        self._order = LongestFirst(examples)
        self._ended_cpu_seconds = 0.0
        self._workers: list[_Worker] = []
        try:
            self._fill()
        except BaseException:
            self.close()
            raise

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:
        """Replies as they arrive; a client that takes longer than `timeout` wall seconds is ended and replaced.

        Replies that nobody has taken when the caller stops asking are dropped.

        Raises:
            RunError: There is no worker, and none can be started.
        """
        self._fill()
        queue = self._order.arrange(messages, workers=self._size)
        try:
            self._give(queue)
            while queue or any(worker.wanted for worker in self._workers):
                check_interrupt()
                watched = [w for w in self._workers if w.message is not None or (queue and not w.ready)]
                ready = set(wait([worker.connection for worker in watched], self._patience(timeout)))
                for worker in watched:
                    reply = None
                    if worker.connection in ready:
                        reply = self._receive(worker)
                    elif timeout is not None and worker.message is not None and monotonic() - worker.since >= timeout:
                        reply = self._replace(worker, FailureCode.DEADLINE_EXCEEDED)
                    self._give(queue)
                    if reply is not None:
                        yield reply
        finally:
            for worker in self._workers:
                worker.wanted = False

    def cpu_seconds(self) -> float:
        """CPU seconds that this process and all workers have used, until each worker's last reply."""
        return process_time() + self._ended_cpu_seconds + sum(worker.cpu_seconds for worker in self._workers)

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            _end(worker)
        self._workers.clear()
        self._mailbox.close()
        if self._own_states is not None:
            self._own_states.close()

    def _fill(self) -> None:
        """Start what is missing."""
        while len(self._workers) < self._size:
            try:
                self._workers.append(self._start())
            except (OSError, EOFError) as e:
                self._missing(str(e))
                return

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(
            target=work,
            args=(theirs, self._factory, self._mailbox.folders),
            kwargs={"device": self._device, "workers": self._size},
            daemon=True,
        )
        process.start()
        theirs.close()
        return _Worker(process=process, connection=ours)

    def _missing(self, reason: str) -> None:
        """Go on with the workers that there are, if there are any."""
        if not self._workers:
            raise RunError(
                f"a worker process could not start: {reason}",
                hint="its own message stands above; where memory ran out, take fewer --workers or a smaller data set",
            )
        log.warning("worker_missing", reason=reason, workers=len(self._workers))

    def _patience(self, timeout: float | None) -> float:
        """Seconds until something has to be looked at."""
        since = [worker.since for worker in self._workers if worker.message is not None]
        if timeout is None or not since:
            return _LOOK_UP_SECONDS
        return min(_LOOK_UP_SECONDS, max(0.0, min(since) + timeout - monotonic()))

    def _give(self, queue: deque[Message]) -> None:
        """Give the next messages to those who have none."""
        for worker in self._workers:
            if queue and worker.ready and worker.message is None:
                self._send(worker, queue.popleft())

    def _send(self, worker: _Worker, message: Message) -> None:
        worker.message, worker.wanted, worker.since = message, True, monotonic()
        shared: dict[str, ArrayRecord] = {}
        rest = RecordDict()
        for key, record in message.content.items():
            if key in _SHARED and isinstance(record, ArrayRecord):
                shared[key] = record
            else:
                rest[key] = record
        worker.published = self._mailbox.publish(shared) if shared else None
        worker.slot = self._mailbox.slot()
        self._mailbox.keep({busy.published for busy in self._workers if busy.message is not None})
        node = message.metadata.dst_node_id
        header = {
            "node": node,
            "id": message.metadata.message_id,
            "type": message.metadata.message_type,
            "published": None if worker.published is None else str(worker.published),
            "slot": str(worker.slot),
        }
        with suppress(BrokenPipeError, ConnectionResetError):  # `_receive` finds the worker gone
            worker.connection.send_bytes(json.dumps(header).encode())
            worker.connection.send_bytes(b"".join(encode_records(rest)))
            worker.connection.send_bytes(self._states.read(node - FIRST_NODE) or b"")

    def _receive(self, worker: _Worker) -> Message | None:
        """What a worker has to say: that it is ready, or a reply, which is None where nobody wants it any more."""
        try:
            header = worker.connection.recv_bytes()
            if not worker.ready:
                worker.ready = True
                return None
            content, state = worker.connection.recv_bytes(), worker.connection.recv_bytes()
        except (EOFError, OSError):
            return self._replace(worker, FailureCode.CLIENT_LOST)
        return self._reply(worker, json.loads(header), content, state)

    def _reply(self, worker: _Worker, header: dict[str, Any], content: bytes, state: bytes) -> Message | None:
        message, wanted = worker.message, worker.wanted
        if message is None or worker.slot is None:
            raise RuntimeError("an idle worker answered")
        slot, size = worker.slot, header["size"]
        worker.message, worker.wanted, worker.slot = None, False, None
        worker.cpu_seconds = header["cpu_seconds"]
        if size is None or not wanted:
            self._mailbox.take_back(slot)
        if not wanted:
            return None
        if state:
            self._states.write(message.metadata.dst_node_id - FIRST_NODE, state)
        if header["error"] is not None:
            return Message(Error(**header["error"]), reply_to=message)
        self._order.took(message, header["seconds"])
        records = decode_records(content) if size is None else self._mailbox.read(slot, size)
        return Message(records, reply_to=message)

    def _replace(self, worker: _Worker, failure: FailureCode) -> Message | None:
        """End a worker, start another in its place, and answer for its client if anybody waits for it."""
        message, wanted, was_ready = worker.message, worker.wanted, worker.ready
        how = _end(worker)
        if worker.slot is not None:
            self._mailbox.take_back(worker.slot)
        self._ended_cpu_seconds += worker.cpu_seconds
        self._workers.remove(worker)
        if not was_ready:
            self._missing(how)
        else:
            if failure is FailureCode.CLIENT_LOST:
                log.warning("worker_lost", how=how)
            self._fill()
        return failure_reply(message, failure) if message is not None and wanted else None


def _end(worker: _Worker) -> str:
    """End a process; how it ended, which is its own doing where it had let go of its connection."""
    if worker.connection.closed or worker.connection.poll():
        worker.process.join(_EXIT_SECONDS)
    worker.process.kill()
    worker.process.join()
    code = worker.process.exitcode
    worker.process.close()
    worker.connection.close()
    if code is None or code >= 0:
        return f"it ended with code {code}"
    name = signal.Signals(-code).name
    return f"{name}, as the system ends a process where memory runs out" if -code == signal.SIGKILL else name
