"""What only the operating system can show of ledgers: death at any instant, two at once, a disk that is full."""

import json
import subprocess
import sys

import pytest

from tests.helpers.events import sampled
from tests.helpers.ledger_processes import file_ledger


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the ledgers of the real processes are."""
    return tmp_path_factory.mktemp("ledgers")


@pytest.fixture(scope="module")
def found(folder):
    """What `tests.helpers.ledger_processes` found."""
    command = [sys.executable, "-m", "tests.helpers.ledger_processes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_killed_at_any_step_it_holds_what_was_granted_and_goes_on(found):
    """Before and in the middle of each system call that changes a file; then again at each step of the repair."""
    outcome = found["killed_reserving"]
    assert outcome["kills"] > 60
    assert (outcome["lost"], outcome["unusable"]) == (0, 0)


def test_a_decision_killed_at_any_step_is_made_or_still_to_be_made(found):
    """Nothing is in between."""
    outcome = found["killed_accepting"]
    assert outcome["kills"] > 15
    assert outcome["neither"] == 0


@pytest.mark.parametrize("kind", ["file", "simulated"])
def test_eight_at_once_cannot_overspend_and_lose_nothing(found, kind):
    """With room for three events three succeed, five are refused, and three are held."""
    assert found["race"][kind] == [0, 0, 0, 1, 1, 1, 1, 1, 3]


def test_a_full_disk_refuses_and_leaves_both_files_as_they_were(found, folder):
    """At the limit, and within the line; once there is room, the ledger goes on."""
    assert found["full_disk"] == [[2, True]] * 3
    ledger = file_ledger(folder / "full_disk")
    ledger.reserve(sampled(2), planned=9)
    assert len(ledger.events()) == 2


def test_a_simulated_store_can_be_used_before_and_after_a_fork(found):
    """By parent and children at once."""
    assert found["fork_in_use"] == [0, 0, 16]
