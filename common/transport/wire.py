"""Names and limits of the plane that both ends share, without gRPC: methods, refusals, sizes of fields."""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeVar

from google.protobuf.message import DecodeError, Message

from common.errors import RefusedError

M = TypeVar("M", bound=Message)

PROTOCOL: Final = 1
"""Version of the control messages; both ends must have the same."""
FRAME_BYTES: Final = 1 << 20
"""Most bytes of one raw frame. Larger ones are no faster, and each costs its size in memory."""
ID_BYTES: Final = 16
DIGEST_BYTES: Final = 32
MOST_ENVELOPE_BYTES: Final = 64 << 10
"""A sealed envelope has about 5 KB with both signatures."""
MOST_HELD: Final = 1024
"""Most orders that an agent may hold."""

PLANE: Final = "coterie.v1.Plane"
ATTACH: Final = f"/{PLANE}/Attach"
FETCH: Final = f"/{PLANE}/Fetch"
UPLOAD: Final = f"/{PLANE}/Upload"
UPLOAD_STATE: Final = f"/{PLANE}/UploadState"
RENEW: Final = f"/{PLANE}/Renew"
ENROL: Final = f"/{PLANE}/Enrol"

OPERATOR: Final = "coterie.v1.Operator"
SUBMIT: Final = f"/{OPERATOR}/Submit"
ASK: Final = f"/{OPERATOR}/Ask"
FOLLOW: Final = f"/{OPERATOR}/Follow"
DOWNLOAD: Final = f"/{OPERATOR}/Download"


class Refusal(StrEnum):
    """Why a call is refused: all that a peer learns, as the details of a gRPC status."""

    DENIED = "denied"
    """On the deny list, not a party of this federation, or of a role that may not do this."""
    MALFORMED = "malformed"
    PROTOCOL = "protocol"
    """The other end has another version of the control messages."""
    ATTACHED_ELSEWHERE = "attached-elsewhere"
    """Another living process is attached under this identity."""
    SILENT = "silent"
    """Nothing was heard for too long."""
    UNKNOWN_BLOB = "unknown-blob"
    """There is no open order for this site with that blob."""
    UNKNOWN_ORDER = "unknown-order"
    """Nobody waits for this update (any more): forget it."""
    WRONG_OFFSET = "wrong-offset"
    """Ask `UploadState` how much is there."""
    OTHER_UPDATE = "other-update"
    """An upload was begun with another envelope: begin anew at offset 0."""
    TOO_LARGE = "too-large"
    """More than was announced, or than an answer to this order may have: forget it."""
    SUPERSEDED = "superseded"
    """The same site has opened this upload again."""
    DISK_FULL = "disk-full"
    """Try again later."""
    NO_RESULT = "no-result"
    """There is nothing to download; `Ask` says why."""
    BUSY = "busy"
    """Too many calls at once: try again later."""
    STOPPING = "stopping"
    """The coordinator is shutting down: try again later."""
    FAILED = "failed"
    """A fault at the coordinator: try again later."""


def parse(kind: type[M], data: bytes) -> M:
    """A control message from its bytes.

    Raises:
        RefusedError: These are not the bytes of one.
    """
    message = kind()
    try:
        message.ParseFromString(data)
    except (DecodeError, ValueError, RecursionError) as e:
        raise RefusedError("a control message cannot be read") from e
    return message
