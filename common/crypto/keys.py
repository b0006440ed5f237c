"""A party's secret keys, and their files."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mldsa import MLDSA65PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.crypto.identity import HPKE, NAME, PartyRecord, Role, Suite, signed_bytes
from common.crypto.refusal import SealError
from common.errors import KitError, RefusedError

_PRIVATE, _RECORD = "private.json", "record.json"
SEED_BYTES = {"ed25519": 32, "ml_dsa": 32, "ml_kem": 64, "x25519": 32}
"""What a party's keys are made from."""


class PartyKeys:
    """A party's secret keys, made from seeds of the operating system's generator.

    Guarantee:
        No secret is in its `repr`. Python cannot wipe memory: while the process lives, so do the keys in it.
    """

    __slots__ = ("_ed25519", "_ml_dsa", "_seeds", "_wrapping", "record")

    def __init__(self, name: str, role: Role, suite: Suite, seeds: Mapping[str, bytes]) -> None:
        self._seeds = dict(seeds)
        self._ed25519 = Ed25519PrivateKey.from_private_bytes(seeds["ed25519"])
        self._ml_dsa = None if suite is Suite.ED25519 else MLDSA65PrivateKey.from_seed_bytes(seeds["ml_dsa"])
        ml_kem = MLKEM768PrivateKey.from_seed_bytes(seeds["ml_kem"])
        x25519 = X25519PrivateKey.from_private_bytes(seeds["x25519"])
        self._wrapping = hpke.MLKEM768X25519PrivateKey(ml_kem, x25519)
        self.record = PartyRecord(
            name=name,
            role=role,
            suite=suite,
            ed25519=self._ed25519.public_key().public_bytes_raw(),
            ml_dsa=b"" if self._ml_dsa is None else self._ml_dsa.public_key().public_bytes_raw(),
            ml_kem=ml_kem.public_key().public_bytes_raw(),
            x25519=x25519.public_key().public_bytes_raw(),
        )

    @classmethod
    def generate(cls, name: str, role: Role, *, suite: Suite = Suite.ED25519) -> Self:
        """New keys.

        Raises:
            RefusedError: The name is none.
        """
        if not re.fullmatch(NAME, name):
            raise RefusedError(f"{name!r} cannot be a party's name", hint="use letters, digits, '-' and '_'")
        return cls(name, role, suite, {field: os.urandom(size) for field, size in SEED_BYTES.items()})

    def save(self, folder: Path) -> None:
        """Write `private.json` and `record.json` into a folder that only its owner can enter.

        Raises:
            KitError: Keys are there already, or the disk does not take them.
        """
        if (folder / _RECORD).exists():  # checked first: new keys beside an old record would fit nobody
            raise KitError(
                f"{folder} has an identity already", hint="keys are never overwritten: choose another folder"
            )
        secret = {"version": 1} | {name: base64.b64encode(seed).decode() for name, seed in self._seeds.items()}
        write_private(folder / _PRIVATE, json.dumps(secret, indent=2).encode() + b"\n")
        write_private(folder / _RECORD, json.dumps(self.record.to_document(), indent=2).encode() + b"\n")

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            KitError: It is missing or damaged, or record and keys do not fit each other.
        """
        try:
            secret = json.loads((folder / _PRIVATE).read_bytes())
            record = PartyRecord.from_document(json.loads((folder / _RECORD).read_bytes()))
            seeds = {name: base64.b64decode(secret[name], validate=True) for name in SEED_BYTES}
            keys = cls(record.name, record.role, record.suite, seeds)
            if secret["version"] != 1 or keys.record != record:
                raise ValueError
        except (OSError, ValueError, KeyError, TypeError, RecursionError, RefusedError) as e:
            raise KitError(
                f"the identity in {folder} is missing or damaged", hint="restore it, or have a new kit made"
            ) from e
        return keys

    def sign(self, label: bytes, message: bytes) -> bytes:
        """Sign a message for one purpose: Ed25519, then ML-DSA-65 where the suite has it.

        Args:
            label: The purpose, with a version; a signature for one label is none for another.
            message: What is signed.
        """
        signed = signed_bytes(self.record.key_id, label, message)
        post_quantum = b"" if self._ml_dsa is None else self._ml_dsa.sign(signed)
        return self._ed25519.sign(signed) + post_quantum

    def unwrap(self, wrapped: bytes, info: bytes) -> bytes:
        """Open a key that was wrapped for this party under the same `info`.

        Raises:
            SealError: `wrap`.
        """
        try:
            return HPKE.decrypt(wrapped, self._wrapping, info)
        except (InvalidTag, ValueError) as e:
            raise SealError("wrap") from e

    def __repr__(self) -> str:
        return f"PartyKeys(name={self.record.name!r}, role={self.record.role!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Simulations hand the keys of their parties to their own worker processes."""
        return (type(self), (self.record.name, self.record.role, self.record.suite, self._seeds))


def write_private(path: Path, data: bytes) -> None:
    """Write a new file that only its owner can read, in a folder that only its owner can enter.

    Raises:
        KitError: The file is there already, or cannot be written; then none is left.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.parent.chmod(0o700)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as e:
        raise KitError(f"{path} is there already", hint="keys are never overwritten: choose another folder") from e
    except OSError as e:
        raise KitError(f"{path} cannot be written: {e.strerror}", hint="check the path and the disk") from e
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except OSError as e:
        path.unlink(missing_ok=True)
        raise KitError(f"{path} cannot be written: {e.strerror}", hint="check the path and the disk") from e
