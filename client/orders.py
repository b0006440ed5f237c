"""What a site was asked: orders that wait, the one that is worked on, those that failed, and those that are over."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from common.errors import FailureCode
from common.transport import wire_pb2

_OVER_KEPT: Final = 10_000


@dataclass(slots=True)
class Task:
    """An order until its answer is stored.

    Attributes:
        order: As it came.
        deadline: When nobody waits any more, by `time.monotonic`; None: never.
        stage: idle (it waits), fetching or working.
        cancelled: Whether nobody waits for it any more.
    """

    order: wire_pb2.Order
    deadline: float | None
    stage: str = "idle"
    cancelled: bool = False

    @property
    def message_id(self) -> bytes:
        """The order's id."""
        return self.order.message_id


class Orders:
    """Orders by message id; thread-safe.

    Guarantee: an order is handed out once, however often it is entered.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._tasks: OrderedDict[bytes, Task] = OrderedDict()
        self._failures: dict[bytes, FailureCode] = {}
        self._over: OrderedDict[bytes, None] = OrderedDict()

    def enter(self, order: wire_pb2.Order) -> bool:
        """Let an order wait; False where it is known."""
        message_id = order.message_id
        with self._changed:
            if message_id in self._tasks or message_id in self._failures or message_id in self._over:
                return False
            deadline = time.monotonic() + order.seconds_left if order.seconds_left else None
            self._tasks[message_id] = Task(order=order, deadline=deadline)
            self._changed.notify_all()
        return True

    def next(self, ending: Callable[[], bool]) -> Task | None:
        """The oldest order that somebody still waits for, as soon as there is one; None when `ending`."""
        with self._changed:
            self._changed.wait_for(lambda: ending() or self._ready() is not None)
            task = None if ending() else self._ready()
            if task is not None:
                task.stage = "fetching"
            return task

    def wake(self) -> None:
        """Have `ending` asked again."""
        with self._changed:
            self._changed.notify_all()

    def end(self, task: Task) -> None:
        """An order is worked on no more."""
        with self._changed:
            self._tasks.pop(task.message_id, None)

    def fail(self, task: Task, failure: FailureCode) -> bool:
        """Keep a failure until the coordinator has it; False where nobody waits for it."""
        with self._changed:
            if not task.cancelled:
                self._failures[task.message_id] = failure
            return not task.cancelled

    def close(self, message_id: bytes) -> None:
        """Nobody waits for this order any more, or its answer has arrived."""
        with self._changed:
            task = self._tasks.get(message_id)
            if task is not None:
                task.cancelled = True
                if task.stage == "idle":
                    del self._tasks[message_id]
            self._failures.pop(message_id, None)
            self._over[message_id] = None
            if len(self._over) > _OVER_KEPT:
                self._over.popitem(last=False)

    def failures(self) -> dict[bytes, FailureCode]:
        """Failures that the coordinator may not have."""
        with self._changed:
            return dict(self._failures)

    def held(self) -> list[bytes]:
        """Orders that need not be sent again."""
        with self._changed:
            return [*self._tasks, *self._failures]

    def current(self) -> Task | None:
        """What is worked on."""
        with self._changed:
            return next((task for task in self._tasks.values() if task.stage != "idle"), None)

    def _ready(self) -> Task | None:
        now = time.monotonic()
        for message_id, task in list(self._tasks.items()):
            if task.deadline is None or now <= task.deadline:
                return task
            del self._tasks[message_id]  # the coordinator closes it by itself
        return None
