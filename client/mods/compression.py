"""Shortens an update before it is sealed, as the run says: after clipping and noise, which it cannot undo."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from numpy.typing import NDArray

from client.request import TrainRequest, parse_query, read_arrays
from common.errors import FailureCode, PeerError
from common.fingerprint import model_digest
from common.flower import ROUND, RUN, arrays_of, from_record, metrics_of, to_record, update_reply
from common.transport.compression import Compression, Values, encode_update, left_out, update_of

Arrays = Mapping[str, NDArray[Any]]

_STATE, _SENT, _REST, _BASE = "compression", "compression-sent", "compression-rest", "base"
"""Records of a client's own state, never sent: which round it is of, what was sent, what was left out."""
_LABEL: Final = b"coterie int8 rounding v1"


def compression_mod(name_of: Callable[[TrainRequest, Context], str]) -> Mod:
    """A mod that puts the encoded update in place of the trained weights, where the run asks for it.

    Guarantee: the same update in the same run, round and client gives the same bytes. With top-k, a round that is asked
    for again with the same model is answered with the arrays that were sent first, and its remainder counts once.

    Args:
        name_of: The client's name; its rounding depends on it.

    Raises (the mod):
        PeerError: The update is not finite.
    """

    def compress(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        request = parse_query(message)
        how = Compression.of(request.config.transport)
        reply = call_next(message, context)
        if how.codec == "none" or not reply.has_content():
            return reply
        start, trained = read_arrays(message), arrays_of(reply.content)
        update = update_of(start, trained)
        if not all(np.isfinite(change).all() for change in update.values()):
            raise PeerError(FailureCode.NON_FINITE_UPDATE)
        if how.codec == "top-k":
            encoded = _with_feedback(context, request, start, trained, update, how)
        else:
            said = f"{request.digest}/{request.server_round}/{name_of(request, context)}/".encode()
            encoded = encode_update(update, trained, how, seed=hashlib.sha256(_LABEL + said).digest())
        metrics = {key: value for key, value in metrics_of(reply.content).items() if not isinstance(value, list)}
        return update_reply(message, encoded, metrics)

    return compress


def _with_feedback(  # noqa: PLR0917
    context: Context,
    request: TrainRequest,
    start: Arrays,
    trained: Arrays,
    update: dict[str, Values],
    how: Compression,
) -> Arrays:
    """Top-k of the update and of what earlier rounds left out; what is left now waits in the client's state.

    Source: Stich et al. 2018 (arXiv 1809.07599), algorithm 1.
    """
    state = context.state
    kept, rest, sent = state.get(_STATE), state.get(_REST), state.get(_SENT)
    base = model_digest(start).hex()
    if (
        isinstance(kept, ConfigRecord)
        and isinstance(rest, ArrayRecord)
        and isinstance(sent, ArrayRecord)
        and kept[RUN] == request.digest
    ):
        last = kept[ROUND]
        if (last, kept[_BASE]) == (request.server_round, base):
            return from_record(sent)
        if isinstance(last, int) and last < request.server_round:
            before = from_record(rest)
            update = {name: change + before[name] for name, change in update.items()}
        # else the coordinator went back: what was left out belongs to a course of the run that was given up
    encoded = encode_update(update, trained, how, seed=b"")
    state[_STATE] = ConfigRecord({RUN: request.digest, ROUND: request.server_round, _BASE: base})
    state[_SENT] = to_record(encoded)
    state[_REST] = to_record({name: left_out(change, encoded[name]) for name, change in update.items()})
    return encoded
