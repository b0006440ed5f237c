"""The sum of clipped updates, formed while replies arrive, and answered by its release: noised, never itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import Message
from flwr.serverapp import Grid
from numpy.typing import NDArray
from torch import nn

from common.errors import PrivacyError
from common.flower import WITHIN, arrays_of, metrics_of
from server.grids.base import WrappingGrid, stream_replies
from server.grids.mean_reply import mean_reply, no_single_replies, parts
from server.grids.spooling import Shelf

Arrays = Mapping[str, NDArray[Any]]

HEADROOM: Final = 2.0**-16
"""By how much, relatively, updates are clipped below the clipping norm: room for all that rounding in float64 can add.
`check_rounding` says when it is enough."""

_WHY: Final = "under client-level privacy"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ClippedSum:
    """What the coordinator is trusted with, and nobody else sees without noise.

    Attributes:
        update: float64[d]: the sum of all clipped updates, over the trainable parameters one after the other.
        within: Sum over the replies of b - 1/2, b being 1 where the client says that its update lay within the norm.
        asked: How many clients were asked.
    """

    update: NDArray[np.float64]
    within: float
    asked: int


Release = Callable[[ClippedSum], NDArray[np.float64]]
"""Makes of the sum what may be known: the mean update with noise, float64[d]. Called once a round."""


def trainable_names(model: nn.Module) -> list[str]:
    """Names of the arrays that training changes, in the model's order; buffers and frozen parameters are not among
    them.
    """
    return [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor.requires_grad]


class ClippedSumGrid(WrappingGrid):
    """Answers a strategy with one reply: the model plus the released mean update, with weight 1.

    So a strategy that takes the mean of the replies steps by what was released and sees nothing else. Replies are added
    in the order of the messages, in float64.

    Guarantee:
        One client changes the sum by at most `clipping_norm` in L2 norm and the count by at most 1/2, whatever it
        sends: every update is clipped here, whether or not the client did. A failed reply, and one that is not finite,
        adds nothing to either. There is exactly one release, also where nobody answered or nobody was asked.
        Arrays that are not `trainable` are the model's own in the answer; what clients send for them is not looked at.
        Failed replies pass through as they arrive.

    Source:
        McMahan et al. 2018 (arXiv 1710.06963), algorithm 1, with the fixed denominator of its section 3.1.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        model: Arrays,
        trainable: Sequence[str],
        clipping_norm: float,
        release: Release,
        folder: Path | None = None,
    ) -> None:
        """Prepare one round.

        Args:
            inner: A grid that lets only sound replies pass.
            model: What the round's messages carry.
            trainable: The floating-point arrays of it that training changes.
            clipping_norm: L2 bound on one client's update.
            release: Adds noise and divides by a public constant.
            folder: Where early replies wait that memory is not kept for; None takes the system's temporary files.
        """
        super().__init__(inner)
        self._model = model
        self._trainable = trainable
        self._bound = clipping_norm * (1 - HEADROOM)
        self._release = release
        self._folder = folder

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """The failed replies as they arrive, then the one answer."""
        messages = list(messages)
        order = [message.metadata.dst_node_id for message in messages]
        total = np.zeros(sum(self._model[name].size for name in self._trainable))
        within, next_place = 0.0, 0
        early = Shelf(folder=self._folder)
        heard: set[int] = set()
        for reply in stream_replies(self._inner, messages, timeout) if messages else ():
            if reply.metadata.src_node_id in heard:
                continue
            heard.add(reply.metadata.src_node_id)
            if reply.has_error():
                yield reply
            if next_place < len(order) and order[next_place] == reply.metadata.src_node_id:
                within += self._add(total, reply)
                next_place += 1
            else:
                early.put(reply.metadata.src_node_id, reply)
            del reply  # or it stays in memory while the next one arrives
            while next_place < len(order) and order[next_place] in early:
                within += self._add(total, early.take(order[next_place]))
                next_place += 1
        for node in order[next_place:]:
            if node in early:
                within += self._add(total, early.take(node))
        mean = self._release(ClippedSum(update=total, within=within, asked=len(messages)))
        yield mean_reply(self._model, self._trainable, mean, to=messages[0] if messages else None)

    def push_messages(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[str]:  # noqa: ARG002
        """Refused: replies that are pulled one by one would pass the noise by."""
        raise no_single_replies(_WHY)

    def pull_messages(self, message_ids: Iterable[str], *, needed: int | None = None) -> list[Message]:  # noqa: ARG002
        """Refused, as `push_messages` is."""
        raise no_single_replies(_WHY)

    def _add(self, total: NDArray[np.float64], reply: Message) -> float:
        """Add a reply's clipped update to the sum; what it adds to the count."""
        if reply.has_error():
            return 0.0
        arrays = arrays_of(reply.content)
        update = np.empty_like(total)
        for name, part in parts(self._model, self._trainable, update):
            np.subtract(arrays[name].reshape(-1), self._model[name].reshape(-1), out=part, dtype=np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            length = math.sqrt(float(update @ update))
        if not math.isfinite(length):
            return 0.0
        if length > self._bound:
            update *= self._bound / length
        total += update
        return 0.5 if metrics_of(reply.content).get(WITHIN) == 1 else -0.5


def check_rounding(coefficients: Sequence[float], *, rounds: int, asked: int) -> None:
    """Refuse a round in which rounding in float64 could move neighbouring sums further apart than `HEADROOM` allows.

    A sum of m vectors of norm at most C, formed one after the other, is off by at most (m - 1) u m C with u = 2^-53
    (Higham 2002, section 4.2). A row of the matrix product with b coefficients, and its division by the noise's grid,
    is off by at most (b + 4) u |c| m C more, |c| being the sum of the coefficients, which also bounds what the matrix
    makes of the first error. Neighbours differ by twice that, over n rounds by sqrt(n) times as much. Where this stays
    below C HEADROOM, clipping to C (1 - HEADROOM) keeps neighbours within C times `matrix.sensitivity`, before rounding
    to the grid; that adds at most grid * sqrt(d n), half a step for either neighbour on each coordinate and row.

    Args:
        coefficients: Of the matrix; (1.0,) for independent noise.
        rounds: n; independent noise is one release a round, and n counts as 1.
        asked: m.

    Raises:
        PrivacyError: Too many clients were asked.
    """
    rows = rounds if len(coefficients) > 1 else 1
    if 2.0**-52 * asked * sum(coefficients) * rows**0.5 * (asked + len(coefficients) + 4) > HEADROOM:
        raise PrivacyError(
            f"the sum of {asked} updates cannot be formed exactly enough for its noise",
            hint="ask fewer clients a round",
        )
