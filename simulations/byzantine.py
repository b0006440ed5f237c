"""Clients that lie, for showing what robust strategies are for."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from client.request import parse_request
from common.flower import ARRAYS, arrays_of, to_record


def byzantine_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """The first `simulation.byzantine_clients` clients send their update multiplied by `simulation.byzantine_scale`."""
    reply = call_next(message, context)
    settings = parse_request(message).config.simulation
    partition = context.node_config.get("partition-id")
    if reply.has_error() or not isinstance(partition, int) or partition >= settings.byzantine_clients:
        return reply
    start = arrays_of(message.content)
    trained = arrays_of(reply.content)
    scale = settings.byzantine_scale
    scaled = {k: start[k] + (trained[k] - start[k]) * scale for k in start}
    reply.content[ARRAYS] = to_record({k: values.astype(start[k].dtype) for k, values in scaled.items()})
    return reply
