"""How a call is refused: a status of gRPC's and one fixed code, never the text of an exception."""

from __future__ import annotations

from typing import Final

from grpc import StatusCode

from common.transport.wire import Refusal

STATUS: Final = {
    Refusal.DENIED: StatusCode.PERMISSION_DENIED,
    Refusal.MALFORMED: StatusCode.INVALID_ARGUMENT,
    Refusal.PROTOCOL: StatusCode.FAILED_PRECONDITION,
    Refusal.ATTACHED_ELSEWHERE: StatusCode.ALREADY_EXISTS,
    Refusal.SILENT: StatusCode.DEADLINE_EXCEEDED,
    Refusal.UNKNOWN_BLOB: StatusCode.NOT_FOUND,
    Refusal.UNKNOWN_ORDER: StatusCode.NOT_FOUND,
    Refusal.WRONG_OFFSET: StatusCode.FAILED_PRECONDITION,
    Refusal.OTHER_UPDATE: StatusCode.FAILED_PRECONDITION,
    Refusal.TOO_LARGE: StatusCode.INVALID_ARGUMENT,
    Refusal.SUPERSEDED: StatusCode.ABORTED,
    Refusal.DISK_FULL: StatusCode.RESOURCE_EXHAUSTED,
    Refusal.NO_RESULT: StatusCode.NOT_FOUND,
    Refusal.BUSY: StatusCode.RESOURCE_EXHAUSTED,
    Refusal.STOPPING: StatusCode.UNAVAILABLE,
    Refusal.FAILED: StatusCode.INTERNAL,
}


class RefusedCallError(Exception):
    """Ends a call with a refusal."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.value)
        self.refusal = refusal
