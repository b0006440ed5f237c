"""One run, from its configuration to its result: the same coordinator as in a simulation, over the plane.

The run's folder is the truth: whenever the process ends, the next one goes on after the folder's last checkpoint. What
is in the database only says that there is a run to go on with.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, cast

import structlog

from common.config import RunConfig
from common.config.load import parse_config
from common.errors import CoterieError, DataError, FailureCode, RunError
from common.flower import prepare_process
from common.kit import Kit
from common.privacy import PrivacyPlan
from common.schema import DataSchema, Examples, read_schema
from common.site import Site
from server.checkpoint import checkpoint_digest
from server.coordinator import Coordinator
from server.grids import SealedGrid
from server.grids.plane import PlaneGrid
from server.job import Job, Observer, Outcome, RoundRecord
from server.plane.hub import Hub
from server.planning import check_fit, held_out_examples, known_schema, plan_run
from server.results import Observers, RoundKeeper, complete_folder, describe_privacy, describe_run
from server.roster import ask_schema
from server.service.audit import AuditLog
from server.service.board import Board, BoardObserver
from server.service.ledgers import coordinators_ledger, spent_by_run
from server.service.orders import RunOrders, Stop
from server.service.state import Run
from server.store import RunFolder

log = structlog.get_logger()

RUNS: Final = "runs"
"""Folder of the runs' folders, in the service's state."""
FACTS: Final = "service.json"
"""In a run's folder: what has to be the same when it is resumed."""
MODEL: Final = "model.safetensors"
_PASSING: Final = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """What all runs of a service share.

    Attributes:
        kit: The coordinator's.
        state: Folder of everything that lasts.
        hub: The way to the sites.
        audit: What happened, for ever.
        board: What happens now.
        site: The coordinator's own models and data.
    """

    kit: Kit
    state: Path
    hub: Hub
    audit: AuditLog
    board: Board
    site: Site

    def folder(self, run_id: str) -> Path:
        """Where a run's folder is."""
        return self.state / RUNS / run_id


def carry_out(run: Run, place: Workplace, stop: Stop) -> None:
    """Do a run, or go on with it, to its end.

    Guarantee: killed at any instant and called again, it ends with the model that an undisturbed run ends with, byte
    for byte, unless chance that is not seeded (noise, Poisson cohorts) or time (deadlines) decided between them.

    Raises:
        StoppedError: Somebody asked it to stop. What there is of the run stays in its folder.
        CoterieError: The run is not possible, or failed.
    """
    prepare_process()
    begin = perf_counter()
    config = parse_config(run.config)
    path = place.folder(run.run_id)
    place.board.update(run.run_id, step="preparing", problem="")
    orders = RunOrders(place.hub, run_id=run.run_id, audit=place.audit, board=place.board)
    with RunFolder.resume(path) if (path / "run.toml").exists() else RunFolder.create(config, path) as folder:
        resumed = bool(folder.rounds())
        place.audit.record("run-started", run=run.run_id, name=run.name, attempt=run.attempt, resumed=resumed or None)
        found = folder.read_result()
        if found is None:
            try:
                work = _Work(run, config, folder, place=place, orders=orders, stop=stop)
                result = work.result(work.train(), seconds=perf_counter() - begin)
                complete_folder(folder, work.outcome, result)
            except CoterieError as e:
                if not passes(e):
                    folder.write_result({"status": "failed", "name": run.name, "problem": problem_of(e)})
                raise
        elif found.get("status") == "failed":  # ended between this being written and its being noted
            told = found.get("problem", {})
            raise RunError(str(told.get("message", "the run failed")), hint=str(told.get("hint", "")))
        model = hashlib.sha256((folder.path / MODEL).read_bytes()).hexdigest()
    place.audit.record("model-released", run=run.run_id, model=model)
    place.audit.secure()


def passes(error: BaseException) -> bool:
    """Whether what ended a run may go away by itself, such as a full disk: the run then goes on later."""
    cause = error.__cause__
    return isinstance(error, RunError) and isinstance(cause, OSError) and cause.errno in _PASSING


class _Work:
    """The parts of one attempt at a run."""

    def __init__(
        self, run: Run, config: RunConfig, folder: RunFolder, *, place: Workplace, orders: RunOrders, stop: Stop
    ) -> None:
        self._run, self._config, self._folder = run, config, folder
        self._place, self._stop = place, stop
        cohort = config.cohort
        self._grid = SealedGrid(
            PlaneGrid(
                cast("Hub", orders),  # of the hub, a grid needs what `RunOrders` has
                run_id=bytes.fromhex(run.run_id),
                sites=run.sites,
                enough=cohort.size if cohort.over_sampling else None,
                check=stop.check,
            ),
            keys=place.kit.keys,
            records=place.kit.pins().sites,
            run_id=bytes.fromhex(run.run_id),
            config_digest=bytes.fromhex(run.config_digest),
            folder=orders.blobs,
            attempts_before=run.attempt - 1,
        )
        self._schema = self._find_schema()
        planned = plan_run(config, self._schema, clients=len(run.sites), site=place.site)
        self._model, self._plan = planned.model, planned.plan
        self._ledger = coordinators_ledger(config, self._plan, state=place.state, kit=place.kit.folder)
        self._held_out = self._find_held_out()
        self.outcome: Outcome

    def train(self) -> Outcome:
        """All rounds that are still to be done."""
        self._stop.check()
        keeper = RoundKeeper(self._folder, spent=lambda _: dict(self._spent()), plan=self._plan)
        recorder = _Recorder(self._run, self._folder, self._place.audit, self._stop, plan=self._plan)
        job = Job(
            config=self._config,
            model=self._model,
            held_out=self._held_out,
            plan=self._plan,
            folder=self._folder,
            observer=Observers([recorder, keeper, BoardObserver(self._place.board, self._run.run_id), recorder.last]),
            ledger=self._ledger,
            run_id=self._run.run_id,
            authorization=self._run.authorization,
            sites=self._place.kit.pins().sites,
        )
        try:
            self.outcome = Coordinator(job).run(self._grid)
        finally:
            keeper.close()
        return self.outcome

    def result(self, outcome: Outcome, *, seconds: float) -> dict[str, Any]:
        """What `result.json` says."""
        config = self._config.model_copy(
            update={"data": self._config.data.model_copy(update={"partition": "natural", "pooled": False})}
        )
        return describe_run(
            config,
            outcome,
            self._folder.rounds(),
            schema=self._schema,
            model=self._model,
            held_out=self._held_out,
            clients={name: {} for name in self._run.sites},
            privacy=None if self._plan is None else self._privacy(self._plan),
            seconds=seconds,
            simulated=False,
        ) | {"comparison": None, "run": self._run.run_id}

    def _privacy(self, plan: PrivacyPlan) -> dict[str, Any]:
        own = plan.central
        return describe_privacy(
            self._config,
            plan,
            epsilon=self._spent(),
            taken=dict.fromkeys(self._run.sites, plan.rounds) if own else {},
            examples_epsilon={},
            epsilon_is="spent by the coordinator's releases over the whole run, for each client"
            if own
            else "not known here: each site's own ledger says what was spent of its examples",
        )

    def _spent(self) -> Mapping[str, float]:
        return spent_by_run(self._ledger, self._plan, clients=self._run.sites, run=self._run.config_digest)

    def _find_schema(self) -> DataSchema:
        """From what this party knows; else as the sites say, which a resumed run does not ask again."""
        known = known_schema(self._config, self._place.site)
        if known is not None:
            return known
        path = self._folder.path / FACTS
        if path.is_file():
            try:
                return read_schema(json.loads(path.read_text(encoding="utf-8"))["schema"])
            except (OSError, ValueError, KeyError, TypeError) as e:
                raise RunError(f"{path} is damaged", hint="restore it from a copy, or submit the run again") from e
        self._place.board.update(self._run.run_id, step="asking the sites what their data looks like")
        schema = ask_schema(self._grid, self._config, run_id=self._run.run_id, authorization=self._run.authorization)
        self._folder.write(FACTS, json.dumps({"schema": schema.to_text()}).encode())
        return schema

    def _find_held_out(self) -> Examples | None:
        """This party's own examples, if they are there and fit; a run trains also where nothing can be measured."""
        try:
            examples = held_out_examples(self._config, self._place.site)
        except DataError as e:
            log.warning("no_held_out_examples", run=self._run.run_id, reason=str(e))
            return None
        if examples is not None:
            check_fit(self._model, examples, self._schema)
        return examples


class _Recorder(Observer):
    """Writes the round into the audit log, and looks whether the run shall stop. Told first of each round."""

    def __init__(self, run: Run, folder: RunFolder, audit: AuditLog, stop: Stop, *, plan: PrivacyPlan | None) -> None:
        self._run, self._folder, self._audit, self._stop = run, folder, audit, stop
        self._private = plan is not None
        self.last = _EndOfRound(audit)

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """See `Observer`. Of what the cohort is about to be sent, the digest is that of its checkpoint."""
        self._stop.check()
        self._audit.record(
            "round-started",
            run=self._run.run_id,
            round=server_round,
            attempt=self._run.attempt,
            cohort=cohort,
            checkpoint=checkpoint_digest(self._folder.checkpoints, server_round - 1),
        )

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """See `Observer`."""
        self._stop.check()
        del client, failure  # what came was recorded when it came

    def round_finished(self, record: RoundRecord) -> None:
        """See `Observer`."""
        self._stop.check()
        self._audit.record(
            "round-ended",
            run=self._run.run_id,
            round=record.server_round,
            survivors=record.survivors,
            failures=record.failures,
        )


class _EndOfRound(Observer):
    """Told last of each round, before its checkpoint is written."""

    def __init__(self, audit: AuditLog) -> None:
        self._audit = audit

    def round_finished(self, record: RoundRecord) -> None:
        """See `Observer`. Nothing of the next round leaves this machine before all of this one is on record."""
        del record
        self._audit.secure()


def problem_of(error: BaseException) -> dict[str, Any]:
    """What an operator is told of a run that failed."""
    if isinstance(error, CoterieError):
        return {"code": error.code, "message": str(error), "hint": error.hint, "exit_code": error.exit_code}
    return {
        "code": "error",
        "message": f"a fault in Coterie ({type(error).__name__})",
        "hint": "the coordinator's log has the details",
        "exit_code": 1,
    }
