"""Ledgers under real processes: killed at every step, racing, out of disk. Run as a program, since forking a test
runner is not safe: `python -m tests.helpers.ledger_processes FOLDER` prints one JSON document.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import BudgetExhaustedError, LedgerError
from common.privacy.accounting.budget import Budget
from common.privacy.ledger import FileLedger, Ledger
from common.privacy.ledger.administration import accept
from simulations.ledgers import SimulatedLedgers
from tests.helpers.events import sampled
from tests.helpers.ledgers import ROOMY, room_for

_STEPS = ("open", "write", "fsync", "replace", "truncate", "ftruncate", "mkdir", "unlink")


def file_ledger(folder: Path, budget: Budget = ROOMY) -> FileLedger:
    """A site's ledger below a folder."""
    return FileLedger(folder / "ledger" / "icu.jsonl", counter=folder / "identity" / "icu.json", budget=budget)


def simulated_ledger(folder: Path, budget: Budget = ROOMY) -> Ledger:
    """A simulated ledger below a folder."""
    return SimulatedLedgers(folder / "ledgers.db", budget=budget).of("icu")


def forked(work: Callable[[], None]) -> int:
    """Run something in a child process; its id. It exits with 0, 1 if refused, 2 on a ledger error, 99 otherwise."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            work()
            code = 0
        except BudgetExhaustedError:
            code = 1
        except LedgerError:
            code = 2
        except BaseException as e:  # noqa: BLE001 - told to whoever reads the output
            print(repr(e), file=sys.stderr)  # noqa: T201
        os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    """How a child ended; minus the signal's number if it was killed."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def die_at(step: int, *, halfway: bool) -> None:
    """Make this process kill itself at the n-th system call that changes a file; a write may get half its bytes out."""
    left = step

    def deadly(real: Callable[..., Any], *, writes: bool) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                if halfway and writes:
                    real(arguments[0], arguments[1][: max(1, len(arguments[1]) // 2)])
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)

        return call

    for name in _STEPS:
        setattr(os, name, deadly(getattr(os, name), writes=name == "write"))


def reserving(folder: Path, rounds: range, returned: Path) -> None:
    """Reserve rounds; a mark in `returned` for each that was granted."""
    write = os.write
    with returned.open("ab", buffering=0) as marks:
        for r in rounds:
            file_ledger(folder).reserve(sampled(r), planned=9)
            write(marks.fileno(), b"x")


def killed_reserving(folder: Path) -> dict[str, int]:
    """Kill at every step of a first reservation; where that leaves something to repair, kill at every step of the
    repair and the reservation after it, too. Count what went wrong.
    """
    result = {"kills": 0, "lost": 0, "unusable": 0}
    for halfway in (False, True):
        for step in range(1000):
            case = folder / f"{halfway}-{step}"
            if exit_code(forked(lambda: _dying(case, range(1, 2), step, halfway=halfway))) == 0:  # noqa: B023
                break
            _judge(case, result)
            for again in range(1000 if _unfinished(case, torn=halfway) else 0):
                copy = folder / f"{halfway}-{step}-{again}"
                shutil.copytree(case, copy)
                done = exit_code(forked(lambda: _dying(copy, range(2, 3), again, halfway=halfway))) == 0  # noqa: B023
                _judge(copy, result)
                if done:
                    break
    return result


def _dying(case: Path, rounds: range, step: int, *, halfway: bool) -> None:
    case.mkdir(exist_ok=True)
    returned = case / "returned"
    returned.touch()
    die_at(step, halfway=halfway)
    reserving(case, rounds, returned)


def _unfinished(case: Path, *, torn: bool) -> bool:
    ledger = file_ledger(case)
    with ledger.locked(writing=False):
        found = ledger.look()
    return bool(found.chain.tail) if torn else found.pending


def _judge(case: Path, result: dict[str, int]) -> None:
    """What is held is at least what was granted, and whoever comes next goes on without any decision."""
    result["kills"] += 1
    try:
        result["lost"] += len(file_ledger(case).events()) < len((case / "returned").read_bytes())
        copy = case.with_name(f"{case.name}-judged")
        shutil.copytree(case, copy)
        file_ledger(copy).reserve(sampled(9), planned=9)
    except LedgerError as e:
        print(f"{case}: {e}", file=sys.stderr)  # noqa: T201
        result["unusable"] += 1


def killed_accepting(folder: Path) -> dict[str, int]:
    """Kill at every step of a decision about a ledger that lost its last line."""
    result = {"kills": 0, "neither": 0}
    for step in range(1000):
        case = folder / str(step)
        for r in (1, 2, 3):
            file_ledger(case).reserve(sampled(r), planned=9)
        path = case / "ledger" / "icu.jsonl"
        damaged = b"".join(path.read_bytes().splitlines(keepends=True)[:-1])
        path.write_bytes(damaged)

        def decide(case: Path = case, step: int = step) -> None:
            die_at(step, halfway=True)
            accept(file_ledger(case), assume="nothing-lost")

        ended = exit_code(forked(decide)) == 0
        result["kills"] += not ended
        try:
            result["neither"] += len(file_ledger(case).standing().decisions) != 1
        except LedgerError:
            accept(file_ledger(case), assume="nothing-lost")
            result["neither"] += len(file_ledger(case).events()) != 2
        if ended:
            return result
    return result


def race(folder: Path) -> dict[str, list[int]]:
    """Eight processes, let go at once, want a round each of a budget with room for three."""
    budget = room_for([sampled()] * 3)
    result = {}
    for kind, open_ledger in (("file", file_ledger), ("simulated", simulated_ledger)):
        gate, opened = os.pipe()

        def racer(r: int, open_ledger: Any = open_ledger, gate: int = gate, opened: int = opened) -> None:
            os.close(opened)
            os.read(gate, 1)  # returns when the last writer closes
            open_ledger(folder, budget).reserve(sampled(1, run=str(r)), planned=1)

        pids = [forked(lambda r=r: racer(r)) for r in range(8)]  # type: ignore[misc]
        os.close(opened)
        result[kind] = [*sorted(map(exit_code, pids)), len(open_ledger(folder).events())]
    return result


def fork_in_use(folder: Path) -> list[int]:
    """A store that was used before its process forks is used by parent and children."""
    ledgers = SimulatedLedgers(folder / "ledgers.db", budget=ROOMY)
    ledgers.of("a").reserve(sampled(1), planned=99)
    pids = [forked(lambda r=r: _reserve_many(ledgers, r)) for r in (2, 3)]  # type: ignore[misc]
    _reserve_many(ledgers, 4)
    codes = [exit_code(pid) for pid in pids]
    return [*codes, len(ledgers.of("a").events())]


def _reserve_many(ledgers: SimulatedLedgers, r: int) -> None:
    for i in range(5):
        ledgers.of("a").reserve(sampled(10 * r + i), planned=99)


def full_disk(folder: Path) -> list[list[object]]:
    """A limit on the size of files: at the ledger's end, and within the next line. Whether the ledger stays whole."""
    ledger = file_ledger(folder)
    ledger.reserve(sampled(1), planned=9)
    before = ledger.path.read_bytes(), ledger.counter.read_bytes()
    outcomes: list[list[object]] = []
    for room in (0, 1, 100):

        def write(limit: int = len(before[0]) + room) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            file_ledger(folder).reserve(sampled(2), planned=9)

        code = exit_code(forked(write))
        outcomes.append([code, (ledger.path.read_bytes(), ledger.counter.read_bytes()) == before])
    return outcomes


if __name__ == "__main__":
    document = {}
    for work in (killed_reserving, killed_accepting, race, full_disk, fork_in_use):
        below = Path(sys.argv[1]) / work.__name__
        below.mkdir()
        document[work.__name__] = work(below)
    print(json.dumps(document))  # noqa: T201
