"""The ledger comes first: a round's events are on disk before its first noisy step, or the round does not take
place.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from flwr.app import Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.policy import Policy
from client.request import TrainRequest, parse_query, parse_request, read_arrays
from client.spool import Release, Spool
from common.fingerprint import model_digest
from common.privacy import Ledger, NonPrivate
from common.transport.records import decode_records, encode_records

_STATE = "own-state/"
"""Begins the names of records that are stored beside a reply's."""


class PrivacyResources(Protocol):
    """What a site's own machine says about privacy."""

    @property
    def policy(self) -> Policy:
        """The site's own rules."""

    def ledger(self, request: TrainRequest, context: Context) -> Ledger | None:
        """The ledger of the data set that the request is about; None where a simulation without privacy keeps none."""

    def spool(self, request: TrainRequest, context: Context) -> Spool | None:
        """Where updates wait until their round is over, or None to keep none."""


def privacy_mod(resources: PrivacyResources) -> Mod:
    """A mod that applies the site's policy, reserves each round in its ledger, and resends what was paid for.

    It belongs around training alone, and never looks at a message's type: Flower also answers `train.default`. Under
    secure aggregation nothing is stored: an update that was kept could be masked a second time.
    """

    def reserve(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        request = parse_query(message)
        resources.policy.check(request.config)
        if request.config.private:  # only now the plan, which takes work
            request = parse_request(message)
        if request.plan is not None:
            resources.policy.check_plan(request.plan)
        ledger = resources.ledger(request, context)
        spool = None if request.config.privacy.secure_aggregation else resources.spool(request, context)
        release = _release(message, request) if spool is not None else None
        if spool is not None and release is not None and (stored := spool.load(release)) is not None:
            return Message(_take_up(decode_records(stored), context), reply_to=message)
        if ledger is not None:
            plan = request.plan
            read_arrays(message)  # a message that cannot be read must not cost a round
            if plan is None:
                event = NonPrivate(run=request.digest, server_round=request.server_round)
                ledger.reserve(event, planned=request.config.rounds)
            else:
                ledger.reserve(plan.event(request.server_round), planned=plan.participations)
        before = dict(context.state.items())
        reply = call_next(message, context)
        if spool is not None and release is not None and reply.has_content():
            spool.drop_before(request.digest, request.server_round, others=_oldest_needed(request))
            spool.save(release, b"".join(encode_records(_with_state(reply.content, context, before))))
        return reply

    return reserve


def _with_state(content: RecordDict, context: Context, before: Mapping[str, object]) -> RecordDict:
    """A reply's records, and what training made the client remember: whoever sends the one again remembers the other.

    It is stored with the update and never sent.
    """
    kept = RecordDict(dict(content.items()))
    for name, record in context.state.items():
        if record is not before.get(name):
            kept[_STATE + name] = record
    return kept


def _take_up(kept: RecordDict, context: Context) -> RecordDict:
    """The reply's records alone; the client remembers what it did when it made them."""
    content = RecordDict()
    for name, record in kept.items():
        if name.startswith(_STATE):
            context.state[name.removeprefix(_STATE)] = record
        else:
            content[name] = record
    return content


def _oldest_needed(request: TrainRequest) -> int:
    """The first round of which somebody's update may be asked for again by a coordinator that had to start anew.

    Of synchronous rounds those before are over. Asynchronously, a simulated client that shares the folder may still be
    at work for one of them; this client itself is not.
    """
    asynchronous = request.config.asynchronous
    return request.server_round - (asynchronous.max_staleness if asynchronous.buffer_size else 0)


def _release(message: Message, request: TrainRequest) -> Release:
    """Names what is asked for: the same request, over the same model, is answered with the same bytes."""
    base = model_digest(read_arrays(message)).hex()
    return Release(run=request.digest, server_round=request.server_round, base=base)
