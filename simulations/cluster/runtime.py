"""Flower's simulation runtime over the processes of a cluster.

The runtime's nodes are places in its queue, not clients: it looks through all of its nodes for each message, so that a
node for each of a million clients would never be through. A message says which client it is for. What the runtime has
no setting for, its backend and how many messages it handles at a time, is put in place of its own while a run lasts.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

from flwr.app import ConfigRecord, Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.server.superlink.fleet.vce import vce_api
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.server.superlink.fleet.vce.backend.backend import Backend
from flwr.serverapp import Grid, ServerApp

from common.errors import FailureCode, RunError
from common.flower import failure_reply, prepare_process, stamp
from common.transport.records import decode_records
from server.grids.base import FIRST_NODE, TransportGrid
from simulations.cluster.pool import START_SECONDS, ActorPool
from simulations.states import ClientStates

_ABOUT: Final = "cluster"
"""Record that a message carries beside its own, and a reply: whom it is for, and what that client keeps."""
_NODE, _ID, _TYPE, _TIMEOUT, _STATE = "node", "message-id", "message-type", "timeout", "state"
_CODE, _REASON = "error-code", "error-reason"
_FEWEST_PLACES: Final = 64
"""The runtime hands out one message a node every tenth of a second."""
_POLL_SECONDS: Final = 0.01


def places_for(processes: int) -> int:
    """Nodes that Flower's runtime is given: enough that no process waits for its queue."""
    return max(_FEWEST_PLACES, 2 * processes)


class ClusterBackend(Backend):
    """Answers the runtime's messages over a pool that is there already."""

    def __init__(self, backend_config: Any, *, pool: ActorPool) -> None:
        super().__init__(backend_config)
        self._pool = pool

    def build(self, app_fn: Callable[[], ClientApp]) -> None:
        """Nothing: the pool's processes make their own apps."""

    @property
    def num_workers(self) -> int:
        """Messages that can be answered at a time."""
        return max(1, self._pool.size)

    def is_worker_idle(self) -> bool:
        """The pool waits by itself."""
        return True

    def terminate(self) -> None:
        """End the pool: nobody waits for an answer any more."""
        self._pool.close()

    def process_message(self, message: Message, context: Context) -> tuple[Message, Context]:
        """Have one client answer; the context is the place's own and stays as it is."""
        about = message.content.config_records[_ABOUT]
        timeout = about[_TIMEOUT]
        try:
            answer = self._pool.answer(
                int(str(about[_NODE])),
                str(about[_ID]),
                str(about[_TYPE]),
                RecordDict({key: record for key, record in message.content.items() if key != _ABOUT}),
                bytes(about[_STATE]),  # type: ignore[arg-type]
                float(timeout) if isinstance(timeout, float) and timeout > 0 else None,
            )
        except RunError as e:
            return Message(RecordDict({_ABOUT: ConfigRecord({_CODE: 0, _REASON: str(e)})}), reply_to=message), context
        content = decode_records(answer.content) if answer.error is None else RecordDict()
        told = ConfigRecord({_STATE: answer.state})
        if answer.error is not None:
            told[_CODE], told[_REASON] = answer.error
        content[_ABOUT] = told
        return Message(content, reply_to=message), context


@dataclass(frozen=True, kw_only=True, slots=True)
class _Flying:
    """A message that has not been answered, and the place it was put on."""

    message: Message
    place: int


class ClusterGrid(TransportGrid):
    """Reaches simulated clients by name through Flower's runtime.

    Guarantee: as many messages are in the runtime as it has places, whatever the cohort; replies are passed on as they
    arrive.
    """

    def __init__(
        self,
        inner: Grid,
        names: Sequence[str],
        *,
        places: int,
        states: ClientStates | None = None,
        stopped: Callable[[], bool] = bool,
    ) -> None:
        """Wait for the runtime's nodes.

        Args:
            inner: Flower's own grid.
            names: The clients', in the order of their partitions.
            places: Nodes that the runtime was given.
            states: Where clients' states are kept from round to round; None keeps them as long as the grid.
            stopped: Whether nobody will answer any more: the user has interrupted the run.

        Raises:
            RunError: It does not start.
        """
        super().__init__(names)
        self._inner = inner
        self._states = ClientStates() if states is None else states
        self._stopped = stopped
        self._counter = itertools.count(1)
        self._pause = threading.Event()
        for _ in range(int(START_SECONDS / _POLL_SECONDS)):
            self._places = list(inner.get_node_ids())
            if len(self._places) >= places:  # the runtime adds them while it starts us
                return
            self._pause.wait(_POLL_SECONDS)
        raise RunError("Flower's simulation runtime does not start", hint="see its messages above")

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive; `timeout` is the wall seconds that each client may take."""
        waiting, free, flying = iter(messages), deque(self._places), dict[str, _Flying]()
        while True:
            while free and (message := next(waiting, None)) is not None:
                stamp(message, message_id=f"m{next(self._counter)}")
                place = free.popleft()
                for pushed in self._inner.push_messages([self._carrier(message, place, timeout)]):
                    flying[pushed] = _Flying(message=message, place=place)
            if not flying:
                return
            arrived = list(self._inner.pull_messages(list(flying)))
            for reply in arrived:
                flown = flying.pop(reply.metadata.reply_to_message_id)
                free.append(flown.place)
                yield self._reply(flown.message, reply)
            if self._stopped():
                raise RunError("the run was interrupted", hint="`coterie simulate --resume` goes on with it")
            if not arrived:
                self._pause.wait(_POLL_SECONDS)

    def _carrier(self, message: Message, place: int, timeout: float | None) -> Message:
        about, node = message.metadata, message.metadata.dst_node_id
        told = ConfigRecord(
            {
                _NODE: node,
                _ID: about.message_id,
                _TYPE: about.message_type,
                _TIMEOUT: timeout or 0.0,
                _STATE: self._states.read(node - FIRST_NODE) or b"",
            }
        )
        return Message(RecordDict({**message.content, _ABOUT: told}), place, about.message_type)

    def _reply(self, message: Message, carried: Message) -> Message:
        """What the client answered, to the message that it was asked."""
        if carried.has_error():  # of the runtime itself
            return failure_reply(message, FailureCode.CLIENT_FAILED)
        content = RecordDict(dict(carried.content))
        told = content.config_records[_ABOUT]
        del content[_ABOUT]
        if told.get(_CODE) == 0:
            raise RunError(
                str(told[_REASON]), hint="see `ray status`; `coterie simulate --resume` goes on with the run"
            )
        if state := told.get(_STATE):
            self._states.write(message.metadata.dst_node_id - FIRST_NODE, bytes(state))  # type: ignore[arg-type]
        if _CODE in told:
            return Message(Error(code=int(str(told[_CODE])), reason=str(told[_REASON])), reply_to=message)
        return Message(content, reply_to=message)


def run_over(pool: ActorPool, server_app: ServerApp, *, places: int) -> None:
    """Run a ServerApp in Flower's simulation runtime, its messages answered by the pool.

    Raises:
        RuntimeError: The runtime or the app failed.
    """
    from flwr.simulation import run_simulation

    prepare_process()
    backend = partial(ClusterBackend, pool=pool)  # Flower's own takes dead processes for living ones
    threads = partial(ThreadPoolExecutor, max_workers=max(1, pool.size))  # each waits for one client
    with _replaced(raybackend, "RayBackend", backend), _replaced(vce_api, "ThreadPoolExecutor", threads):
        run_simulation(server_app=server_app, client_app=ClientApp(), num_supernodes=places)


@contextmanager
def _replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """Give a module's name another meaning while the block runs."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)
