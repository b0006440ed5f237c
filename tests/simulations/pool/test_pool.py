"""A pool of worker processes gives what this process would give, and loses no more than a failing client."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message

from common.errors import FailureCode, RunError
from common.flower import ARRAYS, METRICS, failure_of, to_record
from simulations.inline import AppFactory, InlineGrid, InProcess
from simulations.pool import pool as module
from simulations.pool.pool import WorkerPool
from tests.helpers.pools import NAMES, broken_app, counting_app, own_a_pool, queries
from tests.helpers.processes import children, wait_until
from tests.helpers.runs import STRATEGIES, Log, as_bytes, configuration, prepared, private, run


@pytest.fixture
def pools() -> Iterator[Any]:
    """Makes pools that end with the test."""
    made: list[WorkerPool] = []

    def make(workers: int, factory: AppFactory = counting_app) -> InlineGrid:
        made.append(WorkerPool(factory, workers))
        return InlineGrid(made[-1], NAMES)

    yield make
    for pool in made:
        pool.close()


def ask(grid: InlineGrid, trouble: dict[int, str] | None = None, **options: Any) -> dict[int, Message]:
    """Replies by the client's place."""
    messages = queries(grid, trouble, options.pop("arrays", None))
    return {r.metadata.src_node_id - 2: r for r in grid.send_and_receive(messages, **options)}


def counts(replies: dict[int, Message]) -> dict[int, Any]:
    return {place: reply.content.metric_records[METRICS]["count"] for place, reply in sorted(replies.items())}


class TestNumberOfWorkers:
    @pytest.mark.parametrize("name", ["fedavg", "fedadam", "krum", "qfedavg"])
    def test_changes_no_bit(self, name: str, tmp_path: Path) -> None:
        """The result is the same to the bit in this process and over one, two and three workers."""
        config = configuration(rounds=3, data={"clients": 7}, strategy={"name": name, **STRATEGIES[name]})
        one_process = config.model_copy(update={"cohort": config.cohort.model_copy(update={"deadline_seconds": 1e4})})
        expected, log = run(tmp_path / "here", config)
        for place, workers in (("one", 1), ("two", 2), ("three", 3)):
            outcome, other = run(tmp_path / place, one_process if workers == 1 else config, workers=workers)
            assert as_bytes(outcome.arrays) == as_bytes(expected.arrays)
            assert outcome.evaluation == expected.evaluation
            assert [r.train_loss for r in other.records] == [r.train_loss for r in log.records]

    def test_more_workers_than_clients(self, pools: Any) -> None:
        """Workers without work do no harm."""
        assert counts(ask(pools(6))) == {0: 1, 1: 1, 2: 1, 3: 1}

    def test_private_clients_keep_their_ledgers(self, tmp_path: Path) -> None:
        """Whichever worker trains a client, its rounds are in its own ledger, once each."""
        run(tmp_path / "run", private(rounds=3), workers=2)
        ledgers = prepared(tmp_path / "run", private(rounds=3)).sites.ledgers
        assert ledgers is not None
        rounds = {f"client-{i:02d}": [e.server_round for e in ledgers.of(f"client-{i:02d}").events()] for i in range(4)}
        assert rounds == {f"client-{i:02d}": [1, 2, 3] for i in range(4)}


class TestFailingClient:
    @pytest.mark.parametrize(
        ("trouble", "reason"),
        [
            ("raise", "client-failed"),
            ("nan", "non-finite-update"),
            ("exit", "client-lost"),
            ("kill", "client-lost"),
        ],
    )
    def test_is_a_failed_reply_and_the_run_goes_on(self, trouble: str, reason: str, tmp_path: Path) -> None:
        """A client that raises, diverges, ends or kills its process fails each round with a reason; others train."""
        changes: dict[str, Any] = {
            "model": {"options": {"trouble": trouble}},
            "data": {"name": "one-in-trouble"},
        }
        outcome, log = run(tmp_path / "run", workers=2, **changes)
        assert log.failures == [{"client-01": reason}] * 3
        assert [record.survivors for record in log.records] == [["client-00", "client-02", "client-03"]] * 3
        assert outcome.evaluation is not None
        assert outcome.evaluation.accuracy > 0.6

    @pytest.mark.parametrize("trouble", ["raise", "nan"])
    def test_fails_alike_in_this_process(self, trouble: str, tmp_path: Path) -> None:
        """What can be survived in one process has the same reason and result there, to the bit."""
        changes: dict[str, Any] = {"model": {"options": {"trouble": trouble}}, "data": {"name": "one-in-trouble"}}
        here, log = run(tmp_path / "here", **changes)
        there, other = run(tmp_path / "there", workers=2, **changes)
        assert as_bytes(here.arrays) == as_bytes(there.arrays)
        assert log.failures == other.failures

    def test_that_hangs_is_ended_at_its_deadline(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A client whose forward pass never ends fails with a reason, each round anew, and costs nobody else.

        The clock stands still until the others have answered: however slow the machine is, nobody else is late.
        """
        clock = Clock()
        monkeypatch.setattr(module, "monotonic", clock)

        class Watching(Log):
            def reply_received(self, client: str, failure: Any) -> None:
                super().reply_received(client, failure)
                answered = [fate for _, fate in self.fates if fate is None]
                if len(answered) % 3 == 0:
                    clock.now += 3600

        changes: dict[str, Any] = {
            "model": {"options": {"trouble": "hang"}},
            "data": {"name": "one-in-trouble"},
            "cohort": {"deadline_seconds": 3600.0},
        }
        outcome, log = run(tmp_path / "run", workers=2, observer=Watching(), **changes)
        assert log.failures == [{"client-01": "deadline-exceeded"}] * 3
        assert outcome.evaluation is not None

    def test_loses_its_worker_and_no_other(self, pools: Any) -> None:
        """The worker of a lost client is replaced; the clients after it are answered, the lost one again next time."""
        grid = pools(2)
        replies = ask(grid, {0: "kill", 2: "exit"})
        assert {place: failure_of(reply) for place, reply in replies.items()} == {
            0: FailureCode.CLIENT_LOST, 1: None, 2: FailureCode.CLIENT_LOST, 3: None,
        }  # fmt: skip
        assert counts(ask(grid)) == {0: 1, 1: 2, 2: 1, 3: 2}

    def test_all_may_be_lost(self, pools: Any) -> None:
        """A round in which every client kills its worker is a round of failures; the next one works."""
        grid = pools(2)
        replies = ask(grid, dict.fromkeys(range(4), "kill"))
        assert {failure_of(reply) for reply in replies.values()} == {FailureCode.CLIENT_LOST}
        assert len(replies) == 4
        assert counts(ask(grid)) == {0: 1, 1: 1, 2: 1, 3: 1}

    def test_that_hangs_has_a_deadline_of_its_own(self, pools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """A deadline runs from when a client is asked, not from when the round began."""
        clock = Clock()
        monkeypatch.setattr(module, "monotonic", clock)
        grid = pools(1)
        replies = {}
        for reply in grid.stream(queries(grid, {3: "hang"}), timeout=10.0):
            replies[reply.metadata.src_node_id - 2] = failure_of(reply)
            clock.now += 9.0  # four clients one after the other take 36 seconds
            if len(replies) == 3:
                clock.ticks = 10.0
        assert replies == {0: None, 1: None, 2: None, 3: FailureCode.DEADLINE_EXCEEDED}

    def test_text_of_an_exception_stays_with_the_client(self, pools: Any) -> None:
        """The reply of a client that raised says nothing of what it raised."""
        (failed,) = [reply for reply in ask(pools(1), {2: "raise"}).values() if reply.has_error()]
        assert "17" not in failed.error.reason


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = self.ticks = 0.0

    def __call__(self) -> float:
        self.now += self.ticks
        return self.now


class TestState:
    def test_follows_the_client(self, pools: Any) -> None:
        """What a client keeps in its context is there the next time, whichever worker serves it."""
        grid, processes = pools(3), set()
        for expected in (1, 2, 3, 4, 5):
            replies = ask(grid)
            assert counts(replies) == dict.fromkeys(range(4), expected)
            processes |= {int(r.content.metric_records[METRICS]["process"]) for r in replies.values()}
        assert os.getpid() not in processes

    def test_follows_the_client_in_this_process(self) -> None:
        """The same without workers."""
        grid = InlineGrid(InProcess(counting_app), NAMES)
        assert [counts(ask(grid)) for _ in (1, 2)] == [dict.fromkeys(range(4), n) for n in (1, 2)]

    def test_of_a_lost_round_is_not_kept(self, pools: Any) -> None:
        """A client that dies after it changed its state finds the state of its last answer."""
        grid = pools(2)
        ask(grid)
        ask(grid, {1: "kill"})
        assert counts(ask(grid)) == {0: 3, 1: 2, 2: 3, 3: 3}


class TestArrays:
    def test_large_ones_go_both_ways(self, pools: Any) -> None:
        """20 MB out to each client and 20 MB back, exactly."""
        values = np.random.default_rng(0).random(20 * 2**17)
        replies = ask(pools(2), arrays=to_record({"big": values, "none": values[:0], "scalar": values[0]}))
        for reply in replies.values():
            back = reply.content.array_records[ARRAYS]
            assert as_bytes({name: array.numpy() for name, array in back.items()}) == as_bytes(
                {"big": values, "none": values[:0], "scalar": values[0]}
            )

    def test_model_of_20_megabytes_trains(self, tmp_path: Path) -> None:
        """A model of that size, with integers in it, is trained over workers to the bytes of this process."""
        changes: dict[str, Any] = {
            "rounds": 2,
            "model": {"name": "wide", "options": {"megabytes": 20}},
            "data": {"clients": 3},
        }
        here, _ = run(tmp_path / "here", **changes)
        there, log = run(tmp_path / "there", workers=2, **changes)
        assert as_bytes(here.arrays) == as_bytes(there.arrays)
        assert here.arrays["calls"].dtype == np.int64
        assert here.arrays["calls"] > 0
        assert log.failures == [{}, {}]

    def test_are_in_one_file_a_round(self, pools: Any) -> None:
        """A model is written once for all clients, in memory where there is /dev/shm, and the last round's is gone."""
        grid = pools(2)
        folders = []
        for value in (1.0, 2.0, 3.0):
            replies = ask(grid, arrays=to_record({"w": np.full(3, value)}))
            assert {r.content.metric_records[METRICS]["total"] for r in replies.values()} == {3 * value}
            folders.append([path.name for path in folder_of(grid).iterdir()])
        assert [len(names) for names in folders] == [1, 1, 1]
        assert len({name for names in folders for name in names}) == 3


def folder_of(grid: InlineGrid) -> Path:
    """Where a pool keeps the model of the round."""
    folder = grid._engine._mailbox.folders[0]  # type: ignore[attr-defined]
    assert isinstance(folder, Path)
    return folder


class TestEnd:
    def test_of_a_pool_is_the_end_of_its_processes_and_files(self, pools: Any) -> None:
        """Closing a pool ends its workers, also one that hangs, and removes its files."""
        before = children()
        grid = pools(2)
        stream = grid.stream(queries(grid, {0: "hang"}, to_record({"w": np.ones(3)})))
        next(stream)
        folder = folder_of(grid)
        assert len(children() - before - keepers()) == 2
        assert list(folder.iterdir())
        grid._engine.close()
        assert children() - before - keepers() == set()
        assert not folder.exists()

    @pytest.mark.parametrize("workers", [1, 2])
    def test_comes_with_an_interruption(self, workers: int, tmp_path: Path) -> None:
        """Ctrl-C in the middle of a round passes through the engine; afterwards no worker is left."""

        class Interrupting(Log):
            def reply_received(self, client: str, failure: Any) -> None:
                raise KeyboardInterrupt

        before = children()
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", workers=workers, observer=Interrupting())
        assert children() - before - keepers() == set()

    def test_no_process_is_left_after_a_run(self, tmp_path: Path) -> None:
        """A run that ends well leaves no workers either."""
        before = children()
        run(tmp_path / "run", workers=3)
        assert children() - before - keepers() == set()

    def test_worker_that_cannot_start_is_an_error(self, pools: Any) -> None:
        """Where a client cannot be made in any worker, the run ends with an error instead of waiting for ever."""
        with pytest.raises(RunError, match="could not start"):
            ask(pools(2, broken_app))

    @pytest.mark.parametrize("trouble", ["none", "hang"])
    def test_comes_with_the_death_of_the_owner(self, trouble: str) -> None:
        """A pool whose process is killed leaves no workers behind, not even one whose client hangs, and no files."""
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        owner = context.Process(target=own_a_pool, args=(theirs, trouble))
        owner.start()
        workers, folder = ours.recv()
        assert len(workers) == 2
        assert folder.is_dir()
        owner.kill()
        owner.join()
        wait_until(lambda: not any(alive(pid) for pid in workers) and not folder.exists())
        owner.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in {"Z", "X"}
    except OSError:
        return False


def command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return ""


def keepers() -> set[int]:
    """Python's own helpers: the fork server (not what it forked) and the resource tracker."""
    mine = os.getpid()
    found = set()
    for pid in children():
        try:
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == mine and ("forkserver" in command(pid) or "resource_tracker" in command(pid)):
            found.add(pid)
    return found
