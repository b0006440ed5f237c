"""The record of privacy events: on disk before anything is released, never skipped, never taken back."""

import json
import os
import stat
import subprocess
import sys

import pytest

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy import FileLedger, NonPrivate, PoissonGaussian, spent_epsilon
from common.privacy.events import event_to_dict

DELTA = 1e-5
ROOMY = (1e6, DELTA)


def event(server_round=1, **fields):
    values = {"noise_multiplier": 2.0, "sampling_rate": 1.0, "steps": 1, "run": "r", "server_round": server_round}
    return PoissonGaussian(**values | fields)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger" / "site.jsonl"


@pytest.fixture
def ledger(path):
    return FileLedger(path)


class TestWriteAhead:
    """When `reserve` returns, the event is on disk."""

    def test_events_are_kept_in_their_order(self, ledger, path):
        """Also for whoever opens the file next."""
        events = [event(1), event(2), NonPrivate(run="r", server_round=3)]
        for one in events:
            ledger.reserve(one, budget=(float("inf"), DELTA))
        assert FileLedger(path).events() == ledger.events() == events

    def test_a_new_ledger_is_empty(self, ledger, path):
        """And looking at it makes no file."""
        assert ledger.events() == []
        assert not path.exists()

    def test_it_answers_what_is_spent_with_the_new_event(self, ledger):
        """The replay of the whole file."""
        ledger.reserve(event(1), budget=ROOMY)
        assert ledger.reserve(event(2), budget=ROOMY) == spent_epsilon([event(1), event(2)], delta=DELTA)
        assert spent_epsilon(ledger.events(), delta=DELTA) == spent_epsilon([event(1), event(2)], delta=DELTA)

    def test_the_file_is_flushed_to_disk_with_the_event_in_it(self, ledger, path, monkeypatch):
        """Written first, flushed then; for a new file its folder too, or a power cut could take the name away."""
        flushed, real = [], os.fsync

        def watched(descriptor):
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            flushed.append("folder" if is_folder else len(path.read_bytes().splitlines()))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", watched)
        ledger.reserve(event(1), budget=ROOMY)
        assert flushed == [1, "folder"]
        ledger.reserve(event(2), budget=ROOMY)
        assert flushed == [1, "folder", 2]


class TestRefusal:
    """A refusal writes nothing; a ledger that cannot be trusted refuses everything."""

    def test_a_round_that_would_overspend_is_refused_and_not_written(self, ledger, path):
        """What is left can still be spent by something smaller."""
        one, two = (spent_epsilon([event()] * n, delta=DELTA) for n in (1, 2))
        budget = ((one + two) / 2, DELTA)
        ledger.reserve(event(1), budget=budget)
        before = path.read_bytes()
        with pytest.raises(BudgetExhaustedError) as caught:
            ledger.reserve(event(2), budget=budget)
        assert caught.value.hint
        assert path.read_bytes() == before
        ledger.reserve(event(2, noise_multiplier=100.0), budget=budget)

    def test_exactly_the_budget_can_be_spent(self, ledger):
        """To the last bit, so that calibrated noise lasts to the last round."""
        cost = spent_epsilon([event()], delta=DELTA)
        assert ledger.reserve(event(), budget=(cost, DELTA)) == cost

    def test_nothing_private_follows_a_release_without_noise(self, ledger):
        """No finite budget has room beside infinity."""
        ledger.reserve(NonPrivate(run="r", server_round=1), budget=(float("inf"), DELTA))
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(event(2), budget=ROOMY)

    @pytest.mark.parametrize(
        "fields", [{"noise_multiplier": float("inf")}, {"noise_multiplier": float("nan")}, {"steps": 0}], ids=str
    )
    def test_an_event_that_could_not_be_read_again_is_not_written(self, ledger, path, fields):
        """One bad request must not make a site's ledger unreadable for good."""
        ledger.reserve(event(1), budget=ROOMY)
        before = path.read_bytes()
        with pytest.raises(LedgerError):
            ledger.reserve(event(2, **fields), budget=ROOMY)
        assert path.read_bytes() == before

    GOOD = json.dumps(event_to_dict(event())).encode() + b"\n"

    @pytest.mark.parametrize(
        "data",
        [
            GOOD + GOOD[:-1],
            GOOD + GOOD[: len(GOOD) // 2],
            GOOD + b"\n",
            b"\n" + GOOD,
            GOOD + b"not json\n",
            GOOD + b"[]\n",
            GOOD + b"null\n",
            GOOD + b"\x00" * 20 + b"\n",
            GOOD + b"\xff\xfe\n",
            GOOD + b"[" * 100_000 + b"\n",
            GOOD.replace(b'"version": 1', b'"version": 2'),
            GOOD.replace(b"poisson-gaussian", b"laplace"),
            GOOD.replace(b'"steps": 1', b'"steps": 0'),
            GOOD.replace(b'"steps": 1', b'"steps": "1"'),
            GOOD.replace(b'"steps": 1', b'"stepz": 1'),
            GOOD.replace(b"2.0", b"NaN"),
            GOOD.replace(b"2.0", b"Infinity"),
            GOOD.replace(b'"kind": "poisson-gaussian"', b'"kind": []'),
        ],
        ids=lambda data: repr(data[-40:]),
    )
    def test_a_damaged_ledger_refuses_everything_and_stays_as_it_is(self, ledger, path, data):
        """A line that is cut off, unknown or impossible is never skipped: what cannot be read cannot be counted."""
        path.parent.mkdir()
        path.write_bytes(data)
        with pytest.raises(LedgerError):
            ledger.events()
        with pytest.raises(LedgerError):
            ledger.reserve(event(), budget=(float("inf"), DELTA))
        assert path.read_bytes() == data

    def test_a_place_that_cannot_be_written_is_refused(self, tmp_path):
        """A file where the folder should be, a folder where the file should be."""
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        for path in (tmp_path / "file" / "site.jsonl", tmp_path / "folder"):
            with pytest.raises(LedgerError):
                FileLedger(path).reserve(event(), budget=ROOMY)


# One process that forks the others, each of which opens the ledger afresh. Forking a test runner is not safe.
_PROCESSES = """
import json, os, resource, sys
from pathlib import Path
from common.errors import BudgetExhaustedError, LedgerError
from common.privacy import FileLedger, PoissonGaussian, spent_epsilon

def event(server_round):
    return PoissonGaussian(noise_multiplier=2.0, sampling_rate=1.0, steps=1, run="r", server_round=server_round)

def forked(work, *arguments):
    pid = os.fork()
    if pid == 0:
        try:
            code = work(*arguments)
        except BudgetExhaustedError:
            code = 1
        except LedgerError:
            code = 2
        except BaseException as e:
            print(repr(e), file=sys.stderr)
            code = 99
        os._exit(code)
    return pid

def exit_codes(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def race(path, budget):
    gate, opened = os.pipe()

    def racer(server_round):
        os.close(opened)
        os.read(gate, 1)  # all are let go at once, when the last writer closes
        FileLedger(path).reserve(event(server_round), budget=budget)
        return 0

    spent_epsilon([event(1)], delta=1e-5)  # what is slow to import is there before the race
    pids = [forked(racer, i) for i in range(1, 9)]
    os.close(opened)
    return sorted(exit_codes(pids))

def fill(path, budget):
    def write(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        FileLedger(path).reserve(event(2), budget=budget)
        return 0

    FileLedger(path).reserve(event(1), budget=budget)
    before = path.read_bytes()
    sizes = [len(before) + room for room in (0, 1, 40)]
    return [(*exit_codes([forked(write, size)]), path.read_bytes() == before) for size in sizes]

folder, epsilon = Path(sys.argv[1]), float(sys.argv[2])
print(json.dumps([race(folder / "race", (epsilon, 1e-5)), fill(folder / "fill", (1e6, 1e-5))]))
"""


@pytest.fixture(scope="module")
def process_folder(tmp_path_factory):
    """Where the ledgers of the real processes are."""
    return tmp_path_factory.mktemp("ledgers")


@pytest.fixture(scope="module")
def outcome(process_folder):
    """Exit codes of the race and of the full disk: 0 reserved, 1 budget exhausted, 2 ledger error."""
    three, four = (spent_epsilon([event()] * n, delta=DELTA) for n in (3, 4))
    command = [sys.executable, "-c", _PROCESSES, str(process_folder), str((three + four) / 2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


class TestRealProcesses:
    """What only the operating system can show."""

    def test_two_processes_cannot_both_spend_the_last_of_a_budget(self, outcome, process_folder):
        """Eight, let go at once, with room for three events: three succeed, five are refused."""
        assert outcome[0] == [0, 0, 0, 1, 1, 1, 1, 1]
        assert len(FileLedger(process_folder / "race").events()) == 3

    def test_a_full_disk_refuses_and_leaves_the_ledger_whole(self, outcome, process_folder):
        """At the limit, and within the line; once there is room, the ledger goes on."""
        assert outcome[1] == [[2, True]] * 3
        ledger = FileLedger(process_folder / "fill")
        ledger.reserve(event(2), budget=ROOMY)
        assert len(ledger.events()) == 2
