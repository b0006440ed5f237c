"""The keys of all parties of a simulated run: for sealing, for secure aggregation, or for both."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from flwr.app import Context
from flwr.clientapp.typing import Mod
from flwr.serverapp import Grid

from client.mods import sealed_mod
from common.config import RunConfig
from common.crypto import NO_ID, PartyKeys, PartyRecord, Role, Suite
from common.crypto.keys import SEED_BYTES
from common.disk import atomic_file, disk_errors
from common.errors import FailureCode, PeerError, RunError
from server.grids import SealedGrid

KEYS: Final = "parties.seed"
"""File in a run's folder that all its simulated parties' keys come from."""
_SECRET_BYTES: Final = 32
_LABEL: Final = b"coterie simulated party v1"


@dataclass(frozen=True, kw_only=True, slots=True)
class SimulatedKeys:
    """What the clients of a simulated run hold, all in one object: it goes to this machine's own worker processes."""

    coordinator: PartyRecord
    sites: tuple[PartyKeys, ...]

    def mod(self) -> Mod:
        """The sealed mod of whichever client a context stands for."""
        return sealed_mod(self.of, self.coordinator)

    @property
    def records(self) -> dict[str, PartyRecord]:
        """The clients' public records, by name."""
        return {keys.record.name: keys.record for keys in self.sites}

    def of(self, context: Context) -> PartyKeys:
        """The keys of the client that a context stands for.

        Raises:
            PeerError: It stands for none.
        """
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
    def for_clients(cls, names: Sequence[str], *, folder: Path | None = None, in_files: bool = False) -> Self:
        """Keys for a coordinator and these clients, in the order of their partitions.

        Args:
            names: The clients'.
            folder: Of the run: one that is resumed goes on with the keys that signed what is in it. None forgets them.
            in_files: Whether the clients read their keys from the folder, each its own: they are on several machines.

        Raises:
            RunError: The folder cannot be read or written, or none was named for keys in files.
        """
        secret = os.urandom(_SECRET_BYTES) if folder is None else _kept_secret(folder / KEYS)
        coordinator = _derived(secret, "coordinator", "coordinator")
        sites = tuple(_derived(secret, name, "site") for name in names)
        if in_files:
            from simulations.cluster.keys import write_keys

            if folder is None:
                raise RunError("keys in files need a run folder", hint="name one that all machines share")
            return cls(coordinator=coordinator, clients=write_keys(folder, sites, coordinator.record))
        return cls(coordinator=coordinator, clients=SimulatedKeys(coordinator=coordinator.record, sites=sites))

    @property
    def records(self) -> dict[str, PartyRecord]:
        """Everybody's public records but the coordinator's."""
        return self.clients.records

    def around(self, grid: Grid, config: RunConfig) -> SealedGrid:
        """The grid with everything that passes it sealed; a simulated run is named by its configuration."""
        digest = bytes.fromhex(config.digest())
        return SealedGrid(
            grid,
            keys=self.coordinator,
            records=self.records,
            run_id=hashlib.sha256(digest).digest()[: len(NO_ID)],
            config_digest=digest,
        )


def _derived(secret: bytes, name: str, role: Role) -> PartyKeys:
    """A party's keys, which are always the same for the same secret."""
    seeds = {}
    for field, size in SEED_BYTES.items():
        info = b"/".join([_LABEL, role.encode(), name.encode(), field.encode()])
        seeds[field] = HKDF(algorithm=SHA256(), length=size, salt=None, info=info).derive(secret)
    return PartyKeys(name, role, Suite.ED25519, seeds)


def _kept_secret(path: Path) -> bytes:
    """What the file holds; a new secret is written where there is none."""
    with disk_errors(path, "read"):
        if path.exists():
            return path.read_bytes()
    secret = os.urandom(_SECRET_BYTES)
    with atomic_file(path) as temporary, disk_errors(path):
        temporary.touch(mode=0o600)
        temporary.write_bytes(secret)
    return secret
