"""A thousand sites that are attached and wait, each with its own connection and certificate, in one event loop.

Run as a process: `python -m simulations.benchmarks.plane.waiting ADDRESS KITS FIRST END`; prints a line when all of
them are attached, and answers orders as an agent would.
"""

from __future__ import annotations

import asyncio
import io
import secrets
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
from flwr.app import MetricRecord, RecordDict
from grpc import aio

from common.crypto import Direction, Header, open_envelope, seal
from common.flower import ARRAYS, METRICS, TRAIN_LOSS, WEIGHT, arrays_of, to_record
from common.kit import Kit, load_kit
from common.transport import wire, wire_pb2
from common.transport.channel import CLIENT_OPTIONS
from common.transport.records import decode_records, encode_records, manifest
from common.transport.sealed import order_id
from common.transport.wire import FRAME_BYTES

MOST_BYTES = 64 << 20


async def serve(address: str, kit: Kit, attached: asyncio.Semaphore) -> None:
    """Stay attached, answer what is ordered."""
    tls = kit.tls()
    credentials = grpc.ssl_channel_credentials(tls.root, tls.key, tls.chain)
    said: asyncio.Queue[wire_pb2.ClientEvent] = asyncio.Queue()
    hello = wire_pb2.Hello(protocol=wire.PROTOCOL, version="benchmark", instance=secrets.token_bytes(16))
    await said.put(wire_pb2.ClientEvent(hello=hello))
    interval = 20.0

    async def events() -> AsyncIterator[bytes]:
        while True:
            try:
                event = await asyncio.wait_for(said.get(), interval)
            except TimeoutError:
                event = wire_pb2.ClientEvent(heartbeat=wire_pb2.Heartbeat(state="idle"))
            yield event.SerializeToString()

    async with aio.secure_channel(address, credentials, options=CLIENT_OPTIONS) as connection:
        async for data in connection.stream_stream(wire.ATTACH, None, None)(events()):
            event = wire_pb2.ServerEvent.FromString(data)
            kind = event.WhichOneof("event")
            if kind == "welcome":
                interval = event.welcome.heartbeat_seconds
                attached.release()
            elif kind == "order":
                await answer(connection, kit, event.order)


async def answer(connection: aio.Channel, kit: Kit, order: wire_pb2.Order) -> None:
    """Send the model back as it came."""
    request = wire_pb2.FetchRequest(digest=order.blob_digest).SerializeToString()
    came = bytearray()
    async for frame in connection.unary_stream(wire.FETCH, None, None)(request):
        came += frame
    blob = _seal(kit, order, came)

    async def frames() -> AsyncIterator[bytes]:
        start = wire_pb2.UploadStart(message_id=order.message_id, envelope=blob[0], blob_bytes=len(blob[1]))
        yield start.SerializeToString()
        for at in range(0, len(blob[1]), FRAME_BYTES):
            yield blob[1][at : at + FRAME_BYTES]

    await connection.stream_unary(wire.UPLOAD, None, None)(frames())


def _seal(kit: Kit, order: wire_pb2.Order, came: bytearray) -> tuple[bytes, bytes]:

    opening = open_envelope(order.envelope, sender=kit.coordinator, recipient=kit.keys, most_bytes=MOST_BYTES)
    plain = bytearray(opening.header.plaintext_bytes)
    opening.read(io.BytesIO(came), plain)
    metrics = MetricRecord({WEIGHT: 1.0, TRAIN_LOSS: 0.5})
    content = RecordDict({ARRAYS: to_record(arrays_of(decode_records(plain))), METRICS: metrics})
    parts, asked = encode_records(content), opening.header
    header = Header(
        direction=Direction.UP,
        kind=asked.kind,
        run_id=asked.run_id,
        server_round=asked.server_round,
        attempt=asked.attempt,
        sender=kit.keys.record.key_id,
        message_id=secrets.token_bytes(16),
        reply_to=order_id(order.envelope),
        plaintext_bytes=sum(memoryview(part).nbytes for part in parts),
        manifest=manifest(content),
        config_digest=asked.config_digest,
        cohort_digest=asked.cohort_digest,
        base_digest=opening.blob_digest or bytes(32),
    )
    sink = io.BytesIO()
    sealed = seal(parts, header, sender=kit.keys, sink=sink, broadcast=False)
    return sealed.envelope_for(kit.coordinator), sink.getvalue()


async def main() -> None:
    """Attach them all, then wait for orders until stdin closes."""
    address, kits, first, end = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    attached = asyncio.Semaphore(0)
    tasks = []
    for i in range(first, end):
        kit = load_kit(kits / f"crowd-{i:04d}", role="site")
        tasks.append(asyncio.create_task(serve(address, kit, attached)))
        await asyncio.sleep(0)
    for _ in tasks:
        await attached.acquire()
    print("attached", flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
