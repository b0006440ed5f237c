"""Sealing around a simulated run: the keys of all parties, made for the run and forgotten with it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from client.mods import sealed_mod
from common.config import RunConfig
from common.crypto import NO_ID, PartyKeys, PartyRecord
from common.errors import FailureCode, PeerError
from server.grids import SealedGrid


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedKeys:
    """What the clients of a simulated run hold, all in one object: it goes to this machine's own worker processes."""

    coordinator: PartyRecord
    sites: tuple[PartyKeys, ...]

    def mod(self) -> Mod:
        """The sealed mod of whichever client a context stands for."""
        return sealed_mod(self._of, self.coordinator)

    def _of(self, context: Context) -> PartyKeys:
        partition = context.node_config.get("partition-id")
        if not isinstance(partition, int) or not 0 <= partition < len(self.sites):
            raise PeerError(FailureCode.INVALID_REQUEST)
        return self.sites[partition]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sealing:
    """All keys of one simulated run: the coordinator's stay in this process."""

    coordinator: PartyKeys
    clients: SimulatedKeys

    @classmethod
    def for_clients(cls, names: Sequence[str]) -> Self:
        """New keys for a coordinator and these clients, in the order of their partitions."""
        coordinator = PartyKeys.generate("coordinator", "coordinator")
        sites = tuple(PartyKeys.generate(name, "site") for name in names)
        return cls(coordinator=coordinator, clients=SimulatedKeys(coordinator=coordinator.record, sites=sites))

    def around(self, grid: Grid, config: RunConfig) -> SealedGrid:
        """The grid with everything that passes it sealed; a simulated run is named by its configuration."""
        digest = bytes.fromhex(config.digest())
        return SealedGrid(
            grid,
            keys=self.coordinator,
            records={keys.record.name: keys.record for keys in self.clients.sites},
            run_id=hashlib.sha256(digest).digest()[: len(NO_ID)],
            config_digest=digest,
        )
