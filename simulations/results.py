"""What a simulated run leaves behind: what every run does (`server.results`), and what only a simulation knows."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from common.errors import DataError
from common.models.weights import ModelWeights
from common.privacy import PrivacyPlan
from server.coordinator import Outcome
from server.evaluation import evaluate
from server.results import MOST_LISTED, RoundKeeper, complete_folder, describe_privacy, describe_run
from server.store import RunFolder
from simulations.batching import read_record
from simulations.run import Prepared

_MOST_CLASSES = 100
"""With more classes (next-token data) their counts are not kept."""


class FolderObserver(RoundKeeper):
    """Writes each round to the run folder and to TensorBoard events; epsilon is what the simulated ledgers say."""

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        clients = len(prepared.federation.clients)
        super().__init__(folder, spent=prepared.spent, plan=prepared.plan, clients=clients)


def write_results(
    prepared: Prepared, outcome: Outcome, folder: RunFolder, *, seconds: float, comparison: dict[str, Any] | None
) -> dict[str, Any]:
    """Complete a run folder; returns the result."""
    result = describe(prepared, outcome, folder.rounds(), seconds=seconds)
    result |= {"comparison": comparison, "batching": read_record(folder.path)}
    return complete_folder(folder, outcome, result)


def describe(prepared: Prepared, outcome: Outcome, rounds: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """The result of a run as JSON values."""
    plan, federation = prepared.plan, prepared.federation
    shown = listed(federation.names, {name for row in rounds for name in row["survivors"]})
    clients = _clients(prepared, outcome, shown)
    return describe_run(
        prepared.config,
        outcome,
        rounds,
        schema=federation.schema,
        model=prepared.model,
        held_out=federation.test,
        clients=clients,
        privacy=None if plan is None else _privacy(prepared, plan, [*shown, *_who_spent_most(rounds, shown)]),
        seconds=seconds,
        simulated=True,
        population={
            "clients": len(federation.clients),
            "evaluated": sum(facts.get("accuracy") is not None for facts in clients.values()),
            "participated": len({name for row in rounds for name in row["survivors"]}),
        },
    )


def listed(names: Sequence[str], took_part: Collection[str], *, most: int = MOST_LISTED) -> list[str]:
    """Whom a result tells something of: all clients, or a fixed choice of `most`.

    Those who took part come first; of more, or of the others, each at an even distance from the next in order of names.

    Args:
        names: The population, in the order of its partitions.
        took_part: Those of whom an update was used.
        most: How many are listed.
    """
    if len(names) <= most:
        return list(names)
    first = sorted(took_part)
    chosen = [first[place] for place in _evenly(len(first), most)]
    if len(chosen) < most:
        others = (names[place] for place in _evenly(len(names), most))
        chosen += [name for name in others if name not in took_part][: most - len(chosen)]
    return sorted(chosen)


def _evenly(count: int, most: int) -> Iterator[int]:
    """At most `most` places below `count`, at even distances."""
    taken = min(count, most)
    return (i * count // taken for i in range(taken))


def _who_spent_most(rounds: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> list[str]:
    """The client of the largest epsilon in the rows, unless it is shown anyway."""
    told = {name: epsilon for row in rounds for name, epsilon in (row.get("epsilon") or {}).items()}
    name = max(told, key=lambda name: math.inf if told[name] is None else told[name], default=None)
    return [] if name is None or name in set(shown) else [name]


def _clients(prepared: Prepared, outcome: Outcome, shown: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Each shown client's sizes, classes and the chosen model's accuracy on its own held-out examples."""
    ModelWeights(prepared.model).load(outcome.arrays)
    names = prepared.federation.names
    places = dict(zip(names, range(len(names)), strict=True)) if len(names) == len(shown) else None
    document: dict[str, dict[str, Any]] = {}
    for name in shown:
        try:
            client = prepared.federation.clients[names.index(name) if places is None else places[name]]
        except DataError:  # a site's own function could not make it: its rounds have said so
            document[name] = {}
            continue
        own = evaluate(prepared.model, client.test, batch_size=prepared.config.evaluation.batch_size)
        document[name] = {
            "train_examples": len(client.train),
            "test_examples": len(client.test),
            "accuracy": own.accuracy if own.count else None,
            "class_counts": _class_counts(client.train.targets, prepared.federation.schema.num_classes),
        }
    return document


def _privacy(prepared: Prepared, plan: PrivacyPlan, clients: Sequence[str]) -> dict[str, Any]:
    """What was promised, at what price; epsilon counts the plan's own unit, `examples_epsilon` a site's examples."""
    return describe_privacy(
        prepared.config,
        plan,
        epsilon=prepared.spent(clients),
        taken=prepared.rounds_taken(clients),
        examples_epsilon=prepared.sites_spent(clients),
        epsilon_is="spent by the coordinator's releases over the whole run, for each client"
        if plan.central
        else "spent at each client over the whole run",
        insecure_fixed_noise=prepared.sites.insecure_seed is not None,
    )


def _class_counts(targets: Tensor, num_classes: int) -> list[int]:
    return [int(n) for n in targets.flatten().bincount(minlength=num_classes)] if num_classes <= _MOST_CLASSES else []
