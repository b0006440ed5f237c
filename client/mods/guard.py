"""Outermost mod: whatever goes wrong at a client, the coordinator learns a code and never an exception's text."""

from __future__ import annotations

from contextlib import suppress

import structlog
from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable

from common.errors import BudgetExhaustedError, FailureCode, PeerError
from common.flower import failure_reply

log = structlog.get_logger()


def guard_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Turn any exception into a typed failure; the site's own log keeps the exception's type and place, not its
    text.
    """
    try:
        return call_next(message, context)
    except PeerError as e:
        return failure_reply(message, e.failure)
    except BudgetExhaustedError:
        return failure_reply(message, FailureCode.BUDGET_EXHAUSTED)
    except Exception as e:  # noqa: BLE001 - the boundary: nothing may pass
        place = e.__traceback__
        while place and place.tb_next:
            place = place.tb_next
        where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place else ""
        with suppress(OSError, ValueError):  # a log that is full or closed must not cost the reply
            log.error("client_failed", error=type(e).__name__, where=where)  # noqa: TRY400 - a trace can quote data
        return failure_reply(message, FailureCode.CLIENT_FAILED)
