"""What a client keeps of a run: whole after a crash, and never that of another run."""

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from client.replays import Replays
from client.run_state import RunStates
from common.errors import FailureCode, PeerError
from common.flower import from_record, to_record

ONE, TWO = b"1" * 16, b"2" * 16


def state(value: float) -> RecordDict:
    return RecordDict({"rest": to_record({"w": np.full(3, value, np.float32)}), "kept": ConfigRecord({"n": value})})


def value_of(found: RecordDict) -> float:
    assert found["kept"]["n"] == from_record(found["rest"])["w"][0]
    return found["kept"]["n"]


def test_a_state_is_there_in_the_next_round_and_in_the_next_process(tmp_path):
    """Each run's own."""
    states = RunStates(tmp_path)
    states.put(ONE, state(1.0))
    states.put(TWO, state(2.0))
    for found in (states, RunStates(tmp_path)):
        assert (value_of(found.take(ONE)), value_of(found.take(TWO))) == (1.0, 2.0)


def test_a_run_without_state_begins_with_none(tmp_path):
    """And leaves no file."""
    states = RunStates(tmp_path)
    assert not states.take(ONE)
    states.put(ONE, RecordDict())
    assert not list(tmp_path.iterdir())


def test_a_damaged_state_counts_as_none(tmp_path):
    """The run goes on."""
    RunStates(tmp_path).put(ONE, state(1.0))
    (tmp_path / f"{ONE.hex()}.state").write_bytes(b"nonsense")
    assert not RunStates(tmp_path).take(ONE)


def test_only_the_last_few_runs_are_kept(tmp_path):
    """A site must not fill its disk with runs that are over."""
    states = RunStates(tmp_path)
    for number in range(10):
        states.put(bytes([number] * 16), state(float(number)))
    assert len(list(tmp_path.iterdir())) <= 5
    assert value_of(states.take(bytes([9] * 16))) == 9.0


class TestReplays:
    """An order counts as answered once its answer is on the disk."""

    @staticmethod
    def taken(replays: Replays) -> bool:
        try:
            replays.begin(ONE, TWO)
        except PeerError as e:
            return e.failure is not FailureCode.INVALID_REQUEST
        return True

    def test_in_one_process_an_order_is_taken_once(self, tmp_path):
        """Answered or not."""
        replays = Replays(tmp_path)
        assert self.taken(replays)
        assert not self.taken(replays)

    def test_an_answer_that_was_sealed_but_not_stored_may_be_made_again(self, tmp_path):
        """By the next process: nothing of it has left."""
        replays = Replays(tmp_path)
        assert self.taken(replays)
        replays.answered(ONE, TWO)
        assert self.taken(Replays(tmp_path))

    def test_a_stored_answer_is_never_made_again(self, tmp_path):
        """By any process."""
        replays = Replays(tmp_path)
        assert self.taken(replays)
        replays.stored(ONE, TWO)
        assert not self.taken(replays)
        assert not self.taken(Replays(tmp_path))
