"""What one real site provides to its ClientApp: data, ledgers, stored updates and noise, under its own rules."""

from __future__ import annotations

import hashlib
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import structlog
from flwr.app import Context

from client.admission import Admission
from client.ledgers import IDENTITY, LEDGERS, SiteLedgers
from client.policy import Policy, load_policy
from client.request import TrainRequest
from client.secagg import FileJournal, Members, MemoryMembers, Seat
from client.spool import Spool
from common.aggregation import rules_for
from common.config.settings import DataSettings
from common.crypto import PartyRecord
from common.data import load_federation
from common.errors import DataError, SiteError
from common.kit import Kit
from common.pins import Claim, secagg_claim
from common.privacy import Ledger, NoiseSource, SecureNoise
from common.privacy.ledger.standing import Protected
from common.schema import ClientData, DataSchema, Examples
from common.secagg.member import Member
from common.site import Site, load_site

log = structlog.get_logger()

SITE_FILE, POLICY_FILE, SPOOL, JOURNALS = "site.toml", "policy.toml", "spool", "secagg"
"""Names in a kit, and in its state folder."""

_KEPT = 2
"""Data sets kept in memory: that of the run, and one more for whoever asks about another run meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """A data set in memory, and a digest of its content, which stays there."""

    schema: DataSchema
    data: ClientData
    content: bytes

    @property
    def unit(self) -> Protected:
        """Whom its budget protects."""
        return "example" if self.data.train.entities is None else "entity"


@dataclass(frozen=True, kw_only=True)
class SiteResources:
    """Resources of one site, from its kit and its own two files.

    Guarantee: whatever a run's configuration says of partitions, the site trains on its own examples: the data set's
    group that has the site's name, or all of it where it has one group.

    Attributes:
        kit: Keys, pins and state.
        policy: The site's own rules.
        site: Its own models and data.
        members: Keeps its secrets of secure aggregation between messages.
    """

    kit: Kit
    policy: Policy
    site: Site
    members: Members = field(default_factory=MemoryMembers, repr=False)
    _held: OrderedDict[str, Held] = field(default_factory=OrderedDict, init=False, repr=False)
    _ledgers: dict[tuple[str, bytes], Ledger] = field(default_factory=dict, init=False, repr=False)

    @property
    def admission(self) -> Admission:
        """What this site asks of every request."""
        return Admission(
            name=self.kit.name,
            federation=self.kit.federation,
            operators=self.kit.operators,
            policy=self.policy,
            site=self.site,
        )

    @cached_property
    def ledgers(self) -> SiteLedgers:
        """The ledgers of all its data sets.

        Raises:
            PrivacyError: The policy sets no budget.
        """
        return SiteLedgers(
            self.kit.state_path / LEDGERS,
            self.kit.folder / IDENTITY,
            self.policy.opened_budget(),
            allow_non_private="none" in self.policy.limits.units,
        )

    @cached_property
    def _source(self) -> SecureNoise:
        return SecureNoise()

    def held(self, settings: DataSettings, *, seed: int) -> Held:
        """This site's part of a data set, read once for equal settings.

        Raises:
            DataError: There is no such data set, it cannot be read, or no part of it is this site's.
        """
        key = f"{seed}/{settings.model_dump_json()}"
        if key not in self._held:
            schema, data = load_own(settings, seed=seed, site=self.site, name=self.kit.name)
            everything = data
            if settings.max_examples:
                whole = settings.model_copy(update={"max_examples": 0})
                everything = load_own(whole, seed=seed, site=self.site, name=self.kit.name)[1]
            self._held[key] = Held(schema=schema, data=data, content=content_digest(schema, everything))
        self._held.move_to_end(key)
        while len(self._held) > _KEPT:
            self._held.popitem(last=False)
        return self._held[key]

    def data(self, request: TrainRequest, context: Context) -> tuple[DataSchema, ClientData]:  # noqa: ARG002
        """The examples of this site."""
        held = self._of(request)
        return held.schema, held.data

    def ledger(self, request: TrainRequest, context: Context) -> Ledger:  # noqa: ARG002
        """The ledger of the data set, of runs with and without privacy."""
        held, name = self._of(request), request.config.data.name
        key = (name, held.content)
        if key not in self._ledgers:  # one that is kept reads only what was appended since
            _ = self.kit.state  # made for this user only, before a ledger is made in it
            fingerprint = self.ledgers.fingerprint([held.content])
            self._ledgers[key] = self.ledgers.open(name, fingerprint, unit=held.unit)
        return self._ledgers[key]

    def spool(self, request: TrainRequest, context: Context) -> Spool:  # noqa: ARG002
        """Updates of every run, also without privacy: what is asked for again is sent again, to the byte."""
        return Spool(self.kit.state / SPOOL, owner=self.kit.name)

    def noise(self, request: TrainRequest, context: Context) -> NoiseSource:  # noqa: ARG002
        """Secure noise."""
        return self._source

    def most_steps(self, request: TrainRequest, context: Context) -> int | None:  # noqa: ARG002
        """All: a site takes the time that it takes, and the coordinator decides how long it waits."""
        return None

    def rounding(self, request: TrainRequest, context: Context) -> bytes:  # noqa: ARG002
        """Fresh every time: a vector is rounded once."""
        return os.urandom(32)

    def member(self, request: TrainRequest, context: Context) -> AbstractContextManager[Member]:
        """This site's member of a run under secure aggregation."""
        return self.members.open(request.run_id, lambda: self._seat(request), context)

    @property
    def peers(self) -> Mapping[str, PartyRecord]:
        """Whom this site adds its updates up with, as the kit's pins are now: itself, and those whose keys came another
        way than through the coordinator, unless the policy says that this does not matter.

        Raises:
            KitError: The pins cannot be read.
        """
        kit = self.kit.reloaded()
        others = kit.agreed_sites if self.policy.secure_aggregation.require_pins else kit.sites
        return {**others, kit.name: kit.keys.record}

    @property
    def not_agreed(self) -> list[str]:
        """Sites that it takes part in no sum with: their keys came through the coordinator, and the policy minds."""
        return sorted(self.kit.reloaded().sites.keys() - self.peers.keys())

    @property
    def secagg_claim(self) -> Claim:
        """Whom secure aggregation protects this site's updates from."""
        kit = self.kit.reloaded()
        return secagg_claim(agreed=self.peers.keys() <= {*kit.agreed_sites, kit.name})

    def _seat(self, request: TrainRequest) -> Seat:
        if others := self.not_agreed:
            mend = f"compare with them, then: coterie enroll --kit {self.kit.folder} --fingerprint F"
            log.warning("no_sum_with", sites=others, reason="their keys came through the coordinator", hint=mend)
        return Seat(
            name=self.kit.name,
            signer=self.kit.keys,
            peers=self.peers,
            rules=rules_for(request.config, request.run_id),
            journal=FileJournal(self.kit.state / JOURNALS, request.run_id),
            most_aborts=self.policy.secure_aggregation.most_aborts_a_day,
        )

    def _of(self, request: TrainRequest) -> Held:
        return self.held(request.config.data, seed=request.config.seeds.data)


def site_resources(
    kit: Kit, *, site_file: Path | None = None, policy_file: Path | None = None, members: Members | None = None
) -> SiteResources:
    """The resources of a kit's site.

    Args:
        kit: A site's kit.
        site_file: Its registry; None takes `site.toml` of the kit.
        policy_file: Its rules; None takes `policy.toml` of the kit.
        members: Keeps its secrets of secure aggregation; None keeps them in this process's memory.

    Raises:
        SiteError: A file is missing or wrong, or the policy pins another coordinator than the kit.
    """
    policy = load_policy(policy_file or kit.folder / POLICY_FILE)
    pinned = policy.coordinator.key
    if pinned and pinned != kit.coordinator.key_id.hex():
        raise SiteError(
            "the policy pins another coordinator than the kit",
            hint=f"coordinator.key is {pinned}, the kit has {kit.coordinator.key_id.hex()}: ask who is right",
        )
    registry = site_file or kit.folder / SITE_FILE
    site = load_site(registry if site_file or registry.exists() else None)
    return SiteResources(kit=kit, policy=policy, site=site, members=members or MemoryMembers())


def load_own(settings: DataSettings, *, seed: int, site: Site, name: str) -> tuple[DataSchema, ClientData]:
    """One site's part of a data set: the group of its name, or the only one there is.

    Held-out examples are those that a simulation of the same settings holds out.

    Guarantee: whether it can be read does not depend on folds, fractions or lengths of the settings: any part can be
    empty here. Otherwise the settings of one run after another would tell how many examples there are, for nothing.

    Raises:
        DataError: It cannot be read, or has several groups and none of that name.
    """
    own = settings.model_copy(update={"partition": "natural", "clients": 0, "sites": [], "pooled": False})
    federation = load_federation(own, seed=seed, site=site, tolerant=True)
    if settings.max_examples and name in settings.sites and len(federation.clients) > 1:
        # which examples are kept depends on a client's place among those that take part
        among = own.model_copy(update={"sites": settings.sites})
        federation = load_federation(among, seed=seed, site=site, tolerant=True)
    clients = federation.clients
    found = clients if len(clients) == 1 else [client for client in clients if client.name == name]
    if not found:
        raise DataError(
            f"{settings.name} has {len(clients)} groups, and none is `{name}`",
            hint="register this site's own data in site.toml; without `group` all of it is the site's",
        )
    return federation.schema, ClientData(name=name, train=found[0].train, test=found[0].test)


def content_digest(schema: DataSchema, data: ClientData) -> bytes:
    """A digest of all examples, whatever their order and whichever of them are held out. It is no secret kept: whoever
    has it can try out guesses of the data. Only a keyed fingerprint of it is ever written.
    """
    digest = hashlib.sha256(f"{schema.kind}/{schema.input_shape}/".encode())
    for row in sorted(row for part in (data.train, data.test) for row in _rows(part)):
        digest.update(row)
    return digest.digest()


def _rows(examples: Examples) -> Iterator[bytes]:
    inputs, targets = examples.inputs.contiguous().numpy(), examples.targets.contiguous().numpy()
    for one, target in zip(inputs, targets, strict=True):
        yield hashlib.blake2b(one.tobytes() + b"/" + target.tobytes(), digest_size=16).digest()
