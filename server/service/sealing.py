"""A result, packed and sealed for one operator: made once and kept, so that a broken download can be continued."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from common.crypto import KINDS, NO_ID, Direction, Header, PartyKeys, PartyRecord, seal
from common.disk import atomic_file, disk_errors, sync
from server.archive import FILES, pack
from server.plane.desk import Download
from server.service.state import Run

RESULTS: Final = "results"
_MANIFEST: Final = hashlib.sha256(b"coterie result archive v1\0" + "\0".join(FILES).encode()).digest()
_PART_BYTES: Final = 1 << 20


class SealedResults:
    """Results as files of ciphertext in the service's state; thread-safe."""

    def __init__(self, folder: Path, keys: PartyKeys) -> None:
        self._folder = folder
        self._keys = keys
        self._mutex = threading.Lock()

    def of(self, run: Run, *, folder: Path, recipient: PartyRecord) -> Download:
        """A finished run's result for an operator.

        Raises:
            RunError: The run's folder cannot be read, or there is no room.
        """
        base = self._folder / run.run_id / recipient.key_id.hex()
        envelope, blob = base.with_suffix(".envelope"), base.with_suffix(".blob")
        with self._mutex, disk_errors(base):
            if not envelope.exists():  # it is written last
                base.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                packed = base.with_suffix(".tar")
                try:
                    with packed.open("wb") as file:
                        pack(folder, file)
                    with blob.open("wb") as sink, atomic_file(envelope) as temporary:
                        sealed = seal(
                            _parts(packed), self._header(run, packed), sender=self._keys, sink=sink, broadcast=False
                        )
                        sink.flush()
                        sync(blob)
                        temporary.write_bytes(sealed.envelope_for(recipient))
                finally:
                    packed.unlink(missing_ok=True)
            return Download(envelope=envelope.read_bytes(), path=blob)

    def _header(self, run: Run, packed: Path) -> Header:
        return Header(
            direction=Direction.RESULT,
            kind=KINDS["result"],
            run_id=bytes.fromhex(run.run_id),
            server_round=run.rounds,
            attempt=0,
            sender=self._keys.record.key_id,
            message_id=os.urandom(len(NO_ID)),
            reply_to=NO_ID,
            plaintext_bytes=packed.stat().st_size,
            manifest=_MANIFEST,
            config_digest=bytes.fromhex(run.config_digest),
            cohort_digest=bytes(32),
            base_digest=bytes(32),
        )


def _parts(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_PART_BYTES):
            yield part
