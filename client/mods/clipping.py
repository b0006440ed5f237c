"""With privacy unit client, a client's whole update is bounded before it leaves the client."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable
from numpy.typing import NDArray

from client.request import TrainRequest, parse_request
from common.errors import FailureCode, PeerError
from common.flower import WEIGHT, WITHIN, arrays_of, update_reply

Arrays = Mapping[str, NDArray[Any]]


def clipping_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Clip the update of a run with privacy unit `client` to the clipping norm of the request; pass other runs on.

    The update is what training changed in all floating-point arrays, as one vector, in float64. Only clients that
    behave do this: the coordinator clips once more, so that one that does not costs nobody else's privacy.

    Guarantee:
        The reply holds the model that came plus an update of at most the clipping norm (up to rounding to the model's
        dtypes), every other array exactly as it came, the weight 1 and, where clipping adapts, whether the update lay
        within the norm (1 or 0). No norm, loss or count leaves.

    Raises:
        PeerError: The norm asked for is not the run's; or the update is not finite, where the coordinator adds the
            noise and may know that. Where clients add it, who is in a sum must not depend on anybody's data: a model
            could be made on which training overflows if one example is there. Such an update is zero.

    Source:
        McMahan et al. 2018 (arXiv 1710.06963), algorithm 1, FlatClip. Departure: an update that is not finite counts as
        zero, and is a failure on record where the coordinator adds the noise.
    """
    request = parse_request(message)
    if request.config.privacy.unit != "client":
        return call_next(message, context)
    norm = _agreed_norm(request)
    reply = call_next(message, context)
    if not reply.has_content():
        return reply
    start = arrays_of(message.content)
    try:
        arrays, within = clip_update(start, arrays_of(reply.content), norm)
    except PeerError:
        if not request.config.distributed:
            raise
        arrays, within = dict(start), False
    metrics = {WEIGHT: 1.0}
    if request.config.privacy.clipping == "adaptive":
        metrics[WITHIN] = float(within)
    return update_reply(message, arrays, metrics)


def clip_update(start: Arrays, trained: Arrays, norm: float) -> tuple[dict[str, NDArray[Any]], bool]:
    """The start plus the clipped update, and whether the update lay within the norm.

    Args:
        start: The model that came.
        trained: The same arrays after training.
        norm: L2 bound on the update over all floating-point arrays.

    Guarantee: An update within the norm is passed on to the bit.

    Raises:
        PeerError: The update is not finite, or its square has no place in float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is looked for below
        changes = {
            name: trained[name].astype(np.float64) - values.astype(np.float64)
            for name, values in start.items()
            if values.dtype.kind == "f"
        }
        length = math.sqrt(sum(float(np.vdot(change, change)) for change in changes.values()))
    if not math.isfinite(length):
        raise PeerError(FailureCode.NON_FINITE_UPDATE)
    if length <= norm:
        return {name: trained[name] if name in changes else values for name, values in start.items()}, True
    factor = norm / length
    clipped = dict(start)
    for name, change in changes.items():
        clipped[name] = (start[name] + factor * change).astype(start[name].dtype)
    return clipped, False


def _agreed_norm(request: TrainRequest) -> float:
    """The norm asked for; where it does not adapt, only the run's own."""
    privacy = request.config.privacy
    if privacy.clipping != "adaptive" and request.clipping_norm != privacy.clipping_norm:
        raise PeerError(FailureCode.INVALID_REQUEST)
    return request.clipping_norm
