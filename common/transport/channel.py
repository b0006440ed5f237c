"""One port over mutual TLS: the options, credentials and calls that both ends of the plane use.

Control messages are protobuf, bulk is raw bytes: a protobuf `bytes` field costs half as much again at each end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol, TypeVar, cast

import grpc
from google.protobuf.message import Message

from common.transport import wire, wire_pb2

Item_co = TypeVar("Item_co", covariant=True)

COORDINATOR_DNS: Final = "coordinator.coterie.internal"
"""The one name that a client's TLS accepts, wherever the coordinator listens: no other leaf has it."""

_CONTROL_BYTES: Final = 4 << 20
"""Most bytes of one message: a run's configuration fits, and no peer makes the other end hold more."""
_SHARED: Final = (
    ("grpc.max_receive_message_length", _CONTROL_BYTES),
    ("grpc.max_send_message_length", _CONTROL_BYTES),
    ("grpc.max_metadata_size", 16 << 10),
)
CLIENT_OPTIONS: Final = (
    *_SHARED,
    ("grpc.http2.max_frame_size", 16_777_215),
    ("grpc.ssl_target_name_override", COORDINATOR_DNS),
    ("grpc.enable_retries", 0),  # a repeated call is the caller's decision: offsets change
    ("grpc.use_local_subchannel_pool", 1),  # a new channel is a new connection, with the certificate of now
    ("grpc.keepalive_time_ms", 30_000),  # a cut link is seen within a minute, not when TCP gives up
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.initial_reconnect_backoff_ms", 500),
    ("grpc.max_reconnect_backoff_ms", 10_000),
)
SERVER_OPTIONS: Final = (
    *_SHARED,
    # What is buffered of each upload that nobody reads yet. Frames of 16 KB, the default, cost a quarter more CPU;
    # larger ones, and windows that grow as a sender is quick, hold tens of megabytes for each of many sites.
    # At 50 ms a round trip a window of 1 MiB lets 20 MB/s through.
    ("grpc.http2.max_frame_size", 2 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 1 << 20),
    ("grpc.so_reuseport", 0),  # a second server on the port is an error, not a lottery
    ("grpc.max_concurrent_streams", 32),  # a connection; what a party may hold is counted by the service
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
)


class Tls(Protocol):
    """PEM bytes of a party's certificate chain, its private key, and the federation's root."""

    @property
    def chain(self) -> bytes: ...  # noqa: D102
    @property
    def key(self) -> bytes: ...  # noqa: D102
    @property
    def root(self) -> bytes: ...  # noqa: D102


class Stream(Protocol[Item_co]):
    """Answers as they come; iterating raises `grpc.RpcError` when the call ends with a refusal."""

    def __iter__(self) -> Iterator[Item_co]: ...
    def __next__(self) -> Item_co: ...
    def cancel(self) -> bool:
        """End the call; can be called from any thread."""
        ...


def server_credentials(tls: Callable[[], Tls]) -> grpc.ServerCredentials:
    """Mutual TLS for the coordinator; `tls` is asked again at every new connection.

    Guarantee: a renewed leaf is used from the next connection on. While `tls` raises, the one before stays.
    """
    used = tls()

    def changed() -> Any:  # None for no change, which the published types leave out
        nonlocal used
        try:
            now = tls()
        except Exception:  # noqa: BLE001 - a fault in the kit must not end the service
            return None
        if (now.chain, now.key, now.root) == (used.chain, used.key, used.root):
            return None
        used = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(_configuration(used), changed, require_client_authentication=True)


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(tls.key, tls.chain)], root_certificates=tls.root)


def channel(address: str, tls: Tls, *, options: Iterable[tuple[str, Any]] = ()) -> grpc.Channel:
    """A connection to the coordinator, made when the first call is.

    Guarantee: only the coordinator of the federation whose root `tls` holds can be at the other end.
    """
    credentials = grpc.ssl_channel_credentials(tls.root, tls.key, tls.chain)
    return grpc.secure_channel(address, credentials, options=[*CLIENT_OPTIONS, *options])


class PlaneCalls:
    """What sites, and parties with a certificate to renew, can call. Raises what gRPC raises: `refusal_of` reads it."""

    def __init__(self, connection: grpc.Channel) -> None:
        self._attach = connection.stream_stream(wire.ATTACH, _encode, wire_pb2.ServerEvent.FromString)
        self._fetch = connection.unary_stream(wire.FETCH, _encode, None)
        self._upload = connection.stream_unary(wire.UPLOAD, None, wire_pb2.UploadStatus.FromString)
        self._upload_state = connection.unary_unary(wire.UPLOAD_STATE, _encode, wire_pb2.UploadStatus.FromString)
        self._renew = connection.unary_unary(wire.RENEW, _encode, wire_pb2.CertificateAnswer.FromString)
        self._enrol = connection.unary_unary(wire.ENROL, _encode, wire_pb2.CertificateAnswer.FromString)

    def attach(self, events: Iterator[wire_pb2.ClientEvent]) -> Stream[wire_pb2.ServerEvent]:
        """Open the control stream. `events` is read in another thread; the first must be a Hello."""
        return cast("Stream[wire_pb2.ServerEvent]", self._attach(events))

    def fetch(self, digest: bytes, *, offset: int = 0) -> Stream[bytes]:
        """The frames of a blob from `offset` on; it is complete only when the order's count of bytes has come."""
        return cast("Stream[bytes]", self._fetch(wire_pb2.FetchRequest(digest=digest, offset=offset)))

    def upload(self, start: wire_pb2.UploadStart, frames: Iterable[bytes]) -> wire_pb2.UploadStatus:
        """Send the blob of an update from `start.offset` on, in frames of `FRAME_BYTES`; waits for a free place."""

        def everything() -> Iterator[bytes]:
            yield start.SerializeToString()
            yield from frames

        return cast("wire_pb2.UploadStatus", self._upload(everything()))

    def upload_state(self, message_id: bytes, *, timeout: float = 30) -> wire_pb2.UploadStatus:
        """How much of an update is there."""
        request = wire_pb2.UploadStateRequest(message_id=message_id)
        return cast("wire_pb2.UploadStatus", self._upload_state(request, timeout=timeout))

    def renew(self, csr_pem: bytes, *, timeout: float = 30) -> wire_pb2.CertificateAnswer:
        """A new certificate for the caller's identity and the key of this request."""
        request = wire_pb2.CertificateRequest(csr_pem=csr_pem)
        return cast("wire_pb2.CertificateAnswer", self._renew(request, timeout=timeout))

    def enrol(self, request: wire_pb2.CertificateRequest, *, timeout: float = 30) -> wire_pb2.CertificateAnswer:
        """Become a party, with a token's certificate."""
        return cast("wire_pb2.CertificateAnswer", self._enrol(request, timeout=timeout))


class OperatorCalls:
    """What operators can call."""

    def __init__(self, connection: grpc.Channel) -> None:
        self._submit = connection.unary_unary(wire.SUBMIT, _encode, wire_pb2.Document.FromString)
        self._ask = connection.unary_unary(wire.ASK, _encode, wire_pb2.Document.FromString)
        self._follow = connection.unary_stream(wire.FOLLOW, _encode, wire_pb2.Document.FromString)
        self._download = connection.unary_stream(wire.DOWNLOAD, _encode, None)

    def submit(self, request: wire_pb2.SubmitRequest, *, timeout: float = 60) -> wire_pb2.Document:
        """Queue a run."""
        return cast("wire_pb2.Document", self._submit(request, timeout=timeout))

    def ask(self, question: wire_pb2.Question, *, timeout: float = 60) -> wire_pb2.Document:
        """One answer."""
        return cast("wire_pb2.Document", self._ask(question, timeout=timeout))

    def follow(self, question: wire_pb2.Question) -> Stream[wire_pb2.Document]:
        """Answers as they come."""
        return cast("Stream[wire_pb2.Document]", self._follow(question))

    def download(self, question: wire_pb2.Question) -> Stream[bytes]:
        """The sealed envelope, then the frames of the blob from the byte on that `argument` says (decimal; none: 0)."""
        return cast("Stream[bytes]", self._download(question))


def refusal_of(error: grpc.RpcError) -> str:
    """The short code of a refusal, such as `denied`; `unreachable` where no coordinator answered."""
    call = cast("grpc.Call", error)  # what a call raises is the call itself
    try:
        return wire.Refusal(call.details() or "").value
    except ValueError:
        code: grpc.StatusCode = call.code()
        return "unreachable" if code is grpc.StatusCode.UNAVAILABLE else code.name.lower().replace("_", "-")


def _encode(message: Message) -> bytes:
    return message.SerializeToString()
