"""What happens now, for those who watch: each run's round, cohort and replies. Nothing here outlasts the process."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common.errors import FailureCode
from server.job import Observer, RoundRecord

ASKED, RECEIVED, USED = "asked", "received", "used"
"""How far a site is in a round: its order is open; its update is here; it was verified and counts."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Live:
    """One run as it stands.

    Attributes:
        step: What the service does for it now, such as `preparing` or `training`.
        server_round: The round that is being worked on, or the last; 0 before the first.
        done: Rounds that are complete.
        cohort: Who is asked in it.
        replies: By site how far it is, or the slug of its failure.
        last: The last complete round's row, or None.
        problem: Why it does not get on at the moment, or empty.
    """

    step: str = ""
    server_round: int = 0
    done: int = 0
    cohort: tuple[str, ...] = ()
    replies: Mapping[str, str] = field(default_factory=dict)
    last: Mapping[str, Any] | None = None
    problem: str = ""


class Board:
    """Where every run stands. Changes are numbered, so that who watches misses none for ever."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._version = 0
        self._runs: dict[str, Live] = {}

    def live(self, run_id: str) -> Live:
        """One run."""
        with self._changed:
            return self._runs.get(run_id, Live())

    def update(self, run_id: str, **changes: Any) -> None:
        """Change what is told of a run."""
        with self._changed:
            self._runs[run_id] = replace(self._runs.get(run_id, Live()), **changes)
            self._bump()

    def reply(self, run_id: str, site: str, state: str, *, only_after: tuple[str, ...] = ()) -> None:
        """Note how far a site is in the present round; `only_after`: unless it is further already."""
        with self._changed:
            live = self._runs.get(run_id, Live())
            if only_after and live.replies.get(site) not in only_after:
                return
            self._runs[run_id] = replace(live, replies={**live.replies, site: state})
            self._bump()

    def forget(self, run_id: str) -> None:
        """A run has ended."""
        with self._changed:
            self._runs.pop(run_id, None)
            self._bump()

    def touch(self) -> None:
        """Something that is told elsewhere has changed."""
        with self._changed:
            self._bump()

    @property
    def version(self) -> int:
        """Number of the last change."""
        with self._changed:
            return self._version

    def wait(self, seen: int, timeout: float) -> int:
        """Wait for a change after number `seen`; the number of the last."""
        with self._changed:
            self._changed.wait_for(lambda: self._version != seen, timeout)
            return self._version

    def _bump(self) -> None:
        self._version += 1
        self._changed.notify_all()


class BoardObserver(Observer):
    """Tells the board of a run's rounds."""

    def __init__(self, board: Board, run_id: str) -> None:
        self._board = board
        self._run_id = run_id

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """See `Observer`."""
        self._board.update(
            self._run_id,
            step="training",
            server_round=server_round,
            cohort=tuple(cohort),
            replies=dict.fromkeys(cohort, ASKED),
        )

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """See `Observer`."""
        self._board.reply(self._run_id, client, USED if failure is None else failure.slug)

    def round_finished(self, record: RoundRecord) -> None:
        """See `Observer`."""
        last = {
            "round": record.server_round,
            "survivors": len(record.survivors),
            "asked": len(record.cohort),
            "accuracy": record.accuracy,
            "loss": record.loss,
            "train_loss": record.train_loss,
            "seconds": sum(record.seconds.values()),
        }
        self._board.update(self._run_id, done=record.server_round, last=last)
