"""A worker that the system ends, or that is refused memory, costs the clients that it was working on, and no more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from common.errors import FailureCode, RunError
from common.flower import METRICS, config_of, failure_of, to_record
from server.grids.base import FIRST_NODE
from simulations.chunks import chunk_message, fates
from simulations.inline import AppFactory, InlineGrid
from simulations.pool.pool import WorkerPool
from tests.helpers.pools import NAMES, app_unless, counting_app, queries
from tests.helpers.processes import wait_until

LOST = FailureCode.CLIENT_LOST
CGROUPS = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]


@pytest.fixture
def pools() -> Iterator[Any]:
    """Makes pools that end with the test."""
    made: list[WorkerPool] = []

    def make(workers: int, factory: AppFactory = counting_app) -> WorkerPool:
        made.append(WorkerPool(factory, workers))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def ask(pool: WorkerPool, trouble: dict[int, str] | None = None) -> dict[int, FailureCode | None]:
    """Every client's fate, by its place."""
    grid = InlineGrid(pool, NAMES)
    replies = grid.send_and_receive(queries(grid, trouble))
    return {reply.metadata.src_node_id - FIRST_NODE: failure_of(reply) for reply in replies}


def has_all(pool: WorkerPool) -> bool:
    """Whether two workers were ready by the end of a round in which nothing failed."""
    return ask(pool) == SOUND and [worker.ready for worker in pool._workers] == [True, True]


SOUND: dict[int, FailureCode | None] = dict.fromkeys(range(len(NAMES)))


def test_a_client_that_is_refused_memory_is_a_failed_reply(pools: Any) -> None:
    """It allocates until its process may not have more; the worker stays, and answers for others."""
    pool = pools(1)
    (worker,) = pool._workers
    assert ask(pool, {1: "memory"}) == SOUND | {1: FailureCode.CLIENT_FAILED}
    assert pool._workers == [worker]
    assert ask(pool) == SOUND


def test_a_client_may_lose_its_worker_again_and_again(pools: Any) -> None:
    """Each time it costs that client's round; it is not tried a second time, and the pool stays as large as it was."""
    pool = pools(2)
    processes = set()
    for _ in range(4):
        assert ask(pool, {1: "kill"}) == SOUND | {1: LOST}
        assert len(pool._workers) == 2
        processes |= {worker.process.pid for worker in pool._workers}
    assert len(processes) >= 5
    assert ask(pool) == SOUND


def test_a_chunk_loses_all_of_its_members(pools: Any) -> None:
    """They trained as one; another chunk and the clients after it train."""
    pool = pools(2)
    grid = InlineGrid(pool, NAMES)
    asked = []
    for nodes, trouble in (((2, 4), "kill"), ((3, 5), "none")):
        (template, *_) = queries(grid, {0: trouble}, to_record({"w": np.ones(2)}))
        assert config_of(template.content)["trouble"] == trouble
        asked.append(chunk_message(template, nodes, largest=1.0))
    members = {2: (2, 4), 3: (3, 5)}
    replies = {reply.metadata.src_node_id: reply for reply in grid.stream(asked)}
    assert [(f.node_id, f.failure) for f in fates(members[2], replies[2])] == [(2, LOST), (4, LOST)]
    assert failure_of(replies[3]) is None
    assert ask(pool) == SOUND


def own_cgroup() -> Path | None:
    """A group of processes with a limit on their memory, where this process may make one."""
    for root in CGROUPS:
        group = root / f"coterie-test-{os.getpid()}"
        limits = [group / "memory.limit_in_bytes", group / "memory.max"]
        try:
            group.mkdir()
            (limit,) = [path for path in limits if path.exists()]
            limit.write_text(str(64 << 20))
        except (OSError, ValueError):
            if group.is_dir():
                group.rmdir()
        else:
            return group
    return None


def test_a_worker_that_the_system_ends_is_replaced(pools: Any) -> None:
    """A client takes more memory than its group of processes has: the kernel kills it; the others never notice."""
    group = own_cgroup()
    if group is None:
        pytest.skip("needs the right to limit a process's memory")
    pool = pools(1)
    try:
        ask(pool)
        (group / "cgroup.procs").write_text(str(pool._workers[0].process.pid))
        assert ask(pool, {2: "memory"}) == SOUND | {2: LOST}
        assert ask(pool) == SOUND
    finally:
        pool.close()
        group.rmdir()


@pytest.mark.skipif(not Path("/proc/self/oom_score_adj").exists(), reason="Linux only")
def test_the_system_ends_a_worker_before_the_coordinator(pools: Any) -> None:
    """Where all memory of the machine is used up, it takes whom it is told to."""
    pool = pools(1)
    ask(pool)
    (worker,) = pool._workers
    theirs = int(Path(f"/proc/{worker.process.pid}/oom_score_adj").read_text())
    assert theirs > int(Path("/proc/self/oom_score_adj").read_text())


class TestStart:
    def test_that_fails_later_leaves_the_other_workers(self, pools: Any, tmp_path: Path) -> None:
        """A worker that cannot be replaced is missed; the next round tries again."""
        flag = tmp_path / "flag"
        pool = pools(2, partial(app_unless, str(flag)))
        wait_until(lambda: has_all(pool))
        flag.touch()
        assert ask(pool, {0: "kill"}) == SOUND | {0: LOST}
        assert ask(pool) == SOUND
        flag.unlink()
        wait_until(lambda: has_all(pool))

    def test_that_fails_for_all_ends_the_run(self, pools: Any, tmp_path: Path) -> None:
        """With what became of the process, and what to do about it."""
        flag = tmp_path / "flag"
        pool = pools(2, partial(app_unless, str(flag)))
        wait_until(lambda: has_all(pool))
        flag.touch()
        with pytest.raises(RunError, match="could not start: it ended with code 1") as error:
            ask(pool, dict.fromkeys(range(4), "kill"))
        assert "--workers" in error.value.hint

    def test_that_the_system_refuses_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No process can be made: the limit on processes, or no memory."""

        def refused(_: WorkerPool) -> None:
            raise OSError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(WorkerPool, "_start", refused)
        with pytest.raises(RunError, match="Resource temporarily unavailable"):
            WorkerPool(counting_app, 2)


def test_replies_that_nobody_takes_are_dropped(pools: Any) -> None:
    """A caller may stop in the middle of a round; the next one gets its own replies, from all workers."""
    pool = pools(2)
    grid = InlineGrid(pool, NAMES)
    for value in (1.0, 2.0, 3.0):
        stream = grid.stream(queries(grid, arrays=to_record({"w": np.full(3, -value)})))
        next(stream)
        stream.close()
        replies = grid.send_and_receive(queries(grid, arrays=to_record({"w": np.full(3, value)})))
        assert {reply.content.metric_records[METRICS]["total"] for reply in replies} == {3 * value}
        assert len(list(replies)) == 4


def test_processor_time_of_workers_counts(pools: Any) -> None:
    """It never goes back, also when a worker is replaced."""
    pool = pools(2)
    seconds = [pool.cpu_seconds()]
    for trouble in ({}, {1: "kill"}, {}):
        ask(pool, trouble)
        seconds.append(pool.cpu_seconds())
    assert seconds == sorted(seconds)
    assert seconds[-1] > seconds[0]
