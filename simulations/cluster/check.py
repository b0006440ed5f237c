"""What a node of a cluster is asked before anything else: who it is, and whether it sees what the coordinator sees."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from common.errors import CoterieError

if TYPE_CHECKING:
    from common.schema import ClientData
    from simulations.sites import SimulatedSites

_PACKAGES: Final = ("common", "client", "server", "simulations")
_DISTRIBUTIONS: Final = ("coterie", "torch", "numpy", "flwr", "cryptography")
_CLIENTS_COMPARED: Final = 16
LOCK: Final = "lock"


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What has to be the same on every node.

    Attributes:
        versions: Of Python and of what results depend on.
        source: Digest of Coterie's own source.
        data: Digest of the data's description and of some clients' examples; empty where they cannot be loaded.
        problem: Why they cannot.
    """

    versions: tuple[tuple[str, str], ...]
    source: str
    data: str
    problem: str

    def differences(self, other: Facts) -> str:
        """What of another node's facts is unlike these, for people; empty if nothing is."""
        theirs = dict(other.versions)
        found = [f"{name} {theirs.get(name)}, not {mine}" for name, mine in self.versions if theirs.get(name) != mine]
        if not found and other.source != self.source:
            found.append("another source of Coterie under the same version")
        if other.problem:
            found.append(f"the data cannot be loaded ({other.problem})")
        elif other.data != self.data:
            found.append("other data")
        return "; ".join(found)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What a node says.

    Attributes:
        facts: Of the node.
        token: What it found in the file that was written for it; empty if nothing.
        written: What it put there instead.
        locks: Whether it is told that somebody else holds the folder's lock.
    """

    facts: Facts
    token: str
    written: str
    locks: bool


def look(sites: SimulatedSites, file: Path | None) -> Answer:
    """Runs on a node.

    Args:
        sites: The run that is simulated.
        file: Of this node, in the run's folder; None: it needs none.
    """
    token, written, locks = ("", "", False) if file is None else _touch(file)
    return Answer(facts=facts_of(sites), token=token, written=written, locks=locks)


def facts_of(sites: SimulatedSites) -> Facts:
    """What this machine has."""
    versions = [("Python", platform.python_version()), *((name, _version(name)) for name in _DISTRIBUTIONS)]
    data, problem = "", ""
    try:
        data = _data_digest(sites)
    except CoterieError as e:
        problem = str(e)
    return Facts(versions=tuple(versions), source=_source_digest(), data=data, problem=problem)


def _touch(file: Path) -> tuple[str, str, bool]:
    """What is in the file, what was put in its place, and whether the lock beside it is known to be held."""
    try:
        token, written = file.read_text(encoding="ascii"), os.urandom(16).hex()
        file.write_text(written, encoding="ascii")
        return token, written, _is_held(file.with_name(LOCK))
    except (OSError, UnicodeDecodeError):
        return "", "", False


def _is_held(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "missing"


def _source_digest() -> str:
    root, digest = Path(__file__).parents[2], hashlib.sha256()
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(root)}/{len(content)}/".encode())
            digest.update(content)
    return digest.hexdigest()


def _data_digest(sites: SimulatedSites) -> str:
    """Of the description, of how many clients there are, and of some of them."""
    federation = sites.federation
    clients, digest = federation.clients, hashlib.sha256()
    digest.update(f"{federation.schema!r}/{len(clients)}/".encode())
    for place in _spread(len(clients)):
        for part in _parts(clients[place]):
            digest.update(part)
    return digest.hexdigest()


def _spread(count: int) -> Sequence[int]:
    """Some places, evenly spaced, the first and the last among them."""
    some = min(count, _CLIENTS_COMPARED)
    return sorted({round(i * (count - 1) / max(1, some - 1)) for i in range(some)})


def _parts(client: ClientData) -> Iterator[bytes | memoryview]:
    """What a client's name and training examples are made of."""
    examples = client.train
    for values in (examples.inputs, examples.targets, examples.entities):
        array = np.empty(0) if values is None else np.ascontiguousarray(values.numpy())
        yield f"{client.name}/{array.dtype}/{array.shape}/".encode()
        yield array.reshape(-1).view(np.uint8).data if array.size else b""
