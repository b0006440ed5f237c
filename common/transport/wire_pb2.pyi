from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ClientEvent(_message.Message):
    __slots__ = ("hello", "heartbeat", "failure")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    heartbeat: Heartbeat
    failure: Failure
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol", "version", "held", "instance")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    version: str
    held: _containers.RepeatedScalarFieldContainer[bytes]
    instance: bytes
    def __init__(self, protocol: _Optional[int] = ..., version: _Optional[str] = ..., held: _Optional[_Iterable[bytes]] = ..., instance: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("working_on", "state")
    WORKING_ON_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    working_on: bytes
    state: str
    def __init__(self, working_on: _Optional[bytes] = ..., state: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("message_id", "code")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    CODE_FIELD_NUMBER: _ClassVar[int]
    message_id: bytes
    code: int
    def __init__(self, message_id: _Optional[bytes] = ..., code: _Optional[int] = ...) -> None: ...

class ServerEvent(_message.Message):
    __slots__ = ("welcome", "order", "cancel", "receipt", "ping")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    order: Order
    cancel: Cancel
    receipt: Receipt
    ping: Ping
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., order: _Optional[_Union[Order, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("protocol", "heartbeat_seconds", "version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    heartbeat_seconds: float
    version: str
    def __init__(self, protocol: _Optional[int] = ..., heartbeat_seconds: _Optional[float] = ..., version: _Optional[str] = ...) -> None: ...

class Order(_message.Message):
    __slots__ = ("message_id", "kind", "envelope", "blob_digest", "blob_bytes", "seconds_left")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    BLOB_DIGEST_FIELD_NUMBER: _ClassVar[int]
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    SECONDS_LEFT_FIELD_NUMBER: _ClassVar[int]
    message_id: bytes
    kind: str
    envelope: bytes
    blob_digest: bytes
    blob_bytes: int
    seconds_left: float
    def __init__(self, message_id: _Optional[bytes] = ..., kind: _Optional[str] = ..., envelope: _Optional[bytes] = ..., blob_digest: _Optional[bytes] = ..., blob_bytes: _Optional[int] = ..., seconds_left: _Optional[float] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: bytes
    def __init__(self, message_id: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: bytes
    def __init__(self, message_id: _Optional[bytes] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("digest", "offset")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    offset: int
    def __init__(self, digest: _Optional[bytes] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadStart(_message.Message):
    __slots__ = ("message_id", "envelope", "blob_bytes", "offset")
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    ENVELOPE_FIELD_NUMBER: _ClassVar[int]
    BLOB_BYTES_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    message_id: bytes
    envelope: bytes
    blob_bytes: int
    offset: int
    def __init__(self, message_id: _Optional[bytes] = ..., envelope: _Optional[bytes] = ..., blob_bytes: _Optional[int] = ..., offset: _Optional[int] = ...) -> None: ...

class UploadStatus(_message.Message):
    __slots__ = ("received", "complete")
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    received: int
    complete: bool
    def __init__(self, received: _Optional[int] = ..., complete: _Optional[bool] = ...) -> None: ...

class UploadStateRequest(_message.Message):
    __slots__ = ("message_id",)
    MESSAGE_ID_FIELD_NUMBER: _ClassVar[int]
    message_id: bytes
    def __init__(self, message_id: _Optional[bytes] = ...) -> None: ...

class CertificateRequest(_message.Message):
    __slots__ = ("csr_pem", "record", "signature")
    CSR_PEM_FIELD_NUMBER: _ClassVar[int]
    RECORD_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    csr_pem: bytes
    record: str
    signature: bytes
    def __init__(self, csr_pem: _Optional[bytes] = ..., record: _Optional[str] = ..., signature: _Optional[bytes] = ...) -> None: ...

class CertificateAnswer(_message.Message):
    __slots__ = ("chain_pem", "parties")
    CHAIN_PEM_FIELD_NUMBER: _ClassVar[int]
    PARTIES_FIELD_NUMBER: _ClassVar[int]
    chain_pem: bytes
    parties: str
    def __init__(self, chain_pem: _Optional[bytes] = ..., parties: _Optional[str] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("config", "authorization")
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    AUTHORIZATION_FIELD_NUMBER: _ClassVar[int]
    config: str
    authorization: str
    def __init__(self, config: _Optional[str] = ..., authorization: _Optional[str] = ...) -> None: ...

class Question(_message.Message):
    __slots__ = ("what", "run", "argument")
    WHAT_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ARGUMENT_FIELD_NUMBER: _ClassVar[int]
    what: str
    run: str
    argument: str
    def __init__(self, what: _Optional[str] = ..., run: _Optional[str] = ..., argument: _Optional[str] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("json",)
    JSON_FIELD_NUMBER: _ClassVar[int]
    json: str
    def __init__(self, json: _Optional[str] = ...) -> None: ...
