"""Writing kits: new folders that appear whole or not at all, renewed certificates, new pins, archives.

Private keys are made here and never leave the folder, but in the kit's own archive. Nothing that holds a key is ever
overwritten.
"""

from __future__ import annotations

import fcntl
import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import tomli_w
from cryptography.exceptions import InvalidSignature

from common.crypto import PartyKeys, PartyRecord, encode_tls_key, generate_tls_key, make_csr, peer_identity
from common.disk import atomic_file
from common.errors import KitError, RefusedError, RunError
from common.kit import (
    IDENTITY,
    KIT,
    PARTIES,
    UNCONFIRMED,
    KitFacts,
    party_role,
    read_facts,
    read_pins,
    read_unconfirmed,
)
from common.kit_texts import readme, site_toml
from common.kit_tls import CHAIN, NEXT_TLS_KEY, ROOT, TLS_KEY, fits, read, verify_chain
from common.pins import Pins

_OURS, _PUBLIC = 0o600, 0o644


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder (0700) beside `path`, which takes its name when the block ends without error.

    Guarantee: What is at `path` already is never touched.

    Raises:
        KitError: There is something at `path`, or the folder cannot be written.
    """
    if path.exists() or path.is_symlink():
        raise KitError(f"{path} is there already", hint="keys are never overwritten: choose another folder")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir(mode=0o700)
        yield temporary
        temporary.rename(path)
    except OSError as e:
        raise KitError(f"{path} cannot be written: {e.strerror}", hint="check the disk and its permissions") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process and one thread at a time change a kit; others wait.

    Raises:
        KitError: The folder cannot be locked.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as e:
        raise KitError(f"{folder} cannot be opened: {e.strerror}", hint="check the path and its permissions") from e
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def put(path: Path, data: bytes, *, secret: bool = False) -> None:
    """Write a file, whole or not at all. A secret is never readable for others, not even for an instant.

    Raises:
        KitError: The disk is full, or the folder cannot be written.
    """
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        with atomic_file(path) as temporary:
            temporary.unlink(missing_ok=True)  # left behind by a process that was killed
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _OURS if secret else _PUBLIC)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
    except (OSError, RunError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise KitError(f"{path} cannot be written: {reason}", hint="check the disk and its permissions") from e


def begin_kit(folder: Path, facts: KitFacts, keys: PartyKeys) -> bytes:
    """Fill a new folder with everything that a party has before its certificate comes; its CSR, as PEM."""
    put(folder / KIT, kit_toml(facts))
    keys.save(folder / IDENTITY)
    put(folder / "README.txt", readme(facts.role, facts.name).encode())
    if facts.role == "site":
        put(folder / "site.toml", site_toml(facts.name).encode())
    return begin_renewal(folder)


def complete_kit(
    folder: Path, *, server: str, root: bytes, chain: bytes, pins: Pins, unconfirmed: Iterable[PartyRecord] = ()
) -> None:
    """Add what an enrolment answers: the coordinator's address, the root, the certificate and the pins.

    `unconfirmed` are those of the pins that came through the coordinator, and that nobody has compared.

    Raises:
        KitError: The certificate is not for this kit.
        RefusedError: The kit pins somebody with other keys already.
    """
    facts = read_facts(folder)
    if (folder / PARTIES).exists():
        pins = read_pins(folder).plus(pins.records())
    if (folder / ROOT).exists() and read(folder / ROOT) != root:
        raise RefusedError("the answer has another root than this kit", hint="enrol anew, into another folder")
    check_certificate(folder, chain, root=root)
    put(folder / ROOT, root)
    _mark_unconfirmed(folder, unconfirmed)
    put(folder / PARTIES, pins.to_text().encode())
    put(folder / KIT, kit_toml(facts.model_copy(update={"server": server})))
    install_certificate(folder, chain)


def begin_renewal(folder: Path) -> bytes:
    """Make the key of the next certificate, and ask for one: the CSR, as PEM. The present ones stay in use.

    Raises:
        KitError: The kit cannot be written.
    """
    facts = read_facts(folder)
    with locked(folder):
        _settle(folder)
        key = generate_tls_key()
        put(folder / NEXT_TLS_KEY, encode_tls_key(key), secret=True)
    return make_csr(key, federation=facts.federation, role=party_role(facts), name=facts.name)


def install_certificate(folder: Path, chain: bytes) -> None:
    """Take a new certificate into use.

    Guarantee: Whenever the process is killed, `read_tls` finds a certificate with its key: the old or the new.

    Raises:
        KitError: It is not this party's, not of the kit's root, or not for a key of this kit.
    """
    check_certificate(folder, chain, root=read(folder / ROOT))
    with locked(folder):
        put(folder / CHAIN, chain)
        _settle(folder)


def check_certificate(folder: Path, chain: bytes, *, root: bytes) -> None:
    """Refuse a certificate that is not this kit's, before anything is written.

    Raises:
        KitError: It names another party, comes from another root, or belongs to another key.
    """
    facts = read_facts(folder)
    hint = "ask for a new one; `coterie enroll --kit KIT` writes the request"
    try:
        identity = peer_identity(chain)
        verify_chain(chain, root)
    except (RefusedError, ValueError, TypeError, InvalidSignature) as e:
        raise KitError("the certificate does not come from the federation's root", hint=hint) from e
    if (identity.federation, identity.role, identity.name) != (facts.federation, facts.role, facts.name):
        raise KitError(f"the certificate is for {identity.role} `{identity.name}`", hint=hint)
    keys = [folder / name for name in (NEXT_TLS_KEY, TLS_KEY) if (folder / name).exists()]
    if not any(fits(key, chain) for key in keys):
        raise KitError("the certificate is for another key than this kit's", hint=hint)


def add_pins(folder: Path, records: Iterable[PartyRecord]) -> list[PartyRecord]:
    """Pin new parties; those that were new.

    Guarantee: What is pinned stays as it is.

    Raises:
        KitError: The kit's pins cannot be read or written.
        RefusedError: A name is pinned with other keys.
    """
    with locked(folder):
        return add_pins_locked(folder, records)


def add_pins_locked(folder: Path, records: Iterable[PartyRecord]) -> list[PartyRecord]:
    """As `add_pins`, for a caller that holds the lock."""
    path, asked = folder / PARTIES, list(records)
    before = read_pins(folder)
    after = before.plus(asked)
    new = [record for record in asked if before.find(record.name) is None]
    if new:
        put(path, after.to_text().encode())
    return new


def write_archive(folder: Path) -> Path:
    """Pack a kit as `NAME.tar.gz` beside it (0600): the same kit gives the same bytes. State is left out.

    Raises:
        KitError: The archive cannot be written.
    """
    packed = io.BytesIO()
    with (
        gzip.GzipFile(filename="", fileobj=packed, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for path in [folder, *sorted(folder.rglob("*"))]:
            inside = path.relative_to(folder)
            if path.is_symlink() or inside.parts[:1] == ("state",) or path.name.endswith(".tmp"):
                continue
            member = tarfile.TarInfo(str(Path(folder.name, inside)))
            member.mode = path.stat().st_mode & 0o777
            if path.is_dir():
                member.type = tarfile.DIRTYPE
                tar.addfile(member)
            else:
                data = read(path)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    archive = folder.with_name(f"{folder.name}.tar.gz")
    put(archive, packed.getvalue(), secret=True)
    return archive


def _settle(folder: Path) -> None:
    """Let the next key take its place once its certificate is there, also after an interruption between the two."""
    chain, following = folder / CHAIN, folder / NEXT_TLS_KEY
    if chain.exists() and following.exists() and fits(following, read(chain)):
        following.replace(folder / TLS_KEY)


def kit_toml(facts: KitFacts) -> bytes:
    """The text of `kit.toml`."""
    head = "# Which party of which federation this kit is for. README.txt says what lies beside it.\n"
    return (head + tomli_w.dumps(facts.model_dump())).encode()


def _mark_unconfirmed(folder: Path, records: Iterable[PartyRecord]) -> None:
    """Before they are pinned: an interruption must not make them count as confirmed."""
    new = {record.key_id for record in records}
    if new:
        key_ids = sorted(key_id.hex() for key_id in read_unconfirmed(folder) | new)
        put(folder / UNCONFIRMED, (json.dumps({"format": 1, "key_ids": key_ids}, indent=1) + "\n").encode())
