"""The round loop: sample a cohort, let the strategy ask, fold the answers, evaluate, checkpoint.

Under client-level privacy the answers are clipped, summed and released with noise instead (`server.release`).

Flower's `Strategy.start` has no resume, no checkpoint hook and samples with the global `random`; this loop drives the
same hooks (`configure_train`, `aggregate_train`) of an unmodified strategy and does these things itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from time import perf_counter
from typing import Any

import numpy as np
import structlog
from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.errors import BudgetExhaustedError, FailureCode, PrivacyError, RunError
from common.flower import (
    CLIENTS,
    CLIPPING_NORM,
    NOISE,
    ORDER,
    PARTICIPATIONS,
    SEPARATION,
    TRAIN_LOSS,
    WITHIN,
    from_record,
    to_record,
)
from common.models.weights import ModelWeights
from common.transport.compression import Compression
from server.aggregation import aggregate, all_finite, make_writable
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.cohort import CohortSampler, Sampler, min_separation, participations
from server.evaluation import Evaluation, evaluate
from server.grids import (
    CheckedGrid,
    ClippedSum,
    ClippedSumGrid,
    DecompressingGrid,
    FoldingGrid,
    SpoolingGrid,
    noised_reply,
    trainable_names,
)
from server.job import Arrays, Job, Observer, Outcome, RoundRecord
from server.release import Release, Releases
from server.roster import CohortView, discover, request_record
from server.strategies import cast_like, largest_value, make_strategy, minimum_replies, replies_needed
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
        self._trainable = trainable_names(job.model)
        self._releases = self._make_releases()
        self._best: tuple[int, Evaluation, Arrays] | None = None
        self._last: Evaluation | None = None
        self._since_best = 0
        self._any_update = False
        self._checkpoint_seconds = 0.0

    def _make_releases(self) -> Releases | None:
        """What adds noise here, under client-level privacy."""
        job = self._job
        if job.config.privacy.unit != "client":
            return None
        if job.plan is None:
            raise PrivacyError("the run is private but has no plan", hint="make one with `make_plan`")
        return Releases(
            job.plan,
            run=job.config.digest(),
            dimensions=sum(self._arrays[name].size for name in self._trainable),
            ledger=job.ledger,
            noise=job.noise,
            checkpoints=job.folder.checkpoints if job.folder else None,
        )

    def run(self, grid: Grid) -> Outcome:
        """Train until the last round, or until evaluation says to stop; continue after the last checkpoint, if any.

        Raises:
            RunError: There is no client, no round had an update, or the checkpoint is of another configuration.
            PrivacyError: The coordinator's ledger does not allow a round, or cannot be written.
        """
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
            or (cohort.sampling == "poisson" and plan.unit == "client" and cohort.size / clients > plan.sampling_rate)
        ):
            raise RunError(
                f"only {clients} clients are there, too few for the privacy plan",
                hint="start it again with all clients",
            )

    def _round(self, grid: Grid, roster: Mapping[str, int], server_round: int) -> None:
        job, config, clock = self._job, self._job.config, _Clock()
        cohort = self._sampler.sample(server_round, list(roster))
        release = self._releases.stored(server_round) if self._releases else None
        if release is not None:
            cohort = release.cohort
        names = {roster[name]: name for name in cohort if name in roster}
        job.observer.round_started(server_round, cohort)
        fates: dict[str, FailureCode | None] = {}

        def on_reply(message: Message, failure: FailureCode | None) -> None:
            name = names[message.metadata.dst_node_id]
            fates[name] = failure
            job.observer.reply_received(name, failure)

        how = Compression.of(config.transport)
        checked = CheckedGrid(
            grid if how.codec == "none" else DecompressingGrid(grid, template=self._arrays, how=how),
            template=self._arrays,
            equal_weights=config.private or config.strategy.weighting == "equal",
            metrics=self._metrics(),
            largest=largest_value(config.strategy),
            on_reply=on_reply,
        )
        view = CohortView(checked, list(names))
        start = to_record(self._arrays)
        request = self._strategy.configure_train(server_round, start, self._request(cohort), view)
        messages = sorted(request, key=lambda message: names[message.metadata.dst_node_id])
        if release is not None:
            for name, fate in release.fates.items():
                fates[name] = fate
                job.observer.reply_received(name, fate)
            replies = [noised_reply(self._arrays, self._trainable, release.mean, to=None)]
        elif self._releases is not None:
            release, replies = self._noised(self._releases, server_round, view, messages, cohort=cohort, fates=fates)
        else:
            kind = FoldingGrid if replies_needed(self._strategy) == "mean" else SpoolingGrid
            asking = kind(view, folder=job.folder.path if job.folder else None)
            replies = list(asking.send_and_receive(messages, timeout=config.cohort.deadline_seconds or None))
        clock.lap("train")
        survivors = [name for name in cohort if name in fates and fates[name] is None]
        train_loss, refused = None, False
        fewest = max(config.cohort.min_survivors, minimum_replies(config.strategy))
        if release is not None or len(survivors) >= fewest:  # what was released is used, whoever answered
            replies.sort(key=lambda reply: names.get(reply.metadata.src_node_id, ""))
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
            failures={name: fate.slug for name, fate in sorted(fates.items()) if fate is not None},
            train_loss=train_loss,
            accuracy=evaluation.accuracy if evaluation else None,
            loss=evaluation.loss if evaluation else None,
            aggregate_refused=refused,
            clipping_norm=release.clipping_norm if release else None,
            within=release.within if release else None,
            seconds={**clock.laps, "checkpoint": self._checkpoint_seconds},
        )
        # The record comes before the checkpoint: a resumed run drops records without one, and could not add a lost one.
        job.observer.round_finished(record)
        clock.lap("observer")
        self._save(server_round)
        clock.lap("checkpoint")
        self._checkpoint_seconds = clock.laps["checkpoint"]

    def _noised(
        self,
        releases: Releases,
        server_round: int,
        view: Grid,
        messages: list[Message],
        *,
        cohort: list[str],
        fates: Mapping[str, FailureCode | None],
    ) -> tuple[Release, list[Message]]:
        """Ask the cohort, release the noised mean of its clipped updates; the release, and what the strategy sees."""
        released: list[Release] = []

        def release(total: ClippedSum) -> NDArray[np.float64]:
            released.append(releases.release(server_round, total, cohort=cohort, fates=fates))
            return released[-1].mean

        asking = ClippedSumGrid(
            view,
            model=self._arrays,
            trainable=self._trainable,
            clipping_norm=releases.clipping_norm,
            release=release,
            folder=self._job.folder.path if self._job.folder else None,
        )
        replies = list(asking.send_and_receive(messages, timeout=self._job.config.cohort.deadline_seconds or None))
        return released[0], replies

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

    def _metrics(self) -> tuple[str, ...]:
        """What a reply holds beside weights and weight: nothing that was not paid for."""
        if self._releases is not None and self._releases.adaptive:
            return (WITHIN,)
        return () if self._job.config.private else (TRAIN_LOSS,)

    def _request(self, cohort: list[str]) -> ConfigRecord:
        """The configuration that every client of a round gets; Flower adds the round's number to it."""
        job, plan = self._job, self._job.plan
        told = None if self._releases is not None else cohort  # who takes part is not for others to know
        record = request_record(job.config, run_id=job.run_id, authorization=job.authorization, cohort=told)
        if plan is not None:
            record[NOISE], record[ORDER] = plan.noise_multiplier, plan.budget.order
            record[PARTICIPATIONS], record[SEPARATION] = plan.participations, plan.min_separation
            record[CLIENTS] = plan.clients
        if self._releases is not None:
            record[CLIPPING_NORM] = self._releases.clipping_norm
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
                },
                config_digest=self._job.config.digest(),
                noise=self._releases.state() if self._releases else {},
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
        if self._releases is not None:
            self._releases.restore(checkpoint.noise, server_round=checkpoint.server_round)
        progress = checkpoint.progress
        self._any_update, self._since_best = progress["any_update"], progress["since_best"]
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
    return {
        "server_round": server_round,
        "accuracy": evaluation.accuracy,
        "loss": evaluation.loss,
        "count": evaluation.count,
    }


def _from_progress(saved: Mapping[str, Any]) -> Evaluation:
    return Evaluation(accuracy=saved["accuracy"], loss=saved["loss"], count=saved["count"])
