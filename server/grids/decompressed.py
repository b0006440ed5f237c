"""Restores the weights of a reply whose update was shortened; what does not fit the model exactly is refused."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import FailureCode, RefusedError
from common.flower import ARRAYS, arrays_of, failure_reply, to_record
from common.transport.compression import Compression, decode_update
from server.grids.base import WrappingGrid, stream_replies


class DecompressingGrid(WrappingGrid):
    """Turns encoded updates into the weights that they make of the model.

    Guarantee: a reply is decoded only if each of its arrays has exactly the length that the model and the run's
    settings give it; every other is the failure INVALID_REPLY, and nothing was allocated for it.
    """

    def __init__(self, inner: Grid, *, template: Mapping[str, NDArray[Any]], how: Compression) -> None:
        """Prepare one round.

        Args:
            inner: Where encoded replies come from.
            template: The model that every message carries.
            how: The run's compression, not `none`.
        """
        super().__init__(inner)
        self._template = template
        self._how = how

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Replies as they arrive, decoded."""
        asked = {message.metadata.dst_node_id: message for message in messages}
        for reply in stream_replies(self._inner, list(asked.values()), timeout):
            message = asked.get(reply.metadata.src_node_id)
            if message is not None:
                yield reply if reply.has_error() else self._decoded(reply, message)
            del reply  # or it stays in memory while the next one arrives

    def _decoded(self, reply: Message, message: Message) -> Message:
        try:
            return decoded(reply, self._template, self._how)
        except (RefusedError, KeyError, TypeError, ValueError):
            return failure_reply(message, FailureCode.INVALID_REPLY)


def decoded(reply: Message, template: Mapping[str, NDArray[Any]], how: Compression) -> Message:
    """A reply whose encoded update was put to the model that it began with.

    Args:
        reply: Not a failure; nothing of it has been checked.
        template: That model.
        how: The run's compression, not `none`.

    Raises:
        RefusedError, KeyError, TypeError, ValueError: It does not fit the model.
    """
    arrays = decode_update(template, arrays_of(reply.content), how)
    content = RecordDict({key: to_record(arrays) if key == ARRAYS else record for key, record in reply.content.items()})
    return Message(content, metadata=reply.metadata)  # type: ignore[call-overload,no-any-return]
