"""Whether a site takes part in what a request asks for: whose order it is, over which data, with whom, and when.

A coordinator that is broken into can seal any request. It cannot sign as an operator, so each request carries an
operator's word for exactly this run and configuration, and the site checks that against the keys it pins. What leaves
is checked as well. Only sites on machines of their own have an admission; who simulates owns the data.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import structlog
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.policy import Policy, released_metrics
from client.request import TrainRequest, parse_query, parse_request
from common.config import RunConfig
from common.crypto import PartyRecord, RunAuthorization, SealError, read_authorization
from common.errors import FailureCode, PeerError
from common.flower import (
    ARRAYS,
    AUTHORIZATION,
    CLIENT,
    COHORT,
    CONFIG,
    MASKED,
    ROUND_STEP,
    RUN_HEX,
    SCHEMA,
    SECAGG,
    SECAGG_TYPE,
    SETUP_STEP,
    WEIGHT,
    config_of,
)
from common.site import Site

log = structlog.get_logger()

_SKEW = timedelta(hours=1)
"""How far an operator's clock may be ahead of this one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Admission:
    """What a site asks of every request.

    Attributes:
        name: The site's own name.
        federation: The federation's name.
        operators: Pinned records by name.
        policy: The site's own rules.
        site: Its registry of data.
        now: Tells the time, with its zone.
    """

    name: str
    federation: str
    operators: Mapping[str, PartyRecord]
    policy: Policy
    site: Site
    now: Callable[[], datetime] = lambda: datetime.now(UTC)

    def check(self, message: Message) -> TrainRequest:
        """The request in a message, if this site takes part in it.

        Guarantee: the answer depends on configuration, policy, pins and time alone, never on the data. The site's own
        log says why a request was refused, the peer learns that it was.

        Raises:
            PeerError: It does not.
        """
        request = parse_query(message)
        record = config_of(message.content)
        rules = [self._signed(record, request), self.rules(request.config)]
        if message.metadata.message_type != SECAGG_TYPE:  # no round starts with it, and one that has started may end
            rules.append(self._in_time())
        if message.metadata.message_type != MessageType.QUERY:
            rules.append(self._with_whom(record, message, request.config))
        for reason in (reason for group in rules for broken, reason in group if broken):
            log.warning("request_refused", reason=reason, run_id=str(record.get(RUN_HEX, ""))[:32])
            raise PeerError(FailureCode.POLICY_REFUSED)
        return request

    def rules(self, config: RunConfig) -> Iterator[tuple[bool, str]]:
        """Whether each rule about the configuration is broken, and what it is."""
        yield from self.policy.rules(config)
        yield self.policy.budget is None, "the policy has no [budget]"
        yield (
            not self.policy.allows_data(config.data.name, registered=self.site.data),
            f"{config.data.name} is neither in site.toml nor listed in allow.data",
        )
        yield bool(config.data.sites) and self.name not in config.data.sites, "data.sites does not name this site"
        yield (
            0 < config.asynchronous.buffer_size < self.policy.limits.smallest_cohort,
            "asynchronous.buffer_size, the updates of a step, is below limits.smallest_cohort",
        )
        yield (  # others can fail on purpose: a step of those who are left would show their updates
            config.asynchronous.buffer_size > 0 and config.cohort.min_survivors < self.policy.limits.smallest_cohort,
            "cohort.min_survivors, the fewest updates of a step, is below limits.smallest_cohort",
        )

    def authorization(self, text: str) -> RunAuthorization:
        """What a pinned operator signed, who may order runs here.

        Raises:
            SealError: It is no such thing.
        """
        allowed = self.policy.operators.allowed
        operators = {name: r for name, r in self.operators.items() if allowed is None or name in allowed}
        return read_authorization(text, federation=self.federation, operators=operators)

    def _signed(self, record: ConfigRecord, request: TrainRequest) -> Iterator[tuple[bool, str]]:
        text, run_id = record.get(AUTHORIZATION), record.get(RUN_HEX)
        if not isinstance(text, str) or not isinstance(run_id, str):
            yield True, "no operator has signed the run"
            return
        try:
            signed = self.authorization(text)
        except SealError as e:
            yield True, f"authorization: {e.layer}"
            return
        yield signed.run_id != run_id, "the authorization is of another run"
        yield signed.config_digest != request.digest, "the authorization is of another configuration"
        age = self.now() - datetime.fromisoformat(signed.issued_at)
        yield age < -_SKEW, "the run was signed in the future: is a clock wrong?"
        yield age > timedelta(hours=self.policy.limits.longest_run_hours), "the run is older than longest_run_hours"

    def _in_time(self) -> Iterator[tuple[bool, str]]:
        yield not self.policy.limits.open_at(self.now().astimezone().time()), "it is outside of limits.hours"

    def _with_whom(self, record: ConfigRecord, message: Message, config: RunConfig) -> Iterator[tuple[bool, str]]:
        """The cohort as the coordinator tells it; where it may not tell, the number that noise was made for."""
        least, told = self.policy.limits.smallest_cohort, record.get(COHORT)
        if told is None and config.central:
            plan = parse_request(message).plan
            yield plan is None or plan.denominator < least, "the expected cohort is below limits.smallest_cohort"
            return
        names = _names(told)
        yield names is None or len(set(names)) != len(names), "the cohort is no list of different names"
        yield names is not None and self.name not in names, "the cohort does not hold this site"
        yield names is not None and len(names) < least, "the cohort is below limits.smallest_cohort"


def admission_mod(admission: Admission) -> Mod:
    """A mod that admits requests, and lets nothing leave that the run and the policy do not name.

    It belongs just inside the sealed mod, which sees to it that the run is that of the sealed header, and around secure
    aggregation: what passes here has been masked.
    """

    def admit(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        request = admission.check(message)
        reply = call_next(message, context)
        if reply.has_content():
            kind = message.metadata.message_type
            masked = request.config.privacy.secure_aggregation
            fits = _is_masked(reply, kind) if masked else _is_open(reply, request.config, admission.policy)
            if not fits:
                log.error("release_refused")
                raise PeerError(FailureCode.POLICY_REFUSED)
        return reply

    return admit


def _is_open(reply: Message, config: RunConfig, policy: Policy) -> bool:
    """Whether a reply holds nothing but the model and those of the run's metrics that the policy allows."""
    allowed = {name for name in released_metrics(config) if name in policy.allow.metrics}
    for name, record in reply.content.items():
        if isinstance(record, MetricRecord):
            told = {name for name, value in record.items() if not (name == WEIGHT and value == 1)}
            fits = told <= allowed
        elif isinstance(record, ConfigRecord):
            fits = record.keys() <= {CLIENT, SCHEMA}
        else:
            fits = isinstance(record, ArrayRecord) and name != SECAGG
        if not fits:
            return False
    return True


def _is_masked(reply: Message, kind: str) -> bool:
    """Whether a reply of a run under secure aggregation holds nothing in clear.

    An answer to a query holds the public facts of the data, to a step of the protocol that step, and to training one
    masked vector, with a step of the next set-up perhaps: no metric, no weight, no other array.
    """
    content = dict(reply.content)
    if kind == MessageType.QUERY:
        told = content.pop(CONFIG, None)
        return not content and isinstance(told, ConfigRecord) and told.keys() <= {CLIENT, SCHEMA}
    steps = content.pop(SECAGG, None)
    if kind == SECAGG_TYPE:
        return not content and _are_bytes(steps, {ROUND_STEP, SETUP_STEP})
    masked = content.pop(ARRAYS, None)
    return not content and _are_bytes(masked, {MASKED}) and (steps is None or _are_bytes(steps, {SETUP_STEP}))


def _are_bytes(record: object, names: set[str]) -> bool:
    """Whether a record holds nothing but strings of bytes by these names, one at least."""
    return (
        isinstance(record, ArrayRecord)
        and len(record) > 0
        and record.keys() <= names
        and all(array.dtype == "uint8" and len(array.shape) == 1 for array in record.values())
    )


def _names(told: object) -> list[str] | None:
    """The list of names in a request, or None."""
    try:
        names = json.loads(told) if isinstance(told, str) else None
    except (ValueError, RecursionError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
