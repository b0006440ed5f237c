"""What a simulated run leaves behind: what every run does (`server.results`), and what only a simulation knows."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from common.models.weights import ModelWeights
from common.privacy import PrivacyPlan
from server.coordinator import Outcome
from server.evaluation import evaluate
from server.results import RoundKeeper, complete_folder, describe_privacy, describe_run
from server.store import RunFolder
from simulations.run import Prepared

_MOST_CLASSES = 100
"""With more classes (next-token data) their counts are not kept."""


class FolderObserver(RoundKeeper):
    """Writes each round to the run folder and to TensorBoard events; epsilon is what the simulated ledgers say."""

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        super().__init__(folder, spent=prepared.spent, plan=prepared.plan)


def write_results(
    prepared: Prepared, outcome: Outcome, folder: RunFolder, *, seconds: float, comparison: dict[str, Any] | None
) -> dict[str, Any]:
    """Complete a run folder; returns the result."""
    result = describe(prepared, outcome, folder.rounds(), seconds=seconds) | {"comparison": comparison}
    return complete_folder(folder, outcome, result)


def describe(prepared: Prepared, outcome: Outcome, rounds: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """The result of a run as JSON values."""
    plan, federation = prepared.plan, prepared.federation
    return describe_run(
        prepared.config,
        outcome,
        rounds,
        schema=federation.schema,
        model=prepared.model,
        held_out=federation.test,
        clients=_clients(prepared, outcome),
        privacy=None if plan is None else _privacy(prepared, plan),
        seconds=seconds,
        simulated=True,
    )


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
    return describe_privacy(
        prepared.config,
        plan,
        epsilon=prepared.spent(),
        taken=prepared.rounds_taken(),
        examples_epsilon=prepared.sites_spent(),
        epsilon_is="spent by the coordinator's releases over the whole run, for each client"
        if plan.central
        else "spent at each client over the whole run",
        insecure_fixed_noise=prepared.sites.insecure_seed is not None,
    )


def _class_counts(targets: Tensor, num_classes: int) -> list[int]:
    return [int(n) for n in targets.flatten().bincount(minlength=num_classes)] if num_classes <= _MOST_CLASSES else []
