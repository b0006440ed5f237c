"""The site is sovereign: nothing that a coordinator sends is executed, imported, opened or unpickled."""

import json
import pickle
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from common.errors import FailureCode
from common.flower import ARRAYS, failure_of
from tests.client.conftest import PRIVATE, run, train_message

FORBIDDEN = (
    "open", "os.", "subprocess.", "import", "exec", "compile", "marshal.", "pickle.", "socket.", "shutil.", "ctypes.",
    "code.__new__", "glob.", "tempfile.", "urllib.",
)  # fmt: skip
_seen: list[str] | None = None
_thread = threading.get_ident()


def _audit(event, arguments):
    if _seen is not None and event.startswith(FORBIDDEN) and threading.get_ident() == _thread:
        _seen.append(f"{event} {arguments!r:.200}")


@pytest.fixture(scope="module", autouse=True)
def audit():
    """Python's own audit hook: sees every file, process, import and unpickling. It cannot be taken away again."""
    global _thread  # noqa: PLW0603
    _thread = threading.get_ident()
    sys.addaudithook(_audit)


@pytest.fixture
def handled(client, tmp_path):
    """Have a message answered; the reply, and what Python did to files, processes and code meanwhile."""
    one = client()

    def handle(message, *overrides):
        global _seen  # noqa: PLW0603 - an audit hook is as global as it gets
        assert failure_of(one.answer(train_message(run(*overrides)))) is None  # imports, and the run's own model
        _seen = events = []
        try:
            reply = one.answer(message)
        finally:
            _seen = None
        return reply, events

    return handle


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self):
        return (Path.touch, (self._target,))


def test_the_audit_sees_what_it_has_to(handled, tmp_path):
    """Otherwise the tests below would prove nothing."""
    global _seen  # noqa: PLW0603
    _seen = events = []
    try:
        (tmp_path / "x").touch()
        pickle.loads(pickle.dumps(Bomb(tmp_path / "y")))  # noqa: S301 - on purpose
        exec("pass")  # noqa: S102
    finally:
        _seen = None
    assert {event.split()[0] for event in events} >= {"open", "pickle.find_class", "exec"}


def test_an_honest_message_is_answered_without_touching_anything(handled):
    """Neither files nor code: what the audit is compared with."""
    reply, events = handled(train_message(run()))
    assert failure_of(reply) is None
    assert events == []


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("model", "name", "os:system"),
        ("model", "name", "evil.py:build"),
        ("model", "name", "entry:evil"),
        ("model", "name", "common.models.registry"),
        ("model", "name", "{folder}/evil.py:build"),
        ("model", "source", "evil.py:build"),
        ("model", "options", {"activation": "{folder}/evil.py"}),
        ("model", "options", {"__class__": 1}),
        ("data", "name", "python:{folder}/evil.py:load"),
        ("data", "name", "csv:{folder}/evil.csv"),
        ("data", "name", "{folder}/evil.csv"),
        ("data", "name", "../evil"),
        ("data", "sites", ["{folder}"]),
        ("training", "optimizer", "torch.optim.SGD"),
        ("strategy", "name", "evil.Strategy"),
        ("simulation", "plugin", "evil"),
    ],
    ids=str,
)
def test_code_and_paths_in_a_configuration_are_refused_and_nothing_is_touched(handled, tmp_path, table, key, value):
    """Whatever they name, it exists, and is neither looked for nor loaded."""
    marker = tmp_path / "touched"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\ndef build(schema): pass\nload = build\n")
    (tmp_path / "evil.csv").write_text("label\n1\n")
    tree = json.loads(run().canonical_json())
    tree[table][key] = json.loads(json.dumps(value).replace("{folder}", str(tmp_path)))
    reply, events = handled(train_message(run(), run=json.dumps(tree)))
    assert failure_of(reply) is FailureCode.INVALID_REQUEST
    assert events == []
    assert not marker.exists()


@pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
@pytest.mark.parametrize("stype", ["numpy.ndarray", "pickle", "torch.Tensor"])
def test_pickles_in_place_of_weights_are_refused_and_never_loaded(handled, tmp_path, stype, private):
    """As raw bytes, and as an object array in numpy's own format."""
    from io import BytesIO

    target = tmp_path / "touched"
    buffer = BytesIO()
    np.save(buffer, np.array([Bomb(target)], dtype=object), allow_pickle=True)
    for data in (pickle.dumps(Bomb(target)), buffer.getvalue()):
        overrides = PRIVATE if private else ()
        message = train_message(run(*overrides))
        arrays = {name: Array("float32", (1,), stype, data) for name in message.content[ARRAYS]}
        message.content[ARRAYS] = ArrayRecord(arrays)
        reply, events = handled(message, *overrides)
        assert failure_of(reply) is FailureCode.INVALID_REQUEST
        # Its own ledger may be open, and numpy parses its header as a literal (which compiles, and runs nothing).
        own = (f"open ('{tmp_path}/ledger.jsonl'", f"os.mkdir ('{tmp_path}'", "compile (b\"{'descr'")
        assert [event for event in events if not event.startswith(own)] == []
        assert not target.exists()


def test_bytes_beside_the_known_fields_are_not_looked_at(handled, tmp_path):
    """A coordinator may send more than is asked for; it stays bytes."""
    target = tmp_path / "touched"
    reply, events = handled(train_message(run(), hook=pickle.dumps(Bomb(target)), module="os:system"))
    assert failure_of(reply) is None
    assert events == []
    assert not target.exists()
