"""The service as one process: state, hub, queue and port, started in that order and ended in the other."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import structlog
import torch

from common.disk import atomic_file, disk_errors
from common.errors import CoterieError
from common.flower import prepare_process
from common.kit import Kit
from common.site import Site, load_site
from server.plane.hub import Hub
from server.plane.limits import Limits
from server.plane.orders import Event, Kind
from server.plane.server import PlaneServer
from server.provisioning.denied import DENIED, Denied
from server.service.audit import AUDIT, SECURED, AuditLog, Line
from server.service.board import Board
from server.service.desk import Desk
from server.service.orders import Stop
from server.service.repeats import Repeats
from server.service.runner import RUNS, Workplace, carry_out
from server.service.scheduler import Scheduler
from server.service.sealing import RESULTS, SealedResults
from server.service.state import Run, ServiceState

log = structlog.get_logger()

DATABASE: Final = "service.db"
ADDRESS: Final = "address.json"
"""In the state folder while the service runs: where it listens, and its process id."""
SITE_FILE: Final = "site.toml"
_GRACE_SECONDS: Final = 2.0
_SHOWN: Final = ("party", "detail", "run", "name", "operator", "status", "problem", "round", "attempt", "port")
_AUDITED: Final[dict[Kind, str]] = {
    "attached": "site-attached",
    "detached": "site-detached",
    "denied": "denied",
    "refused": "refused",
    "enrolled": "enrolled",
    "renewed": "renewed",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Listening:
    """Where the service can be reached."""

    host: str
    port: int


class Service:
    """A coordinator from `start` to `stop`; a context manager does both.

    Guarantee: a second service on the same state is refused. Whatever ends the process, the next one goes on with every
    run that was queued or running.

    Args:
        kit: The coordinator's.
        host: Address to listen at.
        port: 0 takes a free one.
        state: Folder of everything that lasts; None takes the kit's own.
        heartbeat_seconds: How often sites show that they are alive.
        limits: Bounds on peers.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        host: str,
        port: int,
        state: Path | None = None,
        heartbeat_seconds: float = 20.0,
        limits: Limits | None = None,
    ) -> None:
        self._kit = kit
        self._folder = state or kit.state
        with disk_errors(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self._folder / RUNS).mkdir(mode=0o700, exist_ok=True)
        self._host = host
        self._hub = Hub(self._folder, observe=self._observe, heartbeat_seconds=heartbeat_seconds)  # takes the lock
        self._state = ServiceState(self._folder / DATABASE)
        self._audit = AuditLog(self._folder / AUDIT, self._state)
        self._audit.watch(_journal)
        self._repeats = Repeats()
        self._board = Board()
        self._place = Workplace(
            kit=kit, state=self._folder, hub=self._hub, audit=self._audit, board=self._board, site=_own_site(kit)
        )
        self._scheduler = Scheduler(
            self._state,
            carry_out=self._carry_out,
            attached=lambda: frozenset(self._hub.attached()),
            audit=self._audit,
            board=self._board,
            denied=Denied(kit.folder / DENIED).names,
        )
        shutil.rmtree(self._folder / RESULTS, ignore_errors=True)  # copies of what the runs' folders hold
        results = SealedResults(self._folder / RESULTS, kit.keys)
        desk = Desk(self._place, self._state, self._scheduler, results)
        self._server = PlaneServer(kit, host=host, port=port, hub=self._hub, desk=desk, limits=limits)

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop."""
        self.stop()

    @property
    def listening(self) -> Listening:
        """Where sites and operators reach it."""
        return Listening(host=self._host, port=self._server.port)

    def start(self) -> None:
        """Listen, and go on with what there is to do.

        Raises:
            RunError: The port is taken, or the state cannot be written.
        """
        prepare_process()
        torch.set_num_threads(1)  # what is measured must not depend on how many cores there are
        try:
            self._server.start()
        except BaseException:
            self._close()
            raise
        self._audit.record("service-started", port=self._server.port, pid=os.getpid())
        self._scheduler.start()
        facts = {"host": self._host, "port": self._server.port, "pid": os.getpid()}
        with atomic_file(self._folder / ADDRESS) as temporary:
            temporary.write_text(json.dumps(facts) + "\n", encoding="utf-8")

    def stop(self) -> None:
        """End what runs where it can go on later, close the port, and let go of everything."""
        (self._folder / ADDRESS).unlink(missing_ok=True)
        self._scheduler.close()
        self._server.stop(grace=_GRACE_SECONDS)
        with suppress(CoterieError):
            self._audit.record("service-stopped", pid=os.getpid())
        self._close()

    def _close(self) -> None:
        try:
            self._audit.close()
        except CoterieError:
            log.exception("audit_log_not_closed")
        self._state.close()
        self._hub.close()

    def _carry_out(self, run: Run, stop: Stop) -> None:
        carry_out(run, self._place, stop)

    def _observe(self, event: Event) -> None:
        """What the plane tells, from its own thread."""
        name = _AUDITED.get(event.kind)
        comes_or_goes = event.kind in {"attached", "detached"}
        untold = self._repeats.left_out(event.party) if comes_or_goes else 0
        if name is not None and untold is not None:
            self._audit.record(name, party=event.party, detail=event.detail, untold=untold or None)
        if event.kind in {"attached", "detached", "list-changed"}:
            self._scheduler.wake()
        if event.kind in {"attached", "detached", "order-sent"}:
            self._board.touch()


def _journal(line: Line) -> None:
    """Show what an administrator wants to see pass by; who takes part in a round is not among it."""
    if line["event"] in SECURED:
        log.info(line["event"].replace("-", "_"), **{key: line[key] for key in _SHOWN if key in line})


def _own_site(kit: Kit) -> Site:
    """The coordinator's own models and data: the `site.toml` in its kit, if there is one."""
    path = kit.folder / SITE_FILE
    return load_site(path if path.is_file() else None)
