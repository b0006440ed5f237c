"""One simulated run from configuration to run folder."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from flwr.serverapp import Grid
from safetensors.numpy import save as save_arrays
from torch import nn

from common.config import RunConfig
from common.errors import FailureCode, ModelError
from common.flower import client_context
from common.models import check_private, initial_model, parameter_count
from common.models.weights import ModelWeights
from common.privacy import RELATION, PrivacyPlan, make_plan, spent_epsilon
from common.schema import Federation
from server.app import make_server_app
from server.cohort import CohortSampler, participations
from server.coordinator import Job, Observer, Outcome, RoundRecord
from server.evaluation import evaluate, majority_accuracy
from server.report import write_report
from server.report.tensorboard import EventWriter
from server.store import RunFolder
from server.strategies import check_strategy
from simulations.inline import AppFactory, InlineGrid, InProcess, app_factory
from simulations.sites import LEDGERS, SimulatedSites, ledger_of
from simulations.workers import WorkerPool

EngineName = Literal["inline", "ray"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """A run that is known to be possible: its data loads, its model fits, its privacy target can be met."""

    sites: SimulatedSites
    model: nn.Module
    plan: PrivacyPlan | None

    @property
    def config(self) -> RunConfig:
        """The run's configuration."""
        return self.sites.config

    @property
    def federation(self) -> Federation:
        """The run's data."""
        return self.sites.federation


def prepare(config: RunConfig, *, ledgers: Path, site_file: Path | None = None) -> Prepared:
    """Load the data, build the model, calibrate the noise: everything that can refuse a run does so here.

    Raises:
        DataError, ModelError, SiteError, ConfigError, PrivacyError: The run is not possible.
    """
    torch.set_num_threads(1)  # a client's result must not depend on how many cores it finds
    sites = SimulatedSites(config=config, ledgers=ledgers, site_file=site_file)
    federation = sites.federation
    clients = len(federation.clients)
    check_strategy(config.strategy, config.cohort.size or clients)
    model = initial_model(config.model, federation.schema, seed=config.seeds.model, site=sites.site)
    plan = None
    if config.private:
        check_private(model)
        plan = make_plan(config, participations=participations(config.cohort, clients, config.rounds))
    _check_fit(model, federation)
    return Prepared(sites=sites, model=model, plan=plan)


def execute(
    prepared: Prepared,
    *,
    workers: int = 1,
    engine: EngineName = "inline",
    folder: RunFolder | None = None,
    observer: Observer | None = None,
    sampler: CohortSampler | None = None,
    factory: AppFactory | None = None,
) -> Outcome:
    """Train to the end; continues after the folder's last checkpoint.

    Args:
        workers: Processes that train clients; 1 trains in this process, unless clients have a deadline.
        engine: `inline`, or `ray` for Flower's own simulation runtime.
        factory: Another ClientApp than that of the prepared run.
    """
    config = prepared.config
    job = Job(
        config=config,
        model=prepared.model,
        held_out=prepared.federation.test,
        plan=prepared.plan,
        folder=folder,
        sampler=sampler,
        observer=observer or Observer(),
    )
    outcomes: list[Outcome] = []
    app = make_server_app(job, outcomes.append)
    make_app = factory or app_factory(prepared.sites)
    if engine == "ray":
        from simulations.ray_engine import run_on_ray

        run_on_ray(app, make_app, clients=len(prepared.federation.clients), workers=workers)
    else:
        with inline_grid(prepared, make_app, workers=workers) as grid:
            app(grid, client_context(node_id=0, partition=0))
    return outcomes[0]


@contextmanager
def inline_grid(prepared: Prepared, factory: AppFactory, *, workers: int) -> Iterator[Grid]:
    """A grid over this process or over worker processes, which end with it."""
    pooled = workers > 1 or prepared.config.cohort.deadline_seconds > 0
    engine = WorkerPool(factory, workers) if pooled else InProcess(factory)
    try:
        yield InlineGrid(engine, [client.name for client in prepared.federation.clients])
    finally:
        engine.close()


def auto_workers(config: RunConfig, clients: int) -> int:
    """One process a core, no more than a round has clients."""
    return max(1, min(os.cpu_count() or 1, config.cohort.size or clients))


def simulate(
    prepared: Prepared,
    folder: RunFolder,
    *,
    workers: int,
    engine: EngineName = "inline",
    observers: Sequence[Observer] = (),
    comparison: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Run, and leave a complete run folder: result, model, events and report. Returns the result."""
    begin = perf_counter()
    keeper = FolderObserver(prepared, folder)
    outcome = execute(prepared, workers=workers, engine=engine, folder=folder, observer=Observers([keeper, *observers]))
    keeper.close()
    folder.write_bytes("model.safetensors", save_arrays(dict(outcome.arrays)))
    result = describe(prepared, outcome, folder.rounds(), seconds=perf_counter() - begin)
    result["comparison"] = comparison
    folder.write_result(result)
    write_report(folder.path)
    return result


def describe(prepared: Prepared, outcome: Outcome, rounds: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """The result of a run as JSON values."""
    config, federation, plan = prepared.config, prepared.federation, prepared.plan
    ModelWeights(prepared.model).load(outcome.arrays)
    batch = config.evaluation.batch_size
    clients = {}
    for client in federation.clients:
        own = evaluate(prepared.model, client.test, batch_size=batch)
        clients[client.name] = {
            "train_examples": len(client.train),
            "test_examples": len(client.test),
            "accuracy": own.accuracy if own.count else None,
            "class_counts": _class_counts(client.train.targets, federation.schema.num_classes),
        }
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
        "clients": clients,
        "privacy": None if plan is None else {**_describe_privacy(plan), "epsilon": spent_by_client(prepared)},
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


def spent_by_client(prepared: Prepared) -> dict[str, float]:
    """Epsilon that each client's ledger says was spent."""
    if prepared.plan is None:
        return {}
    return {
        client.name: spent_epsilon(
            ledger_of(prepared.sites.ledgers, client.name).events(), delta=prepared.plan.target_delta
        )
        for client in prepared.federation.clients
    }


class FolderObserver(Observer):
    """Writes each round to the run folder and to TensorBoard events."""

    def __init__(self, prepared: Prepared, folder: RunFolder) -> None:
        self._prepared = prepared
        self._folder = folder
        self._events = EventWriter(folder.path)
        self.epsilon: dict[str, float] = {}

    def round_finished(self, record: RoundRecord) -> None:
        """Append the round; epsilon is read from the ledgers of those who took part."""
        plan = self._prepared.plan
        if plan is not None:
            for name in record.cohort:
                events = ledger_of(self._prepared.sites.ledgers, name).events()
                self.epsilon[name] = spent_epsilon(events, delta=plan.target_delta)
        row = {**asdict(record), "epsilon": dict(sorted(self.epsilon.items()))}
        self._folder.append_round(row)
        self._events.write_round(row)

    def close(self) -> None:
        """Flush the events."""
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


def ledgers_in(folder: RunFolder | None) -> Path:
    """Where a run's simulated ledgers lie: in its folder, or in a fresh temporary one."""
    return folder.path / LEDGERS if folder else Path(tempfile.mkdtemp(prefix="coterie-ledger-"))


def _describe_privacy(plan: PrivacyPlan) -> dict[str, Any]:
    return {
        "unit": "example",
        "relation": RELATION,
        "target_epsilon": plan.target_epsilon,
        "target_delta": plan.target_delta,
        "noise_multiplier": plan.noise_multiplier,
        "max_grad_norm": plan.max_grad_norm,
        "sampling_rate": plan.sampling_rate,
        "epsilon_is": "spent at each client over the whole run",
    }


def _class_counts(targets: torch.Tensor, num_classes: int) -> list[int]:
    return [int(n) for n in targets.flatten().bincount(minlength=num_classes)] if num_classes <= 100 else []


def _check_fit(model: nn.Module, federation: Federation) -> None:
    """One forward pass on one held-out example: shapes and token ids must fit."""
    example = federation.test.inputs[:1]
    expected = (*federation.test.targets[:1].shape, federation.schema.num_classes)
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except (RuntimeError, IndexError, TypeError, ValueError) as e:
        raise ModelError(
            f"the model fails on an example of shape {list(example.shape[1:])} ({type(e).__name__})",
            hint="choose a model for this kind of data; `coterie data check` shows the shape",
        ) from e
    if tuple(logits.shape) != expected:
        raise ModelError(
            f"the model answers with shape {list(logits.shape)}, {list(expected)} is needed",
            hint="a model returns one logit a class, for every target",
        )
