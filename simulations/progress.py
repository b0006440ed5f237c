"""What a person sees while a simulation runs: on stderr, only on a terminal, gone when it is over."""

from __future__ import annotations

from rich.progress import Progress, TaskID

from common.errors import FailureCode
from server.coordinator import Observer, RoundRecord
from server.report.words import NARROW, ceiling, duration
from simulations.results import FolderObserver


class ProgressObserver(Observer):
    """Shows round, clients reported, accuracy and loss, epsilon against its target, and the time left."""

    def __init__(
        self, progress: Progress, keeper: FolderObserver, *, rounds: int, target_epsilon: float | None
    ) -> None:
        self._progress = progress
        self._keeper = keeper
        self._target = target_epsilon
        self._rounds: TaskID = progress.add_task("rounds", total=rounds, detail="")
        self._clients: TaskID = progress.add_task("clients", total=1, detail="", visible=False)
        self._failed = 0
        self._here: set[str] = set()

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """Start the round's bar."""
        self._failed, self._here = 0, set()
        self._progress.update(self._rounds, completed=server_round - 1)
        self._progress.reset(self._clients, total=len(cohort), detail="", visible=True)

    def update_received(self, client: str) -> None:
        """Count a masked update: what follows are steps without training, which take no time to speak of."""
        self._count(client)

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """Count the reply."""
        self._failed += failure is not None
        self._count(client)

    def _count(self, client: str) -> None:
        """Move the bar, once a client."""
        self._here.add(client)
        detail = f"{self._failed} failed" if self._failed else ""
        self._progress.update(self._clients, completed=len(self._here), detail=detail)

    def round_finished(self, record: RoundRecord) -> None:
        """Show the round's figures."""
        parts = []
        if record.accuracy is not None:
            parts.append(f"accuracy {record.accuracy:.3f}")
        loss = record.train_loss if record.loss is None else record.loss
        if loss is not None:
            parts.append(f"loss {loss:.3f}")
        if record.clock is not None:
            parts.append(f"{duration(record.clock.at_seconds)} on the clock".replace(NARROW, " "))
        if self._keeper.epsilon:
            spent = max(self._keeper.epsilon.values())
            parts.append(f"epsilon {ceiling(spent)}" + (f" of {self._target:g}" if self._target else ""))
        self._progress.update(self._rounds, completed=record.server_round, detail=", ".join(parts))

    def comparison(self, done: int, total: int, arm: str) -> None:
        """Show how far the comparison is."""
        self._progress.update(self._rounds, visible=False)
        self._progress.update(
            self._clients, description="comparison", completed=done, total=total, detail=f"last: {arm}"
        )
