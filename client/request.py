"""What a training message asks for, checked before anything is done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

from flwr.app import ConfigRecord, Message

from common.config import RunConfig
from common.config.load import parse_config
from common.errors import CoterieError, FailureCode, PeerError
from common.flower import NOISE, PARTICIPATIONS, ROUND, RUN, config_of
from common.privacy import PrivacyPlan, make_plan

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainRequest:
    """One round's work: which run, which round, and under which privacy plan (None: without privacy).

    `digest` names the configuration: what is made for a run can be kept under it.
    """

    config: RunConfig
    digest: str
    server_round: int
    plan: PrivacyPlan | None
    proximal_mu: float


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


def _parse(message: Message, *, train: bool) -> TrainRequest:
    try:
        record = config_of(message.content)
        text = _field(record, RUN, str)
        config, digest = _config(text)
        plan = None
        if train and config.private:
            plan = _plan(text, _field(record, NOISE, float), _field(record, PARTICIPATIONS, int))
        server_round = _field(record, ROUND, int)
        if server_round > config.rounds:
            raise ValueError(server_round)
        mu = record.get("proximal-mu", 0.0)
        if not isinstance(mu, float) or not 0 <= mu < math.inf:
            raise ValueError(mu)
        return TrainRequest(config=config, digest=digest, server_round=server_round, plan=plan, proximal_mu=mu)
    except (CoterieError, KeyError, TypeError, ValueError) as e:
        raise PeerError(FailureCode.INVALID_REQUEST) from e


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
def _plan(text: str, noise_multiplier: float, participations: int) -> PrivacyPlan:
    return make_plan(_config(text)[0], participations=participations, noise_multiplier=noise_multiplier)
