"""Asynchronous runs over a real plane: nobody waits for a slow site, and a coordinator that dies loses no update."""

from __future__ import annotations

import json
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from client.ledger_lookup import entries_of
from common.config import RunConfig
from server.service.audit import AUDIT, read_lines, verify
from server.service.process import DATABASE
from server.service.state import ServiceState
from server.store import RunFolder
from simulations.loopback import free_port
from tests.helpers.agents import PRIVATE, configuration
from tests.helpers.clinic import SITES, Clinic, Gate, end_of, seen
from tests.helpers.plane import BOUND
from tests.helpers.processes import PATIENCE_SECONDS, wait_until
from tests.server.service.test_killed import reachable, server, submitted

SLOW = SITES[2]
QUICK = SITES[:2]
BUFFERED = ("asynchronous.buffer_size=2",)


def run_config(*changes: str) -> RunConfig:
    return configuration(f"data.sites={json.dumps(list(SITES))}", *BUFFERED, *changes)


def audit(clinic: Clinic, *names: str, **facts: Any) -> list[dict[str, Any]]:
    """Lines of these events, with these facts."""
    lines = read_lines(clinic.state / AUDIT, wanted=lambda line: line["event"] in names)
    return [line for line in lines if all(line.get(key) == value for key, value in facts.items())]


class Brake:
    """Lets a site answer so many times, and holds its next answer back until a test lets it go."""

    def __init__(self, answers: int) -> None:
        self.left, self.held, self.free = answers, threading.Event(), threading.Event()

    def before(self, app: Callable[..., Any]) -> Callable[..., Any]:
        def answer(message: Any, context: Any) -> Any:
            if message.metadata.message_type == "train":
                self.left -= 1
                if self.left < 0:
                    self.held.set()
                    assert self.free.wait(BOUND)
            return app(message, context)

        return answer

    def open(self) -> None:
        self.free.set()


@contextmanager
def audited(clinic: Clinic) -> Iterator[None]:
    """The audit log is whole at the end."""
    yield
    state = ServiceState(clinic.state / DATABASE, reading=True)
    try:
        assert verify(clinic.state / AUDIT, state).problem == ""
    finally:
        state.close()


def test_a_slow_site_holds_up_no_step_and_counts_as_old(tmp_path: Path) -> None:
    """Two hospitals make three steps while the third works on the first; then its update counts, three steps old."""
    clinic = Clinic(tmp_path)
    gate, brakes = Gate(), {name: Brake(3) for name in QUICK}
    with clinic.serving(), clinic.agents(gates={SLOW: gate, **brakes}), clinic.operator() as operator:  # type: ignore[dict-item]
        run = operator.submit(run_config("rounds=4"))["run"]
        for brake in brakes.values():
            assert brake.held.wait(BOUND)
        seen(operator, run, lambda status: status["rounds_done"] == 3)
        assert gate.arrived.wait(BOUND)
        gate.open()
        wait_until(lambda: bool(audit(clinic, "received", site=SLOW)))
        brakes[QUICK[0]].open()
        status = end_of(operator, run)
        operator.fetch(run, tmp_path / "fetched")
        brakes[QUICK[1]].open()
    assert status["status"] == "completed"
    rows = RunFolder.open(tmp_path / "fetched").rounds()
    assert [row["staleness"] for row in rows] == [dict.fromkeys(QUICK, 0)] * 3 + [{QUICK[0]: 0, SLOW: 3}]
    assert [row["cohort"] for row in rows] == [list(SITES)] * 4
    assert [line["round"] for line in audit(clinic, "asked", site=SLOW, kind="train")] == [1]
    cancelled = {line["message"] for line in audit(clinic, "cancelled")}
    assert cancelled == {audit(clinic, "asked", site=QUICK[1], kind="train")[-1]["message"]}


def test_a_run_that_its_operator_ends_cancels_what_is_open(tmp_path: Path) -> None:
    """Also the orders of earlier steps."""
    clinic = Clinic(tmp_path)
    gate, brakes = Gate(), {name: Brake(1) for name in QUICK}
    with clinic.serving(), clinic.agents(gates={SLOW: gate, **brakes}), clinic.operator() as operator:  # type: ignore[dict-item]
        run = operator.submit(run_config("rounds=4"))["run"]
        for brake in brakes.values():
            assert brake.held.wait(BOUND)
        operator.ask("stop", run)
        assert end_of(operator, run)["status"] == "stopped"
        asked = {line["message"] for line in audit(clinic, "asked", kind="train")}
        answered = {line["message"] for line in audit(clinic, "received")}
        assert {line["message"] for line in audit(clinic, "cancelled")} == asked - answered
        assert len(asked - answered) == 3


def test_a_site_whose_policy_wants_more_company_stays_away(tmp_path: Path) -> None:
    """A step of one update shows that update to whoever sees two models: smallest_cohort is about steps, too."""
    clinic = Clinic(tmp_path)
    for name in SITES:
        policy = clinic.kits / name / "policy.toml"
        policy.write_text(policy.read_text().replace("smallest_cohort = 1", "smallest_cohort = 3"))
    with clinic.serving(), clinic.agents(), clinic.operator() as operator:
        run = operator.submit(run_config("rounds=1"))["run"]
        status = end_of(operator, run)
        assert status["status"] == "failed"
    failed = audit(clinic, "failed")
    assert {line["site"] for line in failed} == set(SITES)
    assert {line["failure"] for line in failed} == {"policy-refused"}


@pytest.mark.slow
def test_a_killed_coordinator_asks_those_at_work_again_and_nobody_pays_twice(tmp_path: Path) -> None:
    """After SIGKILL before each step's checkpoint: the same requests go out again, sites send what they have stored."""
    clinic = Clinic(tmp_path)
    sites = f"data.sites={json.dumps(list(SITES))}"
    clinic.lead_to(free_port())
    rounds = 4
    with audited(clinic), clinic.agents(), clinic.operator() as operator:
        with server(clinic, "checkpoint", 1) as process:
            run = submitted(operator, clinic, process, f"rounds={rounds}", *BUFFERED, *PRIVATE, sites)
            assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        for step in (("received", 1), ("checkpoint", 1)):
            with server(clinic, *step) as process:
                assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        with server(clinic) as process:
            wait_until(lambda: reachable(operator), process=None)
            status = end_of(operator, run)
            operator.fetch(run, tmp_path / "fetched")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0
    assert status["status"] == "completed"
    rows = RunFolder.open(tmp_path / "fetched").rounds()
    assert [row["server_round"] for row in rows] == list(range(1, rounds + 1))
    assert all(len(row["survivors"]) == 2 and row["failures"] == {} for row in rows)
    again = Counter((line["site"], line["round"]) for line in audit(clinic, "asked", kind="train"))
    assert max(again.values()) > 1, "nobody was asked again"
    for name in SITES:
        (entry,) = entries_of("", clinic.kits / name / "state", "heart")
        taken = [event.server_round for event in entry.standing.events]
        assert len(taken) == len(set(taken)), "a round was paid for twice"
        used = [row["server_round"] - row["staleness"][name] for row in rows if name in row["survivors"]]
        assert set(used) <= set(taken)
        assert used == sorted(set(used)), "two updates of one round"
        assert len(taken) <= rounds, "more than the noise was made for"
