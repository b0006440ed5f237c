"""What operators are answered: they queue runs, watch and end them, and fetch results.

Operators are trusted with everything the service knows but the sites' updates, and with one more exception: under
client-level privacy nobody is told who was asked and who answered.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any, Final

from common.config.load import parse_config
from common.crypto import PeerIdentity, read_authorization
from common.errors import CoterieError, RefusedError, RunError
from server.plane.desk import Document, Download
from server.service.admission import check_submission
from server.service.audit import AUDIT, Line, read_lines
from server.service.board import ASKED, Live
from server.service.runner import Workplace
from server.service.scheduler import Scheduler
from server.service.sealing import SealedResults
from server.service.state import ENDED, Run, ServiceState, find_run
from server.service.telling import Teller, tells_names, told_round

MOST_OPEN: Final = 1000
"""Runs that may wait at once."""
_PULSE_SECONDS: Final = 2.0
"""How often who follows is given the chance to go."""
_MOST_LINES: Final = 10_000
_LAST_LINE: Final = "run-ended"


class Desk:
    """Answers operators; see `server.plane.desk.OperatorDesk`."""

    def __init__(self, place: Workplace, state: ServiceState, scheduler: Scheduler, results: SealedResults) -> None:
        self._place, self._state, self._scheduler, self._results = place, state, scheduler, results

    def submit(self, identity: PeerIdentity, text: str, authorization: str) -> Document:
        """Check a run, and queue it. The same submission again is answered like the first.

        Raises:
            RefusedError: It is not signed by the operator who sends it, or is signed for another configuration.
            CoterieError: The run is not possible.
        """
        kit, pins = self._place.kit, self._place.kit.pins()
        signed = read_authorization(authorization, federation=kit.federation, operators=pins.operators)
        if signed.operator != identity.name:
            raise RefusedError(
                f"the run is authorized by {signed.operator}, but submitted by {identity.name}",
                hint="submit it with the kit that signed it",
            )
        config = parse_config(text)
        if config.digest() != signed.config_digest or config.canonical_json() != text:
            raise RefusedError(
                "the authorization is for another configuration", hint="both sides must run the same version"
            )
        known = self._state.run(signed.run_id)
        if known is None and len([run for run in self._state.runs() if run.status not in ENDED]) >= MOST_OPEN:
            raise RunError(f"{MOST_OPEN} runs are waiting", hint="stop some of them first")
        sites = known.sites if known else check_submission(config, place=self._place, pinned=pins.sites)
        run = self._state.add(
            Run(
                run_id=signed.run_id,
                name=config.name,
                operator=signed.operator,
                config=text,
                config_digest=signed.config_digest,
                authorization=authorization,
                sites=sites,
                rounds=config.rounds,
            )
        )
        if known is None:
            self._place.audit.record(
                "run-submitted",
                run=run.run_id,
                name=run.name,
                operator=run.operator,
                config=run.config_digest,
                sites=list(run.sites),
            )
            self._place.audit.secure()
        self._scheduler.wake()
        self._place.board.touch()
        return self._status(run)

    def ask(self, identity: PeerIdentity, what: str, run: str, argument: str) -> Document:
        """`runs`, `status`, `stop`, `sites` or `logs`.

        Raises:
            RunError: There is no such run.
            RefusedError: There is no such question.
        """
        del argument
        if what == "runs":
            return {"runs": [self._status(found) for found in reversed(self._state.runs())]}
        if what == "sites":
            return {"sites": self._sites()}
        if what == "status":
            return self._status(self._find(run))
        if what == "logs":
            found = self._find(run)
            teller = Teller(found)
            lines = list(read_lines(self._audit_path, wanted=lambda line: line.get("run") == found.run_id))
            shown = [told for line in lines if (told := teller.told(line)) is not None]
            return {"run": found.run_id, "lines": shown[-_MOST_LINES:]}
        if what == "stop":
            found = self._find(run)
            if found.status in ENDED:
                raise RunError(f"the run has ended: it is {found.status}", hint="there is nothing to stop")
            self._place.audit.record("stop-requested", run=found.run_id, operator=identity.name)
            return self._status(self._scheduler.stop_run(found.run_id))
        raise RefusedError(f"there is no question `{what[:40]}`", hint="both sides must run the same version")

    def follow(self, identity: PeerIdentity, what: str, run: str, argument: str) -> Iterator[Document | None]:
        """`status` or `logs` of a run as they change, until it ends.

        Raises:
            RunError: There is no such run.
            RefusedError: This cannot be followed.
        """
        del identity, argument
        found = self._find(run)
        if what == "status":
            return self._follow_status(found.run_id)
        if what == "logs":
            return self._follow_logs(found)
        raise RefusedError(f"`{what[:40]}` cannot be followed", hint="both sides must run the same version")

    def download(self, identity: PeerIdentity, run: str) -> Download:
        """A finished run's result, sealed for who asks.

        Raises:
            RunError: The run has no result.
        """
        found = self._find(run)
        recipient = self._place.kit.pins().operators.get(identity.name)
        if found.status != "completed" or recipient is None:
            raise RunError(f"the run has no result: it is {found.status}", hint="`coterie status` says why")
        download = self._results.of(found, folder=self._place.folder(found.run_id), recipient=recipient)
        self._place.audit.record("result-downloaded", run=found.run_id, operator=identity.name)
        return download

    @property
    def _audit_path(self) -> Any:
        return self._place.state / AUDIT

    def _find(self, wanted: str) -> Run:
        return find_run(self._state.runs(), wanted)

    def _follow_status(self, run_id: str) -> Iterator[Document | None]:
        before: Document | None = None
        while True:
            seen = self._place.board.version
            run = self._state.run(run_id) or self._find(run_id)
            now = self._status(run)
            if now != before:
                yield now
                before = now
            if run.status in ENDED:
                return
            while self._place.board.wait(seen, _PULSE_SECONDS) == seen:
                yield None

    def _follow_logs(self, run: Run) -> Iterator[Document | None]:
        waiting: queue.SimpleQueue[Line] = queue.SimpleQueue()
        teller = Teller(run)
        end = self._place.audit.watch(lambda line: waiting.put(line) if line.get("run") == run.run_id else None)
        try:
            past = list(read_lines(self._audit_path, wanted=lambda line: line.get("run") == run.run_id))
            for line in past:
                if (told := teller.told(line)) is not None:
                    yield {"line": told}
            last = past[-1]["number"] if past else -1
            ended = run.status in ENDED or any(line["event"] == _LAST_LINE for line in past)
            while not ended:
                try:
                    line = waiting.get(timeout=_PULSE_SECONDS)
                except queue.Empty:
                    yield None
                    continue
                if line["number"] > last and (told := teller.told(line)) is not None:
                    yield {"line": told}
                ended = line["event"] == _LAST_LINE
        finally:
            end()

    def _status(self, run: Run) -> dict[str, Any]:
        live = self._place.board.live(run.run_id)
        waiting = self._scheduler.waiting(run) if run.status == "queued" else None
        document: dict[str, Any] = {
            "run": run.run_id,
            "name": run.name,
            "status": run.status,
            "operator": run.operator,
            "sites": list(run.sites),
            "rounds": run.rounds,
            "attempt": run.attempt,
            "submitted": run.submitted,
            "started": run.started,
            "finished": run.finished,
            "problem": run.problem or ({"message": live.problem} if live.problem else None),
            "waiting_for_sites": list(waiting.sites) if waiting else [],
            "waiting_for_runs": list(waiting.runs) if waiting else [],
        }
        return document | self._progress(run, live)

    def _progress(self, run: Run, live: Live) -> dict[str, Any]:
        result = self._result(run) if run.status == "completed" else {}
        names = tells_names(run)
        return {
            "step": live.step,
            "round": live.server_round or result.get("rounds") or 0,
            "rounds_done": max(live.done, result.get("rounds") or 0),
            "cohort": list(live.cohort) if names else [],
            "replies": self._replies(live) if names else {},
            "last_round": told_round(run, dict(live.last)) if live.last else None,
            "accuracy": result.get("accuracy"),
            "loss": result.get("loss"),
            "majority_accuracy": result.get("majority_accuracy"),
        }

    def _replies(self, live: Live) -> dict[str, str]:
        """How far each site of the round is; of one that was asked, what its agent says or that it is away."""
        attached = self._place.hub.attached() if ASKED in live.replies.values() else {}
        return {
            site: (attached[site].state if site in attached else "away") if state == ASKED else state
            for site, state in live.replies.items()
        }

    def _result(self, run: Run) -> dict[str, Any]:
        from server.store import RunFolder

        try:
            return RunFolder.open(self._place.folder(run.run_id)).read_result() or {}
        except CoterieError:
            return {}

    def _sites(self) -> list[dict[str, Any]]:
        from server.provisioning import Denied
        from server.provisioning.denied import DENIED

        attached = self._place.hub.attached()
        denied = Denied(self._place.kit.folder / DENIED)
        running = {site: run.run_id for run in self._state.runs("running") for site in run.sites}
        # What a site does, and what waits for it, says who is asked.
        hidden = {s for r in self._state.runs("running", "stopping") if not tells_names(r) for s in r.sites}
        return [
            {
                "name": name,
                "attached": name in attached,
                "denied": denied.refuses_name(name),
                "since": attached[name].since if name in attached else None,
                "state": attached[name].state if name in attached and name not in hidden else None,
                "version": attached[name].version if name in attached else None,
                "open_orders": attached[name].open_orders if name in attached and name not in hidden else 0,
                "run": running.get(name),
                "key_id": record.key_id.hex(),
            }
            for name, record in sorted(self._place.kit.pins().sites.items())
        ]
