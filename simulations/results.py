"""What a simulated run leaves behind: a row a round, events, the model, the result, the report."""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from safetensors.numpy import save as save_arrays
from torch import Tensor

from common.errors import FailureCode, LedgerError
from common.models import parameter_count
from common.models.weights import ModelWeights
from common.privacy import RELATION, PrivacyPlan
from common.privacy.accounting.accountant import ReplaceOne
from server.coordinator import Observer, Outcome, RoundRecord
from server.evaluation import evaluate, majority_accuracy
from server.report import write_report
from server.report.tensorboard import EventWriter
from server.store import RunFolder
from simulations.run import Prepared

_MOST_CLASSES = 100
"""With more classes (next-token data) their counts are not kept."""


class FolderObserver(Observer):
    """Writes each round to the run folder and to TensorBoard events."""

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        self._prepared = prepared
        self._folder = folder
        self._events: EventWriter | None = None
        self.epsilon: dict[str, float] = prepared.spent()
        self._check_ledgers()

    def round_finished(self, record: RoundRecord) -> None:
        """Append the round; epsilon is read from the ledgers of those who were asked."""
        if self._prepared.plan is not None:
            everybody = self._prepared.plan.unit == "client"  # one release for all, whoever was asked
            self.epsilon |= self._prepared.spent(None if everybody else record.cohort)
        row = {**asdict(record), "epsilon": dict(sorted(self.epsilon.items()))}
        self._folder.append_round(row)
        self._events = self._events or EventWriter(self._folder.path)  # a run that is refused writes nothing
        self._events.write_round(row)

    def _check_ledgers(self) -> None:
        """A resumed run goes on with the ledgers that it wrote: fewer events than before would be epsilon not told."""
        rows = self._folder.rounds()
        for name, before in (rows[-1].get("epsilon", {}) if rows else {}).items():
            if self.epsilon.get(name, 0.0) < (math.inf if before is None else before):
                raise LedgerError(
                    f"the ledger of {name} holds less than the run had spent", hint="restore it, or start a new run"
                )

    def close(self) -> None:
        """Flush the events."""
        if self._events is not None:
            self._events.close()


class Observers(Observer):
    """Tells several observers in turn."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.round_started(server_round, cohort)

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.reply_received(client, failure)

    def round_finished(self, record: RoundRecord) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.round_finished(record)


def write_results(
    prepared: Prepared, outcome: Outcome, folder: RunFolder, *, seconds: float, comparison: dict[str, Any] | None
) -> dict[str, Any]:
    """Complete a run folder; returns the result."""
    folder.write("model.safetensors", save_arrays(dict(outcome.arrays)))
    result = describe(prepared, outcome, folder.rounds(), seconds=seconds) | {"comparison": comparison}
    folder.write_result(result)
    write_report(folder.path)
    return folder.read_result() or result  # as it was written: what is not finite is null


def describe(prepared: Prepared, outcome: Outcome, rounds: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """The result of a run as JSON values."""
    config, federation, plan = prepared.config, prepared.federation, prepared.plan
    evaluation = outcome.evaluation
    laps = {name: sum(r["seconds"].get(name, 0.0) for r in rounds) for name in (rounds[0]["seconds"] if rounds else {})}
    return {
        "format": 1,
        "name": config.name,
        "status": "stopped-early" if outcome.stopped_early else "completed",
        "rounds": outcome.rounds,
        "selected_round": outcome.selected_round,
        "accuracy": evaluation.accuracy if evaluation else None,
        "loss": evaluation.loss if evaluation else None,
        "majority_accuracy": majority_accuracy(federation.test.targets),
        "evaluation": {"examples": len(federation.test), "released": not config.private},
        "missing": dict(sorted(Counter(reason for r in rounds for reason in r["failures"].values()).items())),
        "clients": _clients(prepared, outcome),
        "privacy": None if plan is None else _privacy(prepared, plan),
        "model": {"name": config.model.name, "parameters": parameter_count(prepared.model)},
        "data": {
            "name": config.data.name,
            "partition": "pooled" if config.data.pooled else config.data.partition,
            "class_names": list(federation.schema.class_names),
        },
        "seconds": {"total": seconds, **laps},
        "simulated": True,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
    }


def _clients(prepared: Prepared, outcome: Outcome) -> dict[str, dict[str, Any]]:
    """Each client's sizes, classes and the chosen model's accuracy on its own held-out examples."""
    ModelWeights(prepared.model).load(outcome.arrays)
    document = {}
    for client in prepared.federation.clients:
        own = evaluate(prepared.model, client.test, batch_size=prepared.config.evaluation.batch_size)
        document[client.name] = {
            "train_examples": len(client.train),
            "test_examples": len(client.test),
            "accuracy": own.accuracy if own.count else None,
            "class_counts": _class_counts(client.train.targets, prepared.federation.schema.num_classes),
        }
    return document


def _privacy(prepared: Prepared, plan: PrivacyPlan) -> dict[str, Any]:
    """What was promised, at what price; epsilon counts the plan's own unit, `examples_epsilon` a site's examples."""
    return {
        "unit": plan.unit,
        "trust": "nobody" if plan.unit == "example" else "coordinator",
        "relation": RELATION,
        "mechanism": plan.mechanism,
        "target_epsilon": prepared.config.privacy.target_epsilon,
        "target_delta": plan.budget.delta,
        "order": plan.budget.order,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev": plan.noise_stddev,
        "clipping": plan.clipping,
        "clipping_norm": plan.clipping_norm,
        "sampling_rate": plan.sampling_rate,
        "epsilon": prepared.spent(),
        "epsilon_replace_one": _replace_one(prepared, plan),
        "examples_epsilon": prepared.sites_spent(),
        "epsilon_is": "spent at each client over the whole run"
        if plan.unit == "example"
        else "spent by the coordinator's releases over the whole run, for each client",
        "insecure_fixed_noise": prepared.sites.insecure_seed is not None,
    }


def _replace_one(prepared: Prepared, plan: PrivacyPlan) -> dict[str, float | None]:
    """The same where neighbours differ by one unit replaced, by privacy loss distributions; null where infinite."""
    taken = prepared.rounds_taken()
    cost = {
        k: ReplaceOne().epsilon(plan.release(k), delta=plan.budget.delta, unit=plan.unit) for k in set(taken.values())
    }
    return {name: cost[k] if math.isfinite(cost[k]) else None for name, k in taken.items()}


def _class_counts(targets: Tensor, num_classes: int) -> list[int]:
    return [int(n) for n in targets.flatten().bincount(minlength=num_classes)] if num_classes <= _MOST_CLASSES else []
