"""Which run starts when: in the order of the queue, side by side where runs share no site, each once its sites are
there.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from common.errors import CoterieError, RefusedError, RunError
from server.service.audit import AuditLog
from server.service.board import Board
from server.service.orders import Stop, StoppedError
from server.service.runner import passes, problem_of
from server.service.state import ENDED, Run, ServiceState, Status

log = structlog.get_logger()

RESUME_SECONDS: Final = 60.0
"""A run that was interrupted goes on without a site that has not come back by then, as it would have without the
interruption."""
RETRY_SECONDS: Final = 30.0
"""After a full disk, and the like."""
AGAIN_SECONDS: Final = 1.0
"""After a fault of the scheduler's own, such as a database that is locked."""

CarryOut = Callable[[Run, Stop], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Waiting:
    """Why a queued run has not started: sites that are not attached, and earlier runs that need one of its sites."""

    sites: tuple[str, ...]
    runs: tuple[str, ...]


@dataclass(eq=False, slots=True)
class _Running:
    run: Run
    stop: Stop
    thread: threading.Thread


class Scheduler:
    """Carries out what is in the queue.

    Guarantee: no site is in two runs at once; of two runs that share a site the earlier one is first. What was running
    when a former process ended is gone on with before anything that shares a site with it. A site that is shut out is
    waited for by nobody; a run whose operator is shut out, or all of whose sites are, ends.

    Args:
        state: The queue.
        carry_out: Does one run, in a thread of its own.
        attached: Names of the sites that are there now.
        denied: Whether a site or an operator is shut out under its name.
        audit, board: Told of what becomes of runs.
    """

    def __init__(
        self,
        state: ServiceState,
        *,
        carry_out: CarryOut,
        attached: Callable[[], frozenset[str]],
        audit: AuditLog,
        board: Board,
        denied: Callable[[str], bool] = lambda _: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._state, self._carry_out, self._attached = state, carry_out, attached
        self._audit, self._board, self._denied, self._clock = audit, board, denied, clock
        self._changed = threading.Condition()
        self._dirty = True
        self._ending = False
        self._running: dict[str, _Running] = {}
        self._not_before: dict[str, float] = {}
        self._began = clock()
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Something has changed: a run was submitted, a site came or went. Returns at once."""
        with self._changed:
            self._dirty = True
            self._changed.notify_all()

    def stop_run(self, run_id: str) -> Run:
        """End a run at its operator's word; what there is of it stays.

        Raises:
            RunError: There is no such run.
        """
        with self._changed:
            run = self._state.ask_to_stop(run_id)
            running = self._running.get(run_id)
            if running is not None:
                running.stop.request("operator")
            elif run.status == "stopping":  # interrupted, and not yet gone on with
                run = self._state.end(run_id, "stopped")
        if run.status == "stopped":
            self._audit.record("run-ended", run=run_id, status="stopped")
        self._board.touch()
        self.wake()
        return run

    def waiting(self, run: Run) -> Waiting:
        """Why a run has not started."""
        attached = self._attached()
        needed = self._needed(run)
        before = [r for r in self._open() if r.position < run.position and needed & set(r.sites)]
        return Waiting(
            sites=tuple(site for site in run.sites if site in needed - attached), runs=tuple(r.run_id for r in before)
        )

    def close(self, timeout: float = 30.0) -> None:
        """Ask no more, keep everything, and return when no run is being worked on. The runs go on after a restart."""
        with self._changed:
            self._ending = True
            running = list(self._running.values())
            for one in running:
                one.stop.request("service")
            self._changed.notify_all()
        end = self._clock() + timeout
        for one in running:
            one.thread.join(max(0.0, end - self._clock()))
        if self._thread.ident is not None:
            self._thread.join()

    def _open(self) -> list[Run]:
        return [run for run in self._state.runs() if run.status not in ENDED]

    def _needed(self, run: Run) -> frozenset[str]:
        """The sites of a run that anything can be expected of."""
        return frozenset(site for site in run.sites if not self._denied(site))

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._ending, timeout=self._patience())
                if self._ending:
                    return
                self._dirty = False
            try:
                self._start_possible()
            except Exception:  # a full disk, a locked database: what was to be started is still to be started
                log.exception("scheduler_failed")
                with self._changed:
                    self._dirty = True
                    self._changed.wait_for(lambda: self._ending, timeout=AGAIN_SECONDS)

    def _patience(self) -> float | None:
        """How long nothing can change by itself; None: for ever."""
        moments = [*self._not_before.values(), self._began + RESUME_SECONDS]
        ahead = [moment - self._clock() for moment in moments if moment > self._clock()]
        return max(0.01, min(ahead)) if ahead else None

    def _start_possible(self) -> None:
        attached = self._attached()
        taken: set[str] = set()
        for run in self._open():
            needed = self._needed(run)
            if run.run_id not in self._running and self._ended(run, needed):
                continue
            free = not taken & needed
            taken |= needed  # also of one that still waits: later runs do not overtake it
            if free and run.run_id not in self._running and self._may_start(run, needed, attached):
                self._start(run)

    def _ended(self, run: Run, needed: frozenset[str]) -> bool:
        """End a run that nobody works on and that must not start; whether it was such."""
        if run.status == "stopping":
            self._end(run, "stopped", None)
        elif self._denied(run.operator):
            self._end(run, "stopped", _operator_denied(run))
        elif not needed:
            self._end(run, "failed", RunError("all of its sites are on the deny list", hint="submit it for others"))
        else:
            return False
        return True

    def _may_start(self, run: Run, needed: frozenset[str], attached: frozenset[str]) -> bool:
        now = self._clock()
        if now < self._not_before.get(run.run_id, 0.0):
            return False
        if attached >= needed:
            return True
        return run.status == "running" and now >= self._began + RESUME_SECONDS

    def _start(self, run: Run) -> None:
        with self._changed:
            if self._ending:
                return
            begun = self._state.begin(run.run_id)
            stop = Stop(lambda: self._denied(run.operator))
            thread = threading.Thread(target=self._work, args=(begun, stop), name=f"run {run.run_id[:8]}", daemon=True)
            self._running[run.run_id] = _Running(run=begun, stop=stop, thread=thread)
        thread.start()

    def _work(self, run: Run, stop: Stop) -> None:
        """One run in its thread; whatever happens, the others go on."""
        try:
            self._carry_out(run, stop)
        except StoppedError:
            if stop.reason == "operator":
                self._end(run, "stopped", None)
            elif stop.reason == "denied":
                self._end(run, "stopped", _operator_denied(run))
            else:
                self._audit.record("run-stopped", run=run.run_id, attempt=run.attempt)
        except Exception as e:  # noqa: BLE001 - whatever it is, it ends this run only
            self._failed(run, e)
        else:
            self._end(run, "completed", None)
        finally:
            with self._changed:
                self._running.pop(run.run_id, None)
            self.wake()

    def _failed(self, run: Run, error: Exception) -> None:
        if not isinstance(error, CoterieError):
            log.error("run_failed_unexpectedly", run=run.run_id, exc_info=error)
        if passes(error):
            log.warning("run_waits", run=run.run_id, reason=str(error))
            self._board.update(run.run_id, step="waiting", problem=f"{error}; it goes on by itself")
            self._not_before[run.run_id] = self._clock() + RETRY_SECONDS
            return
        self._end(run, "failed", error)

    def _end(self, run: Run, status: Status, error: Exception | None) -> None:
        problem = None if error is None else problem_of(error)
        try:
            self._audit.record(
                "run-ended", run=run.run_id, status=status, problem=None if problem is None else problem["code"]
            )
            self._audit.secure()
            self._state.end(run.run_id, status, problem)
        except CoterieError:
            log.exception("end_of_run_not_kept", run=run.run_id, status=status)
            self._not_before[run.run_id] = self._clock() + RETRY_SECONDS
            return
        self._board.forget(run.run_id)


def _operator_denied(run: Run) -> RefusedError:
    return RefusedError(
        f"operator denied: {run.operator} is on the deny list", hint="another operator can submit the run anew"
    )
