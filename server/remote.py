"""An operator's way to the coordinator: calls over mutual TLS, plain documents, results opened and verified."""

from __future__ import annotations

import json
import mmap
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Final, Self

import grpc
import typer

from common import errors
from common.config import RunConfig
from common.crypto import KINDS, Direction, Opening, authorize, open_envelope
from common.disk import disk_errors
from common.errors import CoterieError, RefusedError, RunError, UnreachableError
from common.kit import Kit
from common.renewal import is_due, renew
from common.transport.channel import OperatorCalls, PlaneCalls, channel, refusal_of
from common.transport.wire_pb2 import Question, SubmitRequest
from server.archive import unpack
from server.store import RunFolder

Document = dict[str, Any]

_TRIES: Final = 3
_MOST_BYTES: Final = 1 << 44
_HINTS: Final[Mapping[str, tuple[str, str]]] = {
    "unreachable": ("cannot be reached", "is `coterie server` running, and the address in kit.toml right?"),
    "denied": ("does not let you in", "your certificate has expired or was revoked, or the kit is of another role"),
    "busy": ("is busy", "try again in a moment"),
    "stopping": ("is shutting down", "try again when it is back"),
    "failed": ("failed to answer", "its log has the details"),
    "protocol": ("speaks another version", "both sides must run the same version"),
    "malformed": ("did not understand", "both sides must run the same version"),
    "deadline-exceeded": ("did not answer in time", "try again; its log may say why"),
}


class Coordinator:
    """The coordinator as an operator sees it; a context that closes the connection.

    Args:
        kit: The operator's.
    """

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._channel = channel(kit.address, kit.tls())
        self._calls = OperatorCalls(self._channel)

    def __enter__(self) -> Self:
        """Use the connection; renew the operator's certificate first, where a third or less of its life is left."""
        self._renew()
        return self

    def _renew(self) -> None:
        """Where that fails, the certificate that is there still serves."""
        try:
            if is_due(self._kit):
                renew(self._kit, PlaneCalls(self._channel))
        except grpc.RpcError as e:
            _warn(f"your certificate could not be renewed: {refusal_of(e)}")
        except CoterieError as e:
            _warn(f"your certificate could not be renewed: {e}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self._channel.close()

    def submit(self, config: RunConfig) -> Document:
        """Sign a run and queue it; where it stands. A connection that breaks meanwhile does not queue it twice.

        Raises:
            UnreachableError: The coordinator does not answer.
            CoterieError: It refuses the run, in its own words.
        """
        run_id = secrets.token_hex(16)
        signed = authorize(
            self._kit.keys, federation=self._kit.federation, run_id=run_id, config_digest=config.digest()
        )
        request = SubmitRequest(config=config.canonical_json(), authorization=signed)
        for last in (False, False, True):
            try:
                return self._answer(lambda: self._calls.submit(request).json)
            except UnreachableError:
                if last:
                    raise
        raise AssertionError("unreachable")

    def ask(self, what: str, run: str = "") -> Document:
        """One answer.

        Raises:
            UnreachableError: The coordinator does not answer.
            CoterieError: What it says itself.
        """
        return self._answer(lambda: self._calls.ask(Question(what=what, run=run)).json)

    def follow(self, what: str, run: str) -> Iterator[Document]:
        """Answers as they come, until the run ends. Where the connection breaks it is taken up again.

        Raises:
            UnreachableError: The coordinator does not answer any more.
            CoterieError: What it says itself.
        """
        tries = 0
        while True:
            stream = self._calls.follow(Question(what=what, run=run))
            try:
                for answer in stream:
                    tries = 0
                    yield _checked(json.loads(answer.json))
            except grpc.RpcError as e:
                tries += 1
                if refusal_of(e) not in {"unreachable", "stopping"} or tries > _TRIES:
                    raise self._unreachable(e) from e
                self._wait_for_coordinator()
            else:
                return
            finally:
                with suppress(Exception):
                    stream.cancel()

    def fetch(self, run: str, out: Path) -> Document:
        """Bring a run's result into a new folder, which `coterie predict` can use.

        Guarantee: what lies in the folder was sealed for this operator by the pinned coordinator for this very run and
        configuration. Where anything is wrong, there is no folder.

        Raises:
            RunError: The run has no result, or the folder exists or cannot be written.
            RefusedError: What came is not the coordinator's, or not of this run.
            UnreachableError: The coordinator does not answer.
        """
        status = self.ask("status", run)
        if status["status"] != "completed":
            raise RunError(
                f"run {status['run'][:12]} has no result: it is {status['status']}",
                hint="`coterie status RUN --kit KIT --follow` waits for its end",
            )
        with disk_errors(out):
            if out.exists() and (not out.is_dir() or any(out.iterdir())):
                raise RunError(f"{out} exists already", hint="choose a new folder with --out")
            out.parent.mkdir(parents=True, exist_ok=True)
        # A folder of this process alone: a result must not be written through what others put at a name they can guess.
        with disk_errors(out):
            scratch = TemporaryDirectory(prefix=".coterie-", dir=out.parent, ignore_cleanup_errors=True)
        with scratch as folder:
            blob, plain = Path(folder) / "sealed", Path(folder) / "tar"
            opening = self._download(status["run"], blob)
            if opening.header.run_id.hex() != status["run"]:
                raise RefusedError("the result is of another run", hint="ask the coordinator's administrator")
            with disk_errors(out):
                _decrypt(opening, blob, plain)
            with disk_errors(out), plain.open("rb") as file:
                unpack(file, out)
            _check_configuration(opening, out)
        return status

    def _download(self, run: str, blob: Path) -> Opening:
        """The ciphertext in a file, and its verified envelope; a broken download is continued."""
        envelope, tries = b"", 0
        blob.unlink(missing_ok=True)
        while True:
            size = blob.stat().st_size if blob.exists() else 0
            frames = iter(self._calls.download(Question(run=run, argument=str(size))))
            try:
                found = next(frames, b"")
                if found != envelope:
                    opening, envelope = self._opened(found, blob.parent), found
                    if size:  # sealed anew since: what is there belongs to other keys
                        blob.unlink()
                        continue
                with disk_errors(blob), blob.open("ab") as file:
                    for frame in frames:
                        size += len(frame)
                        if size > opening.blob_bytes:
                            raise RefusedError("the result is longer than it says", hint="fetch it again")
                        file.write(frame)
            except grpc.RpcError as e:
                tries += 1
                if refusal_of(e) == "no-result":
                    raise RunError("the run has no result", hint="`coterie status RUN --kit KIT` says why") from e
                if refusal_of(e) not in {"unreachable", "stopping"} or tries > _TRIES:
                    raise self._unreachable(e) from e
                self._wait_for_coordinator()
            else:
                return opening

    def _opened(self, envelope: bytes, folder: Path) -> Opening:
        opening = open_envelope(
            envelope, sender=self._kit.coordinator, recipient=self._kit.keys, most_bytes=_MOST_BYTES
        )
        header = opening.header
        if header.direction is not Direction.RESULT or header.kind != KINDS["result"]:
            raise RefusedError("what came is not a result", hint="ask the coordinator's administrator")
        if shutil.disk_usage(folder).free < 3 * opening.blob_bytes:
            raise RunError(
                f"{folder} has no room for {opening.blob_bytes} bytes, three times over", hint="free some space"
            )
        return opening

    def _answer(self, call: Callable[[], str]) -> Document:
        try:
            return _checked(json.loads(call()))
        except grpc.RpcError as e:
            raise self._unreachable(e) from e

    def _wait_for_coordinator(self) -> None:
        """Until the connection is there again, at most a minute."""
        with suppress(grpc.FutureTimeoutError):
            grpc.channel_ready_future(self._channel).result(timeout=60)

    def _unreachable(self, error: grpc.RpcError) -> UnreachableError:
        refusal = refusal_of(error)
        what, hint = _HINTS.get(refusal, (f"refuses: {refusal}", "ask the coordinator's administrator"))
        return UnreachableError(f"the coordinator at {self._kit.address} {what}", hint=hint)


def _warn(text: str) -> None:
    """On stderr: stdout is the answer's."""
    typer.echo(f"warning: {text}", err=True)


def _decrypt(opening: Opening, blob: Path, plain: Path) -> None:
    """Into a file that is mapped: a model need not fit into memory twice."""
    size = opening.header.plaintext_bytes
    with plain.open("w+b") as file:
        plain.chmod(0o600)
        file.truncate(size)
        if not size:
            opening.read(b"", bytearray())
            return
        with blob.open("rb") as source:  # the mapping goes with its last view, of which an error still holds one
            opening.read(source, memoryview(mmap.mmap(file.fileno(), size)))


def _check_configuration(opening: Opening, out: Path) -> None:
    try:
        found = RunFolder.open(out).config().digest()
        if found != opening.header.config_digest.hex():
            raise RefusedError("the result is of another configuration", hint="both sides must run the same version")
    except CoterieError:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _checked(document: Document) -> Document:
    """The document, unless it is an error: then the error that it describes."""
    facts = document.get("error")
    if not isinstance(facts, dict):
        return document
    kind = _KINDS.get(str(facts.get("code")), RefusedError)
    raise kind(str(facts.get("message", "the coordinator refuses")), hint=str(facts.get("hint", "")))


def _kinds() -> dict[str, type[CoterieError]]:
    known = (value for value in vars(errors).values() if isinstance(value, type))
    return {kind.code: kind for kind in known if issubclass(kind, CoterieError)}


_KINDS: Final = _kinds()
"""What an error document's code means here: the coordinator's error becomes ours, with its exit code."""


@contextmanager
def reaching(kit: Kit) -> Iterator[Coordinator]:
    """The coordinator of a kit, until the block ends."""
    with Coordinator(kit) as coordinator:
        yield coordinator
