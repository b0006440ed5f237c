"""A Flower Grid that calls ClientApps on this machine: in this process, or over a pool of worker processes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Protocol

from flwr.app import Message
from flwr.clientapp import ClientApp

from client.app import make_client_app
from client.mods import guard_mod
from common.flower import client_context, stamp
from common.transport.records import decode_records, encode_records
from server.grids.base import FIRST_NODE, TransportGrid
from simulations.byzantine import byzantine_mod
from simulations.interrupt import check_interrupt
from simulations.sealing import SimulatedKeys
from simulations.sites import SimulatedSites
from simulations.states import ClientStates

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
    """Calls the ClientApp here, one client after the other. Cannot end a client that hangs.

    Args:
        factory: Makes the ClientApp.
        states: Where clients' states are kept from round to round; None keeps them until `close`.
    """

    def __init__(self, factory: AppFactory, states: ClientStates | None = None) -> None:
        self._app = factory()
        self._states = ClientStates() if states is None else states
        self._own = states is None

    def answer(self, messages: Sequence[Message], *, timeout: float | None) -> Iterator[Message]:  # noqa: ARG002
        """Replies in the order of the messages."""
        for message in messages:
            check_interrupt()
            node = message.metadata.dst_node_id
            partition = node - FIRST_NODE
            kept = self._states.read(partition)
            state = None if kept is None else decode_records(kept)
            context = client_context(node_id=node, partition=partition, state=state)
            reply = guard_mod(message, context, self._app)
            if context.state:
                self._states.write(partition, b"".join(encode_records(context.state)))
            yield reply

    def close(self) -> None:
        """Let go of states that nobody else keeps."""
        if self._own:
            self._states.close()


class InlineGrid(TransportGrid):
    """Reaches simulated clients by name through an engine on this machine."""

    def __init__(self, engine: Engine, clients: Sequence[str]) -> None:
        super().__init__(clients)
        self._engine = engine
        self._counter = itertools.count(1)

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive."""
        stamped = [stamp(message, message_id=f"m{next(self._counter)}") for message in messages]
        yield from self._engine.answer(stamped, timeout=timeout)
