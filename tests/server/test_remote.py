"""A result on the wire: what the operator's side accepts, and what it does when the line breaks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.errors import KitError, RefusedError, RunError
from server.archive import FILES
from server.remote import Coordinator
from server.service.process import RESULTS
from server.service.state import Run
from server.store import RunFolder
from tests.helpers.agents import configuration
from tests.helpers.clinic import Clinic

RUN = "ab" * 16
CONFIG = configuration("name=done")


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    """A service with one finished run of three megabytes."""
    made = Clinic(tmp_path_factory.mktemp("clinic"))
    with made.serving() as service:
        with RunFolder.create(CONFIG, made.state / "runs" / RUN) as folder:
            folder.append_round({"server_round": 1, "seconds": {}})
            folder.write("model.safetensors", os.urandom(3 << 20))
            folder.write("report.html", b"<html></html>")
            folder.write_result({"name": "done"})
        state = service._state
        state.add(
            Run(
                run_id=RUN,
                name="done",
                operator="alice",
                config=CONFIG.canonical_json(),
                config_digest=CONFIG.digest(),
                authorization="",
                sites=("hungary",),
                rounds=1,
            )
        )
        state.end(RUN, "completed")
        yield made


@pytest.fixture
def alice(clinic: Clinic) -> Iterator[Coordinator]:
    with clinic.operator() as coordinator:
        yield coordinator


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "run"


def sealed(clinic: Clinic) -> Path:
    """The file of ciphertext for alice."""
    return clinic.state / RESULTS / RUN / f"{clinic.kit('alice').keys.record.key_id.hex()}.blob"


class Cut:
    """Calls whose first download ends in the middle."""

    def __init__(self, calls: Any, *, after: int) -> None:
        self._calls, self._after = calls, after
        self.offsets: list[str] = []

    def download(self, question: Any) -> Iterator[bytes]:
        self.offsets.append(question.argument)
        for number, frame in enumerate(self._calls.download(question)):
            if len(self.offsets) == 1 and number == self._after:
                raise _BrokenError
            yield frame

    def __getattr__(self, name: str) -> Any:
        return getattr(self._calls, name)


class _BrokenError(grpc.RpcError):
    """What gRPC raises when a connection breaks."""

    def code(self) -> grpc.StatusCode:
        return grpc.StatusCode.UNAVAILABLE

    def details(self) -> str:
        return "connection lost"


def test_a_run_arrives_as_it_lies_there(clinic: Clinic, alice: Coordinator, out: Path) -> None:
    """Byte for byte; for each operator under keys of their own."""
    alice.fetch("done", out)
    source = clinic.state / "runs" / RUN
    assert {name: (out / name).read_bytes() for name in FILES} == {name: (source / name).read_bytes() for name in FILES}
    with clinic.operator("mallory") as other:
        other.fetch("done", out.parent / "other")
    assert len({path.read_bytes() for path in (clinic.state / RESULTS / RUN).glob("*.envelope")}) == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["other", "run"], "nothing else is left behind"


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_broken_download_is_continued(clinic: Clinic, alice: Coordinator, out: Path, after: int) -> None:
    """From the byte where it broke; also before anything came."""
    cut = Cut(alice._calls, after=after)
    alice._calls = cut  # type: ignore[assignment]
    alice.fetch(RUN, out)
    assert cut.offsets == ["0", str(max(0, after - 1) << 20)]
    assert (out / "model.safetensors").read_bytes() == (clinic.state / "runs" / RUN / "model.safetensors").read_bytes()


def test_a_result_that_was_sealed_anew_meanwhile_is_fetched_anew(clinic: Clinic, alice: Coordinator, out: Path) -> None:
    """A restarted service has other keys for it: what had come is of no use."""
    alice.fetch(RUN, out.parent / "first")
    cut = Cut(alice._calls, after=2)
    alice._calls = cut  # type: ignore[assignment]
    download = cut.download

    def remade(question: Any) -> Iterator[bytes]:
        if cut.offsets:
            sealed(clinic).with_suffix(".envelope").unlink(missing_ok=len(cut.offsets) > 1)
        return download(question)

    cut.download = remade  # type: ignore[method-assign]
    alice.fetch(RUN, out)
    assert (out / "model.safetensors").read_bytes() == (out.parent / "first" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("place", [0, 1 << 20, -1])
def test_ciphertext_that_was_changed_is_refused(clinic: Clinic, alice: Coordinator, out: Path, place: int) -> None:
    """On the coordinator's disk or on the way; no folder appears."""
    alice.fetch(RUN, out.parent / "first")
    data = sealed(clinic).read_bytes()
    changed = bytearray(data)
    changed[place] ^= 1
    sealed(clinic).write_bytes(changed)
    try:
        with pytest.raises(RefusedError):
            alice.fetch(RUN, out)
    finally:
        sealed(clinic).write_bytes(data)
    assert [path.name for path in out.parent.iterdir()] == ["first"]


def test_a_result_of_another_configuration_is_refused(clinic: Clinic, tmp_path: Path) -> None:
    """The signed header names the run's configuration, and the folder's must be that one."""
    with clinic.operator("mallory") as mallory:
        path = clinic.state / "runs" / RUN / "run.toml"
        kept = path.read_text()
        for envelope in (clinic.state / RESULTS / RUN).glob("*.envelope"):
            envelope.unlink()
        path.write_text(kept.replace("rounds = 3", "rounds = 4"))
        try:
            with pytest.raises(RefusedError, match="another configuration"):
                mallory.fetch(RUN, tmp_path / "out")
        finally:
            path.write_text(kept)
            for envelope in (clinic.state / RESULTS / RUN).glob("*.envelope"):
                envelope.unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_lost_its_files_has_no_result(clinic: Clinic, alice: Coordinator, out: Path) -> None:
    """The operator is told so; why stands in the coordinator's log."""
    path = clinic.state / "runs" / RUN
    for envelope in (clinic.state / RESULTS / RUN).glob("*.envelope"):
        envelope.unlink()
    path.rename(path.with_name("gone"))
    try:
        with pytest.raises(RunError, match="no result"):
            alice.fetch(RUN, out)
    finally:
        path.with_name("gone").rename(path)


class TestRenewal:
    """An operator's certificate lasts, though an operator has no process that runs all the time."""

    def test_a_certificate_that_ends_soon_is_renewed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """By the first call that is made then; the next connection shows the new one."""
        clinic = Clinic(tmp_path)
        with clinic.serving():
            before = clinic.kit("alice").certificate()
            with clinic.operator():
                assert clinic.kit("alice").certificate() == before, "there is time yet"
            monkeypatch.setattr("server.remote.is_due", lambda _: True)
            with clinic.operator() as alice:
                after = clinic.kit("alice").certificate()
                assert after.serial != before.serial
                assert alice.ask("runs") == {"runs": []}
            monkeypatch.undo()
            with clinic.operator() as alice:
                assert alice.ask("runs") == {"runs": []}

    def test_a_renewal_that_fails_stops_nobody(
        self, clinic: Clinic, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Neither a coordinator that refuses it nor a kit that cannot be written. It is said, beside the answer."""
        monkeypatch.setattr("server.remote.is_due", lambda _: True)
        for error in (_BrokenError(), KitError("the kit cannot be written")):
            monkeypatch.setattr("server.remote.renew", _raises(error))
            capsys.readouterr()
            with clinic.operator() as alice:
                assert alice.ask("runs")["runs"]
            assert "could not be renewed" in capsys.readouterr().err


def _raises(error: Exception) -> Any:
    def call(*_: object) -> None:
        raise error

    return call


def test_a_result_is_not_written_through_a_link(alice: Coordinator, out: Path, tmp_path: Path) -> None:
    """Somebody who can write to the folder laid links at the names that could be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("keep")
    out.parent.mkdir()
    for end in ("sealed", "tar", "part"):
        (out.parent / f".{out.name}.{end}").symlink_to(victim)
    with suppress(RunError):
        alice.fetch(RUN, out)
    assert victim.read_text() == "keep"
