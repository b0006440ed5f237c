"""What do I gain, and what does privacy cost? The same folds trained alone, federated, with privacy, and pooled."""

from __future__ import annotations

import json
import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from common.config import RunConfig
from common.errors import ConfigError, RunError
from common.guarantee import ADDED_OR_REMOVED, UPDATE_REPLACED, against
from common.models.weights import ModelWeights
from common.schema import Federation
from server.coordinator import Outcome
from server.evaluation import majority_accuracy, probabilities
from simulations.interrupt import check_interrupt
from simulations.logs import begin_worker
from simulations.run import Prepared, execute, prepare

FEDERATED, PRIVATE, POOLED = "federated", "federated_dp", "pooled"


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldResult:
    """One arm on one fold: scores and truths of the held-out examples, hospital by hospital.

    Attributes:
        arm: `federated`, `federated_dp`, `pooled`, or `alone.SITE`.
        fold: From 0.
        scores: By site, the probability of class 1; with more than two classes, 1 where the prediction was right.
        truths: By site, the class.
        correct: By site, whether each prediction was right.
        epsilon: By site, what the ledger says was spent; empty without privacy.
    """

    arm: str
    fold: int
    scores: dict[str, list[float]]
    truths: dict[str, list[int]]
    correct: dict[str, list[bool]]
    epsilon: dict[str, float]


def arms_of(config: RunConfig, plain: RunConfig, sites: Sequence[str]) -> dict[str, RunConfig]:
    """The configuration of each arm; `plain` is the run's configuration as it is without privacy.

    Secure aggregation stays with the run itself: who trains alone has nobody to hide among.
    """
    arms = {FEDERATED: plain, PRIVATE: config} if config.private else {FEDERATED: config}
    arms[POOLED] = _with_data(plain, pooled=True)
    for site in sites:
        arms[f"alone.{site}"] = _with_data(plain, sites=[site])
    return arms


def check_comparable(config: RunConfig) -> None:
    """Refuse a comparison that has no sites to compare, before the run starts.

    Raises:
        ConfigError: The clients are not the data's own groups, or a round is chosen by its accuracy: that would judge a
            run on the examples that it was chosen on.
    """
    if config.evaluation.select != "last" or config.evaluation.patience:
        raise ConfigError(
            "a comparison judges the last round of every run",
            hint="set evaluation.select = 'last' and evaluation.patience = 0, or comparison.enabled = false",
        )
    if config.simulation.virtual or config.asynchronous.buffer_size:
        raise ConfigError(
            "a comparison also trains each site alone, which has nobody to be late for",
            hint="leave out simulation.devices and asynchronous, or set comparison.enabled = false",
        )
    if config.data.partition != "natural" or config.data.pooled:
        raise ConfigError(
            "comparison.enabled compares sites, which only a natural partition has",
            hint="set data.partition = 'natural' and data.pooled = false, or comparison.enabled = false",
        )


def compare(
    prepared: Prepared,
    outcome: Outcome,
    plain: RunConfig,
    *,
    results_file: Path,
    workers: int,
    on_result: Callable[[int, int, str], None],
) -> dict[str, Any]:
    """Set a finished run beside its alternatives; the run itself is one fold of its own arm.

    Args:
        prepared: The run that was made, its data undivided.
        outcome: What it ended with.
        plain: The run's configuration as it is without privacy.
        results_file: Where each fold's result is kept, so that an interrupted comparison goes on where it stopped.
        workers: Processes, each training one arm on one fold at a time.
        on_result: Told of the number done, the number of all, and the arm just done.
    """
    config, federation = prepared.config, prepared.federation
    sites = [client.name for client in federation.clients]
    arms = arms_of(config, plain, sites)
    results = read_results(results_file)
    results_file.write_text("".join(_line(result) for result in results), encoding="utf-8")  # ends a cut-off line

    def keep(result: FoldResult) -> None:
        with results_file.open("a", encoding="utf-8") as file:
            file.write(_line(result))
        results.append(result)

    own = fold_result(PRIVATE if config.private else FEDERATED, prepared, outcome, federation)
    if not any((result.arm, result.fold) == (own.arm, own.fold) for result in results):
        keep(own)
    have = {(result.arm, result.fold) for result in results}
    jobs = [
        (arm, _with_data(arm_config, fold=fold).canonical_json(), sites, prepared.sites.site_file)
        for fold in range(config.data.folds)
        for arm, arm_config in arms.items()
        if (arm, fold) not in have
    ]
    # A run with a deadline starts processes of its own, which a pool's process may not.
    for result in _run_all(jobs, 1 if config.cohort.deadline_seconds else workers):
        keep(result)
        check_interrupt()
        on_result(len(results), len(arms) * config.data.folds, result.arm)
    order = list(arms)
    return summarise(sorted(results, key=lambda result: (order.index(result.arm), result.fold)), config)


def fold_result(arm: str, prepared: Prepared, outcome: Outcome, federation: Federation) -> FoldResult:
    """Judge a finished run on the held-out examples of every site in `federation`."""
    ModelWeights(prepared.model).load(outcome.arrays)
    scores, truths, correct = {}, {}, {}
    for client in federation.clients:
        table = probabilities(prepared.model, client.test, batch_size=prepared.config.evaluation.batch_size)
        targets = client.test.targets.flatten()
        right = table.argmax(1) == targets
        scores[client.name] = (table[:, 1] if table.shape[1] == 2 else right.float()).tolist()
        truths[client.name] = targets.tolist()
        correct[client.name] = right.tolist()
    return FoldResult(
        arm=arm,
        fold=prepared.config.data.fold,
        scores=scores,
        truths=truths,
        correct=correct,
        epsilon=prepared.spent(),
    )


def summarise(results: Sequence[FoldResult], config: RunConfig) -> dict[str, Any]:
    """The comparison as JSON values: means and standard deviations over folds, and what each site gains."""
    by_arm: dict[str, list[FoldResult]] = {}
    for result in results:
        by_arm.setdefault(result.arm, []).append(result)
    arms = {arm: _summarise_arm(rows) for arm, rows in by_arm.items()}
    alone = {arm.removeprefix("alone."): summary for arm, summary in arms.items() if arm.startswith("alone.")}
    document: dict[str, Any] = {
        "folds": config.data.folds,
        "test_majority": _majority(by_arm[FEDERATED], None),
        "arms": {FEDERATED: arms[FEDERATED], POOLED: arms[POOLED], "alone": alone},
        "pooled_minus_federated": fmean(
            p - f for p, f in zip(_accuracies(by_arm[POOLED]), _accuracies(by_arm[FEDERATED]), strict=True)
        ),
        "gains": {site: _gain(by_arm, site) for site in by_arm[FEDERATED][0].scores if f"alone.{site}" in by_arm},
    }
    if PRIVATE in arms:
        epsilon = {site: max(row.epsilon[site] for row in by_arm[PRIVATE]) for site in by_arm[PRIVATE][0].epsilon}
        document["arms"][PRIVATE] = {
            **arms[PRIVATE],
            "epsilon": epsilon,
            "delta": config.privacy.target_delta,
            "unit": config.privacy.unit,
            "relation": UPDATE_REPLACED if config.distributed else ADDED_OR_REMOVED,
            "against": _against(config),
        }
    return document


def _against(config: RunConfig) -> str:
    trust = "cohort" if config.distributed else "coordinator" if config.central else "nobody"
    return against(trust, config.secagg.colluding)


def read_results(path: Path) -> list[FoldResult]:
    """Results that an interrupted comparison left; a line that was cut off is left out."""
    results = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                results.append(FoldResult(**json.loads(line)))
            except (ValueError, TypeError):
                break
    return results


def _line(result: FoldResult) -> str:
    return json.dumps(asdict(result)) + "\n"


Job = tuple[str, str, Sequence[str], Path | None]
"""Arm, its configuration on one fold as JSON, the sites on whose held-out examples it is judged, and the registry."""


def _run_all(jobs: Sequence[Job], workers: int) -> Iterator[FoldResult]:
    if workers <= 1 or len(jobs) <= 1:
        yield from map(_run_one, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simulations.comparison", "common.privacy.optimizer"])
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)),
        mp_context=context,
        initializer=begin_worker,
    )
    try:
        for future in as_completed([pool.submit(_run_one, job) for job in jobs]):
            yield future.result()
    except BrokenProcessPool as e:
        raise RunError(
            "a worker process of the comparison was ended", hint="free some memory, then continue with --resume"
        ) from e
    finally:
        pool.shutdown(cancel_futures=True)


def _run_one(job: Job) -> FoldResult:
    arm, text, sites, site_file = job
    config = RunConfig.model_validate_json(text)
    everyone = _with_data(config, sites=list(sites), pooled=False)
    with tempfile.TemporaryDirectory(prefix="coterie-") as folder:
        prepared = prepare(config, folder=Path(folder), site_file=site_file)
        outcome = execute(prepared)
        whole = prepare(everyone, folder=Path(folder), site_file=site_file).federation
        return fold_result(arm, prepared, outcome, whole)


def _with_data(config: RunConfig, **changes: Any) -> RunConfig:
    tree = config.model_dump()
    tree["data"] |= changes
    tree["evaluation"] |= {"every": 0, "patience": 0, "select": "last"}
    return RunConfig.model_validate(tree)


def _summarise_arm(rows: Sequence[FoldResult]) -> dict[str, Any]:
    sites = {}
    for site in rows[0].scores:
        accuracies = [_mean(row.correct[site]) for row in rows]
        sites[site] = {
            "accuracy_mean": fmean(accuracies),
            "accuracy_sd": _sd(accuracies),
            # A site's fold can hold one class only: its AUC is taken over all folds' held-out examples together,
            # so it has no spread over folds.
            "auc_mean": _auc(
                [s for row in rows for s in row.scores[site]], [t for row in rows for t in row.truths[site]]
            ),
            "auc_sd": None,
            "majority": _majority(rows, site),
        }
    accuracies = _accuracies(rows)
    aucs = [
        _auc([s for v in row.scores.values() for s in v], [t for v in row.truths.values() for t in v]) for row in rows
    ]
    known = [auc for auc in aucs if auc is not None]
    return {
        "accuracy_mean": fmean(accuracies),
        "accuracy_sd": _sd(accuracies),
        "auc_mean": fmean(known) if known else None,
        "auc_sd": _sd(known) if known else None,
        "sites": sites,
    }


def _gain(by_arm: dict[str, list[FoldResult]], site: str) -> dict[str, Any]:
    """What a site gains on its own held-out examples by taking part, over training alone, fold by fold."""
    own = [_mean(row.correct[site]) for row in by_arm[f"alone.{site}"]]
    document = {}
    for arm in (FEDERATED, PRIVATE):
        if arm in by_arm:
            differences = [_mean(row.correct[site]) - alone for row, alone in zip(by_arm[arm], own, strict=True)]
            error = _sd(differences) / math.sqrt(len(differences))
            mean = fmean(differences)
            verdict = "gains" if mean > 2 * error else "loses" if mean < -2 * error else "no clear gain"
            document[arm] = {"accuracy_gain": mean, "standard_error": error, "verdict": verdict}
    return document


def _accuracies(rows: Sequence[FoldResult]) -> list[float]:
    return [_mean([right for site in row.correct.values() for right in site]) for row in rows]


def _majority(rows: Sequence[FoldResult], site: str | None) -> float:
    import torch

    truths = [t for row in rows for name, values in row.truths.items() if site in (None, name) for t in values]
    return majority_accuracy(torch.tensor(truths))


def _auc(scores: Sequence[float], truths: Sequence[int]) -> float | None:
    """Area under the ROC curve; None unless exactly the classes 0 and 1 occur."""
    if set(truths) != {0, 1}:
        return None
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(truths, scores))


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _sd(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
