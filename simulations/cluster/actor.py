"""What runs in a process of the cluster: one client after the other, whichever comes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from client.memory import keep_freed_memory
from client.mods import guard_mod
from common.errors import RunError
from common.flower import client_context, prepare_process, stamp
from common.transport.records import decode_records, encode_records
from server.grids.base import FIRST_NODE
from simulations.logs import log_to_stderr

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from simulations.inline import AppFactory


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A client's answer, as it travels.

    Attributes:
        error: Code and sentence of a failure, or None.
        content: Encoded records; empty with an error.
        state: What the client keeps until it is asked again, encoded; empty if nothing.
    """

    error: tuple[int, str] | None
    content: bytes
    state: bytes


class ClientActor:
    """Answers messages with an app that this process made: generators and keys never travel."""

    def __init__(self, factory: AppFactory, set_up: Callable[[], None] | None = None) -> None:
        """Prepare.

        Args:
            factory: Makes the app.
            set_up: Called before it.
        """
        self._factory, self._set_up = factory, set_up
        self._app: ClientApp | None = None
        self._shared: tuple[str, Any] = ("", {})

    def start(self) -> None:
        """Make the app, which loads the clients' data. Its errors reach whoever waits: those of `__init__` do not."""
        import torch

        log_to_stderr(quiet=True)
        torch.set_num_threads(1)  # a client's result must not depend on where it trains
        keep_freed_memory()
        prepare_process()
        if self._set_up is not None:
            self._set_up()
        self._app = self._factory()

    def answer(  # noqa: PLR0917 - Ray passes on what stands in its own arguments at no cost
        self,
        node: int,
        message_id: str,
        message_type: str,
        content: bytes,
        state: bytes,
        shared_id: str,
        shared: NDArray[np.uint8] | None,
    ) -> Answer:
        """One client's answer.

        Args:
            node: The client's node id.
            message_id: The message's.
            message_type: What is asked for.
            content: The message's own records, encoded.
            state: What the client kept; empty if nothing.
            shared_id: Names `shared`.
            shared: Records that are the same for all clients of a round, encoded: uint8[bytes], mapped, not copied.
        """
        if self._app is None:
            raise RuntimeError("not started")
        records = decode_records(content)
        if shared is not None:
            if shared_id != self._shared[0]:
                self._shared = (shared_id, decode_records(shared.data))
            records.update(self._shared[1])
        context = client_context(
            node_id=node, partition=node - FIRST_NODE, state=decode_records(state) if state else None
        )
        message = stamp(Message(records, node, message_type), message_id=message_id)
        reply = guard_mod(message, context, self._app)
        kept = b"".join(encode_records(context.state)) if context.state else b""
        if reply.has_error():
            return Answer(error=(reply.error.code, reply.error.reason or ""), content=b"", state=kept)
        return Answer(error=None, content=b"".join(encode_records(reply.content)), state=kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedFolder:
    """What a process looks for before it serves: the run's folder, as the coordinator sees it.

    A node may join the cluster after its nodes were looked at.
    """

    marker: Path
    token: str

    def __call__(self) -> None:
        """Look.

        Raises:
            RunError: Here the folder is another one.
        """
        try:
            found = self.marker.read_text(encoding="ascii")
        except (OSError, UnicodeDecodeError):
            found = ""
        if found != self.token:
            raise RunError(f"{self.marker.parent} is not the run's folder here", hint="share it between all Ray nodes")
