"""What a run's configuration says about its sums: their rules, how updates become vectors, and which arrays they cover.

Client and coordinator both ask here, so that both sides of a sum agree to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from common.errors import PrivacyError
from common.flower import TRAIN_LOSS
from common.privacy import PrivacyPlan
from common.privacy.distributed import DistributedSum
from common.secagg.fixed_point import Codec, FixedPoint
from common.secagg.parameters import Rules

Arrays = Mapping[str, NDArray[Any]]


def rules_for(config: RunConfig, run_id: bytes) -> Rules:
    """The rules of a run's secure aggregation.

    Args:
        config: The run.
        run_id: 16 bytes.
    """
    settings = config.secagg
    return Rules(
        run_id=run_id,
        config_digest=bytes.fromhex(config.digest()),
        epoch_rounds=settings.epoch_rounds,
        honest=settings.honest,
        colluding=settings.colluding,
        min_survivors=config.cohort.min_survivors,
        smallest_cohort=settings.honest + settings.colluding,
        group_size=settings.group_size,
        bits=settings.bits,
    )


def codec_for(
    config: RunConfig, template: Arrays, *, participants: int, plan: PrivacyPlan | None, server_round: int
) -> Codec:
    """How updates of one round become vectors, and their sum a mean update.

    Args:
        config: The run, with secure aggregation on.
        template: The arrays of the model; only names, dtypes and shapes matter.
        participants: How many are asked for this sum.
        plan: The run's privacy plan, where the clients add noise.
        server_round: The round; a rotation is of one round.

    Raises:
        ConfigError: The ring is too small for so many clients.
        PrivacyError: There is no plan for distributed noise, or it was made for fewer values or clients, or counts on
            more honest ones than a sum is sure to have.
    """
    dimensions = sum(values.size for values in covered(template).values())
    if not config.distributed:
        return _fixed_point(config, dimensions=dimensions, participants=participants)
    mechanism = plan.distributed if plan is not None else None
    if mechanism is None:
        raise PrivacyError("the clients of this run add noise, and no plan says how much")
    if participants > mechanism.clients or mechanism.bits != config.secagg.bits:
        raise PrivacyError(f"the plan is for sums of at most {mechanism.clients} clients, not of {participants}")
    rules = rules_for(config, bytes(16))
    if mechanism.honest > rules.fewest - rules.colluding:
        raise PrivacyError(f"a sum is not sure to hold the noise of {mechanism.honest} honest clients")
    said = f"{config.digest()}/{server_round}".encode()
    rotation = hashlib.sha256(b"coterie rotation v1/" + said).digest()
    return DistributedSum(mechanism=mechanism, dimensions=dimensions, rotation=rotation)


def check_codec(config: RunConfig, clients: int) -> None:
    """Refuse a run whose sums have no room for so many clients, before it starts.

    Where clients add noise, making the plan refuses.

    Raises:
        ConfigError: The ring is too small.
    """
    if config.privacy.secure_aggregation and not config.distributed:
        _fixed_point(config, dimensions=1, participants=clients)


def covered(template: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays that a sum is about, in their order: the floating-point ones; others stay as they are.

    A counter that moved by forty would fill the whole clipping norm of an update.
    """
    return {name: values for name, values in template.items() if values.dtype.kind == "f"}


def flatten(template: Arrays, start: Arrays, trained: Arrays) -> NDArray[np.float64]:
    """What training changed, as one vector: float64[d].

    Args:
        template: What `covered` names, in its order.
        start: The arrays before training.
        trained: The arrays after it, of the same shapes.

    Raises:
        ValueError: A shape is another.
    """
    update = np.empty(sum(values.size for values in template.values()))
    at = 0
    for name, values in template.items():
        before, after = start[name], trained[name]
        if before.shape != values.shape or after.shape != values.shape:
            raise ValueError(f"array {name!r} has another shape than the model's")
        part = update[at : at + values.size].reshape(values.shape)
        with np.errstate(over="ignore", invalid="ignore"):  # the codec refuses what is not finite
            np.subtract(after, before, out=part, dtype=np.float64)
        at += values.size
    return update


def add_update(start: Arrays, update: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """The start plus an update, in the start's dtypes; arrays that no sum is about stay as they are.

    Args:
        start: The model's arrays.
        update: float64[d], over what `covered` names.

    Raises:
        ValueError: The update has another length.
    """
    chosen = covered(start)
    if update.shape != (sum(values.size for values in chosen.values()),):
        raise ValueError("an update has another length than the model")
    arrays, at = dict(start), 0
    for name, before in chosen.items():
        part = update[at : at + before.size].reshape(before.shape)
        with np.errstate(over="ignore"):  # an infinity is refused with the aggregate
            arrays[name] = np.asarray(before + part).astype(before.dtype)
        at += before.size
    return arrays


def _fixed_point(config: RunConfig, *, dimensions: int, participants: int) -> FixedPoint:
    weighted = config.strategy.weighting == "examples" and not config.private
    return FixedPoint(
        bits=config.secagg.bits,
        dimensions=dimensions,
        clipping_norm=config.secagg.clipping_norm,
        most_weight=config.secagg.most_weight if weighted else 1,
        clients=participants,
        metrics=() if config.private else (TRAIN_LOSS,),
    )
