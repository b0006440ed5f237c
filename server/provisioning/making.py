"""From `federation.toml` to an authority and a kit for each party; run again, to kits for those who are new."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.crypto import Authority, PartyKeys, Role, read_csr
from common.errors import ConfigError, KitError
from common.kit import ISSUER, KIT, PARTIES, KitFacts, read_facts
from common.kit_files import add_pins, begin_kit, complete_kit, kit_toml, locked, new_folder, put, write_archive
from common.kit_texts import readme
from common.kit_tls import ROOT
from common.pins import Pins
from server.provisioning.denied import DENIED, EMPTY
from server.provisioning.registry import Registry, record
from server.provisioning.settings import AUTHORITY, COORDINATOR, Federation, host_of
from server.provisioning.tokens import coordinator_registry


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """A folder that was written."""

    name: str
    role: str
    folder: Path
    archive: Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Provisioned:
    """What `provision` did.

    Attributes:
        made: New kits; the first time with the authority's folder.
        kept: Names of parties that had a kit already.
        pins: Everybody, with the new ones.
        root: The federation's root certificate.
        server_kit: The coordinator's kit, where it lies beside the others; its pins are up to date.
    """

    made: Sequence[Made]
    kept: Sequence[str]
    pins: Pins
    root: bytes
    server_kit: Path | None


def provision(federation: Federation, out: Path) -> Provisioned:
    """Make what is missing: the first time everything, later the kits of parties that are new in `federation.toml`.

    Guarantee: No file with a key is overwritten. Where this raises, every folder is as it was before.

    Raises:
        ConfigError: The file contradicts the federation that was made.
        KitError: A folder is in the way, or cannot be written.
    """
    folder = out / AUTHORITY
    if folder.exists():
        return _extend(federation, out, Registry.open(folder))
    keys = {COORDINATOR: PartyKeys.generate(COORDINATOR, "coordinator", suite=federation.signatures)}
    keys |= _new_keys(federation, federation.parties)
    _check_free(out, [*keys, AUTHORITY])
    pins = Pins.of(federation.name, [key.record for key in keys.values()])
    authority = Authority.create(federation.name)
    done: list[Path] = []
    try:
        _write_authority(folder, federation, authority, pins)
        done.append(folder)
        _make_kits(out, Registry.open(folder), keys, pins, done)
        made = [_archived(path, done) for path in tuple(done)]
    except BaseException:
        _remove(done)
        raise
    return Provisioned(made=made, kept=(), pins=pins, root=authority.root, server_kit=out / COORDINATOR)


def replace_issuer(authority_folder: Path, server_kit: Path, *, revoke: bool = False) -> Path:
    """Give authority and coordinator a new issuer under the same root, before the old one expires; the new one's place.

    What the old one signed stays good while the old one lies beside it, as `issuer.old-N`. With `revoke` it is refused
    at once: old issuers are then kept as `issuer.revoked-N`.

    Raises:
        KitError: A folder is not what it should be, or cannot be written.
    """
    authority, server = Authority.load(authority_folder), coordinator_registry(server_kit)
    if authority.root != server.root:
        raise KitError(f"{server_kit} is of another federation than {authority_folder}", hint="name those that belong")
    issuer = authority.with_new_issuer().issuer
    for folder in (authority_folder, server_kit):
        with locked(folder), new_folder(folder / f"{ISSUER}.next") as temporary:
            issuer.save(temporary)
        with locked(folder):
            (folder / ISSUER).rename(_free(folder, "old"))
            (folder / f"{ISSUER}.next").rename(folder / ISSUER)
            for old in sorted(folder.glob(f"{ISSUER}.old-*")) if revoke else []:
                old.rename(_free(folder, "revoked"))
        write_archive(folder)
    return server_kit / ISSUER


def _free(folder: Path, kind: str) -> Path:
    """Where a former issuer is kept."""
    number = 1
    while (path := folder / f"{ISSUER}.{kind}-{number}").exists():
        number += 1
    return path


def _extend(federation: Federation, out: Path, registry: Registry) -> Provisioned:
    """Add the parties that are new."""
    server = out / COORDINATOR if (out / COORDINATOR / KIT).is_file() else None
    pins = registry.pins()
    if server is not None:  # who enrolled by request or token is known there first
        pins = pins.plus(Registry.open(server).pins().records())
    _check_same(federation, registry, pins)
    known = {name: role for name, role in federation.parties.items() if pins.find(name)}
    new = {name: role for name, role in federation.parties.items() if name not in known}
    keys = _new_keys(federation, new)
    pins = pins.plus([key.record for key in keys.values()])
    _check_free(out, list(keys))
    done: list[Path] = []
    try:
        _make_kits(out, registry, keys, pins, done)
        made = [_archived(path, done) for path in tuple(done)]
    except BaseException:
        _remove(done)
        raise
    for folder in (registry.folder, *([server] if server else [])):
        add_pins(folder, pins.records())
        write_archive(folder)
    return Provisioned(made=made, kept=list(known), pins=pins, root=registry.root, server_kit=server)


def _check_same(federation: Federation, registry: Registry, pins: Pins) -> None:
    """Refuse a file that says otherwise than the folders: nobody would be told."""
    facts, where = registry.facts, registry.folder
    if facts.federation != federation.name:
        raise ConfigError(
            f"{where} is of federation `{facts.federation}`, not `{federation.name}`",
            hint="choose another folder with --out",
        )
    if facts.server != federation.server:
        raise ConfigError(
            f"the kits say that the server is at {facts.server}, not at {federation.server}",
            hint=f"write the new address into `server` of {where / KIT} and of every party's kit.toml",
        )
    if pins.coordinator.suite is not federation.signatures:
        raise ConfigError("the suite of a federation cannot be changed", hint="its parties pin each other's keys")
    for name, role in federation.parties.items():
        pinned = pins.find(name)
        if pinned is None and pins.taken(name):
            raise ConfigError(f"the name `{name}` is taken; capitals do not count", hint="choose another name")
        if pinned is not None and pinned.role != role:
            raise ConfigError(f"`{name}` was made as {pinned.role}, not as {role}", hint="choose another name")


def _new_keys(federation: Federation, parties: Mapping[str, Role]) -> dict[str, PartyKeys]:
    return {name: PartyKeys.generate(name, role, suite=federation.signatures) for name, role in sorted(parties.items())}


def _check_free(out: Path, names: Sequence[str]) -> None:
    """Before anything is made: keys are never overwritten."""
    for name in names:
        for path in (out / name, out / f"{name}.tar.gz"):
            if path.exists():
                raise KitError(
                    f"{path} is there already, and {out / AUTHORITY} does not know it",
                    hint="keys are never overwritten: choose another folder with --out, or move that one away",
                )


def _write_authority(folder: Path, federation: Federation, authority: Authority, pins: Pins) -> None:
    facts = KitFacts(federation=federation.name, name=AUTHORITY, role="authority", server=federation.server)
    with new_folder(folder) as temporary:
        authority.save(temporary)
        put(temporary / KIT, kit_toml(facts))
        put(temporary / ROOT, authority.root)
        put(temporary / PARTIES, pins.to_text().encode())
        put(temporary / "README.txt", readme("authority", AUTHORITY).encode())


def _make_kits(out: Path, registry: Registry, keys: dict[str, PartyKeys], pins: Pins, done: list[Path]) -> None:
    for name, key in keys.items():
        _make_kit(out / name, registry, key, pins)
        done.append(out / name)
    if (out / COORDINATOR / KIT).is_file():
        issued = registry.newest()
        for name in keys:
            record(out / COORDINATOR, issued[name])


def _make_kit(folder: Path, registry: Registry, keys: PartyKeys, pins: Pins) -> None:
    name, role, server = keys.record.name, keys.record.role, registry.facts.server
    facts = KitFacts(federation=registry.facts.federation, name=name, role=role)
    with new_folder(folder) as temporary:
        public_key = read_csr(begin_kit(temporary, facts, keys))
        hosts = [host_of(server)] if role == "coordinator" else []
        chain = registry.issue(public_key, role=role, name=name, hosts=hosts)
        complete_kit(temporary, server=server, root=registry.root, chain=chain, pins=pins)
        if role == "coordinator":
            registry.issuer.save(temporary / ISSUER)
            put(temporary / DENIED, EMPTY.encode())


def _archived(folder: Path, done: list[Path]) -> Made:
    archive = write_archive(folder)
    done.append(archive)
    return Made(name=folder.name, role=read_facts(folder).role, folder=folder, archive=archive)


def _remove(paths: Sequence[Path]) -> None:
    """Take back what this call made, and nobody else has seen."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
