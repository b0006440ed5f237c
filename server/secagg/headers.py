"""Which rounds were begun from which model, written down before anybody is asked.

A site trains from a model once: from the same one again only if the round that used it can never be opened any more. So
the coordinator has to know such rounds, also those of a process that was killed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.disk import disk_errors, sync
from common.errors import RunError

FILE: Final = "secagg.jsonl"
"""In a run's folder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Begun:
    """A round of one group that was begun.

    Attributes:
        header: Its digest, 32 bytes.
        base: Digest of the model that it started from, 32 bytes.
        participants: Who was asked, by name.
        epoch: Number of the set-up of its keys, from 1.
    """

    header: bytes
    base: bytes
    participants: tuple[str, ...]
    epoch: int


class Headers:
    """All rounds of a run that were begun, and the certificates of those that were burnt.

    Guarantee: what `begin` and `burn` were given is on the disk when they return, and known to the next process.
    """

    def __init__(self, folder: Path | None) -> None:
        """Open.

        Args:
            folder: The run's; None remembers in memory only.

        Raises:
            RunError: What was written is damaged, or cannot be read.
        """
        self._path = None if folder is None else folder / FILE
        self._begun: list[Begun] = []
        self._burnt: dict[bytes, bytes] = {}
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def begin(self, rounds: Sequence[Begun]) -> None:
        """Remember these before anybody hears of them.

        Raises:
            RunError: The disk is full or cannot be written. Nobody may be asked.
        """
        self._append(
            [
                {"header": r.header.hex(), "base": r.base.hex(), "participants": list(r.participants), "epoch": r.epoch}
                for r in rounds
            ]
        )
        self._begun += rounds

    def burn(self, header: bytes, certificate: bytes) -> None:
        """Remember the certificate that a round can never be opened."""
        self._append([{"header": header.hex(), "certificate": certificate.hex()}])
        self._burnt[header] = certificate

    def of(self, base: bytes) -> list[Begun]:
        """The rounds that started from a model, oldest first."""
        return [begun for begun in self._begun if begun.base == base]

    @property
    def epoch(self) -> int:
        """Number of the last epoch in which a round was begun; 0 before the first."""
        return max((begun.epoch for begun in self._begun), default=0)

    def certificate(self, header: bytes) -> bytes | None:
        """That a round was burnt, or None."""
        return self._burnt.get(header)

    def _append(self, entries: list[dict[str, object]]) -> None:
        if self._path is None or not entries:
            return
        new = not self._path.exists()
        with disk_errors(self._path), self._path.open("ab") as file:
            file.write(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
            file.flush()
            os.fsync(file.fileno())
            if new:
                sync(self._path.parent)

    def _read(self, path: Path) -> None:
        with disk_errors(path, "read"):
            data = path.read_bytes()
        whole = data.rfind(b"\n") + 1
        try:
            for line in data[:whole].splitlines():
                entry = json.loads(line)
                header = bytes.fromhex(entry["header"])
                if "certificate" in entry:
                    self._burnt[header] = bytes.fromhex(entry["certificate"])
                else:
                    base, names = bytes.fromhex(entry["base"]), tuple(map(str, entry["participants"]))
                    self._begun.append(Begun(header=header, base=base, participants=names, epoch=int(entry["epoch"])))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise RunError(f"{path} is damaged", hint="restore it from a copy, or start a new run") from e
        if whole < len(data):  # a killed process can leave a part of a line, of a round that nobody was asked
            with disk_errors(path):
                os.truncate(path, whole)
