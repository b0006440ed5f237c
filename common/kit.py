"""A party's kit: the folder with its keys, its certificate, and the public records of everybody whom it pins.

    kit.toml       federation, name, role, the coordinator's address
    ca.pem         certificate of the federation's root
    parties.json   pinned public records
    unconfirmed.json  which of them came through the coordinator, and nobody has compared yet
    identity/      keys that sign and open messages                                           secret
    tls/           chain.pem, and its key private.pem                                         secret
    issuer/        the coordinator's only: what signs certificates                            secret
    denied.txt, tokens.json, issued.jsonl                               the coordinator's only
    site.toml, policy.toml                                              a site's only: its own data and rules
    state/         made when it is used

`common/kit_files.py` writes kits; this module reads them.
"""

from __future__ import annotations

import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from common.crypto import PartyKeys, PartyRecord, PeerIdentity, Role, peer_identity
from common.errors import KitError
from common.kit_tls import CHAIN, NEXT_TLS_KEY, ROOT, Tls, damage, read, read_tls, verify_chain
from common.pins import Pins

__all__ = [
    "CHAIN",
    "IDENTITY",
    "ISSUER",
    "KIT",
    "PARTIES",
    "UNCONFIRMED",
    "Kit",
    "KitFacts",
    "Tls",
    "check_secrets",
    "load_kit",
    "party_role",
    "read_facts",
    "read_pins",
    "read_unconfirmed",
]

KIT, PARTIES, IDENTITY, ISSUER = "kit.toml", "parties.json", "identity", "issuer"
UNCONFIRMED = "unconfirmed.json"

_SECRETS = (IDENTITY, "tls", ISSUER)
_WHOSE = {"coordinator": "the coordinator", "site": "a site", "operator": "an operator", "authority": "the authority"}


class KitFacts(BaseModel):
    """What `kit.toml` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    federation: str = Field(min_length=1)
    name: str = Field(min_length=1)
    role: Literal["coordinator", "site", "operator", "authority"]
    server: str = Field("", description="host:port of the coordinator; empty until the party is enrolled.")


class _Unconfirmed(BaseModel):
    """What `unconfirmed.json` says."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    key_ids: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Kit:
    """One party's keys and pins.

    Attributes:
        folder: Where the kit lies.
        name, role, keys: The party's own.
        address: The coordinator's `host:port`.
        coordinator, sites, operators: Pinned records, the latter by name.
        unconfirmed: Key ids of pinned records that came through the coordinator, and that nobody has compared with what
            others have.
    """

    folder: Path
    federation: str
    name: str
    role: Role
    address: str
    keys: PartyKeys
    coordinator: PartyRecord
    sites: Mapping[str, PartyRecord]
    operators: Mapping[str, PartyRecord]
    unconfirmed: frozenset[bytes] = frozenset()

    @property
    def agreed_sites(self) -> Mapping[str, PartyRecord]:
        """The sites whose keys were agreed outside of the coordinator, by name."""
        return {name: record for name, record in self.sites.items() if record.key_id not in self.unconfirmed}

    def tls(self) -> Tls:
        """The certificate and its key as they are on the disk now: a renewal rewrites them.

        Raises:
            KitError: A file is missing, or key and certificate do not belong together.
        """
        return read_tls(self.folder)

    def certificate(self) -> PeerIdentity:
        """Whom this party's present certificate names, and until when it is valid.

        Raises:
            KitError: The certificate is missing or damaged.
        """
        return _own_certificate(self.folder)

    @property
    def state_path(self) -> Path:
        """Where `state` is, or will be: for whoever only looks."""
        return self.folder / "state"

    @property
    def state(self) -> Path:
        """The folder for what must outlast a restart; made on first use, for this user only."""
        path = self.state_path
        try:
            path.mkdir(mode=0o700, exist_ok=True)
        except OSError as e:
            raise KitError(f"{path} cannot be made: {e.strerror}", hint="mend the permissions of the kit") from e
        return path

    def pins(self) -> Pins:
        """The public records as they are on the disk now: enrolment adds to them.

        Raises:
            KitError: `parties.json` is missing or damaged.
        """
        return read_pins(self.folder)

    def reloaded(self) -> Kit:
        """This kit with the pins that are on the disk now.

        Raises:
            KitError: `parties.json` is missing or damaged.
        """
        unconfirmed = read_unconfirmed(self.folder)  # first: whoever pins says so before
        pins = self.pins()
        return replace(
            self,
            coordinator=pins.coordinator,
            sites=pins.sites,
            operators=pins.operators,
            unconfirmed=unconfirmed,
        )


def load_kit(folder: Path, *, role: Role | None) -> Kit:
    """Read and check a whole kit.

    Guarantee: Keys, certificate and `kit.toml` name one party of one federation, its own record is the pinned one,
    and no secret can be read by everybody on this machine. Whether the certificate has expired is not looked at.

    Args:
        folder: The kit.
        role: Whose kit it must be; None takes any party's.

    Raises:
        KitError: A file is missing, damaged, or of another party; or the kit is of another role.
    """
    facts = read_facts(folder)
    if facts.role == "authority" or (role is not None and facts.role != role):
        wanted = _WHOSE[role] if role else "a party"
        raise KitError(f"{folder} is the kit of {_WHOSE[facts.role]}, not of {wanted}", hint="name another with --kit")
    _check_enrolled(folder)
    check_secrets(folder)
    pins, keys = read_pins(folder), _read_keys(folder)
    certificate = _own_certificate(folder)
    if (certificate.federation, certificate.role, certificate.name) != (facts.federation, facts.role, facts.name):
        raise KitError(f"{folder / CHAIN} is another party's certificate", hint="restore the kit from its archive")
    tls = read_tls(folder)
    with damage(folder / ROOT):
        verify_chain(tls.chain, tls.root)
    if pins.federation != facts.federation or pins.find(facts.name) != keys.record:
        raise KitError(
            f"{folder}: the keys in {IDENTITY}/ are not those that {PARTIES} lists for `{facts.name}`",
            hint="restore the kit from its archive",
        )
    return Kit(
        folder=folder,
        federation=facts.federation,
        name=facts.name,
        role=facts.role,
        address=facts.server,
        keys=keys,
        coordinator=pins.coordinator,
        sites=pins.sites,
        operators=pins.operators,
        unconfirmed=read_unconfirmed(folder),
    )


def read_facts(folder: Path) -> KitFacts:
    """What `kit.toml` says; also of the authority, and of a kit that waits for its certificate.

    Raises:
        KitError: The folder is no kit, or the file is damaged.
    """
    path = folder / KIT
    if not path.is_file():
        found = f"{folder} is no kit: it has no {KIT}" if folder.is_dir() else f"there is no folder {folder}"
        raise KitError(found, hint="`coterie provision` and `coterie enroll` make kits; name one with --kit")
    try:
        return KitFacts.model_validate(tomllib.loads(read(path).decode()))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as e:
        raise KitError(f"{path} is not valid TOML: {e}", hint="restore it from the kit's archive") from e
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise KitError(f"{path}: `{where}`: {first['msg']}", hint="restore it from the kit's archive") from e


def party_role(facts: KitFacts) -> Role:
    """The role of a party's kit.

    Raises:
        KitError: The folder is the authority's.
    """
    if facts.role == "authority":
        raise KitError("the authority's folder is no party's kit", hint="name a party's kit with --kit")
    return facts.role


def read_pins(folder: Path) -> Pins:
    """The records that a kit pins.

    Raises:
        KitError: `parties.json` is missing or damaged.
    """
    with damage(folder / PARTIES):
        return Pins.from_text(read(folder / PARTIES).decode())


def read_unconfirmed(folder: Path) -> frozenset[bytes]:
    """Key ids of the pinned records that came through the coordinator and were not compared since.

    Raises:
        KitError: The file is damaged.
    """
    path = folder / UNCONFIRMED
    if not path.exists():
        return frozenset()
    with damage(path):
        return frozenset(map(bytes.fromhex, _Unconfirmed.model_validate_json(read(path)).key_ids))


def check_secrets(folder: Path) -> None:
    """Refuse a kit whose secrets everybody on this machine can read: a copy that lost its permissions, mostly.

    A group may read them: a service often runs as another user than the one who installs its files.

    Raises:
        KitError: With the command that mends it.
    """
    for name in _SECRETS:
        for path in sorted(folder.glob(f"{name}*/**/*")):
            if path.name != Path(CHAIN).name and path.is_file() and path.stat().st_mode & stat.S_IRWXO:
                raise KitError(f"everybody on this machine can use {path}", hint=f"chmod -R o= {folder}")


def _check_enrolled(folder: Path) -> None:
    if not (folder / CHAIN).exists() and (folder / NEXT_TLS_KEY).exists():
        raise KitError(
            f"{folder} waits for its certificate",
            hint=f"`coterie enroll --answer ANSWER --kit {folder}` completes it",
        )


def _own_certificate(folder: Path) -> PeerIdentity:
    chain = read(folder / CHAIN)
    with damage(folder / CHAIN):
        return peer_identity(chain)


def _read_keys(folder: Path) -> PartyKeys:
    path = folder / IDENTITY
    if not path.is_dir():
        raise KitError(f"{path} is missing", hint="restore it from the kit's archive; nobody else has these keys")
    with damage(path):
        return PartyKeys.load(path)
