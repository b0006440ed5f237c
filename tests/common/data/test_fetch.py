"""Fetching: pinned, resumable, atomic, and clear when offline. No test leaves this machine."""

from __future__ import annotations

import errno
import gzip
import hashlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from common.config.settings import DataSettings
from common.data import fetch as fetching
from common.data import fetch_data, load_federation
from common.data.origins import Artefact, Debian, Installed, Origin, Pip, Url
from common.errors import DataError, DataUnavailableError
from common.site import Site

CONTENT = bytes(range(256)) * 400
FILE = "content.bin"


@dataclass
class Server:
    """A web server on this machine, and what it was asked."""

    url: str = ""
    content: bytes = CONTENT
    knows_ranges: bool = True
    break_after: int | None = None
    length: str | None = None
    ranges: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    """Serves `Server.content`, whole or by range, and may break off."""
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers["Range"]
            state.ranges.append(asked)
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and state.knows_ranges else 0
            if start >= len(state.content):
                self.send_error(416)
                return
            body = state.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", state.length or str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after])

        def log_message(self, *args: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}/{FILE}"
        yield state
        http.shutdown()
        thread.join()


Offer = Callable[..., Path]


@pytest.fixture
def offer(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Makes `CONTENT` a data set named `thing`, to be had from the given origins; returns where it will be."""

    def make(*origins: Origin, gzipped: bool = False) -> Path:
        sha256 = hashlib.sha256(CONTENT).hexdigest()
        artefact = Artefact(file=FILE, sha256=sha256, size_bytes=len(CONTENT), gzipped=gzipped, origins=origins)
        monkeypatch.setattr(fetching, "ARTEFACTS", {"thing": (artefact,)})
        return empty_cache / "thing" / FILE

    return make


class TestWeb:
    """Downloads."""

    def test_a_download_is_checked_and_kept(self, server: Server, offer: Offer) -> None:
        """The file is in the cache, no part is left, and a second fetch asks nobody."""
        path = offer(Url(server.url))
        seen: list[tuple[str, int, int]] = []
        assert fetch_data("thing", progress=lambda *step: seen.append(step)) == path.parent
        assert path.read_bytes() == CONTENT
        assert [p.name for p in path.parent.iterdir()] == [FILE]
        assert seen[-1] == (FILE, len(CONTENT), len(CONTENT))
        fetch_data("thing")
        assert len(server.ranges) == 1

    def test_a_length_that_is_no_number_is_not_believed(self, server: Server, offer: Offer) -> None:
        """The hash decides."""
        path = offer(Url(server.url))
        server.length = "abc"
        fetch_data("thing")
        assert path.read_bytes() == CONTENT

    def test_a_folder_in_place_of_the_file_is_refused(self, server: Server, offer: Offer) -> None:
        """What the disk refuses is told as that, not as an origin's fault."""
        offer(Url(server.url)).mkdir(parents=True)
        with pytest.raises(DataError, match="cannot be written"):
            fetch_data("thing")

    def test_a_full_disk_is_told_as_that(self, server: Server, offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
        """And not as a server that cannot be reached."""
        offer(Url(server.url))

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with pytest.raises(DataError, match="No space left") as caught:
            fetch_data("thing", progress=full)
        assert "free some space" in caught.value.hint

    def test_an_interrupted_download_continues(self, server: Server, offer: Offer) -> None:
        """What came before the break is kept, and only the rest is asked for."""
        path = offer(Url(server.url))
        server.break_after = 70_000
        with pytest.raises(DataUnavailableError, match="broke after 70000 of 102400 bytes"):
            fetch_data("thing")
        assert not path.exists()
        server.break_after = None
        fetch_data("thing")
        assert path.read_bytes() == CONTENT
        assert server.ranges == [None, "bytes=70000-"]

    def test_a_server_without_ranges_starts_anew(self, server: Server, offer: Offer) -> None:
        """The whole file replaces the part instead of being added to it."""
        path = offer(Url(server.url))
        path.parent.mkdir(parents=True)
        path.with_name(FILE + ".part").write_bytes(CONTENT[:100])
        server.knows_ranges = False
        fetch_data("thing")
        assert path.read_bytes() == CONTENT

    def test_a_complete_part_is_taken(self, server: Server, offer: Offer) -> None:
        """A download that ended just before the check needs no more bytes."""
        path = offer(Url(server.url))
        path.parent.mkdir(parents=True)
        path.with_name(FILE + ".part").write_bytes(CONTENT)
        fetch_data("thing")
        assert path.read_bytes() == CONTENT

    @pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT * 3, b""], ids=["changed", "long", "empty"])
    def test_other_content_is_never_kept(self, server: Server, offer: Offer, content: bytes) -> None:
        """Neither the file nor a part of it stays, so that the next attempt starts clean."""
        path = offer(Url(server.url))
        server.content = content
        with pytest.raises(DataUnavailableError):
            fetch_data("thing")
        assert not path.exists()
        server.content = CONTENT
        fetch_data("thing")
        assert path.read_bytes() == CONTENT

    def test_offline_says_how_to_bring_the_file(self, offer: Offer) -> None:
        """Nobody listens: the error names the file's place, for those who carry it there by hand."""
        path = offer(Url("http://127.0.0.1:9/x"))
        with pytest.raises(DataUnavailableError, match="cannot be reached") as caught:
            fetch_data("thing")
        assert str(path) in caught.value.hint


class TestPackages:
    """Package clients, here replaced by a double that writes what they would."""

    def test_pip_is_given_the_pinned_hash(self, offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pip must refuse other content before it looks inside, and must not bring dependencies."""
        path = offer(Pip("thing==1", binary=False))
        calls: list[tuple[list[str], str]] = []

        def run(command: list[str], *, cwd: str, **_: object) -> subprocess.CompletedProcess[str]:
            calls.append((command, Path(cwd, "pin.txt").read_text()))
            Path(cwd, FILE).write_bytes(CONTENT)
            return subprocess.CompletedProcess(command, 0, "", "")

        monkeypatch.setattr(subprocess, "run", run)
        fetch_data("thing")
        ((command, pins),) = calls
        assert path.read_bytes() == CONTENT
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert {"--no-deps", "--require-hashes"} <= set(command)
        assert pins == f"thing==1 --hash=sha256:{hashlib.sha256(CONTENT).hexdigest()}\n"

    def test_real_pip_brings_a_package_from_an_index(self, tmp_path: Path, offer: Offer) -> None:
        """Pip itself accepts the command; with no index to ask, its complaint is passed on."""
        offer(Pip("coterie-no-such-package==1", binary=True))
        environment = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
        with pytest.MonkeyPatch.context() as patch:
            for key, value in environment.items():
                patch.setenv(key, value)
            with pytest.raises(DataUnavailableError, match="No matching distribution found"):
                fetch_data("thing")

    def test_installed_files_are_used_first(self, tmp_path: Path, offer: Offer, server: Server) -> None:
        """The file that the system has is copied; compressed content is judged by what is inside."""
        (tmp_path / "installed.gz").write_bytes(gzip.compress(CONTENT))
        path = offer(Installed(tmp_path / "installed.gz"), Url(server.url), gzipped=True)
        fetch_data("thing")
        assert gzip.decompress(path.read_bytes()) == CONTENT
        assert server.ranges == []

    def test_the_next_origin_is_tried(self, tmp_path: Path, offer: Offer, monkeypatch: pytest.MonkeyPatch) -> None:
        """Absent and damaged origins are passed over, and every reason is told if none is left."""
        monkeypatch.setenv("PATH", "")
        (tmp_path / "damaged").write_bytes(b"x")
        offer(Installed(tmp_path / "none"), Debian("thing", "x"), Installed(tmp_path / "damaged"))
        with pytest.raises(DataUnavailableError, match=r"not installed; apt-get is not on this machine; .*damaged"):
            fetch_data("thing")


@pytest.mark.parametrize("name", ["fashion-mnist", "shakespeare-full", "sentiment"])
def test_what_is_not_fetched_says_how_to_fetch_it(name: str) -> None:
    """Loading never downloads anything by itself."""
    with pytest.raises(DataUnavailableError, match="has to be fetched first") as caught:
        load_federation(DataSettings(name=name), seed=0, site=Site())
    assert caught.value.hint == f"run: coterie data fetch {name}"


def test_a_damaged_cache_is_refused(empty_cache: Path) -> None:
    """A fetched file is checked every time it is read."""
    (empty_cache / "sentiment").mkdir(parents=True)
    (empty_cache / "sentiment" / "vaderSentiment-3.3.2.tar.gz").write_bytes(b"damaged")
    with pytest.raises(DataError, match="damaged") as caught:
        load_federation(DataSettings(name="sentiment"), seed=0, site=Site())
    assert caught.value.hint == "run: coterie data fetch sentiment"


def test_a_cache_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hint names the variable that moves it."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COTERIE_DATA", str(tmp_path / "file"))
    with pytest.raises(DataError, match="cannot be created") as caught:
        fetch_data("sentiment")
    assert "COTERIE_DATA" in caught.value.hint


def test_names_that_are_not_fetched_are_refused() -> None:
    """Built-in data need no fetching."""
    with pytest.raises(DataError, match="not a data set that is fetched") as caught:
        fetch_data("heart")
    assert "sentiment" in caught.value.hint
