"""One-time tokens, `tokens.json` in the coordinator's kit: which were made, for whom, until when, and whether used.

The file holds no secret: a token's key is in the token alone.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, SecretStr, ValidationError

from common.crypto import PeerIdentity, encode_tls_key, generate_tls_key, peer_identity
from common.enrolment import SUITES, Token
from common.errors import KitError, RefusedError
from common.kit_files import locked, put
from common.kit_tls import read
from server.provisioning.registry import Registry

TOKENS = "tokens.json"
LIFE = timedelta(hours=24)
_FORGOTTEN_AFTER = timedelta(days=365)


class Entry(BaseModel):
    """What is kept of a token."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    serial: str
    name: str
    role: Literal["site", "operator"]
    expires: AwareDatetime
    used: AwareDatetime | None = None


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    format: Literal[1] = 1
    tokens: list[Entry] = []


def make_token(folder: Path, name: str, *, role: Literal["site", "operator"] = "site", life: timedelta = LIFE) -> Token:
    """A token with which `name` can join, once.

    Args:
        folder: The coordinator's kit.
        name: Name of the new party.
        role: What it becomes.
        life: How long the token is good.

    Raises:
        RefusedError: There is such a party already, or it cannot have this name.
        KitError: The folder is not the coordinator's kit, or cannot be written.
    """
    registry = coordinator_registry(folder)
    pins = registry.pins()
    if pins.taken(name):
        raise RefusedError(f"`{name}` is a party already", hint="`coterie provision sign` renews its certificate")
    key = generate_tls_key()
    chain = registry.issue(key.public_key(), role="enrol", name=name, life=life)
    identity = peer_identity(chain)
    entry = Entry(serial=f"{identity.serial:x}", name=name, role=role, expires=identity.not_after)
    with locked(folder):
        kept = [old for old in read_tokens(folder) if datetime.now(UTC) - old.expires < _FORGOTTEN_AFTER]
        _write(folder, [*kept, entry])
    return Token(
        federation=registry.facts.federation,
        server=registry.facts.server,
        name=name,
        role=role,
        suite=next(word for word, suite in SUITES.items() if suite is pins.coordinator.suite),
        coordinator=pins.coordinator.key_id.hex(),
        parties=[record.key_id.hex() for record in pins.records() if record.role != "coordinator"],
        chain=chain.decode("ascii"),
        key=SecretStr(encode_tls_key(key).decode("ascii")),
        root=registry.root.decode("ascii"),
    )


def coordinator_registry(folder: Path) -> Registry:
    """The registry of the coordinator's kit, and of nothing else: only there tokens and the deny list are looked at.

    Raises:
        KitError: It is another folder.
    """
    registry = Registry.open(folder)
    if registry.facts.role != "coordinator":
        raise KitError(f"{folder} is the authority's folder", hint="name the coordinator's kit with --kit")
    return registry


def read_tokens(folder: Path) -> list[Entry]:
    """Every token that is remembered.

    Raises:
        KitError: The file is damaged: no token is good until it is mended.
    """
    path = folder / TOKENS
    if not path.exists():
        return []
    try:
        return _Document.model_validate_json(read(path)).tokens
    except (ValidationError, RecursionError) as e:
        raise KitError(
            f"{path} is damaged", hint="delete it: the tokens in it are void then, and you can make new ones"
        ) from e


def good_token(folder: Path, identity: PeerIdentity) -> Entry:
    """The unused token that a certificate belongs to. The caller holds the lock of the folder.

    Raises:
        RefusedError: It was used, has expired, or was not made here.
        KitError: The file is damaged.
    """
    serial = f"{identity.serial:x}"
    entry = next((entry for entry in read_tokens(folder) if entry.serial == serial), None)
    if entry is None or entry.name != identity.name:
        raise RefusedError(f"this token for `{identity.name}` was not made with this kit")
    if entry.used is not None:
        raise RefusedError(f"the token for `{entry.name}` was used before")
    if datetime.now(UTC) >= entry.expires:
        raise RefusedError(f"the token for `{entry.name}` has expired")
    return entry


def mark_used(folder: Path, entry: Entry) -> None:
    """Remember that a token was used. The caller holds the lock of the folder.

    Raises:
        KitError: The file cannot be written.
    """
    used = entry.model_copy(update={"used": datetime.now(UTC)})
    _write(folder, [used if other == entry else other for other in read_tokens(folder)])


def _write(folder: Path, entries: list[Entry]) -> None:
    put(folder / TOKENS, (_Document(tokens=entries).model_dump_json(indent=1) + "\n").encode())
