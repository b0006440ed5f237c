"""What the coordinator of a masked run ever gets or keeps holds no update, in no form in which one could be written."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.config import RunConfig
from common.transport.records import encode_records
from server.store import RunFolder
from simulations import run as module
from simulations.inline import app_factory
from simulations.run import execute, prepare
from tests.helpers.leaks import WINDOW, Plaintext
from tests.helpers.runs import tree
from tests.helpers.sums import Learnt, listening


class Line(ClientApp):
    """Keeps all that comes from clients, as it would travel if nothing sealed it."""

    def __init__(self, inner: ClientApp, sent: list[bytes]) -> None:
        super().__init__()
        self.inner, self.sent = inner, sent

    def __call__(self, message: Message, context: Context) -> Message:
        reply = self.inner(message, context)
        self.sent.append(b"".join(bytes(part) for part in encode_records(reply.content)))
        return reply


def config(**privacy: Any) -> RunConfig:
    """Digits: a model of 650 values, of which 64 bytes in a row are no coincidence."""
    data = {"name": "digits", "partition": "iid", "clients": 4}
    changes = {"model": {"name": "linear"}, "data": data, "rounds": 2, "privacy": privacy}
    return RunConfig.model_validate(tree(**changes))


def train(folder: Path, monkeypatch: pytest.MonkeyPatch, **privacy: Any) -> tuple[Learnt, list[bytes], list[bytes]]:
    """What clients learnt, what came from them, and every file that was left."""
    chosen, sent = config(**privacy), list[bytes]()
    run = prepare(chosen, folder=folder)
    monkeypatch.setattr(module, "cohort_factory", lambda sites: lambda: Line(app_factory(sites)(), sent))
    with listening(monkeypatch) as learnt, RunFolder.create(chosen, folder) as kept:
        execute(run, folder=kept)
    return learnt, sent, [data for path in files(folder) if len(data := path.read_bytes()) >= WINDOW]


def files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


@pytest.mark.parametrize("privacy", [{}, {"unit": "client", "noise_multiplier": 1.0}], ids=["sums", "noise in sums"])
def test_no_update_leaves_a_client(privacy: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither trained weights nor their difference, as floats or as the numbers that are masked."""
    learnt, sent, kept = train(tmp_path / "run", monkeypatch, secure_aggregation=True, **privacy)
    assert len(learnt.updates) == 2 * 4
    plaintext = Plaintext(learnt.forms)
    assert sum(len(data) for data in sent) > 2 * 4 * 650 * 4, "the masked vectors themselves are there"
    assert not [data for data in sent if plaintext.found_in(data)]
    assert not [data for data in kept if plaintext.found_in(data)]


def test_the_search_finds_what_a_plain_run_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search over the same run without masks: every update is found, or the above would show nothing."""
    learnt, _, _ = train(tmp_path / "masked", monkeypatch, secure_aggregation=True)
    _, sent, _ = train(tmp_path / "plain", monkeypatch)
    plaintext = Plaintext(learnt.trained[:2])  # of the first round, when both runs are the same
    assert sum(plaintext.found_in(data) for data in sent) == 1
