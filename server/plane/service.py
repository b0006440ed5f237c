"""Which method is answered by what, and for whom."""

from __future__ import annotations

from typing import Any

import grpc

from common.transport import wire
from server.plane.attaching import Attaching
from server.plane.bulk import Bulk
from server.plane.enrolling import Enrolling
from server.plane.guard import Guard
from server.plane.questions import Questions

Handlers = Any
"""gRPC's `GenericRpcHandler`: its published type has parameters that it does not have."""


def plane_handlers(guard: Guard, attaching: Attaching, bulk: Bulk, enrolling: Enrolling) -> Handlers:
    """Sites' methods, and certificates for everybody."""
    wrap, stream = guard.wrap, grpc.stream_stream_rpc_method_handler
    unary, down, up = _UNARY, _DOWN, grpc.stream_unary_rpc_method_handler
    return _handlers(
        wire.PLANE,
        {
            wire.ATTACH: stream(wrap(attaching.attach, "site", streams=True)),
            wire.FETCH: down(wrap(bulk.fetch, "site", streams=True)),
            wire.UPLOAD: up(wrap(bulk.upload, "site")),
            wire.UPLOAD_STATE: unary(wrap(bulk.upload_state, "site")),
            wire.RENEW: unary(wrap(enrolling.renew, "site", "operator", "coordinator")),
            wire.ENROL: unary(wrap(enrolling.enrol, "enrol")),
        },
    )


def operator_handlers(guard: Guard, questions: Questions) -> Handlers:
    """Operators' methods."""
    wrap = guard.wrap
    return _handlers(
        wire.OPERATOR,
        {
            wire.SUBMIT: _UNARY(wrap(questions.submit, "operator")),
            wire.ASK: _UNARY(wrap(questions.ask, "operator")),
            wire.FOLLOW: _DOWN(wrap(questions.follow, "operator", streams=True)),
            wire.DOWNLOAD: _DOWN(wrap(questions.download, "operator", streams=True)),
        },
    )


_UNARY, _DOWN = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler


def _handlers(service: str, methods: dict[str, Any]) -> Handlers:
    return grpc.method_handlers_generic_handler(service, {name.rsplit("/", 1)[1]: h for name, h in methods.items()})
