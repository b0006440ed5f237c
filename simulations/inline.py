"""A Flower Grid that calls ClientApps on this machine: in this process, or over a pool of worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from client.app import make_client_app
from client.mods import guard_mod
from common.flower import NodeInfo, Run, client_context, prepare_process, stamp
from simulations.byzantine import byzantine_mod
from simulations.interrupt import check_interrupt
from simulations.sealing import SimulatedKeys
from simulations.sites import SimulatedSites

FIRST_NODE = 2
"""Node ids are partition numbers from here on; 1 is the server."""

AppFactory = Callable[[], ClientApp]


class Engine(Protocol):
    """Gets messages answered."""

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:
        """Replies in any order; `timeout` is the wall seconds that each client may take."""

    def close(self) -> None:
        """Let go of processes and files."""


def simulated_app(sites: SimulatedSites, keys: SimulatedKeys | None = None) -> ClientApp:
    """The ClientApp of simulated clients, with their data loaded; some of them lie if the run says so."""
    _ = sites.federation
    mods = [byzantine_mod] if sites.config.simulation.byzantine_clients else []
    return make_client_app(sites, outer=[keys.mod()] if keys else [], mods=mods)


def app_factory(sites: SimulatedSites, keys: SimulatedKeys | None = None) -> AppFactory:
    """A factory that a worker process can be given; with keys, the clients take and send sealed messages only."""
    return partial(simulated_app, sites, keys)


class InProcess:
    """Calls the ClientApp here, one client after the other. Cannot end a client that hangs."""

    def __init__(self, factory: AppFactory) -> None:
        self._app = factory()
        self._states: dict[int, RecordDict] = {}

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:  # noqa: ARG002
        """Replies in the order of the messages."""
        for message in messages:
            check_interrupt()
            node = message.metadata.dst_node_id
            context = client_context(node_id=node, partition=node - FIRST_NODE, state=self._states.get(node))
            yield guard_mod(message, context, self._app)
            if context.state:
                self._states[node] = context.state

    def close(self) -> None:
        """Nothing to let go of."""


class InlineGrid(Grid):
    """Reaches simulated clients by name through an engine on this machine."""

    def __init__(self, engine: Engine, clients: Sequence[str]) -> None:
        prepare_process()
        self._engine = engine
        self._nodes = [NodeInfo(node_id=FIRST_NODE + i, name=name) for i, name in enumerate(clients)]
        self._counter = itertools.count(1)
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive."""
        stamped = [stamp(message, message_id=f"m{next(self._counter)}") for message in messages]
        yield from self._engine.answer(stamped, timeout=timeout)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """All replies."""
        return list(self.stream(messages, timeout=timeout))

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages answered now; the replies are kept until they are pulled."""
        replies = {reply.metadata.reply_to_message_id: reply for reply in self.stream(messages)}
        self._replies.update(replies)
        return list(replies)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to messages that were pushed."""
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all clients."""
        return [node.node_id for node in self._nodes]

    def get_nodes(self) -> Iterable[NodeInfo]:
        """All clients with their names."""
        return self._nodes

    def set_run(self, run: Run) -> None:
        """See `Grid`."""
        self._run = run

    @property
    def run(self) -> Run:
        """See `Grid`."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """See `Grid`."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)
