"""How fast a model is sealed and opened, in memory, on one core."""

from __future__ import annotations

import io
import os
import secrets
from statistics import median
from time import process_time

from common.crypto import KINDS, NO_ID, Direction, Header, PartyKeys, open_envelope, seal

SIZE = 256 << 20


class _Nowhere(io.RawIOBase):
    """Takes everything: what a disk or a socket costs is measured with the transport."""

    def write(self, data: object) -> int:
        return memoryview(data).nbytes  # type: ignore[arg-type]


def figures(*, pairs: int) -> dict[str, float]:
    """Gigabytes (10^9 bytes) of plaintext a CPU second: an update's way, without the SHA-256 of a broadcast."""
    site, coordinator = PartyKeys.generate("site", "site"), PartyKeys.generate("server", "coordinator")
    payload = memoryview(bytearray(os.urandom(1 << 20) * (SIZE >> 20)))
    out, sealing, opening = bytearray(SIZE), [], []
    for _ in range(pairs):
        header = Header(
            direction=Direction.UP,
            kind=KINDS["train"],
            run_id=secrets.token_bytes(16),
            server_round=1,
            attempt=0,
            sender=site.record.key_id,
            message_id=secrets.token_bytes(16),
            reply_to=NO_ID,
            plaintext_bytes=SIZE,
            manifest=bytes(32),
            config_digest=bytes(32),
            cohort_digest=bytes(32),
            base_digest=bytes(32),
        )
        begin = process_time()
        seal([payload], header, sender=site, sink=_Nowhere(), broadcast=False)  # type: ignore[arg-type]
        sealing.append(process_time() - begin)
        kept = io.BytesIO()
        sealed = seal([payload], header, sender=site, sink=kept, broadcast=False)
        envelope = sealed.envelope_for(coordinator.record)
        begin = process_time()
        opened = open_envelope(envelope, sender=site.record, recipient=coordinator, most_bytes=SIZE)
        opened.read(kept.getbuffer(), out)
        opening.append(process_time() - begin)
    return {
        "seal_gb_per_second": SIZE / 1e9 / median(sealing),
        "open_gb_per_second": SIZE / 1e9 / median(opening),
    }
