"""One simulated run: what can refuse it comes first, then the same apps as in production train it."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import torch
from flwr.serverapp import Grid
from pydantic import TypeAdapter, ValidationError
from torch import nn

from common.config import RunConfig
from common.config.settings import Name
from common.errors import DataError
from common.flower import client_context
from common.privacy import Ledger, PrivacyPlan, spent
from common.schema import Federation
from server.app import make_server_app
from server.cohort import Sampler
from server.coordinator import Job, Observer, Outcome
from server.planning import check_fit, plan_run
from server.store import RunFolder
from simulations.inline import AppFactory, InlineGrid, InProcess, app_factory
from simulations.sealing import Sealing
from simulations.sites import JOURNALS, SimulatedSites
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

    def in_folder(self, folder: Path) -> Self:
        """The same run, its data loaded already, with ledgers and stored updates in `folder`."""
        return replace(self, sites=self.sites.moved(folder, self.plan.site_budget if self.plan else None))

    def spent(self, clients: Sequence[str] | None = None) -> dict[str, float]:
        """Epsilon that was spent of the run's target, by client; empty without privacy.

        Where the coordinator adds the noise it is what its own ledger says, the same for every client; elsewhere what
        each client's ledger says.

        Args:
            clients: Their names; None stands for all.
        """
        names = [client.name for client in self.federation.clients] if clients is None else clients
        if self.plan is None or self.sites.ledgers is None:
            return {}
        if self.plan.unit == "example":
            return self.sites.ledgers.spent(names)
        if not self.plan.central:
            return self.sites.ledgers.spent(names, budget=self.plan.budget)
        ledger = self.sites.ledgers.coordinator(self.plan.budget)
        return dict.fromkeys(names, spent(ledger.events(), budget=self.plan.budget, unit="client"))

    def rounds_taken(self) -> dict[str, int]:
        """How many rounds each client's epsilon counts; empty without privacy."""
        ledgers, plan = self.sites.ledgers, self.plan
        if ledgers is None or plan is None:
            return {}
        if plan.central:
            return dict.fromkeys((client.name for client in self.federation.clients), plan.rounds)
        return {client.name: len(ledgers.of(client.name).events()) for client in self.federation.clients}

    def sites_spent(self) -> dict[str, float]:
        """Epsilon that each client's own ledger says was spent, for its examples; empty without privacy."""
        ledgers = self.sites.ledgers
        return {} if ledgers is None else ledgers.spent([client.name for client in self.federation.clients])


def prepare(
    config: RunConfig, *, folder: Path, site_file: Path | None = None, insecure_seed: int | None = None
) -> Prepared:
    """Load the data, build the model, calibrate the noise: everything that can refuse a run does so here.

    Raises:
        DataError, ModelError, SiteError, ConfigError, PrivacyError: The run is not possible.
    """
    torch.set_num_threads(1)  # a client's result must not depend on how many cores it finds
    sites = SimulatedSites(config=config, folder=folder, site_file=site_file, insecure_seed=insecure_seed)
    federation = sites.federation
    clients = len(federation.clients)
    _check_names(federation)
    planned = plan_run(config, federation.schema, clients=clients, site=sites.site)
    check_fit(planned.model, federation.test, federation.schema)
    return Prepared(sites=sites, model=planned.model, plan=planned.plan).in_folder(folder)


def execute(
    prepared: Prepared,
    *,
    workers: int = 1,
    engine: EngineName = "inline",
    folder: RunFolder | None = None,
    observer: Observer | None = None,
    sampler: Sampler | None = None,
    factory: AppFactory | None = None,
    sealed: bool = False,
) -> Outcome:
    """Train to the end; continues after the folder's last checkpoint.

    Args:
        prepared: The run.
        workers: Processes that train clients; 1 trains in this process, unless clients have a deadline.
        engine: `inline`, or `ray` for Flower's own simulation runtime.
        folder: Where rounds and checkpoints are kept, or None.
        observer: Told of everything as it happens.
        sampler: Who is asked each round; None takes the configuration's.
        factory: Another ClientApp than that of the prepared run.
        sealed: Whether all messages are sealed between coordinator and clients, as between machines.
    """
    config, names = prepared.config, [client.name for client in prepared.federation.clients]
    summed = config.privacy.secure_aggregation
    parties = None
    if sealed or summed:
        parties = Sealing.for_clients(names, folder=folder.path if folder and summed else None)
    gc.freeze()  # some of Flower's strategies collect garbage at every reply; what is imported is none
    job = Job(
        config=config,
        model=copy.deepcopy(prepared.model),  # evaluation loads weights into it: a prepared run stays as it was
        held_out=prepared.federation.test if len(prepared.federation.test) else None,
        plan=prepared.plan,
        folder=folder,
        sampler=sampler,
        ledger=_coordinators_ledger(prepared),
        noise=prepared.sites.coordinators_noise,
        observer=observer or Observer(),
        sites=parties.records if parties and summed else {},
    )
    outcomes: list[Outcome] = []
    app = make_server_app(job, outcomes.append)

    def around(grid: Grid) -> Grid:
        return parties.around(grid, config) if parties and sealed else grid

    with _journals(folder) as journals:
        sites = prepared.sites.keyed(parties.clients, journals=journals) if parties and summed else prepared.sites
        make_app = factory or app_factory(sites, parties.clients if parties and sealed else None)
        if engine == "ray":
            from simulations.ray_engine import run_on_ray

            run_on_ray(app, make_app, names=names, workers=workers, around=around)
        else:
            with inline_grid(prepared, make_app, workers=workers) as grid:
                app(around(grid), client_context(node_id=0, partition=0))
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


@contextmanager
def _journals(folder: RunFolder | None) -> Iterator[Path]:
    """Where clients write down what they have masked and signed: in the run's folder, if it can be resumed."""
    if folder is not None:
        yield folder.path / JOURNALS
        return
    with tempfile.TemporaryDirectory(prefix="coterie-") as temporary:
        yield Path(temporary)


def _coordinators_ledger(prepared: Prepared) -> Ledger | None:
    """Where the coordinator records its own noise."""
    ledgers, plan = prepared.sites.ledgers, prepared.plan
    return None if plan is None or ledgers is None or not plan.central else ledgers.coordinator(plan.budget)


def _check_names(federation: Federation) -> None:
    """A client's name becomes part of a file's name and a value of `data.sites`; a user's own function chooses it."""
    name = TypeAdapter(Name)
    for client in federation.clients:
        try:
            name.validate_python(client.name)
        except ValidationError as e:
            raise DataError(
                f"a client's name is {client.name!r}", hint="use at most 64 letters, digits, '-' and '_'"
            ) from e
