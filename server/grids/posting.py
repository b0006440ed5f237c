"""Sealed messages as orders of the plane: checked, and with their ciphertext in a file that sites can fetch."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, cast

from flwr.app import Message

from common.crypto import blob_size
from common.crypto.envelope import Envelope
from common.disk import disk_errors
from common.errors import RefusedError
from common.transport.sealed import Blob, most_reply_bytes, order_id, read_sealed
from server.plane.hub import Hub
from server.plane.orders import Order


class Posting:
    """Orders that are made together: ciphertext that several share is written once."""

    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._blobs: dict[int, tuple[Blob, Path, bytes]] = {}
        self._written: list[Path] = []

    def order(self, message: Message, *, site: str, run_id: bytes, deadline: float | None) -> Order:
        """A message as an order for a site; nothing is sent.

        Raises:
            RefusedError: It is not sealed, or of another run.
            RunError: The disk is full or cannot be written.
        """
        envelope, blob = read_sealed(message.content)
        fields = Envelope.from_bytes(envelope)
        if fields.header.run_id != run_id:
            raise RefusedError("the message is of another run")
        path, digest = self._file(blob, fields.blob_digest)
        return Order(
            message_id=order_id(envelope),
            site=site,
            kind=message.metadata.message_type,
            envelope=envelope,
            blob=path,
            blob_digest=digest,
            blob_bytes=blob.size,
            most_bytes=blob_size(most_reply_bytes(fields.header.plaintext_bytes)),
            deadline=deadline,
        )

    def close(self) -> None:
        """Remove what was written. None of the orders may be open any more."""
        for path in self._written:
            path.unlink(missing_ok=True)
        self._written.clear()

    def _file(self, blob: Blob, digest: bytes | None) -> tuple[Path, bytes]:
        """Where a blob lies, and under which digest it is fetched; one in memory is written once for all recipients."""
        if id(blob) not in self._blobs:
            if digest is None:
                with blob.open() as file:
                    digest = hashlib.file_digest(cast("Any", file), "sha256").digest()
            path = blob.path
            if path is None:
                path = self._hub.blobs / f"{digest.hex()}.{len(self._written)}.{id(self):x}"
                with disk_errors(path):
                    self._written.append(path)
                    with blob.open() as source, path.open("xb") as target:
                        shutil.copyfileobj(source, target)
            self._blobs[id(blob)] = (blob, path, digest)
        _, path, digest = self._blobs[id(blob)]
        return path, digest
