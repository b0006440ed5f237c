"""The deny list, `denied.txt` in the coordinator's kit: parties and single certificates that are shut out.

One entry a line: a party's name, or `serial:` and a certificate's serial number in hex. `#` starts a comment. The file
is looked at again at every question, so that an entry works at once, without a restart.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

from common.crypto import PeerIdentity
from common.errors import KitError
from common.kit_files import locked, put
from common.kit_tls import read

DENIED = "denied.txt"
_SERIAL = re.compile(r"^(?:0x)?[0-9a-f]{16,40}$")
EMPTY = "# Who is shut out: names of parties, or serial:HEX of one certificate. Works at once, without a restart.\n"


class Denied:
    """Whom the coordinator lets in no more. Thread-safe."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._seen: tuple[int, int, int] | None = None
        self._entries: frozenset[str] | None = frozenset()

    def refuses(self, identity: PeerIdentity) -> bool:
        """Whether a party, or this certificate of it, is shut out.

        Guarantee: Decided by the file as it is now. A file that cannot be read refuses everybody.
        """
        entries = self.entries()
        return entries is None or bool(entries & {identity.name, serial_entry(identity.serial)})

    def refuses_name(self, name: str) -> bool:
        """Whether a party is shut out, whatever its certificate."""
        entries = self.entries()
        return entries is None or name in entries

    def names(self, name: str) -> bool:
        """Whether the list can be read and has a party's name: for what cannot be taken back, such as ending a run."""
        return name in (self.entries() or ())

    def entries(self) -> frozenset[str] | None:
        """All entries, serials as `serial:HEX`; None where the file cannot be read."""
        with self._lock:
            try:
                facts = self._path.stat()
            except FileNotFoundError:
                self._seen, self._entries = None, frozenset()
                return self._entries
            except OSError:
                self._seen, self._entries = None, None
                return None
            now = (facts.st_mtime_ns, facts.st_ino, facts.st_size)
            if now != self._seen:
                try:
                    self._entries = _entries(self._path.read_text(encoding="utf-8-sig"))
                    self._seen = now
                except (OSError, UnicodeDecodeError):
                    self._seen, self._entries = None, None
            return self._entries


def serial_entry(serial: int) -> str:
    """How a certificate stands in the list."""
    return f"serial:{serial:x}"


def names_serial(entry: str) -> bool:
    """Whether an entry is, or may be, the serial number of a certificate."""
    return len(_forms(entry)) > 1 or entry.startswith("serial:")


def _forms(word: str) -> set[str]:
    """All that an entry may mean: a name; a long hexadecimal number is a serial, too, also with colons."""
    compact = word.lower().removeprefix("serial:").replace(":", "")
    return {word, serial_entry(int(compact, 16))} if _SERIAL.match(compact) else {word}


def deny(folder: Path, what: str) -> bool:
    """Shut out a party, or one certificate; False where it was shut out before.

    Raises:
        KitError: The list cannot be read or written.
    """
    path = folder / DENIED
    with locked(folder):
        text = _text(path)
        if _entries(text) & _forms(what):
            return False
        put(path, (text.rstrip("\n") + f"\n{what}\n").encode())
    return True


def allow(folder: Path, what: str) -> bool:
    """Let a party or a certificate in again; False where it was not shut out. Comments stay.

    Raises:
        KitError: The list cannot be read or written.
    """
    path = folder / DENIED
    with locked(folder):
        lines = _text(path).splitlines()
        kept = [line for line in lines if not _entries(line) & _forms(what)]
        if len(kept) == len(lines):
            return False
        put(path, "".join(f"{line}\n" for line in kept).encode())
    return True


def _text(path: Path) -> str:
    if not path.exists():
        return EMPTY
    try:
        return read(path).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise KitError(f"{path} is not text; until it is mended everybody is refused", hint="edit it by hand") from e


def _entries(text: str) -> frozenset[str]:
    words = (line.partition("#")[0].strip() for line in text.splitlines())
    return frozenset().union(*(_forms(word) for word in words if word))
