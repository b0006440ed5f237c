"""The clock of a simulation: moved on by whoever knows what happens next, and never back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from common.errors import RunError
from server.job import ClockRecord


class Launch(NamedTuple):
    """When a client was asked that is still at work, and when it is done, late or gone."""

    at: float
    ends: float


Order = tuple[str, int]
"""What a client is asked: its name, and the round."""


class VirtualClock:
    """Virtual seconds since the run began, and what devices did with them; a `server.job.Clock`.

    Attributes:
        launches: Who is still at work; only asynchronous rounds leave anybody behind.
    """

    def __init__(self) -> None:
        self.launches: dict[Order, Launch] = {}
        self._left: dict[Order, Launch] = {}
        """Launches of an earlier process that nobody has asked for again yet."""
        self._left_at = 0.0
        self._now = 0.0
        self._work: list[float] = []
        self._wasted: list[float] = []

    @property
    def now(self) -> float:
        """The present moment."""
        return self._now

    def advance(self, to: float) -> None:
        """Let it be as late as this; a moment that is over changes nothing."""
        self._now = max(self._now, to)

    def worked(self, seconds: float, *, wasted: bool) -> None:
        """Note that a device was at work."""
        self._work.append(seconds)
        if wasted:
            self._wasted.append(seconds)

    def wasted(self, seconds: float) -> None:
        """Note that work came to nothing which has been counted."""
        self._wasted.append(seconds)

    def launched(self, order: Order) -> float:
        """When a client was asked: now, or before the run was left, if it is asked the same again."""
        launch = self._left.pop(order, None)
        return self._now if launch is None else launch.at

    def landed(self, order: Order) -> None:
        """Note that a client is at work no more."""
        self.launches.pop(order, None)

    def lap(self) -> ClockRecord:
        """What happened since the last lap; the same to the bit, in whatever order it was noted.

        Who was at work when the run was left, and was not asked again since, was given up when the run went on.
        """
        for order, launch in self._left.items():
            self.worked(min(self._left_at, launch.ends) - launch.at, wasted=True)
            self.landed(order)
        self._left = {}
        work, wasted = math.fsum(self._work), math.fsum(self._wasted)
        self._work, self._wasted = [], []
        return ClockRecord(at_seconds=self._now, work_seconds=work, wasted_seconds=wasted)

    def state(self) -> dict[str, Any]:
        """The moment, and who is at work since when."""
        return {"now": self._now, "launches": [[*order, *launch] for order, launch in self.launches.items()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on at that moment, as if it had not been left.

        Raises:
            RunError: It is no state of a clock.
        """
        try:
            launches = {
                (str(name), int(server_round)): Launch(at=float(at), ends=float(ends))
                for name, server_round, at, ends in state["launches"]
            }
            now = float(state["now"])
        except (KeyError, TypeError, ValueError) as e:
            raise RunError("the checkpoint's virtual time is damaged", hint="start a new run") from e
        self.launches, self._left, self._left_at, self._now = launches, dict(launches), now, now
        self._work, self._wasted = [], []
