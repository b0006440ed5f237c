"""One simulated run: what can refuse it comes first, then the same apps as in production train it."""

from __future__ import annotations

import copy
import gc
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from flwr.serverapp import Grid
from pydantic import TypeAdapter, ValidationError
from torch import nn

from common.config import RunConfig
from common.config.settings import Name
from common.errors import DataError
from common.flower import client_context
from common.names import NumberedNames
from common.privacy import Ledger, PrivacyPlan, spent
from common.schema import Federation
from server.app import make_server_app
from server.cohort import Sampler
from server.coordinator import Job, Observer, Outcome
from server.planning import check_fit, plan_run
from server.results import Observers
from server.store import RunFolder
from simulations.batching import Batching, Choice, make_choice, why_one_by_one
from simulations.clock import VirtualTime, make_timing
from simulations.cohort import cohort_factory
from simulations.engines import inline_grid
from simulations.how import ClusterOptions, EngineName
from simulations.inline import AppFactory, app_factory
from simulations.sealing import Sealing
from simulations.sites import JOURNALS, SimulatedSites
from simulations.states import STATES, ClientStates, StateRounds

if TYPE_CHECKING:
    from simulations.cluster.connection import Cluster


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
        names = self.federation.names if clients is None else clients
        if self.plan is None or self.sites.ledgers is None:
            return {}
        if self.plan.unit == "example":
            return self.sites.ledgers.spent(names)
        if not self.plan.central:
            return self.sites.ledgers.spent(names, budget=self.plan.budget)
        ledger = self.sites.ledgers.coordinator(self.plan.budget)
        return dict.fromkeys(names, spent(ledger.events(), budget=self.plan.budget, unit="client"))

    def rounds_taken(self, clients: Sequence[str] | None = None) -> dict[str, int]:
        """How many rounds each client's epsilon counts; empty without privacy. Of whom: as in `spent`."""
        ledgers, plan = self.sites.ledgers, self.plan
        names = self.federation.names if clients is None else clients
        if ledgers is None or plan is None:
            return {}
        return dict.fromkeys(names, plan.rounds) if plan.central else ledgers.taken(names)

    def sites_spent(self, clients: Sequence[str] | None = None) -> dict[str, float]:
        """Epsilon that each client's own ledger says was spent, for its examples; empty without privacy. Of whom: as in
        `spent`.
        """
        ledgers = self.sites.ledgers
        return {} if ledgers is None else ledgers.spent(self.federation.names if clients is None else clients)


def prepare(
    config: RunConfig,
    *,
    folder: Path,
    site_file: Path | None = None,
    insecure_seed: int | None = None,
    trace: Path | None = None,
) -> Prepared:
    """Load the data, build the model, calibrate the noise: everything that can refuse a run does so here.

    Args:
        config: The run.
        folder: Where its ledgers and stored updates are.
        site_file: The local registry, or None.
        insecure_seed: Seed of noise that protects nobody, or None.
        trace: The file of devices that the configuration names by its digest, or None.

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
    timing = make_timing(config, planned.model, planned.plan, names=federation.names, trace=trace)
    return Prepared(sites=sites.timed(timing), model=planned.model, plan=planned.plan).in_folder(folder)


def check_carried_out(prepared: Prepared, *, sealed: bool, engine: EngineName, batching: Batching) -> None:
    """What else can refuse a run, before its folder is made.

    Raises:
        ConfigError: Its clients shall be stacked and cannot be.
    """
    _choice(prepared, sealed=sealed, engine=engine, batching=batching)


def execute(
    prepared: Prepared,
    *,
    workers: int = 1,
    engine: EngineName = "inline",
    cluster: ClusterOptions | None = None,
    folder: RunFolder | None = None,
    observer: Observer | None = None,
    sampler: Sampler | None = None,
    factory: AppFactory | None = None,
    sealed: bool = False,
    batching: Batching = "off",
    record: Mapping[str, Any] | None = None,
) -> Outcome:
    """Train to the end; continues after the folder's last checkpoint.

    Args:
        prepared: The run.
        workers: Processes that train clients; 1 trains in this process, unless clients have a deadline.
        engine: `inline`, or `ray` for Flower's own simulation runtime.
        cluster: The Ray cluster to use; None starts Ray on this machine.
        folder: Where rounds and checkpoints are kept, or None.
        observer: Told of everything as it happens.
        sampler: Who is asked each round; None takes the configuration's.
        factory: Another ClientApp than that of the prepared run.
        sealed: Whether all messages are sealed between coordinator and clients, as between machines.
        batching: Whether clients train stacked.
        record: What another run's `batching.json` says, where that run is repeated.
    """
    config, names = prepared.config, prepared.federation.names
    summed = config.privacy.secure_aggregation
    choice = _choice(
        prepared, sealed=sealed, engine=engine, batching=batching, own=factory is not None, folder=folder, record=record
    )
    timing = prepared.sites.timing
    time = VirtualTime(config, timing, prepared.federation) if timing else None
    gc.freeze()  # some of Flower's strategies collect garbage at every reply; what is imported is none
    outcomes: list[Outcome] = []
    with ExitStack() as after:
        guarded = sealed or summed or prepared.plan is not None
        nodes = after.enter_context(_reached(cluster, prepared, folder, guarded=guarded))
        parties = None
        if sealed or summed:
            kept = folder.path if folder and (summed or nodes) else None
            parties = Sealing.for_clients(names, folder=kept, in_files=nodes is not None)
        journals = after.enter_context(_journals(folder))
        states = after.enter_context(closing(ClientStates(folder.path / STATES if folder else None)))
        job = Job(
            config=config,
            model=copy.deepcopy(prepared.model),  # evaluation loads weights into it: a prepared run stays as it was
            held_out=prepared.federation.test if len(prepared.federation.test) else None,
            plan=prepared.plan,
            folder=folder,
            sampler=sampler or (time.sampler if time else None),
            ledger=_coordinators_ledger(prepared),
            noise=prepared.sites.coordinators_noise,
            observer=Observers([StateRounds(states), *([observer] if observer else [])]),
            sites=parties.records if parties and summed else {},
            clock=time.clock if time else None,
        )
        app = make_server_app(job, outcomes.append)

        def around(grid: Grid) -> Grid:
            grid = parties.around(grid, config) if parties and sealed else grid
            return time.around(grid) if time else grid

        sites = prepared.sites.keyed(parties.clients, journals=journals) if parties and summed else prepared.sites

        def make_factory(sites: SimulatedSites) -> AppFactory:
            if factory is not None:
                return factory
            return app_factory(sites, parties.clients) if parties and sealed else cohort_factory(sites)

        if engine == "ray":
            from simulations.ray_engine import run_on_ray

            make_app = make_factory(nodes.reachable(sites) if nodes else sites)
            run_on_ray(app, make_app, names=names, workers=workers, around=around, cluster=nodes, states=states)
        else:
            with inline_grid(
                prepared, make_factory, sites=sites, workers=workers, states=states, choice=choice
            ) as grid:
                app(around(grid), client_context(node_id=0, partition=0))
    return outcomes[0]


def _choice(
    prepared: Prepared,
    *,
    sealed: bool,
    engine: EngineName,
    batching: Batching,
    own: bool = False,
    folder: RunFolder | None = None,
    record: Mapping[str, Any] | None = None,
) -> Choice:
    """How the run's clients train; see `make_choice`."""
    config = prepared.config
    why = why_one_by_one(config, prepared.model, sealed=sealed, engine=engine, own_app=own)
    cohort = config.cohort.size or len(prepared.federation.clients)
    return make_choice(batching, why, cohort=cohort, folder=folder, record=record)


@contextmanager
def _reached(
    cluster: ClusterOptions | None, prepared: Prepared, folder: RunFolder | None, *, guarded: bool
) -> Iterator[Cluster | None]:
    """The cluster, every node of which was looked at before keys or ledgers are touched."""
    if cluster is None:
        yield None
        return
    from simulations.cluster.connection import cluster_at

    with cluster_at(
        cluster.address,
        prepared.sites,
        folder=folder.path if folder else None,
        guarded=guarded,
        clients=cluster.clients,
        gpus=cluster.gpus,
    ) as reached:
        yield reached


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
    if isinstance(federation.names, NumberedNames):  # they are names, and there may be millions
        return
    name = TypeAdapter(Name)
    for given in federation.names:
        try:
            name.validate_python(given)
        except ValidationError as e:
            raise DataError(f"a client's name is {given!r}", hint="use at most 64 letters, digits, '-' and '_'") from e
