"""A cohort trained in chunks: the members of a chunk as one computation, the cohort as one folded reply.

What one client at a time costs beside its training (a message, records, a reply that is checked and folded) is paid
once a chunk. What each client is owed stays: its own data, noise source and ledger, written ahead of the first noisy
step, and a failure of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from time import process_time
from typing import Any, Final

import numpy as np
import structlog
from flwr.app import Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray
from torch import nn

from client.mods import guard_mod
from common.flower import (
    ROUND,
    TRAIN_LOSS,
    WEIGHT,
    arrays_of,
    config_of,
    metrics_of,
    stamp,
)
from common.models import parameter_count
from common.schema import Federation
from server.grids.broadcast import Broadcast, Fate
from server.grids.mean_reply import one_reply
from server.grids.spooling import Shelf
from simulations.batching import Choice, Probe
from simulations.chunks import COHORT_TYPE, ChunkTrainer, chunk_message, fates
from simulations.inline import AppFactory, Engine, InlineGrid, simulated_app
from simulations.sites import SimulatedSites
from simulations.stacking import chunk_size

log = structlog.get_logger()

_LOOKED_AT: Final = 16
"""Clients whose sizes say what a client of mean size is."""


def cohort_app(sites: SimulatedSites) -> ClientApp:
    """The ClientApp of simulated clients, which also takes whole chunks of them."""
    app = simulated_app(sites)
    app.train(COHORT_TYPE.partition(".")[2], mods=[guard_mod])(ChunkTrainer(sites))
    return app


def cohort_factory(sites: SimulatedSites) -> AppFactory:
    """A factory that a worker process can be given."""
    return partial(cohort_app, sites)


def cohort_grid(engine: Engine, sites: SimulatedSites, model: nn.Module, choice: Choice) -> CohortGrid:
    """A grid over clients that an engine made of `cohort_factory`, trained as `choice` says.

    Args:
        engine: Calls the clients.
        sites: Theirs.
        model: The run's, for its size.
        choice: How each round is trained.
    """
    size = 1 if choice.stacked is False else chunk_size(parameter_count(model), _mean_examples(sites.federation))
    return CohortGrid(engine, sites, members=size, choice=choice)


class CohortGrid(InlineGrid):
    """Reaches simulated clients one by one, or in chunks whose members train stacked; see `server.grids.broadcast`.

    Guarantee: chunks depend on the cohort and on `members` alone, and their sums are added in the cohort's order, in
    float64: the result is the same to the bit for any number of workers.
    """

    def __init__(self, engine: Engine, sites: SimulatedSites, *, members: int, choice: Choice) -> None:
        """Prepare.

        Args:
            engine: Calls the clients.
            sites: Theirs.
            members: Most clients of a chunk.
            choice: How each round is trained.
        """
        super().__init__(engine, sites.federation.names)
        self._sites = sites
        self._members = members
        self._choice = choice
        self._probed: _Probed | None = None

    def fold(
        self,
        messages: Broadcast,
        *,
        largest: float,
        timeout: float | None,  # noqa: ARG002 - see below
    ) -> Iterator[Fate | Message] | None:
        """See `server.grids.broadcast.CohortGrid`. There is no `timeout`: in wall seconds it would end a single client,
        and where clients have one they are never stacked.
        """
        server_round = int(config_of(messages.template.content)[ROUND])  # type: ignore[arg-type]
        stacked = self._choice.begin(server_round)
        self._probed = None
        if self._choice.probing(server_round):
            self._probed = _Probed(self._choice, server_round, stacked=stacked, cpu_seconds=_cpu_clock(self._engine))
        return self._fold(messages, largest) if stacked else None

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive."""
        probed, self._probed = self._probed, None
        replies = super().stream(messages, timeout=timeout)
        if probed is None:
            yield from replies
            return
        weight = 0.0
        for reply in replies:
            if not reply.has_error():
                weight += float(metrics_of(reply.content)[WEIGHT])  # type: ignore[arg-type]
            yield reply
        probed.over(weight)

    def _fold(self, messages: Broadcast, largest: float) -> Iterator[Fate | Message]:
        chunks = list(_chunks(messages.nodes, self._members))
        asked = [chunk_message(messages.template, nodes, largest=largest) for nodes in chunks]
        for message in asked:
            stamp(message, message_id=f"m{next(self._counter)}")
        places = {nodes[0]: place for place, nodes in enumerate(chunks)}
        folder = self._sites.folder
        early, total, next_place = Shelf(folder=folder if folder.is_dir() else None), _Total(), 0
        for reply in self._engine.answer(asked, timeout=None):
            place = places[reply.metadata.src_node_id]
            yield from fates(chunks[place], reply)
            early.put(place, reply)
            del reply  # or it stays in memory while the next one arrives
            while next_place in early:
                total.add(early.take(next_place))
                next_place += 1
        if self._probed is not None:
            self._probed.over(total.weight)
        if total.weight > 0:
            model = arrays_of(messages.template.content)
            loss = {} if self._sites.config.private else {TRAIN_LOSS: total.loss / total.weight}
            yield one_reply(total.mean(model), to=asked[0], weight=total.weight, metrics=loss)


class _Probed:
    """A round whose cost counts."""

    def __init__(self, choice: Choice, server_round: int, *, stacked: bool, cpu_seconds: Callable[[], float]) -> None:
        self._choice = choice
        self._server_round = server_round
        self._stacked = stacked
        self._cpu_seconds = cpu_seconds
        self._begin = cpu_seconds()

    def over(self, weight: float) -> None:
        """All have answered, with updates of so much weight."""
        spent = self._cpu_seconds() - self._begin
        self._choice.measured(
            Probe(server_round=self._server_round, stacked=self._stacked, cpu_seconds=spent, weight=weight)
        )


class _Total:
    """Sums of chunks, in float64."""

    def __init__(self) -> None:
        self.weight = self.loss = 0.0
        self._sums: dict[str, NDArray[np.float64]] = {}

    def add(self, reply: Message) -> None:
        """Add a chunk's sums; nothing of it is kept."""
        if reply.has_error():
            return
        metrics = metrics_of(reply.content)
        weight = float(metrics[WEIGHT])  # type: ignore[arg-type]
        if not weight:
            return
        self.weight += weight
        self.loss += float(metrics[TRAIN_LOSS])  # type: ignore[arg-type]
        for name, values in arrays_of(reply.content).items():
            if name in self._sums:
                self._sums[name] += values
            else:
                self._sums[name] = np.array(values)

    def mean(self, model: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The weighted mean in the model's dtypes; a mean of integers is rounded, as `strategies.cast_like` does."""
        means = {name: self._sums[name] / self.weight for name in model}
        return {
            name: np.asarray(np.rint(mean) if model[name].dtype.kind in "iu" else mean, dtype=model[name].dtype)
            for name, mean in means.items()
        }


def _chunks(nodes: Sequence[int], members: int) -> Iterator[Sequence[int]]:
    """Neighbours of equal numbers (but for one), at most `members` each."""
    count = -(-len(nodes) // members)
    for place in range(count):
        yield nodes[place * len(nodes) // count : (place + 1) * len(nodes) // count]


def _mean_examples(federation: Federation) -> int:
    """Training examples of a client of mean size, by a few that lie evenly in the population."""
    clients = federation.clients
    sizes = []
    for place in range(min(_LOOKED_AT, len(clients))):
        try:
            sizes.append(len(clients[place * len(clients) // min(_LOOKED_AT, len(clients))].train))
        except Exception:  # noqa: BLE001 - a user's own function makes it; the client fails when it is asked
            log.warning("client_without_data", place=place)
    return max(1, sum(sizes) // max(1, len(sizes)))


def _cpu_clock(engine: Engine) -> Callable[[], float]:
    """CPU seconds of everything that trains clients: the engine's, or this process's where it trains them here."""
    return getattr(engine, "cpu_seconds", process_time)
