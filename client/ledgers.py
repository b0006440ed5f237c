"""Where a site keeps the ledgers of its data sets, and how it tells whose ledger is whose.

    ledger/icu.jsonl            one file a data set, under the first name that it had
    identity/ledgers/icu.json   its counter, beside the identity key
    identity/ledgers/salt       32 random bytes, for fingerprints

A data set is known by its names and by fingerprints of its content. All that it ever had lead to one ledger: neither an
edit nor a new name gives it a new budget.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Iterable
from pathlib import Path

from common.disk import sync
from common.errors import LedgerError
from common.privacy.accounting.budget import Budget
from common.privacy.ledger.counter import write_whole
from common.privacy.ledger.file import FileLedger, ledger_errors
from common.privacy.ledger.standing import Protected

LEDGERS, IDENTITY = "ledger", "identity"
"""Folders in a site's state folder."""

_LABEL = b"coterie data fingerprint v1"
_SALT_BYTES = 32
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_COUNTERS = "ledgers"


class SiteLedgers:
    """All ledgers of a site.

    Args:
        folder: Where the ledgers are.
        identity_folder: Where the identity key is; counters and salt are kept there, in a folder `ledgers`.
        budget: Ceiling with which a new ledger opens. One that exists keeps its own.
        allow_non_private: Whether the site permits releases without noise.
    """

    def __init__(self, folder: Path, identity_folder: Path, budget: Budget, *, allow_non_private: bool = False) -> None:
        self._folder = folder
        self._counters = identity_folder / _COUNTERS
        self._budget = budget
        self._allow_non_private = allow_non_private

    def names(self) -> list[str]:
        """Names of all ledgers, sorted; also of those of which only a counter is left."""
        with ledger_errors(self._folder):
            ledgers = {path.stem for path in self._folder.glob("*.jsonl")} if self._folder.is_dir() else set()
            counters = {path.stem for path in self._counters.glob("*.json")} if self._counters.is_dir() else set()
        return sorted(ledgers | counters)

    def named(self, name: str, *, unit: Protected | None = None, fingerprints: Iterable[str] = ()) -> FileLedger:
        """The ledger of that name, whether it is there or not, sound or not.

        Raises:
            LedgerError: It is no name.
        """
        if not _NAME.fullmatch(name):
            raise LedgerError(f"{name!r} is no data set's name", hint="use at most 64 letters, digits, '-' and '_'")
        return FileLedger(
            self._folder / f"{name}.jsonl",
            counter=self._counters / f"{name}.json",
            budget=self._budget,
            unit=unit,
            names=[name],
            fingerprints=fingerprints,
            allow_non_private=self._allow_non_private,
        )

    def open(self, name: str, fingerprint: str, *, unit: Protected = "example") -> FileLedger:
        """The ledger of a data set, verified; a new one where it is known by neither name nor content.

        Args:
            name: Registered name of the data set.
            fingerprint: What `fingerprint` says of its content.
            unit: Whom the budget protects: each row, or each entity.

        Guarantee: A data set that was edited or renamed keeps its ledger, which records both.

        Raises:
            LedgerError: The ledger cannot be trusted; or two ledgers match; or none does and one cannot be read, which
                might have been this one.
        """
        with ledger_errors(self._folder):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(self._folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            ledger = self._matching(name, fingerprint, unit) or self.named(name, unit=unit, fingerprints=[fingerprint])
            ledger.identify(names=[name], fingerprints=[fingerprint])
        finally:
            os.close(lock)
        return ledger

    def look(self, name: str, content: Iterable[bytes], *, unit: Protected = "example") -> FileLedger | None:
        """The ledger of a data set, if it has one; nothing is written.

        Raises:
            LedgerError: As `open`.
        """
        return self._matching(name, self.fingerprint(content), unit) if self.names() else None

    def _matching(self, name: str, fingerprint: str, unit: Protected) -> FileLedger | None:
        """The ledger that knows a data set by its name or its content."""
        matching: list[str] = []
        unreadable: LedgerError | None = None
        for known in self.names():
            try:
                standing = self.named(known).standing()
            except LedgerError as e:
                if known == name:
                    raise
                unreadable = e
            else:
                if known == name or name in standing.names or fingerprint in standing.fingerprints:
                    matching.append(known)
        if len(matching) > 1:
            raise LedgerError(
                f"data set {name} has the name of one ledger and the content of another: {' and '.join(matching)}",
                hint="register that content under the name it had",
            )
        if not matching and unreadable is not None:
            raise unreadable
        return self.named(matching[0], unit=unit) if matching else None

    def fingerprint(self, content: Iterable[bytes]) -> str:
        """A digest of a data set's content that only this site can compute.

        It is keyed with the site's salt: whoever reads an exported ledger cannot try out guesses of the data. How the
        content is divided into chunks leaves no trace.

        Raises:
            LedgerError: The salt cannot be read or written, or is gone while there are ledgers.
        """
        digest = hmac.new(self._salt(), _LABEL, "sha256")
        for chunk in content:
            digest.update(chunk)
        return digest.hexdigest()

    def _salt(self) -> bytes:
        """The site's salt, drawn when it is first needed."""
        path = self._counters / "salt"
        with ledger_errors(path):
            if not path.exists():
                if self.names():
                    raise LedgerError(
                        f"{path} is missing, and with it the way to know data sets by their content",
                        hint="restore the identity folder from a backup",
                    )
                self._counters.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._counters.mkdir(mode=0o700, exist_ok=True)
                _draw(path)
            salt = path.read_bytes()
        if len(salt) != _SALT_BYTES:
            raise LedgerError(f"{path} is damaged", hint="restore the identity folder from a backup")
        return salt


def _draw(path: Path) -> None:
    """Write a new salt, unless another process was first: a name is given to a whole file, once."""
    temporary = path.with_name(f".salt.{secrets.token_hex(8)}.tmp")
    try:
        write_whole(temporary, secrets.token_bytes(_SALT_BYTES))
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
