"""What simulated clients own: their part of a data set, and their ledgers in one store in the run's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from flwr.app import Context

from client.policy import PERMISSIVE, Policy
from client.request import TrainRequest
from client.secagg import ContextMembers, FileJournal, Seat
from client.spool import Spool
from common.aggregation import rules_for
from common.config import RunConfig
from common.crypto import PartyRecord
from common.data import load_federation
from common.data.bootstrap import BootstrapPopulation
from common.data.population import train_size
from common.errors import DataError, FailureCode, PeerError
from common.privacy import Budget, Ledger, NoiseSource, SecureNoise
from common.schema import ClientData, DataSchema, Federation
from common.secagg.member import Member
from common.site import Site, load_site
from simulations.clock import Timing
from simulations.cluster.ledgers import PartitionLedgers, ledgers_in
from simulations.insecure import FixedNoise
from simulations.ledgers import SimulatedLedgers
from simulations.pool.shared_data import SharedData
from simulations.sealing import SimulatedKeys

SPOOL, JOURNALS = "spool", "secagg"
"""Names in a run's folder."""


@dataclass(frozen=True, kw_only=True)
class SimulatedSites:
    """Resources of every client of one simulated run: a client is a partition of the run's data.

    Attributes:
        config: The run that is simulated; a request for another one is refused.
        folder: The run's folder, for ledgers and stored updates. They never touch a real site's.
        site_file: The local registry, or None.
        budget: What each simulated client may spend; None without privacy.
        insecure_seed: Seed of noise that protects nobody, for runs that must repeat to the bit; None: secure noise.
        keys: Everybody's keys, for secure aggregation; None without it.
        journals: Folder of their journals; it lasts as long as the run.
        shared: All clients' data, where processes have it in common; None: each loads its own.
        timing: What decides about virtual time; None without it.
    """

    config: RunConfig
    folder: Path
    site_file: Path | None = None
    budget: Budget | None = None
    insecure_seed: int | None = None
    keys: SimulatedKeys | None = None
    journals: Path | None = None
    shared: SharedData | None = None
    timing: Timing | None = None

    def __getstate__(self) -> dict[str, object]:
        """Settings only, for worker processes: each tensor sent along would be an open file, of which 256 can go."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def moved(self, folder: Path, budget: Budget | None) -> Self:
        """The same sites, their data loaded already, for a run in another folder."""
        return self._changed(folder=folder, budget=budget)

    def keyed(self, keys: SimulatedKeys, *, journals: Path) -> Self:
        """The same sites with keys, so that they can add up their updates."""
        return self._changed(keys=keys, journals=journals)

    def sharing(self, shared: SharedData | None) -> Self:
        """The same sites, whose data other processes find in memory."""
        return self._changed(shared=shared)

    def timed(self, timing: Timing | None) -> Self:
        """The same sites on a simulation's clock."""
        return self._changed(timing=timing)

    def _changed(self, **changes: Any) -> Self:
        sites = replace(self, **changes)
        for loaded in ("site", "federation", "names", "digest"):
            if loaded in self.__dict__:
                sites.__dict__[loaded] = self.__dict__[loaded]
        return sites

    @cached_property
    def site(self) -> Site:
        """Registry of the machine that simulates."""
        return load_site(self.site_file)

    @cached_property
    def federation(self) -> Federation:
        """All clients' examples.

        Raises:
            DataError: It cannot be loaded; or the run is private, and its clients draw from data that has entities: an
                entity's examples would be at many of them.
        """
        if self.shared is not None:
            return self.shared.federation()
        federation = load_federation(self.config.data, seed=self.config.seeds.data, site=self.site)
        copied = isinstance(federation.clients, BootstrapPopulation)
        if self.config.private and copied and federation.test.entities is not None:
            raise DataError(
                f"{self.config.data.name} has entities, and with data.partition = 'bootstrap' many clients have the "
                "same one's examples",
                hint="what its privacy costs would add up over them: divide the data by another partition",
            )
        return federation

    @cached_property
    def names(self) -> Sequence[str]:
        """Names of all clients, by partition."""
        return self.federation.names

    @cached_property
    def digest(self) -> str:
        """Names the run."""
        return self.config.digest()

    @property
    def policy(self) -> Policy:
        """Every valid run is welcome: who simulates owns the data."""
        return PERMISSIVE

    @cached_property
    def ledgers(self) -> SimulatedLedgers | PartitionLedgers | None:
        """All clients' ledgers; None without privacy."""
        return None if self.budget is None else ledgers_in(self.folder, self.budget)

    @cached_property
    def secure_noise(self) -> SecureNoise:
        """This process's own source."""
        return SecureNoise()

    def data(self, request: TrainRequest, context: Context) -> tuple[DataSchema, ClientData]:
        """The partition that this client is."""
        return self.federation.schema, self.federation.clients[self._partition(request, context)]

    def ledger(self, request: TrainRequest, context: Context) -> Ledger | None:
        """This client's simulated ledger; a simulation without privacy keeps none."""
        return None if self.ledgers is None else self.ledgers.of(self._name(request, context))

    def spool(self, request: TrainRequest, context: Context) -> Spool | None:
        """Where this client's updates wait until their round is over; without privacy they are simply made again."""
        return None if request.plan is None else Spool(self.folder / SPOOL, owner=self._name(request, context))

    def member(self, request: TrainRequest, context: Context) -> AbstractContextManager[Member]:
        """This client's member of the run, in its own state."""
        if self.keys is None or self.journals is None:
            raise PeerError(FailureCode.AGGREGATION_REFUSED)
        signer, records = self.keys.of(context), self._records
        seat = Seat(
            name=self._name(request, context),
            signer=signer,
            peers=records,
            rules=rules_for(request.config, request.run_id),
            journal=FileJournal(self.journals / signer.record.name, request.run_id, durable=False),
            most_aborts=self.policy.secure_aggregation.most_aborts_a_day,
        )
        return ContextMembers().open(request.run_id, lambda: seat, context)

    @cached_property
    def _records(self) -> dict[str, PartyRecord]:
        return {} if self.keys is None else self.keys.records

    def noise(self, request: TrainRequest, context: Context) -> NoiseSource:
        """Secure noise, unless the run was asked to repeat to the bit."""
        if self.insecure_seed is None:
            return self.secure_noise
        return FixedNoise(self.insecure_seed, f"{self._name(request, context)}/{request.server_round}")

    def rounding(self, request: TrainRequest, context: Context) -> bytes:
        """The same whenever a run is repeated; it hides nothing from whoever simulates."""
        said = f"{request.digest}/{request.server_round}/{self._name(request, context)}"
        return hashlib.sha256(b"coterie fixed-point rounding v1" + said.encode()).digest()

    @property
    def coordinators_noise(self) -> Callable[[int], NoiseSource] | None:
        """The coordinator's fixed noise by round, where the run was asked to repeat; None lets it draw secure noise."""
        seed = self.insecure_seed
        return None if seed is None else lambda server_round: FixedNoise(seed, f"coordinator/{server_round}")

    def most_steps(self, request: TrainRequest, context: Context) -> int | None:
        """How many steps this client has time for; None for all."""
        if self.timing is None or not self.timing.partial_work:
            return None
        partition = self._partition(request, context)
        examples = train_size(self.federation, partition)
        return self.timing.most_steps(partition, self.names[partition], examples=examples)

    def _name(self, request: TrainRequest, context: Context) -> str:
        """The client's name; its data is not touched."""
        return self.names[self._partition(request, context)]

    def _partition(self, request: TrainRequest, context: Context) -> int:
        partition = context.node_config.get("partition-id")
        if request.digest != self.digest or not isinstance(partition, int) or not 0 <= partition < len(self.names):
            raise PeerError(FailureCode.INVALID_REQUEST)
        return partition
