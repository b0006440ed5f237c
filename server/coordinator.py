"""The round loop: sample a cohort, let the strategy ask, let it step, evaluate, checkpoint.

How a cohort is asked, and what the strategy sees of its answers, is `server.asking`'s.

Flower's `Strategy.start` has no resume, no checkpoint hook and samples with the global `random`; this loop drives the
same hooks (`configure_train`, `aggregate_train`) of an unmodified strategy and does these things itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from time import perf_counter
from typing import Any

import numpy as np
import structlog
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import BudgetExhaustedError, RunError
from common.flower import CLIENTS, NOISE, ORDER, PARTICIPATIONS, ROUND, SEPARATION, TRAIN_LOSS, from_record, to_record
from common.models.weights import ModelWeights
from server.aggregation import aggregate, all_finite, make_writable
from server.asking.base import Call
from server.asking.choice import asking_for
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.cohort import CohortSampler, Sampler, min_separation, participations
from server.evaluation import Evaluation, evaluate
from server.grids.broadcast import Broadcast
from server.job import Arrays, Job, Observer, Outcome, RoundRecord
from server.roster import CohortView, Roster, discover, request_record
from server.strategies import cast_like, make_strategy, replies_needed
from server.strategy_state import restore_strategy, strategy_state

__all__ = ["Coordinator", "Job", "Observer", "Outcome", "RoundRecord"]

log = structlog.get_logger()


class Coordinator:
    """Runs one job over a grid."""

    def __init__(self, job: Job) -> None:
        config = job.config
        self._job = job
        self._strategy = make_strategy(config.strategy, client_learning_rate=config.training.learning_rate)
        self._sampler: Sampler = job.sampler or CohortSampler(config.cohort, seed=config.seeds.cohort, noise=job.noise)
        self._weights = ModelWeights(job.model)
        self._arrays: Arrays = self._weights.shared()  # one copy of the model, which is evaluated where it lies
        self._asking = asking_for(job)
        self._best: tuple[int, Evaluation, Arrays] | None = None
        self._last: Evaluation | None = None
        self._since_best = 0
        self._any_update = False
        self._checkpoint_seconds = 0.0

    def run(self, grid: Grid) -> Outcome:
        """Train until the last round, or until evaluation says to stop; continue after the last checkpoint, if any.

        Raises:
            RunError: There is no client, no round had an update, or the checkpoint is of another configuration.
            PrivacyError: The coordinator's ledger does not allow a round, or cannot be written.
        """
        with closing(self._asking):
            return self._run(grid)

    def _run(self, grid: Grid) -> Outcome:
        config = self._job.config
        done = self._resume()
        roster = discover(grid, config, run_id=self._job.run_id, authorization=self._job.authorization)
        self._check_plan(len(roster))
        patience = config.evaluation.patience
        while done < config.rounds and not (patience and self._since_best >= patience):
            try:
                self._round(grid, roster, done + 1)
            except BudgetExhaustedError as e:
                if not self._any_update:
                    raise
                log.warning("run_ended_by_its_ledger", server_round=done + 1, reason=str(e))
                break
            done += 1
        if not self._any_update:
            raise RunError(
                "no client sent an update in any round that could be used",
                hint="the reasons are in the run folder's rounds.jsonl",
            )
        if self._last is None or (config.evaluation.every and done % config.evaluation.every):
            self._last = self._evaluate()
        stopped = done < config.rounds
        if config.evaluation.select == "best" and self._best is not None:
            best_round, evaluation, arrays = self._best
            return Outcome(
                arrays=arrays, rounds=done, selected_round=best_round, evaluation=evaluation, stopped_early=stopped
            )
        return Outcome(
            arrays=self._arrays, rounds=done, selected_round=done, evaluation=self._last, stopped_early=stopped
        )

    def _check_plan(self, clients: int) -> None:
        """The noise was calibrated for a number of clients: with fewer, each would be asked more often, or sooner."""
        job, plan, cohort = self._job, self._job.plan, self._job.config.cohort
        if plan is None or job.sampler is not None:
            return
        if (
            participations(cohort, clients, job.config.rounds) > plan.participations
            or min_separation(cohort, clients) < plan.min_separation
            or (cohort.sampling == "poisson" and plan.central and cohort.size / clients > plan.sampling_rate)
        ):
            raise RunError(
                f"only {clients} clients are there, too few for the privacy plan",
                hint="start it again with all clients",
            )

    def _round(self, grid: Grid, roster: Roster, server_round: int) -> None:
        clock = _Clock()
        cohort = self._asking.cohort(server_round, self._sampler.sample(server_round, roster.names))
        self._job.observer.round_started(server_round, cohort)
        call = self._call(grid, roster, server_round, cohort)
        if (arrays := self._asking.prepare(call, self._arrays)) is not self._arrays:
            self._take(arrays)
        start, names = to_record(self._arrays), call.names
        answers = self._asking.ask(call, self._messages(call, start), self._arrays)
        clock.lap("train")
        survivors = call.survivors
        train_loss, refused = None, False
        if answers.enough:
            replies = sorted(answers.replies, key=lambda reply: names.get(reply.metadata.src_node_id, ""))
            for reply in replies:
                make_writable(reply)
            before = self._any_update
            refused, train_loss = self._aggregate(server_round, replies, start)
            self._any_update &= before or bool(survivors)  # noise alone trains nothing
        clock.lap("aggregate")
        evaluation = self._judge(server_round)
        clock.lap("evaluate")
        record = RoundRecord(
            server_round=server_round,
            cohort=cohort,
            survivors=survivors,
            failures={name: fate.slug for name, fate in sorted(call.fates.items()) if fate is not None},
            train_loss=train_loss,
            accuracy=evaluation.accuracy if evaluation else None,
            loss=evaluation.loss if evaluation else None,
            aggregate_refused=refused,
            clipping_norm=answers.clipping_norm,
            within=answers.within,
            aggregation=answers.aggregation,
            staleness=answers.staleness,
            clock=self._job.clock.lap() if self._job.clock else None,
            seconds={**clock.laps, "checkpoint": self._checkpoint_seconds},
        )
        # The record comes before the checkpoint: a resumed run drops records without one, and could not add a lost one.
        self._job.observer.round_finished(record)
        clock.lap("observer")
        self._save(server_round)
        clock.lap("checkpoint")
        self._checkpoint_seconds = clock.laps["checkpoint"]

    def _messages(self, call: Call, start: ArrayRecord) -> Sequence[Message]:
        """What the strategy sends, in the cohort's order.

        One that needs only the mean says the same to everybody: it is shown one node, and what it says goes to all.
        """
        nodes = list(call.names)
        alike = replies_needed(self._job.config.strategy.name) == "mean"
        view = CohortView(call.grid, nodes[:1] if alike else nodes)
        request = self._strategy.configure_train(call.server_round, start, call.record, view)
        if alike and nodes:
            (first,) = request
            return Broadcast(first, nodes)
        return sorted(request, key=lambda message: call.names[message.metadata.dst_node_id])

    def _call(self, grid: Grid, roster: Roster, server_round: int, cohort: list[str]) -> Call:
        """The round as it is put to its cohort."""
        record = self._request(cohort)
        record[ROUND] = server_round
        return Call(
            server_round=server_round,
            cohort=cohort,
            nodes=roster,
            grid=grid,
            record=record,
            timeout=self._job.config.cohort.deadline_seconds or None,
            observer=self._job.observer,
        )

    def _aggregate(self, server_round: int, replies: list[Message], start: ArrayRecord) -> tuple[bool, float | None]:
        """Let the strategy step; whether the step was refused, and the cohort's mean training loss, if it was told.

        A step that does not end in finite numbers is undone: values that are finite one by one can still overflow, and
        one client must not be able to end everybody's run.
        """
        before = strategy_state(self._strategy)
        try:
            with np.errstate(all="ignore"):
                aggregated, metrics = aggregate(self._strategy, server_round, replies)
                arrays = None if aggregated is None else _own(cast_like(aggregated, start))
            if not all_finite(arrays or {}) or not all_finite(strategy_state(self._strategy)):
                raise RunError("the aggregate is not finite")
        except (RunError, ArithmeticError, ValueError) as e:
            log.warning("aggregate_refused", server_round=server_round, error=type(e).__name__)
            restore_strategy(self._strategy, before)
            return True, None
        if arrays is not None:
            self._take(arrays)
            self._any_update = True
        loss = None if metrics is None else metrics.get(TRAIN_LOSS)
        return False, float(loss) if isinstance(loss, int | float) else None

    def _take(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Make these the model's weights."""
        self._weights.load(arrays)
        self._arrays = self._weights.shared()

    def _request(self, cohort: list[str]) -> ConfigRecord:
        """What every request of a round says."""
        job, plan = self._job, self._job.plan
        told = cohort if self._asking.tells_cohort else None
        record = request_record(job.config, run_id=job.run_id, authorization=job.authorization, cohort=told)
        if plan is not None:
            record[NOISE], record[ORDER] = plan.noise_multiplier, plan.budget.order
            record[PARTICIPATIONS], record[SEPARATION] = plan.participations, plan.min_separation
            record[CLIENTS] = plan.clients
        self._asking.describe(record)
        return record

    def _judge(self, server_round: int) -> Evaluation | None:
        """Evaluate if this is a round for it, and remember the best."""
        every = self._job.config.evaluation.every
        if not every or server_round % every or self._job.held_out is None:
            return None
        self._last = evaluation = self._evaluate()
        if evaluation is None:
            return None
        self._since_best += 1
        if self._best is None or evaluation.accuracy > self._best[1].accuracy:
            keeps = self._job.config.evaluation.select == "best"
            kept = {name: values.copy() for name, values in self._arrays.items()} if keeps else {}
            self._best, self._since_best = (server_round, evaluation, kept), 0
        return evaluation

    def _evaluate(self) -> Evaluation | None:
        if self._job.held_out is None:
            return None
        return evaluate(self._job.model, self._job.held_out, batch_size=self._job.config.evaluation.batch_size)

    def _save(self, server_round: int) -> None:
        if self._job.folder is None:
            return
        save_checkpoint(
            self._job.folder.checkpoints,
            Checkpoint(
                server_round=server_round,
                arrays=self._arrays,
                strategy=strategy_state(self._strategy),
                sampler=self._sampler.state(),
                best_arrays=(self._best[2] or None) if self._best else None,
                progress={
                    "any_update": self._any_update,
                    "since_best": self._since_best,
                    "best": _to_progress(self._best[0], self._best[1]) if self._best else None,
                    "last": _to_progress(server_round, self._last) if self._last else None,
                    "clock": self._job.clock.state() if self._job.clock else None,
                },
                config_digest=self._job.config.digest(),
                noise=self._asking.state(),
            ),
        )

    def _resume(self) -> int:
        """Take up the last checkpoint; the number of rounds that it covers."""
        folder, config = self._job.folder, self._job.config
        if folder is None:
            return 0
        checkpoint = load_checkpoint(folder.checkpoints, config.digest())
        folder.truncate_rounds(checkpoint.server_round if checkpoint else 0)
        if checkpoint is None:
            return 0
        for warning in checkpoint.warnings:
            log.warning("checkpoint_skipped", reason=warning)
        self._take(checkpoint.arrays)
        restore_strategy(self._strategy, checkpoint.strategy)
        self._sampler.restore(checkpoint.sampler)
        self._asking.restore(checkpoint.noise, server_round=checkpoint.server_round)
        progress = checkpoint.progress
        self._any_update, self._since_best = progress["any_update"], progress["since_best"]
        if self._job.clock and progress.get("clock"):
            self._job.clock.restore(progress["clock"])
        if progress["last"]:
            self._last = _from_progress(progress["last"])
        if progress["best"]:
            best = dict(checkpoint.best_arrays or {})
            self._best = (progress["best"]["server_round"], _from_progress(progress["best"]), best)
        return checkpoint.server_round


class _Clock:
    """Wall seconds since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._at = perf_counter()

    def lap(self, name: str) -> None:
        now = perf_counter()
        self.laps[name], self._at = now - self._at, now


def _own(record: ArrayRecord) -> Arrays:
    """The record's arrays, read-only: every client of an in-process round is shown the same ones."""
    arrays = from_record(record)
    for values in arrays.values():
        values.setflags(write=False)
    return arrays


def _to_progress(server_round: int, evaluation: Evaluation) -> dict[str, Any]:
    return {"server_round": server_round, **asdict(evaluation)}


def _from_progress(saved: Mapping[str, Any]) -> Evaluation:
    return Evaluation(accuracy=saved["accuracy"], loss=saved["loss"], count=saved["count"])
