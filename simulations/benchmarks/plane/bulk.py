"""An update's way up, in CPU seconds of both ends, beside the same bytes over a plain TLS 1.3 socket in the same run.

Both read a file and write a file. Run as a process: `python -m simulations.benchmarks.plane.bulk KIT BYTES` is the
coordinator's end: a line `transport` or `sealed` on stdin has it wait for one upload, and print its CPU seconds.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import process_time

from common.crypto import COORDINATOR_DNS, KINDS, NO_ID, Direction, Header, blob_size, open_envelope, seal
from common.kit import Kit, load_kit
from common.transport import wire_pb2
from common.transport.channel import PlaneCalls, channel
from common.transport.wire import FRAME_BYTES
from server.plane.hub import Hub
from server.plane.orders import Answer, Delivery, Order, Result
from server.plane.server import PlaneServer
from simulations.benchmarks.plane import raw
from simulations.benchmarks.plane.processes import line, module, tell

SITE = "site-000"


def figures(server: Path, site: Path, *, size: int, pairs: int) -> dict[str, float]:
    """Raw over ours, higher is better: sealed end to end, and the transport alone."""
    kit = load_kit(site, role="site")
    payload = site / "payload"
    with payload.open("wb") as file:
        for _ in range(size >> 20):
            file.write(os.urandom(1 << 20))
    for folder in (server, site):
        shutil.copy(folder / "tls/chain.pem", folder / "chain.pem")
        shutil.copy(folder / "tls/private.pem", folder / "private.pem")
    ratios: dict[str, list[float]] = {"transport": [], "sealed": []}
    with module("raw", server, size) as plain, module("bulk", server, size) as ours:
        port = int(line(plain))
        with channel(line(ours), kit.tls()) as connection:
            calls = PlaneCalls(connection)
            for _ in range(pairs):
                for kind, seen in ratios.items():
                    tell(plain)
                    reference = raw.send(payload, site, port, COORDINATOR_DNS) + float(line(plain))
                    seen.append(reference / _upload(kind, kit, calls, ours, payload))
    return {
        "upload_over_raw_tls": median(ratios["sealed"]),
        "transport_over_raw_tls": median(ratios["transport"]),
    }


def _upload(kind: str, kit: Kit, calls: PlaneCalls, ours: subprocess.Popen[str], payload: Path) -> float:
    """One upload; CPU seconds of both ends."""
    update = memoryview(payload.read_bytes())  # what is sealed lies in memory
    size = update.nbytes
    tell(ours, kind)
    message_id = bytes.fromhex(line(ours))
    begin = process_time()
    path, envelope, blob_bytes = payload, bytes(64), size
    if kind == "sealed":
        path, blob_bytes = payload.with_name("sealed"), blob_size(size)
        with path.open("wb", buffering=0) as sink:
            sealed = seal([update], _header(kit, size), sender=kit.keys, sink=sink, broadcast=False)
        envelope = sealed.envelope_for(kit.coordinator)
    start = wire_pb2.UploadStart(message_id=message_id, envelope=envelope, blob_bytes=blob_bytes, offset=0)
    calls.upload(start, _frames(path))
    seconds = process_time() - begin
    return seconds + float(line(ours))


def _frames(path: Path) -> Iterator[bytes]:
    with path.open("rb", buffering=0) as file:
        while frame := file.read(FRAME_BYTES):
            yield frame


def _header(kit: Kit, size: int) -> Header:
    return Header(
        direction=Direction.UP,
        kind=KINDS["train"],
        run_id=bytes(16),
        server_round=1,
        attempt=0,
        sender=kit.keys.record.key_id,
        message_id=secrets.token_bytes(16),
        reply_to=NO_ID,
        plaintext_bytes=size,
        manifest=bytes(32),
        config_digest=bytes(32),
        cohort_digest=bytes(32),
        base_digest=bytes(32),
    )


class _Receiver:
    """The coordinator's end of one upload after another."""

    def __init__(self, kit: Kit, hub: Hub, size: int) -> None:
        self._kit, self._hub, self._size = kit, hub, size
        self._plain = bytearray(size)

    def receive(self, kind: str) -> None:
        arrived, results = threading.Event(), []

        def result(told: Result) -> None:
            results.append(told)
            arrived.set()

        blob = self._hub.blobs / "request"
        blob.write_bytes(b".")
        message_id = secrets.token_bytes(16)
        order = Order(
            message_id=message_id,
            site=SITE,
            kind="train",
            envelope=bytes(64),
            blob=blob,
            blob_digest=bytes(32),
            blob_bytes=1,
            most_bytes=2 * self._size,
        )
        begin = process_time()
        self._hub.send(order, Delivery(result=result))
        print(message_id.hex(), flush=True)
        arrived.wait()
        answer = results[0]
        if not isinstance(answer, Answer):
            raise RuntimeError(f"no update: {answer}")  # noqa: TRY004 - not an argument
        if kind == "sealed":
            opening = open_envelope(
                answer.envelope, sender=self._kit.sites[SITE], recipient=self._kit.keys, most_bytes=self._size
            )
            with answer.path.open("rb", buffering=0) as file:
                opening.read(file, self._plain)
        print(process_time() - begin, flush=True)
        answer.path.unlink()


def main() -> None:
    """Serve uploads until stdin closes."""
    kit, size = load_kit(Path(sys.argv[1]), role="coordinator"), int(sys.argv[2])
    hub = Hub(kit.state / "plane")
    with PlaneServer(kit, host="127.0.0.1", port=0, hub=hub) as server:
        print(f"127.0.0.1:{server.port}", flush=True)
        receiver = _Receiver(kit, hub, size)
        for word in sys.stdin:
            receiver.receive(word.strip())


if __name__ == "__main__":
    main()
