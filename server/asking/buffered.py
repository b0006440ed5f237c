"""Asynchronous aggregation: the server steps whenever enough updates are there, whoever is still at work (FedBuff)."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import numpy as np
import structlog
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import ConfigError, FailureCode, RefusedError
from common.flower import ARRAYS, COHORT, CONFIG, ROUND, WEIGHT, arrays_of, config_of, metrics_of, to_record
from common.transport.compression import Compression
from server.asking.at_work import AtWork, Base, Member
from server.asking.base import Answers, Call, Stateless, fewest_replies, told_metrics
from server.asking.update_buffer import UpdateBuffer, staleness_factor
from server.grids.checked import Soundness
from server.grids.decompressed import decoded
from server.grids.mean_reply import one_reply
from server.grids.outstanding import cancel, pull, push
from server.job import Arrays, Job
from server.strategies import largest_value

log = structlog.get_logger()

_PAUSE_SECONDS: Final = 0.02
"""After a question that brought nothing: Flower's own grids answer at once."""
_STREAM: Final = 0xB0FFE2
"""Tells this use of the cohorts' seed from that of `CohortSampler`."""


class BufferedAsking(Stateless):
    """Each of the coordinator's rounds is one step of the server, made of the first updates that come.

    A round begins by asking idle clients until `cohort.size` are at work (all, where that is 0), and ends with
    `asynchronous.buffer_size` sound updates, or when nobody is at work any more. The strategy sees one reply: the
    present model plus the mean update, each update being what a client made of the model that it began with, weighed by
    examples or equally, and by its staleness. So any strategy of the mean is the server's optimizer. The round's cohort
    is everybody who is at work in it.

    Guarantee:
        A client is asked at most once a round, and again only when its last order has ended. Staleness is counted here:
        rounds from the one in which a client was asked, whether or not they moved the model. An update is judged
        against the model that its order carried; an answer that belongs to no order counts for nothing. Whose update
        would be staler than `max_staleness` is not waited for any more and failed with STALE_UPDATE, so that at most
        `max_staleness` + 1 models are kept.

    Source:
        FedBuff (Nguyen et al. 2022, arXiv 2106.06639), algorithm 1. Departures: a client that ends within a step is
        replaced when the next step begins, so that everybody begins with a newest model and privacy plans hold; the
        mean can be weighted by examples; where fewer than the buffer's size are left at work, the divisor is how many
        there are. The server's learning rate is the strategy's.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._how = Compression.of(job.config.transport)
        self._at_work = AtWork()
        self._sound: dict[int, Soundness] = {}
        """By the round of the base."""
        self._orders: dict[str, str] = {}
        """Names by the grid's ids of their orders, of those that this process has sent."""
        self._arrived: deque[Message] = deque()
        """What came with a reply that filled the buffer."""
        self._grid: Grid | None = None
        self._stale: list[str] = []
        self._fresh: list[str] = []

    def cohort(self, server_round: int, drawn: list[str]) -> list[str]:
        """Everybody who is at work in the round: some since earlier ones, and so many of those drawn as are missing.

        Of any `cohort.size` clients as many are idle as are missing at least.
        """
        self._stale = self._at_work.begun_before(server_round - self._job.config.asynchronous.max_staleness)
        idle = [name for name in drawn if name not in self._at_work]
        missing = len(idle)
        if self._job.config.cohort.size:
            missing = max(0, self._job.config.cohort.size - (len(self._at_work) - len(self._stale)))
        order = np.random.default_rng([self._job.config.seeds.cohort, server_round, _STREAM])
        # Not by name: where replies come in the order of the orders, the last names would be stale for ever.
        self._fresh = [idle[i] for i in order.permutation(len(idle))[:missing]]
        return sorted([*self._at_work.members, *self._fresh])

    def ask(self, call: Call, messages: Sequence[Message], model: Arrays) -> Answers:
        """Ask who is new, and wait for the buffer to fill.

        Raises:
            ConfigError: The run has fewer clients than fill it.
        """
        settings, self._grid = self._job.config.asynchronous, call.grid
        if settings.buffer_size > len(call.nodes):
            raise ConfigError(
                f"asynchronous.buffer_size is {settings.buffer_size}, but there are only {len(call.nodes)} clients",
                hint=f"set it to {len(call.nodes)} or less",
            )
        self._drop_stale(call)
        if messages:
            self._send(call, messages[0], model)
        buffer, staleness = UpdateBuffer(model), {}
        while self._at_work.members and buffer.count < settings.buffer_size:
            reply = self._next(settings.buffer_size - buffer.count)
            if reply is not None:
                name = self._orders.pop(reply.metadata.reply_to_message_id, "")
                if name and self._count(call, reply, self._at_work.members[name], buffer):
                    staleness[name] = call.server_round - self._at_work.members[name].server_round
                if name:
                    self._end(name)
            del reply  # or it stays in memory while the next one arrives
        replies = []
        if buffer.count:
            metrics = buffer.metrics()
            replies = [one_reply(buffer.moved(model), to=None, weight=buffer.weight, metrics=metrics)]
        enough = bool(replies) and len(call.survivors) >= fewest_replies(self._job.config)
        return Answers(replies=replies, enough=enough, staleness=dict(sorted(staleness.items())))

    def state(self) -> dict[str, NDArray[Any]]:
        """Who is at work, since which round, and the models that they began with."""
        return self._at_work.state()

    def restore(self, state: Mapping[str, NDArray[Any]], *, server_round: int) -> None:  # noqa: ARG002 - see `Asking`
        """Take up those who were at work. They get the same request again with the next round, before others do: a site
        that has stored its update sends that one.

        Raises:
            RunError: It is not of such a run.
        """
        self._at_work = AtWork.of_state(state)

    def close(self) -> None:
        """Nobody is waited for any more."""
        if self._grid is not None:
            cancel(self._grid, list(self._orders))
        self._orders.clear()
        self._arrived.clear()
        self._at_work.clear()
        self._sound.clear()

    def _drop_stale(self, call: Call) -> None:
        cancel(call.grid, [order for name in self._stale if (order := self._at_work.members[name].order)])
        for name in self._stale:
            self._fail(call, name, FailureCode.STALE_UPDATE)

    def _send(self, call: Call, template: Message, model: Arrays) -> None:
        """Ask those who were at work before this process began, and those who are new; in the order of their asking."""
        told = ""
        if COHORT in config_of(template.content):
            told = json.dumps(sorted([*self._at_work.members, *self._fresh]))
        unsent = [member for member in self._at_work.members.values() if not member.order]
        if self._fresh:
            arrays = {name: values.copy() for name, values in model.items()}  # the model itself is changed in place
            base = Base(server_round=call.server_round, arrays=arrays, cohort=told)
            unsent += self._at_work.begin(self._fresh, base)
        for server_round, members in groupby(unsent, lambda member: member.server_round):
            self._send_alike(call, template, list(members), self._at_work.bases[server_round])

    def _send_alike(self, call: Call, template: Message, members: Sequence[Member], base: Base) -> None:
        """Send one content to clients that begin with the same model."""
        for member in [member for member in members if member.name not in call.nodes]:
            self._fail(call, member.name, FailureCode.CLIENT_LOST)
        members = [member for member in members if member.name in call.nodes]
        content, about = _content(template.content, base), template.metadata
        messages = [
            Message(content, call.nodes[member.name], about.message_type, ttl=about.ttl, group_id=about.group_id)
            for member in members
        ]
        for member, order in zip(members, push(call.grid, messages, timeout=call.timeout), strict=True):
            if order:
                member.order = order
                self._orders[order] = member.name
            else:
                self._fail(call, member.name, FailureCode.CLIENT_LOST)

    def _next(self, needed: int) -> Message | None:
        """A reply, if one is there."""
        if not self._arrived and self._grid is not None:
            self._arrived.extend(pull(self._grid, list(self._orders), needed=needed))
            if not self._arrived:
                time.sleep(_PAUSE_SECONDS)
        return self._arrived.popleft() if self._arrived else None

    def _count(self, call: Call, reply: Message, member: Member, buffer: UpdateBuffer) -> bool:
        """Add a sound update to the buffer; its fate is told either way."""
        config, base = self._job.config, self._at_work.bases[member.server_round]
        failure: FailureCode | None = FailureCode.INVALID_REPLY
        if reply.metadata.src_node_id == call.nodes.get(member.name):
            reply, failure = self._judged(reply, base)
        if failure is None:
            metrics = {name: value for name, value in metrics_of(reply.content).items() if not isinstance(value, list)}
            age = call.server_round - member.server_round
            buffer.add(
                arrays_of(reply.content),
                base.arrays,
                weight=float(metrics.pop(WEIGHT)),
                factor=staleness_factor(age, exponent=config.asynchronous.staleness_exponent),
                metrics=metrics,
            )
        call.tell(member.name, failure)
        return failure is None

    def _judged(self, reply: Message, base: Base) -> tuple[Message, FailureCode | None]:
        """The reply with whole weights, and why it does not count; None if it does."""
        if self._how.codec != "none" and not reply.has_error():
            try:
                reply = decoded(reply, base.arrays, self._how)
            except (RefusedError, KeyError, TypeError, ValueError):
                return reply, FailureCode.INVALID_REPLY
        if base.server_round not in self._sound:
            config = self._job.config
            self._sound[base.server_round] = Soundness(
                base.arrays,
                equal_weights=config.private or config.strategy.weighting == "equal",
                metrics=told_metrics(config),
                largest=largest_value(config.strategy),
            )
        return reply, self._sound[base.server_round].fault(reply)

    def _fail(self, call: Call, name: str, failure: FailureCode) -> None:
        """A client whose reply nobody waits for."""
        self._orders.pop(self._at_work.members[name].order, None)
        self._end(name)
        call.tell(name, failure)

    def _end(self, name: str) -> None:
        self._at_work.end(name)
        self._sound = {number: sound for number, sound in self._sound.items() if number in self._at_work.bases}


def _content(template: RecordDict, base: Base) -> RecordDict:
    """What clients are sent that begin with a model: the round's own request, or word for word that of its round."""
    config = ConfigRecord(dict(config_of(template)))
    config[ROUND] = base.server_round
    if base.cohort:
        config[COHORT] = base.cohort
    others = {key: record for key, record in template.items() if key not in {ARRAYS, CONFIG}}
    return RecordDict({ARRAYS: to_record(base.arrays), CONFIG: config, **others})
