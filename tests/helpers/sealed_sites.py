"""Sites in short, over a real plane: they open what is sealed for them, and seal what a function makes of it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import grpc
from flwr.app import ConfigRecord, Message, RecordDict

from client.mods.sealed import sealed_mod
from common.errors import FailureCode, PeerError
from common.flower import ARRAYS, CONFIG, ROUND, RUN, arrays_of, client_context, stamp, to_record, update_reply
from common.transport import wire_pb2
from common.transport.sealed import Blob, read_sealed, sealed_content
from server.grids.base import FIRST_NODE
from server.grids.plane import PlaneGrid
from server.grids.sealed import SealedGrid
from tests.helpers.plane import SITES, Plane, kit

RUN_ID, CONFIGURATION = b"r" * 16, '{"a": 1}'


def doubled(message: Message) -> Message:
    """Twice the model that came."""
    arrays = {name: 2 * values for name, values in arrays_of(message.content).items()}
    return update_reply(message, arrays, {"num-examples": 3.0})


class SealedSite:
    """Answers every order, in a thread of its own; while its gate is closed it works on the first and does not end."""

    def __init__(self, plane: Plane, name: str, app: Callable[[Message], Message] = doubled) -> None:
        mine = kit(plane.kits, name)
        self.name, self.agent = name, plane.attach(name)
        self.gate, self.began = threading.Event(), threading.Event()
        self.gate.set()
        self.cancelled: list[bytes] = []
        self.told = threading.Event()
        """Set at the first cancellation."""
        self._mod = sealed_mod(lambda _context: mine.keys, mine.coordinator)
        self._app = app
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not isinstance(event := self.agent._heard.get(), str):
            if event.WhichOneof("event") == "cancel":
                self.cancelled.append(event.cancel.message_id)
                self.told.set()
            elif event.WhichOneof("event") == "order":
                threading.Thread(target=self._answer, args=(event.order,), daemon=True).start()

    def _answer(self, order: Any) -> None:
        with suppress(grpc.RpcError):  # nobody waits for it any more
            self._answered(order)

    def _answered(self, order: Any) -> None:
        blob = Blob.of_bytes(b"".join(self.agent.calls.fetch(order.blob_digest)))
        self.began.set()
        self.gate.wait()
        message = stamp(Message(sealed_content(order.envelope, blob), 1, order.kind), message_id="m")
        try:
            reply = self._mod(message, client_context(node_id=1, partition=0), lambda m, _context: self._app(m))
        except PeerError as e:
            self.agent.fail(order.message_id, e.failure)
            return
        envelope, answer = read_sealed(reply.content)
        start = wire_pb2.UploadStart(message_id=order.message_id, envelope=envelope, blob_bytes=answer.size)
        with answer.open() as file:
            self.agent.calls.upload(start, iter(lambda: file.read(1 << 20), b""))


def refusing(message: Message) -> Message:
    """A site that takes no part."""
    raise PeerError(FailureCode.POLICY_REFUSED)


def sealed_plane(plane: Plane, **changes: Any) -> SealedGrid:
    """What a run reaches the plane's sites by."""
    server = kit(plane.kits, "server")
    return SealedGrid(
        PlaneGrid(plane.hub, run_id=RUN_ID, sites=SITES, **changes),
        keys=server.keys,
        records=server.sites,
        run_id=RUN_ID,
        config_digest=hashlib.sha256(CONFIGURATION.encode()).digest(),
        folder=plane.hub.blobs,
    )


def messages_to(arrays: Mapping[str, Any], *names: str, server_round: int = 1) -> list[Message]:
    """One content to several sites."""
    content = RecordDict({ARRAYS: to_record(arrays), CONFIG: ConfigRecord({RUN: CONFIGURATION, ROUND: server_round})})
    return [Message(content, FIRST_NODE + SITES.index(name), "train") for name in names]
