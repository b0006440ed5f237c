"""What a training message asks for, checked before anything is done."""

from __future__ import annotations

import hashlib
import math
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message
from numpy.typing import NDArray

from common.config import RunConfig
from common.config.load import parse_config
from common.crypto import NO_ID
from common.errors import CoterieError, FailureCode, PeerError
from common.flower import (
    ARRAYS,
    CLIENTS,
    CLIPPING_NORM,
    NOISE,
    ORDER,
    PARTICIPATIONS,
    ROUND,
    RUN,
    RUN_HEX,
    SEPARATION,
    arrays_of,
    config_of,
)
from common.privacy import PrivacyPlan, make_plan
from common.privacy.clipping import LARGEST_NORM, SMALLEST_NORM

T = TypeVar("T")

_LARGEST_MU = 1e6


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibrated:
    """What a message says that the plan was calibrated to; `make_plan` counts it again."""

    noise_multiplier: float
    order: int
    participations: int
    min_separation: int
    clients: int
    dimensions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """One round's work: which run, which round, and under which privacy plan (None: without privacy).

    `digest` names the configuration: what is made for a run can be kept under it. `run_id` is what the coordinator
    calls the run; one without an id, as in a simulation, is named by its configuration. `clipping_norm` is the present
    bound on an update (privacy unit `client`), 0 elsewhere.
    """

    config: RunConfig
    digest: str
    run_id: bytes
    server_round: int
    plan: PrivacyPlan | None
    proximal_mu: float
    clipping_norm: float


def parse_request(message: Message) -> TrainRequest:
    """The request in a training message.

    Raises:
        PeerError: Anything is missing, unknown or out of range. The sender learns no more than that.
    """
    return _parse(message, train=True)


def parse_query(message: Message) -> TrainRequest:
    """The run that a query is about; there is no plan, because nothing is trained.

    Raises:
        PeerError: As `parse_request`.
    """
    return _parse(message, train=False)


def read_arrays(message: Message) -> dict[str, NDArray[Any]]:
    """The weights that came; never unpickled, not to be written to.

    Raises:
        PeerError: There are none, or they are no arrays.
    """
    try:
        return arrays_of(message.content)
    except Exception as e:
        raise PeerError(FailureCode.INVALID_REQUEST) from e


def _parse(message: Message, *, train: bool) -> TrainRequest:
    try:
        record = config_of(message.content)
        text = _field(record, RUN, str)
        config, digest = _config(text)
        plan, clipping_norm = None, 0.0
        if train and config.private:
            said = Calibrated(
                noise_multiplier=_field(record, NOISE, float),
                order=_field(record, ORDER, int),
                participations=_field(record, PARTICIPATIONS, int),
                min_separation=_field(record, SEPARATION, int),
                clients=_field(record, CLIENTS, int),
                dimensions=_dimensions(message),
            )
            plan = _plan(text, said)
            clipping_norm = _clipping_norm(record, config)
        server_round = _field(record, ROUND, int)
        if server_round > config.rounds:
            raise ValueError(server_round)
        mu = record.get("proximal-mu", 0.0)
        if not isinstance(mu, float) or not 0 <= mu <= _LARGEST_MU:
            raise ValueError(mu)
        return TrainRequest(
            config=config,
            digest=digest,
            run_id=_run_id(record, digest),
            server_round=server_round,
            plan=plan,
            proximal_mu=mu,
            clipping_norm=clipping_norm,
        )
    except (CoterieError, KeyError, TypeError, ValueError) as e:
        raise PeerError(FailureCode.INVALID_REQUEST) from e


def _run_id(record: ConfigRecord, digest: str) -> bytes:
    said = record.get(RUN_HEX)
    if said is None:
        return hashlib.sha256(bytes.fromhex(digest)).digest()[: len(NO_ID)]
    run_id = bytes.fromhex(said) if isinstance(said, str) else b""
    if len(run_id) != len(NO_ID):
        raise ValueError(RUN_HEX)
    return run_id


def _clipping_norm(record: ConfigRecord, config: RunConfig) -> float:
    """The bound on an update: what the coordinator says that adds the noise, and else what the run says."""
    if not config.central:
        return config.privacy.clipping_norm if config.distributed else 0.0
    norm = _field(record, CLIPPING_NORM, float)
    if not SMALLEST_NORM <= norm <= LARGEST_NORM:
        raise ValueError(norm)
    return norm


def _dimensions(message: Message) -> int:
    """How many values the model has that can be trained, at most: each is rounded to the noise's grid. Where clients
    add the noise all of them are in the sum.
    """
    record = message.content[ARRAYS]
    if not isinstance(record, ArrayRecord):
        raise TypeError(ARRAYS)
    return max(1, sum(math.prod(array.shape) for array in record.values()))


def _field(record: ConfigRecord, key: str, kind: type[T]) -> T:
    value = record.get(key)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise TypeError(key)
    if isinstance(value, int | float) and not 0 < value < math.inf:
        raise ValueError(key)
    return value


@lru_cache(maxsize=8)
def _config(text: str) -> tuple[RunConfig, str]:
    """Parsed once: every message of a run carries the same text."""
    config = parse_config(text)
    return config, config.digest()


@lru_cache(maxsize=8)
def _plan(text: str, said: Calibrated) -> PrivacyPlan:
    return make_plan(_config(text)[0], **asdict(said))
