"""The grid of a run on this machine: which engine calls its clients, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from flwr.serverapp import Grid

from simulations.batching import Choice
from simulations.cohort import cohort_grid
from simulations.inline import AppFactory, Engine, InlineGrid, InProcess
from simulations.pool.longest_first import examples_of
from simulations.pool.pool import WorkerPool
from simulations.pool.shared_data import shared_data
from simulations.sites import SimulatedSites
from simulations.states import ClientStates

if TYPE_CHECKING:
    from simulations.run import Prepared


@contextmanager
def inline_grid(
    prepared: Prepared,
    make_factory: Callable[[SimulatedSites], AppFactory],
    *,
    workers: int,
    sites: SimulatedSites | None = None,
    states: ClientStates | None = None,
    choice: Choice | None = None,
) -> Iterator[Grid]:
    """A grid over this process or over worker processes, which end with it.

    Args:
        prepared: The run.
        make_factory: From the clients' resources to their app.
        workers: Processes that train clients.
        sites: Resources with keys; None takes the run's own.
        states: What clients keep from round to round; None keeps it as long as the grid.
        choice: Whether clients train stacked; None trains them one by one.
    """
    config, sites = prepared.config, sites or prepared.sites
    engine: Engine
    with ExitStack() as after:
        if workers > 1 or (config.cohort.deadline_seconds > 0 and not config.simulation.virtual):
            sites = sites.sharing(after.enter_context(shared_data(prepared.federation)))
            examples = examples_of(prepared.federation)
            engine = WorkerPool(
                make_factory(sites), workers, states=states, examples=examples, device=config.training.device
            )
        else:
            engine = InProcess(make_factory(sites), states)
        after.callback(engine.close)
        if choice is None:
            yield InlineGrid(engine, prepared.federation.names)
        else:
            yield cohort_grid(engine, prepared.sites, prepared.model, choice)
