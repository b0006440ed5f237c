"""Updates that were paid for, kept until their round is over: a retry resends the same bytes, never fresh noise."""

from __future__ import annotations

import hashlib
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.errors import LedgerError

_DIGEST_BYTES = 32
_OWNER_DIGITS = 16
"""Of a file's name: whose update it is. What it is follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Release:
    """What one stored update answers: a run, a round, and the model that it was asked for with."""

    run: str
    server_round: int
    base: str


class Spool:
    """One client's stored updates, in a folder for each run and round that several clients may share.

    Guarantee: what `load` returns is what `save` was given, or nothing. A file that a power cut has damaged counts as
    not there; then the round is paid for again.
    """

    def __init__(self, folder: Path, *, owner: str) -> None:
        self._folder = folder
        self._owner = owner

    def load(self, release: Release) -> bytes | None:
        """The stored update, if there is one."""
        try:
            data = self._path(release).read_bytes()
        except OSError:
            return None
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        return content if hashlib.sha256(content).digest() == digest else None

    def save(self, release: Release, content: bytes) -> None:
        """Store an update before it is sent.

        Raises:
            LedgerError: The disk is full or cannot be written. Nothing was sent, the round stays paid for.
        """
        path = self._path(release)
        temporary = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                temporary.write_bytes(hashlib.sha256(content).digest() + content)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as e:
            raise LedgerError(f"{path} cannot be written: {e.strerror}", hint="free some space") from e

    def drop_before(self, run: str, server_round: int, *, others: int) -> None:
        """Forget a run's rounds that are over: a coordinator that asks for one has the ones before it on disk.

        Args:
            run: The run.
            server_round: Of this client's updates those of earlier rounds go.
            others: Of everybody's who shares the folder those of rounds before this one.
        """
        with suppress(OSError):
            for entry in (self._folder / run).iterdir():
                if not entry.name.isdecimal() or int(entry.name) >= server_round:
                    continue
                if int(entry.name) < others:
                    shutil.rmtree(entry, ignore_errors=True)
                    continue
                for own in entry.glob(f"{_hash(self._owner)[:_OWNER_DIGITS]}-*"):
                    own.unlink(missing_ok=True)

    def _path(self, release: Release) -> Path:
        name = _hash(f"coterie-spool-v1/{self._owner}/{release.run}/{release.server_round}/{release.base}")
        return self._folder / release.run / str(release.server_round) / f"{_hash(self._owner)[:_OWNER_DIGITS]}-{name}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
