"""The site's end of secure aggregation: what was trained leaves under masks that only a sum over enough sites loses.

The member (`common/secagg`) decides what it answers; here are its place among a site's other checks, and the way from
Flower's messages to it and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Protocol

import numpy as np
import structlog
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable, Mod
from numpy.typing import NDArray

from client.policy import Policy
from client.request import TrainRequest, parse_query, parse_request, read_arrays
from common.aggregation import codec_for, covered, flatten, rules_for
from common.errors import ConfigError, FailureCode, NonFiniteError, PeerError, PrivacyError
from common.fingerprint import model_digest
from common.flower import (
    ARRAYS,
    MASKED,
    ROUND_STEP,
    SECAGG,
    SETUP_STEP,
    TRAIN_LOSS,
    WEIGHT,
    arrays_of,
    from_record,
    metrics_of,
    to_record,
)
from common.privacy import NoiseSource
from common.secagg.fixed_point import Codec
from common.secagg.member import Member
from common.secagg.messages import Train
from common.secagg.packing import pack
from common.secagg.refusal import SecAggError

log = structlog.get_logger()

_STEPS: Final = {ROUND_STEP, SETUP_STEP}
Arrays = Mapping[str, NDArray[Any]]


class MemberResources(Protocol):
    """What a site's own machine says about its part in sums."""

    @property
    def policy(self) -> Policy:
        """The site's own rules."""

    def member(self, request: TrainRequest, context: Context) -> AbstractContextManager[Member]:
        """The member of the run that a request is about; what changes in it is kept when the block ends."""

    def noise(self, request: TrainRequest, context: Context) -> NoiseSource:
        """Where noise comes from."""

    def rounding(self, request: TrainRequest, context: Context) -> bytes:
        """32 bytes that an update's rounding comes from. Nobody else may know them: where steps are coarse, most
        numbers of a sum are one client's rounding, and whoever knows everybody's can tell whose.
        """


def secagg_mod(resources: MemberResources) -> Mod:
    """A mod that lets an update leave under masks alone, in the runs that say so; other runs pass.

    It belongs around all that makes an update what it is, and inside of what checks the request.

    Guarantee:
        Whether this site takes part in the round is decided, and its journal on the disk, before anything is trained.
        An update is masked once. Whatever fails after that uses the round and its model up: this site trains on that
        model again only when the round is known to be burnt. The reply holds one packed masked vector of uint8, and
        the answer to a step of set-up if there was one: no weight, no metric, no other array. Whether there were
        examples, and whether the update was finite, does not show.

    Args:
        resources: The site's rules and its members.

    Raises (the mod):
        PeerError: The round is refused.
    """

    def mask(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        request, steps = parse_query(message), _read_steps(message)
        if not request.config.privacy.secure_aggregation:
            if steps:
                raise PeerError(FailureCode.INVALID_REQUEST)
            return call_next(message, context)
        resources.policy.check(request.config)
        request, start = parse_request(message), read_arrays(message)
        if ROUND_STEP not in steps:
            raise PeerError(FailureCode.AGGREGATION_REFUSED)
        with _refusals(), _member(resources, request, context) as member:
            codec = _codec(request, start, steps[ROUND_STEP])
            masks = member.begin(
                steps[ROUND_STEP], server_round=request.server_round, base=model_digest(start), codec=codec.digest
            )
            answers = _set_up(member, steps)  # afterwards: a new epoch takes the place of one that is not begun
            reply = _trained(call_next, message, context)
            if reply is not None and not reply.has_content():
                return reply
            seed = _seed(resources, request, context)
            vector = _encoded(codec, request, start, reply, seed=seed)
            masks.apply(vector)
        content = RecordDict({ARRAYS: to_record({MASKED: pack(vector, codec.bits)})})
        if answers:
            content[SECAGG] = _record(answers)
        return Message(content, reply_to=message)

    return mask


def answer_steps(resources: MemberResources, message: Message, context: Context) -> Message:
    """The reply to a message that carries nothing but steps: of a set-up, of a round, or both.

    A step of set-up that is refused beside one of a round is left out: the round at hand does not depend on it.

    Raises:
        PeerError: The run has no secure aggregation, or the step is refused.
    """
    request, steps = parse_query(message), _read_steps(message)
    if not request.config.privacy.secure_aggregation or not steps:
        raise PeerError(FailureCode.INVALID_REQUEST)
    resources.policy.check(request.config)
    with _refusals(), _member(resources, request, context) as member:
        answers = {}
        if ROUND_STEP in steps:
            answers[ROUND_STEP] = member.answer(steps[ROUND_STEP])
            answers |= _set_up(member, steps)
        else:
            answers[SETUP_STEP] = member.answer(steps[SETUP_STEP])
    return Message(RecordDict({SECAGG: _record(answers)}), reply_to=message)


@contextmanager
def _member(resources: MemberResources, request: TrainRequest, context: Context) -> Iterator[Member]:
    """The member of a run, if it goes by this very configuration.

    Whoever signs one run id for two of them could have sums opened by the rules of one, with the noise of the other.

    Raises:
        SecAggError: It goes by another.
    """
    with resources.member(request, context) as member:
        if member.rules != rules_for(request.config, request.run_id):
            raise SecAggError("rules")
        yield member


def _set_up(member: Member, steps: Mapping[str, bytes]) -> dict[str, bytes]:
    """The answer to a step of the next epoch's set-up, if one came along and is not refused."""
    if SETUP_STEP not in steps:
        return {}
    try:
        return {SETUP_STEP: member.answer(steps[SETUP_STEP])}
    except SecAggError as e:
        log.warning("set_up_refused", reason=e.reason)
        return {}


def _codec(request: TrainRequest, start: Arrays, step: bytes) -> Codec:
    """How this round's updates become vectors: made from what this site knows, not from what it is told.

    Raises:
        SecAggError: The step is no training.
        PeerError: Sums over so many clients, or with the noise that was planned, are not possible.
    """
    participants = len(Train.from_bytes(step).participants)
    try:
        return codec_for(
            request.config, start, participants=participants, plan=request.plan, server_round=request.server_round
        )
    except (ConfigError, PrivacyError) as e:
        log.warning("aggregation_refused", reason=str(e))
        raise PeerError(FailureCode.AGGREGATION_REFUSED) from e


def _trained(call_next: ClientAppCallable, message: Message, context: Context) -> Message | None:
    """What training answers; None if that is not finite."""
    try:
        return call_next(message, context)
    except PeerError as e:
        if e.failure is not FailureCode.NON_FINITE_UPDATE:
            raise
        return None


def _encoded(
    codec: Codec, request: TrainRequest, start: Arrays, reply: Message | None, *, seed: bytes
) -> NDArray[np.uint32]:
    """What training changed, its weight and its metrics as one vector: uint32[codec.size].

    An update that is not finite counts for nothing, and looks like any other: a model can be made on which training
    overflows where one site has certain examples, and a failure would tell which site that is.
    """
    template = covered(start)
    if reply is not None:
        metrics = {key: value for key, value in metrics_of(reply.content).items() if not isinstance(value, list)}
        weight, update = metrics.pop(WEIGHT), flatten(template, start, arrays_of(reply.content))
        with suppress(NonFiniteError):
            return codec.encode(update, weight=weight, metrics=metrics, seed=seed)
    log.warning("update_not_finite", server_round=request.server_round)
    nothing = np.zeros(sum(values.size for values in template.values()))
    return codec.encode(nothing, weight=0.0, metrics={TRAIN_LOSS: 0.0}, seed=seed)


def _seed(resources: MemberResources, request: TrainRequest, context: Context) -> bytes:
    """32 bytes for an update's rounding, and for this client's share of the noise where there is one."""
    if request.config.distributed:
        return resources.noise(request, context).words(4).tobytes()
    return resources.rounding(request, context)


def _read_steps(message: Message) -> dict[str, bytes]:
    """The steps in a message, by their keys.

    Raises:
        PeerError: What stands there is something else.
    """
    record = message.content.get(SECAGG)
    if record is None:
        return {}
    if not isinstance(record, ArrayRecord) or not record.keys() <= _STEPS:
        raise PeerError(FailureCode.INVALID_REQUEST)
    try:
        arrays = from_record(record)
    except Exception as e:
        raise PeerError(FailureCode.INVALID_REQUEST) from e
    if any(values.dtype != np.uint8 or values.ndim != 1 for values in arrays.values()):
        raise PeerError(FailureCode.INVALID_REQUEST)
    return {key: values.tobytes() for key, values in arrays.items()}


def _record(answers: Mapping[str, bytes]) -> ArrayRecord:
    return to_record({key: np.frombuffer(answer, dtype=np.uint8) for key, answer in answers.items()})


@contextmanager
def _refusals() -> Iterator[None]:
    """Turn what the member refuses into a typed failure; why stands in the site's own log."""
    try:
        yield
    except SecAggError as e:
        log.warning("aggregation_refused", reason=e.reason, text=str(e), hint=e.hint)
        gone = e.reason == "epoch"
        raise PeerError(FailureCode.NOT_IN_EPOCH if gone else FailureCode.AGGREGATION_REFUSED) from e
