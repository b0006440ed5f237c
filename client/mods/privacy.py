"""The ledger comes first: a round's events are on disk before its first noisy step, or the round does not take
place.
"""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable, Mod

from client.request import TrainRequest, parse_request
from common.privacy import Ledger


def privacy_mod(ledger_of: Callable[[TrainRequest, Context], Ledger]) -> Mod:
    """A mod that reserves a private round in the client's ledger, and refuses a round that would overspend.

    It belongs around training alone, and never looks at a message's type: Flower also answers `train.default`.
    """

    def reserve(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        request = parse_request(message)
        if request.plan is not None:
            event = request.plan.event(request.server_round)
            ledger_of(request, context).reserve(event, budget=request.plan.budget)
        return call_next(message, context)

    return reserve
