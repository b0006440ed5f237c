"""Replies that have to wait: a few in memory, the others in files that nobody sees, and never more than there is room
for.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from flwr.app import Message
from flwr.serverapp.strategy import Krum
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import FailureCode, RunError
from common.flower import METRICS, arrays_of, failure_reply
from server.grids import SpoolingGrid
from server.grids.spooling import Shelf
from tests.helpers.grids import ScriptedGrid, train_messages, update
from tests.helpers.runs import as_bytes

MODEL = {"w": np.zeros(1000, np.float32), "n": np.array(3), "empty": np.zeros((0, 2), np.float32)}
MESSAGES = train_messages(MODEL, range(2, 7))


def replies() -> list[Message]:
    """Five, each with its own weights; one of them in another order in memory."""
    shaped = [{**MODEL, "w": MODEL["w"] + i} for i in range(4)]
    shaped.append({**MODEL, "w": np.asfortranarray(np.arange(1000, dtype=np.float32).reshape(20, 50))})
    return [
        Message(update(arrays, 1.0 + i, train_loss=0.5), reply_to=message)
        for i, (arrays, message) in enumerate(zip(shaped, MESSAGES, strict=True))
    ]


def spooling(**options: Any) -> SpoolingGrid:
    return SpoolingGrid(ScriptedGrid(lambda _: replies()), **options)


def mapped(reply: Message) -> bool:
    """Whether a reply's weights lie in a file."""
    base = arrays_of(reply.content)["w"]
    while isinstance(base, np.ndarray):
        base = base.base  # type: ignore[assignment]
    return type(base).__name__ in {"mmap", "memoryview"}


class TestSpooling:
    def test_replies_come_back_to_the_bit(self, tmp_path: Path) -> None:
        """Arrays, metrics and origin of a reply are the same, wherever it waited."""
        for got, sent in zip(spooling(folder=tmp_path, in_memory=0).stream(MESSAGES), replies(), strict=True):
            assert as_bytes(arrays_of(got.content)) == as_bytes(arrays_of(sent.content))
            assert dict(got.content[METRICS]) == dict(sent.content[METRICS])
            assert got.metadata.src_node_id == sent.metadata.src_node_id
            assert mapped(got)

    def test_only_what_is_over_the_limit_goes_to_disk(self, tmp_path: Path) -> None:
        """The first replies stay in memory, as many as fit in the limit together."""
        got = list(spooling(folder=tmp_path, in_memory=9000).stream(MESSAGES))
        assert [mapped(reply) for reply in got] == [False, False, True, True, True]

    def test_files_have_no_name(self, tmp_path: Path) -> None:
        """However the process ends, nothing is left: the folder is empty while replies wait in it."""
        waiting = list(spooling(folder=tmp_path, in_memory=0).stream(MESSAGES))
        assert list(tmp_path.iterdir()) == []
        assert len(waiting) == 5

    def test_a_strategy_may_write_to_a_reply(self, tmp_path: Path) -> None:
        """QFedAvg computes in place; no other reader of the file sees that."""
        (reply, *_) = spooling(folder=tmp_path, in_memory=0).stream(MESSAGES)
        arrays_of(reply.content)["w"][:] = 7
        assert (arrays_of(reply.content)["w"] == 7).all()

    def test_strategies_run_over_it(self, tmp_path: Path) -> None:
        """Krum finds among spooled replies what it finds among others."""
        crowd = [{"w": np.full(50, i, np.float32)} for i in (0.0, 0.1, 0.2, 9.0, 0.15)]

        def answer(messages: list[Message]) -> list[Message]:
            return [Message(update(a, train_loss=1.0), reply_to=m) for a, m in zip(crowd, messages, strict=True)]

        results = []
        for in_memory in (0, 1 << 20):
            grid = SpoolingGrid(ScriptedGrid(answer), folder=tmp_path, in_memory=in_memory)
            arrays, _ = Krum(num_malicious_nodes=1).aggregate_train(1, list(grid.stream(MESSAGES)))
            assert arrays is not None
            results.append(arrays["w"].numpy().tobytes())
        assert results[0] == results[1]

    def test_failures_pass(self, tmp_path: Path) -> None:
        """A failure takes no room."""
        failed = failure_reply(MESSAGES[0], FailureCode.CLIENT_LOST)
        grid = SpoolingGrid(ScriptedGrid(lambda _: [failed]), folder=tmp_path, in_memory=0)
        assert list(grid.stream(MESSAGES)) == [failed]


class Usage(NamedTuple):
    total: int
    used: int
    free: int


class TestRoom:
    def test_a_round_over_the_limit_is_refused_before_anybody_is_asked(self, tmp_path: Path) -> None:
        """The stated limit is compared with one model for each message; nobody pays for a round that cannot be kept."""
        inner = ScriptedGrid(lambda _: replies())
        with pytest.raises(RunError, match="single updates need") as e:
            list(SpoolingGrid(inner, folder=tmp_path, in_memory=0, most_bytes=19_999).stream(MESSAGES))
        assert "cohort.size" in e.value.hint
        assert inner.sent == []
        assert len(list(SpoolingGrid(inner, folder=tmp_path, in_memory=0, most_bytes=20_060).stream(MESSAGES))) == 5

    def test_so_is_one_for_which_the_disk_has_no_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is free now counts like the limit."""
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 1 << 40, 10_000))
        inner = ScriptedGrid(lambda _: replies())
        with pytest.raises(RunError, match="single updates need"):
            list(SpoolingGrid(inner, folder=tmp_path, in_memory=0).stream(MESSAGES))
        assert inner.sent == []

    def test_what_fits_in_memory_asks_no_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Small models never touch a disk, not even a full one."""
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 1, 0))
        assert len(list(spooling().stream(MESSAGES))) == 5

    def test_a_disk_that_fills_up_meanwhile_is_said(self, tmp_path: Path) -> None:
        """A reply that cannot be written ends the round with an error that says where."""
        with pytest.raises(RunError, match="cannot be"):
            list(spooling(folder=tmp_path / "missing", in_memory=100, most_bytes=1 << 40).stream(MESSAGES))


class TestShelf:
    @settings(max_examples=40, deadline=None)
    @given(
        st.lists(st.tuples(st.integers(0, 4), hnp.arrays(np.float32, st.integers(0, 40)), st.booleans()), max_size=12),
        st.integers(0, 300),
    )
    def test_gives_what_was_put_last(self, steps: list[Any], in_memory: int) -> None:
        """Whatever is put and taken in whatever order, each key holds its last reply, whole."""
        shelf, expected = Shelf(in_memory=in_memory), {}
        for key, values, take in steps:
            if take and key in expected:
                assert arrays_of(shelf.take(key).content)["w"].tobytes() == expected.pop(key)
                assert key not in shelf
            else:
                shelf.put(key, Message(update({"w": values}), reply_to=MESSAGES[0]))
                expected[key] = values.tobytes()
        for key, data in expected.items():
            assert key in shelf
            assert arrays_of(shelf.take(key).content)["w"].tobytes() == data

    def test_room_in_memory_comes_back(self, tmp_path: Path) -> None:
        """Taking a reply makes room for the next one."""
        shelf = Shelf(folder=tmp_path, in_memory=5000)
        for reply in replies():
            shelf.put("one", reply)
            assert not mapped(shelf.take("one"))
