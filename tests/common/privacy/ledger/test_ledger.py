"""A site's ledger: on disk before anything is released, never skipped, never taken back, never silently replaced."""

import json
import os
import stat
import threading
from contextlib import suppress
from dataclasses import replace

import pytest

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.ledger import FileLedger
from common.privacy.ledger import file as ledger_module
from common.privacy.ledger.chain import line_after, read_chain
from common.privacy.ledger.standing import event_record, opening
from tests.helpers.events import sampled
from tests.helpers.ledger_processes import file_ledger
from tests.helpers.ledgers import ROOMY, LedgerContract, room_for


@pytest.fixture
def ledger(tmp_path):
    """A ledger with three events."""
    ledger = file_ledger(tmp_path)
    for r in (1, 2, 3):
        ledger.reserve(sampled(r), planned=9)
    return ledger


def refused(ledger: FileLedger) -> LedgerError:
    """That a ledger refuses everything and stays as it is; the error."""
    files = [path for path in (ledger.path, ledger.counter) if path.exists()]
    before = [path.read_bytes() for path in files]
    fresh = FileLedger(ledger.path, counter=ledger.counter, budget=ROOMY)
    for attempt in (
        ledger.events,
        fresh.events,
        fresh.standing,
        fresh.records,
        lambda: ledger.reserve(sampled(9), planned=9),
        lambda: fresh.reserve(sampled(9), planned=9),
        lambda: fresh.set_budget(ROOMY),
        lambda: fresh.identify(names=["x"], fingerprints=[]),
    ):
        with pytest.raises(LedgerError) as caught:
            attempt()
        assert str(ledger.path) in str(caught.value)
    assert [path.read_bytes() for path in files] == before
    assert [path for path in (ledger.path, ledger.counter) if path.exists()] == files
    return caught.value


class TestContract(LedgerContract):
    """What every ledger must do."""

    @pytest.fixture
    def open_ledger(self, tmp_path):
        """The same two files each time."""

        def open_ledger(budget, *, allow_non_private=False):
            path, counter = tmp_path / "ledger" / "icu.jsonl", tmp_path / "identity" / "icu.json"
            return FileLedger(path, counter=counter, budget=budget, allow_non_private=allow_non_private)

        return open_ledger


class TestWriteAhead:
    """When `reserve` returns, the event is on disk."""

    def test_looking_makes_no_file(self, tmp_path):
        """Neither at events nor at the budget."""
        ledger = file_ledger(tmp_path)
        assert (ledger.events(), ledger.budget, ledger.records()) == ([], ROOMY, [])
        assert list(tmp_path.iterdir()) == []

    def test_line_and_counter_are_flushed_in_their_order(self, ledger, monkeypatch):
        """The next counter, the line, then the counter's new name."""
        flushed, real = [], os.fsync

        def watched(descriptor):
            real(descriptor)
            is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
            lines, count = len(ledger.path.read_bytes().splitlines()), json.loads(ledger.counter.read_bytes())["count"]
            flushed.append(("folder" if is_folder else "file", lines, count))

        monkeypatch.setattr(os, "fsync", watched)
        ledger.reserve(sampled(4), planned=9)
        assert flushed == [("file", 4, 4), ("file", 5, 4), ("folder", 5, 5)]

    def test_only_the_owner_reads_the_files(self, ledger):
        """They say when and for whom the site trained."""
        for path in (*ledger.path.parent.iterdir(), *ledger.counter.parent.iterdir()):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert {stat.S_IMODE(p.parent.stat().st_mode) for p in (ledger.path, ledger.counter)} == {0o700}

    def test_each_line_says_when_but_nothing_depends_on_it(self, ledger, monkeypatch):
        """Clocks change."""
        monkeypatch.setattr(ledger_module, "now", lambda: "1970-01-01T00:00:00+00:00")
        ledger.reserve(sampled(4), planned=9)
        assert [record["time"][:2] for record in ledger.records()] == ["20"] * 4 + ["19"]
        assert len(file_ledger(ledger.path.parent.parent).events()) == 4

    def test_threads_take_turns(self, tmp_path):
        """Of one process, with one object."""
        ledger, granted = file_ledger(tmp_path, room_for([sampled()] * 5)), []

        def reserve(run):
            with suppress(BudgetExhaustedError):
                granted.append(ledger.reserve(sampled(run=run), planned=1))

        threads = [threading.Thread(target=reserve, args=(str(i),)) for i in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(granted) == len(ledger.events()) == len(file_ledger(tmp_path).events()) == 5


class TestTrust:
    """What is not what was written is refused, and waits for the administrator."""

    def test_the_error_names_the_file_and_the_command_that_decides(self, ledger):
        """And says that nothing was trained."""
        ledger.path.write_bytes(ledger.path.read_bytes()[:-30] + b"\n")
        error = refused(ledger)
        assert "coterie ledger accept icu" in error.hint
        assert "nothing was trained" in error.hint

    @pytest.mark.parametrize(
        ("line", "old", "new"),
        [
            (0, b'"epsilon":1000000.0', b'"epsilon":2000000.0'),
            (0, b'"time":"20', b'"time":"19'),
            (1, b'"noise_stddev":2.0', b'"noise_stddev":9.0'),
            (2, b'"server_round":2', b'"server_round":7'),
            (3, b'"noise_stddev":2.0', b'"noise_stddev":9.0'),
            (3, b'"time":"20', b'"time":"19'),
        ],
    )
    def test_an_edited_line(self, ledger, line, old, new):
        """Anywhere, also where nothing depends on it."""
        lines = ledger.path.read_bytes().splitlines(keepends=True)
        assert old in lines[line]
        lines[line] = lines[line].replace(old, new)
        ledger.path.write_bytes(b"".join(lines))
        refused(ledger)

    def test_lines_in_another_order(self, ledger):
        """Two of them exchanged."""
        one, two, three, four = ledger.path.read_bytes().splitlines(keepends=True)
        ledger.path.write_bytes(one + three + two + four)
        refused(ledger)

    @pytest.mark.parametrize("kept", range(4))
    def test_a_ledger_cut_short(self, ledger, kept):
        """By whole lines: an older copy looks the same."""
        lines = ledger.path.read_bytes().splitlines(keepends=True)
        ledger.path.write_bytes(b"".join(lines[:kept]))
        error = refused(ledger)
        assert f"{kept} of the 4 records" in str(error)

    def test_a_last_line_cut_short_that_was_counted(self, ledger):
        """That is no reservation that never returned."""
        ledger.path.write_bytes(ledger.path.read_bytes()[:-5])
        refused(ledger)

    def test_an_older_copy_that_was_written_on(self, ledger, tmp_path):
        """As many lines as there were, and a chain that is sound."""
        old = ledger.path.read_bytes()
        ledger.reserve(sampled(4), planned=9)
        chain = read_chain(old)
        ledger.path.write_bytes(old + line_after(chain, event_record(sampled(4, noise=100.0))))
        assert "last line is not the one" in str(refused(ledger))

    def test_an_older_counter(self, ledger):
        """Two lines more than it knows of are more than a crash leaves."""
        old = ledger.counter.read_bytes()
        for r in (4, 5):
            ledger.reserve(sampled(r), planned=9)
        ledger.counter.write_bytes(old)
        assert "holds 6 records" in str(refused(ledger))

    def test_lines_that_another_hand_added(self, ledger):
        """One that does not follow; or one that does, and the beginning of another."""
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole + whole.splitlines(keepends=True)[-1])
        refused(ledger)
        ledger.path.write_bytes(whole + line_after(read_chain(whole), event_record(sampled(4))) + b"{")
        refused(ledger)

    def test_another_data_sets_ledger(self, ledger, tmp_path):
        """As long, and as sound."""
        other = FileLedger(tmp_path / "other.jsonl", counter=tmp_path / "other.json", budget=ROOMY)
        for r in (1, 2, 3):
            other.reserve(sampled(r), planned=9)
        ledger.path.write_bytes(other.path.read_bytes())
        assert "another ledger" in str(refused(ledger))

    def test_a_missing_ledger(self, ledger):
        """Its counter is still there."""
        ledger.path.unlink()
        assert "missing" in str(refused(ledger))

    @pytest.mark.parametrize(
        "data", [None, b"", b"{}", b"[]", b"null", b"\xff", b'{"version": 2}', b"[" * 100_000], ids=repr
    )
    def test_a_missing_or_damaged_counter(self, ledger, data):
        """The ledger by itself does not tell its age."""
        if data is None:
            ledger.counter.unlink()
        else:
            ledger.counter.write_bytes(data)
        assert str(ledger.counter) in str(refused(ledger))

    @pytest.mark.parametrize(
        "change", [{"count": -1}, {"count": 4.0}, {"head": "0" * 64}, {"budget": {}}, {"more": 1}], ids=str
    )
    def test_an_edited_counter(self, ledger, change):
        """Values that it cannot have."""
        ledger.counter.write_text(json.dumps(json.loads(ledger.counter.read_bytes()) | change))
        refused(ledger)

    @pytest.mark.parametrize(
        "record",
        [
            {"record": "event", "event": {"version": 9, "kind": "sampled-gaussian"}},
            {"record": "event", "event": None},
            {"record": "event"},
            {"record": "refund", "epsilon": 1},
            {"record": "budget", "budget": {"epsilon": -1.0, "delta": 1e-5, "order": 8}},
            {"record": "budget", "budget": 3},
            {"record": "identity", "names": "icu", "fingerprints": []},
            {"record": ["event"]},
            {},
        ],
        ids=str,
    )
    def test_records_that_are_not_understood(self, ledger, record):
        """Also where they continue the chain: an event that is not understood is never skipped."""
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole + line_after(read_chain(whole), record))
        refused(ledger)

    def test_a_second_opening(self, ledger):
        """It would bring another budget."""
        whole = ledger.path.read_bytes()
        again = opening(ledger="x", budget=ROOMY, unit="example", simulated=False, names=["icu"], fingerprints=[])
        ledger.path.write_bytes(whole + line_after(read_chain(whole), again))
        refused(ledger)

    def test_a_simulated_ledger(self, tmp_path):
        """Nothing real was released there; it says nothing of a site's data."""
        ledger = file_ledger(tmp_path)
        ledger.reserve(sampled(), planned=1)
        lines = ledger.path.read_bytes().replace(b'"simulated":false', b'"simulated":true').splitlines()
        data = b""
        for line in lines:
            fields = json.loads(line)
            data += line_after(read_chain(data), {k: v for k, v in fields.items() if k not in {"number", "previous"}})
        chain = read_chain(data)
        ledger.path.write_bytes(data)
        ledger.counter.write_text(json.dumps(json.loads(ledger.counter.read_bytes()) | {"head": chain.head}))
        assert "simulated" in str(refused(ledger))

    def test_a_data_set_that_counts_another_unit_now(self, ledger):
        """What protected rows does not protect patients."""
        now_entities = FileLedger(ledger.path, counter=ledger.counter, budget=ROOMY, unit="entity")
        with pytest.raises(LedgerError, match="counts each example"):
            now_entities.reserve(sampled(4), planned=9)

    def test_a_ledger_that_changes_while_it_is_open(self, ledger):
        """What was verified before is compared with what is there now."""
        assert len(ledger.events()) == 3
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole.replace(b'"noise_stddev":2.0', b'"noise_stddev":9.0', 1))
        refused(ledger)


class TestRepair:
    """What a crash leaves is finished by whoever comes next, under the lock."""

    def test_a_line_whose_counter_was_not_written_counts(self, ledger):
        """Its reservation may have returned."""
        old = ledger.counter.read_bytes()
        ledger.reserve(sampled(4), planned=9)
        ledger.counter.write_bytes(old)
        again = file_ledger(ledger.path.parent.parent)
        assert len(again.events()) == 4
        assert ledger.counter.read_bytes() == old  # looking repairs nothing
        again.reserve(sampled(5), planned=9)
        assert json.loads(ledger.counter.read_bytes())["count"] == 6

    @pytest.mark.parametrize("part", [b"{", b'{"event":{"clipping_norm"', b"\x00" * 40])
    def test_a_line_that_was_never_finished_is_cut_off(self, ledger, part):
        """Its reservation never returned: nothing was trained."""
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole + part)
        again = file_ledger(ledger.path.parent.parent)
        assert len(again.events()) == 3
        assert ledger.path.read_bytes() == whole + part
        again.reserve(sampled(4), planned=9)
        assert ledger.path.read_bytes().startswith(whole + b'{"event"')

    def test_another_unit_of_the_same_object_sees_a_repair(self, ledger):
        """What was read before the repair is not read twice."""
        whole = ledger.path.read_bytes()
        ledger.path.write_bytes(whole + b"{")
        assert len(ledger.events()) == 3
        file_ledger(ledger.path.parent.parent).reserve(sampled(4), planned=9)
        assert len(ledger.events()) == 4


class TestAdministration:
    """What only the site's administrator changes."""

    def test_a_budget_that_is_raised_goes_further(self, tmp_path):
        """What was spent stays spent, and the change is on record."""
        two, three = room_for([sampled()] * 2), room_for([sampled()] * 3)
        ledger = file_ledger(tmp_path, two)
        for r in (1, 2):
            ledger.reserve(sampled(r), planned=2)
        ledger.set_budget(three)
        assert file_ledger(tmp_path).budget == ledger.budget == three
        assert ledger.reserve(sampled(1, run="s"), planned=1) == three.epsilon
        assert [record["record"] for record in ledger.records()] == ["opened", "event", "event", "budget", "event"]

    def test_a_budget_that_is_lowered_stops(self, ledger):
        """At once, also where more was spent already."""
        ledger.set_budget(replace(ROOMY, epsilon=1.5))
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(sampled(4), planned=9)
        assert ledger.standing().share > 1

    def test_names_and_fingerprints_are_recorded_once(self, ledger):
        """Whatever the data set was ever known by."""
        for _ in range(2):
            ledger.identify(names=["icu", "icu-2026"], fingerprints=["f1"])
        ledger.identify(names=["icu"], fingerprints=["f2"])
        standing = file_ledger(ledger.path.parent.parent).standing()
        assert (standing.names, standing.fingerprints) == ({"icu", "icu-2026"}, {"f1", "f2"})
        assert [record["record"] for record in ledger.records()][4:] == ["identity", "identity"]

    def test_what_is_used_grows_with_what_is_released(self, tmp_path):
        """Half of a budget's room is half of the releases, though the first one costs an epsilon of its own."""
        ledger = file_ledger(tmp_path, room_for([sampled(steps=10)]))
        assert ledger.standing().share == 0
        ledger.reserve(sampled(steps=5), planned=1)
        assert ledger.standing().share == pytest.approx(0.5, rel=1e-6)

    def test_the_coordinators_own_ledger_counts_clients(self, tmp_path):
        """What protects single examples is infinite there."""
        ledger = FileLedger(tmp_path / "c.jsonl", counter=tmp_path / "i" / "c.json", budget=ROOMY, unit="client")
        ledger.reserve(sampled(unit="client"), planned=1)
        with pytest.raises(BudgetExhaustedError):
            ledger.reserve(sampled(run="s"), planned=1)


class TestDisk:
    """What the operating system refuses."""

    def test_places_that_cannot_be_written_are_refused(self, tmp_path):
        """A file where a folder should be, a folder where a file should be."""
        (tmp_path / "file").write_text("")
        (tmp_path / "folder").mkdir()
        for path, counter in (
            (tmp_path / "file" / "icu.jsonl", tmp_path / "icu.json"),
            (tmp_path / "icu.jsonl", tmp_path / "file" / "icu.json"),
            (tmp_path / "folder", tmp_path / "icu.json"),
        ):
            with pytest.raises(LedgerError) as caught:
                FileLedger(path, counter=counter, budget=ROOMY).reserve(sampled(), planned=1)
            assert caught.value.hint

    @pytest.mark.parametrize("call", range(6))
    def test_an_error_at_any_flush_loses_nothing(self, ledger, monkeypatch, call):
        """Nothing is granted; what was there is there; and the next reservation goes on."""
        real, left = os.fsync, [call]

        def failing(descriptor):
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", failing)
            for r in range(4, 4 + call // 3):  # each reservation flushes three times
                ledger.reserve(sampled(r), planned=9)
            with pytest.raises(LedgerError) as caught:
                ledger.reserve(sampled(7), planned=9)
            assert "free space" in caught.value.hint
        events = file_ledger(ledger.path.parent.parent).events()
        assert len(events) >= 3 + call // 3
        ledger.reserve(sampled(8), planned=9)
        assert [path.name for path in ledger.counter.parent.iterdir()] == ["icu.json"]
