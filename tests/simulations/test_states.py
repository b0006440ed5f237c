"""What clients keep from round to round outlives a run that is stopped, and nothing of a round that is begun again."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import RunConfig
from common.errors import RunError
from simulations.states import KEPT_ROUNDS, STATES, ClientStates
from tests.helpers.runs import Log, as_bytes, configuration, private, run


class TestStore:
    """`ClientStates`."""

    @given(
        st.lists(st.dictionaries(st.integers(0, 4), st.binary(max_size=3), max_size=4), min_size=1, max_size=9),
        st.integers(0, KEPT_ROUNDS),
    )
    def test_a_round_that_begins_again_finds_what_it_found_the_first_time(
        self, rounds: list[dict[int, bytes]], back: int
    ) -> None:
        """Any of the last rounds, and the one that comes next."""
        states, before = ClientStates(), [dict[int, bytes]()]
        for server_round, written in enumerate(rounds, 1):
            states.begin(server_round)
            for client, content in written.items():
                states.write(client, content)
            before.append(before[-1] | written)
        again = max(1, len(rounds) + 1 - back)
        states.begin(again)
        assert {c: states.read(c) for c in range(5)} == {c: before[again - 1].get(c) for c in range(5)}
        states.close()

    def test_the_last_state_of_a_round_counts(self, tmp_path: Path) -> None:
        """A client can be asked several times in one."""
        states = ClientStates(tmp_path / STATES)
        states.begin(1)
        for content in (b"one", b"two"):
            states.write(7, content)
        assert (states.read(7), states.read(8)) == (b"two", None)
        states.close()

    def test_it_is_there_for_the_next_process(self, tmp_path: Path) -> None:
        """Which goes on with what was settled."""
        states = ClientStates(tmp_path / STATES)
        states.begin(1)
        states.write(10_000_000, b"kept")
        states.settle()
        states.close()
        again = ClientStates(tmp_path / STATES)
        again.begin(2)
        assert again.read(10_000_000) == b"kept"
        again.close()

    def test_of_a_client_only_the_last_rounds_are_kept(self, tmp_path: Path) -> None:
        """The file grows with clients, not with rounds."""
        states = ClientStates(tmp_path / STATES)
        for server_round in range(1, 30):
            states.begin(server_round)
            states.write(1, bytes(server_round))
        states.close()
        with closing(sqlite3.connect(tmp_path / STATES)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM states").fetchone()
        assert count == KEPT_ROUNDS + 1

    def test_where_nothing_is_kept_no_file_is_made(self, tmp_path: Path) -> None:
        """Most runs' clients keep nothing."""
        states = ClientStates(tmp_path / STATES)
        states.begin(1)
        assert states.read(1) is None
        states.settle()
        states.close()
        assert list(tmp_path.iterdir()) == []

    def test_others_cannot_read_it(self, tmp_path: Path) -> None:
        """There can be secrets of a sum in it."""
        states = ClientStates(tmp_path / STATES)
        states.write(1, b"secret")
        assert (tmp_path / STATES).stat().st_mode & 0o077 == 0
        states.close()

    @pytest.mark.parametrize("content", [b"garbage" * 100, b"SQLite format 3\x00" + bytes(100)])
    def test_a_damaged_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        """With its name, and what to do."""
        (tmp_path / STATES).write_bytes(content)
        with pytest.raises(RunError, match=STATES) as caught:
            ClientStates(tmp_path / STATES).begin(1)
        assert caught.value.hint

    def test_another_database_is_refused(self, tmp_path: Path) -> None:
        """It is not written to."""
        with closing(sqlite3.connect(tmp_path / STATES)) as connection:
            connection.execute("CREATE TABLE patients (name TEXT)")
        with pytest.raises(RunError, match="no states of this version"):
            ClientStates(tmp_path / STATES).begin(1)


class _StoppedError(Exception):
    """Ends a run from outside."""


class _Stop(Log):
    """Ends a run in the middle of a round, when some of its clients have answered."""

    def __init__(self, server_round: int) -> None:
        super().__init__()
        self._left = 2
        self._round = server_round
        self._now = 0

    def round_started(self, server_round: int, cohort: list[str]) -> None:
        self._now = server_round

    def reply_received(self, client: str, failure: Any) -> None:
        super().reply_received(client, failure)
        self._left -= self._now == self._round
        if not self._left:
            raise _StoppedError


KEEPING = {
    "what top-k left out": configuration(rounds=5, transport={"compression": "top-k"}),
    "adaptive clipping norms": private(
        rounds=5,
        privacy={
            "unit": "example", "noise_multiplier": 2.0, "expected_batch_size": 4, "sampling_rate": 0.3,
            "clipping": "adaptive",
        },
    ),
}  # fmt: skip


class TestResume:
    """A run that was stopped in the middle of a round."""

    @pytest.mark.parametrize("config", KEEPING.values(), ids=KEEPING)
    @pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_ends_as_one_that_was_not(self, tmp_path: Path, config: RunConfig, workers: int) -> None:
        """To the byte: what clients keep goes on from the round before."""
        seed = 3 if config.private else None
        whole, _ = run(tmp_path / "whole", config, insecure_seed=seed)
        with pytest.raises(_StoppedError):
            run(tmp_path / "run", config, workers=workers, observer=_Stop(3), insecure_seed=seed)
        resumed, log = run(tmp_path / "run", config, workers=workers, insecure_seed=seed)
        assert [record.server_round for record in log.records] == [3, 4, 5]
        assert as_bytes(resumed.arrays) == as_bytes(whole.arrays)
        assert (tmp_path / "run" / STATES).is_file()
