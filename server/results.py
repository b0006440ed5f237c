"""What a run leaves behind: a row a round, events, the model, the result, the report. Simulations add what only they
know: each client's examples and ledger.
"""

from __future__ import annotations

import math
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from safetensors.numpy import save as save_arrays
from torch import nn

from common.config import RunConfig
from common.errors import FailureCode, LedgerError
from common.models import parameter_count
from common.privacy import PrivacyPlan
from common.privacy.accounting.accountant import ReplaceOne
from common.schema import DataSchema, Examples
from server.evaluation import majority_accuracy
from server.job import Observer, Outcome, RoundRecord
from server.report import write_report
from server.report.measures import describe_course
from server.report.tensorboard import EventWriter
from server.store import RunFolder
from server.sums import describe_sums

Spent = Callable[[Sequence[str] | None], dict[str, float]]
"""Epsilon spent by client, of these clients or (None) of all, as ledgers say; empty where no ledger is at hand."""

MOST_LISTED: Final = 1000
"""Of a larger population neither rows nor results list every client."""


class RoundKeeper(Observer):
    """Writes each round to the run folder and to TensorBoard events.

    Args:
        folder: The run's folder, open for writing.
        spent: What ledgers say.
        plan: The run's privacy plan, or None.
        clients: The population. A row tells the epsilon of all clients; of more than `MOST_LISTED` that of its cohort.

    Attributes:
        epsilon: As the last row tells it.
        most_epsilon: The largest that any row told; 0 where nothing was spent.
    """

    def __init__(self, folder: RunFolder, *, spent: Spent, plan: PrivacyPlan | None, clients: int = 0) -> None:
        self._folder = folder
        self._spent = spent
        self._plan = plan
        self._many = clients > MOST_LISTED
        self._events: EventWriter | None = None
        before = self._told_before()
        self.epsilon: dict[str, float] = spent(list(before) if self._many else None)
        self.most_epsilon = max(self.epsilon.values(), default=0.0)
        self._check_ledgers(before)

    def round_finished(self, record: RoundRecord) -> None:
        """Append the round; epsilon is read from the ledgers of those who were asked."""
        if self._plan is not None:
            everybody = self._plan.central and not self._many  # one release for all, whoever was asked
            now = self._spent(None if everybody else record.cohort)
            self.epsilon = now if self._many else self.epsilon | now
            self.most_epsilon = max(self.most_epsilon, *now.values(), 0.0)
        row = {**asdict(record), "epsilon": dict(sorted(self.epsilon.items()))}
        self._folder.append_round(row)
        self._events = self._events or EventWriter(self._folder.path)  # a run that is refused writes nothing
        self._events.write_round(row)

    def _told_before(self) -> dict[str, float]:
        """What rows of a run that is resumed say last of each client."""
        told: dict[str, float | None] = {}
        for row in self._folder.rounds():
            told |= row.get("epsilon") or {}
        return {name: math.inf if epsilon is None else epsilon for name, epsilon in told.items()}

    def _check_ledgers(self, before: Mapping[str, float]) -> None:
        """A resumed run goes on with the ledgers that it wrote: fewer events than before would be epsilon not told."""
        for name, epsilon in before.items():
            if self.epsilon.get(name, 0.0) < epsilon:
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
        self._listening = [o for o in observers if type(o).reply_received is not Observer.reply_received]

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.round_started(server_round, cohort)

    def update_received(self, client: str) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.update_received(client)

    def reply_received(self, client: str, failure: FailureCode | None) -> None:
        """See `Observer`."""
        for observer in self._listening:
            observer.reply_received(client, failure)

    def round_finished(self, record: RoundRecord) -> None:
        """See `Observer`."""
        for observer in self._observers:
            observer.round_finished(record)


def complete_folder(folder: RunFolder, outcome: Outcome, result: Mapping[str, Any]) -> dict[str, Any]:
    """Write model, result and report; returns the result as it was written: what is not finite is null."""
    folder.write("model.safetensors", save_arrays(dict(outcome.arrays)))
    folder.write_result(result)
    write_report(folder.path)
    return folder.read_result() or dict(result)


def describe_run(
    config: RunConfig,
    outcome: Outcome,
    rounds: Sequence[Mapping[str, Any]],
    *,
    schema: DataSchema,
    model: nn.Module,
    held_out: Examples | None,
    clients: Mapping[str, Mapping[str, Any]],
    privacy: Mapping[str, Any] | None,
    seconds: float,
    simulated: bool,
    population: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The result of a run as JSON values.

    Args:
        config: The run.
        outcome: What it ended with.
        rounds: Its rows.
        schema: Public facts of its data.
        model: Its model, with whatever weights.
        held_out: The coordinator's own examples, or None.
        clients: What is known of each client.
        privacy: What `describe_privacy` says, or None.
        seconds: Wall seconds of the whole run.
        simulated: Whether all clients were on one machine.
        population: How many `clients` there are, of how many `clients` tells something (`evaluated`), and how many took
            part (`participated`), where these are not all.
    """
    evaluation = outcome.evaluation
    measured = [a for facts in clients.values() if (a := facts.get("accuracy")) is not None]
    laps = {name: sum(r["seconds"].get(name, 0.0) for r in rounds) for name in (rounds[0]["seconds"] if rounds else {})}
    return {
        "format": 1,
        "name": config.name,
        "status": "stopped-early" if outcome.stopped_early else "completed",
        "rounds": outcome.rounds,
        "selected_round": outcome.selected_round,
        "accuracy": evaluation.accuracy if evaluation else None,
        "loss": evaluation.loss if evaluation else None,
        "majority_accuracy": None if held_out is None else majority_accuracy(held_out.targets),
        "evaluation": {
            "examples": 0 if held_out is None else len(held_out),
            "released": not (config.private and simulated),  # a simulation's accuracy is of the clients' own examples
        },
        "missing": dict(sorted(Counter(reason for r in rounds for reason in r["failures"].values()).items())),
        "clients": {name: dict(facts) for name, facts in clients.items()},
        "population": None if population is None else dict(population),
        "course": describe_course(
            rounds,
            accuracy=evaluation.accuracy if evaluation else None,
            clients=population["clients"] if population else len(clients),
            measured=measured,
        ),
        "privacy": None if privacy is None else dict(privacy),
        "secure_aggregation": describe_sums(config, rounds),
        "model": {"name": config.model.name, "parameters": parameter_count(model)},
        "compression": config.transport.compression,
        "data": {
            "name": config.data.name,
            "partition": "pooled" if config.data.pooled else config.data.partition,
            "class_names": list(schema.class_names),
        },
        "seconds": {"total": seconds, **laps},
        "simulated": simulated,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()},
    }


def describe_privacy(
    config: RunConfig,
    plan: PrivacyPlan,
    *,
    epsilon: Mapping[str, float],
    taken: Mapping[str, int],
    examples_epsilon: Mapping[str, float],
    epsilon_is: str,
    insecure_fixed_noise: bool = False,
) -> dict[str, Any]:
    """What was promised, at what price.

    Args:
        config: The run.
        plan: Its plan.
        epsilon: What ledgers say was spent, in the plan's own unit, by client; of a large population that of those who
            are listed, and of whoever spent most.
        taken: How many rounds each client's epsilon counts.
        examples_epsilon: What was spent of each client's examples, where that is known.
        epsilon_is: What `epsilon` counts, for people.
        insecure_fixed_noise: Whether the noise protects nobody.
    """
    return {
        "unit": plan.unit,
        "trust": plan.trust,
        "relation": plan.relation,
        "mechanism": plan.mechanism,
        "target_epsilon": config.privacy.target_epsilon,
        "target_delta": plan.budget.delta,
        "order": plan.budget.order,
        "noise_multiplier": plan.noise_multiplier,
        "noise_stddev": plan.noise_stddev,
        "clipping": plan.clipping,
        "clipping_norm": plan.clipping_norm,
        "sampling_rate": plan.sampling_rate,
        "shares": plan.shares and asdict(plan.shares),
        "epsilon": dict(epsilon),
        "epsilon_replace_one": _replace_one(plan, taken),
        "replace_one_by": "Renyi, best order" if plan.shares else "privacy loss",
        "examples_epsilon": dict(examples_epsilon),
        "epsilon_is": epsilon_is,
        "insecure_fixed_noise": insecure_fixed_noise,
    }


def _replace_one(plan: PrivacyPlan, taken: Mapping[str, int]) -> dict[str, float | None]:
    """The same where neighbours differ by one unit replaced, by `replace_one_by`; null where infinite."""
    cost = {
        k: ReplaceOne().epsilon(plan.release(k), delta=plan.budget.delta, unit=plan.unit) for k in set(taken.values())
    }
    return {name: cost[k] if math.isfinite(cost[k]) else None for name, k in taken.items()}
