"""What a run with virtual time needs: checked before the run begins, and put around its grid."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

from flwr.serverapp import Grid
from torch import nn

from common.config import RunConfig
from common.data.population import train_size
from common.errors import ConfigError
from common.names import SortedNames
from common.privacy import PrivacyPlan
from common.schema import Federation
from server.cohort import Sampler
from simulations.clock.devices import Devices, DrawnDevices
from simulations.clock.grid import ClockedGrid
from simulations.clock.sampler import AvailableSampler
from simulations.clock.timing import Timing
from simulations.clock.trace import check_clients, read_trace, trace_digest
from simulations.clock.virtual import VirtualClock
from simulations.clock.workload import Workload


def make_timing(
    config: RunConfig, model: nn.Module, plan: PrivacyPlan | None, *, names: Sequence[str], trace: Path | None
) -> Timing | None:
    """What decides about time in a run; None for one without virtual time. Everything that can be wrong with it is.

    It holds settings and devices only, and can be given to worker processes.

    Args:
        config: The run's configuration.
        model: Its model.
        plan: Its privacy plan, or None.
        names: Of all clients.
        trace: The file whose digest the configuration holds; None where it holds none.

    Raises:
        ConfigError: The trace is missing, another one, or wrong; or the run cannot have virtual time.
        RunError: The trace cannot be read.
    """
    settings = config.simulation.devices
    if not config.simulation.virtual:
        if trace is not None:
            raise ConfigError(f"{trace} is not the trace of this run", hint="give it when the run is started")
        return None
    if settings.partial_work and config.private:
        raise ConfigError(
            "`simulation.devices.partial_work` changes how many steps a client takes, which is fixed with privacy",
            hint="set it to false",
        )
    return Timing(
        devices=_traced(trace, settings.trace, names) if settings.trace else _drawn(config, trace),
        workload=Workload.of(config, model, plan),
        seed=config.seeds.devices,
        deadline_seconds=config.cohort.deadline_seconds or math.inf,
        partial_work=settings.partial_work,
    )


class VirtualTime:
    """One run's clock, with all that it moves.

    Attributes:
        clock: For the job.
    """

    def __init__(self, config: RunConfig, timing: Timing, federation: Federation) -> None:
        self.clock = VirtualClock()
        self._config, self._timing, self._federation = config, timing, federation

    @cached_property
    def sampler(self) -> Sampler | None:
        """Who is asked, where devices can be away; None where the run's own sampler does.

        Raises:
            ConfigError: Devices are away at times, and cohorts are planned.
        """
        if not self._timing.devices.away_at_times:
            return None
        return AvailableSampler(
            self._config.cohort,
            seed=self._config.seeds.cohort,
            timing=self._timing,
            clock=self.clock,
            place=_finder(self._federation.names),
        )

    def around(self, grid: Grid) -> ClockedGrid:
        """The grid with time; put it outermost."""
        cohort, federation = self._config.cohort, self._federation
        return ClockedGrid(
            grid,
            timing=self._timing,
            clock=self.clock,
            names=federation.names,
            examples=lambda place: train_size(federation, place),
            enough=cohort.size if cohort.size and cohort.over_sampling else None,
        )


def _drawn(config: RunConfig, trace: Path | None) -> Devices:
    if trace is not None:
        raise ConfigError(f"{trace} is not the trace of this run", hint="give it when the run is started")
    return DrawnDevices(settings=config.simulation.devices, seed=config.seeds.devices)


def _traced(trace: Path | None, digest: str, names: Sequence[str]) -> Devices:
    if trace is None:
        raise ConfigError(
            "the run reads its devices from a trace, which is not there",
            hint="name it with --trace when a run begins; one that began has it in its folder as trace.jsonl",
        )
    if trace_digest(trace) != digest:
        raise ConfigError(
            f"{trace} is another trace than the run's", hint=f"put back the file with the SHA-256 {digest}"
        )
    devices = read_trace(trace)
    check_clients(trace, devices, names)
    return devices


def _finder(names: Sequence[str]) -> Callable[[str], int]:
    """A name's place; without a table of all, where names are in order."""
    if not isinstance(names, SortedNames):
        return {name: place for place, name in enumerate(names)}.__getitem__
    return names.index
