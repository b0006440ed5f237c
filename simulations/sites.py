"""What simulated clients own: their part of a data set, and a ledger each in the run's folder."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path

from flwr.app import Context

from client.request import TrainRequest
from common.config import RunConfig
from common.data import load_federation
from common.errors import FailureCode, PeerError
from common.privacy import FileLedger, Ledger
from common.schema import ClientData, DataSchema, Federation
from common.site import Site, load_site

LEDGERS = "ledger"


@dataclass(frozen=True, kw_only=True)
class SimulatedSites:
    """Resources of every client of one simulated run: a client is a partition of the run's data.

    Attributes:
        config: The run that is simulated; a request for another one is refused.
        ledgers: Folder of the simulated ledgers, one file a client. They never touch a real site's.
        site_file: The local registry, or None.
    """

    config: RunConfig
    ledgers: Path
    site_file: Path | None = None

    def __getstate__(self) -> dict[str, object]:
        """Settings only, for worker processes: each tensor sent along would be an open file, of which 256 can go."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def site(self) -> Site:
        """Registry of the machine that simulates."""
        return load_site(self.site_file)

    @cached_property
    def federation(self) -> Federation:
        """All clients' examples."""
        return load_federation(self.config.data, seed=self.config.seeds.data, site=self.site)

    @cached_property
    def digest(self) -> str:
        """Names the run."""
        return self.config.digest()

    def data(self, request: TrainRequest, context: Context) -> tuple[DataSchema, ClientData]:
        """The partition that this client is."""
        partition = context.node_config.get("partition-id")
        clients = self.federation.clients
        if request.digest != self.digest or not isinstance(partition, int) or not 0 <= partition < len(clients):
            raise PeerError(FailureCode.INVALID_REQUEST)
        return self.federation.schema, clients[partition]

    def ledger(self, request: TrainRequest, context: Context) -> Ledger:
        """This client's simulated ledger."""
        _, data = self.data(request, context)
        return ledger_of(self.ledgers, data.name)


def ledger_of(folder: Path, client: str) -> FileLedger:
    """The simulated ledger of one client."""
    return FileLedger(folder / f"{client}.jsonl")
