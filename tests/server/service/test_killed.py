"""A coordinator that is killed at every step of a round, and started again under sites that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from common.errors import UnreachableError
from server.remote import Coordinator
from server.service.audit import AUDIT, read_lines, verify
from server.service.process import ADDRESS, DATABASE
from server.service.state import ServiceState
from server.store import RunFolder
from simulations.loopback import free_port
from tests.helpers.agents import configuration
from tests.helpers.clinic import SITES, Clinic, end_of, simulated
from tests.helpers.processes import PATIENCE_SECONDS, wait_until

ROOT = Path(__file__).parents[3]

STEPS = [
    ("run-started", 0),
    ("round-started", 0),
    ("asked", 1),
    ("received", 0),
    ("received", 2),
    ("round-ended", 0),
    ("checkpoint", 0),
    ("checkpoint", 1),
    ("round-ended", 1),
    ("result", 0),
    ("model-released", 0),
    ("run-ended", 0),
]
"""Each once in a process of its own, one after the other; how often the step is passed before."""


@contextmanager
def server(clinic: Clinic, step: str = "never", passes: int = 0) -> Iterator[subprocess.Popen[bytes]]:
    """The service as a process that answers; it is gone when the block ends."""
    with (clinic.folder / "server.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.dying_server", str(clinic.kits / "server"), str(clinic.port), step,
             str(passes)],
            cwd=ROOT, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def submitted(operator: Coordinator, clinic: Clinic, process: subprocess.Popen[bytes], *overrides: str) -> str:
    """The id of a run, queued as soon as the service answers."""
    found: list[str] = []
    sites = f'data.sites=["{SITES[0]}", "{SITES[1]}"]'
    config = configuration(sites, *overrides)

    def attempt() -> bool:
        try:
            found.append(operator.submit(config)["run"])
        except UnreachableError:
            return False
        return True

    wait_until(lambda: (clinic.state / ADDRESS).exists() or process.poll() is not None)
    wait_until(attempt)
    return found[0]


def dies_at_each_step(clinic: Clinic, steps: Sequence[tuple[str, int]], out: Path) -> None:
    """One run whose coordinator dies at each of these steps ends with the model of a run that nothing disturbed."""
    clinic.lead_to(free_port())
    config = configuration(f'data.sites=["{SITES[0]}", "{SITES[1]}"]', "rounds=4")
    with clinic.agents(*SITES[:2]), clinic.operator() as operator:
        with server(clinic, *steps[0]) as process:
            run = submitted(operator, clinic, process, "rounds=4")
            assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        for step in steps[1:]:
            with server(clinic, *step) as process:
                assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL, step
        with server(clinic) as process:
            wait_until(lambda: reachable(operator), process=None)
            status = end_of(operator, run)
            operator.fetch(run, out / "fetched")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0
    assert status["status"] == "completed"
    assert (out / "fetched" / "model.safetensors").read_bytes() == simulated(config, out / "simulated", SITES[:2])
    rows = RunFolder.open(out / "fetched").rounds()
    assert [(row["server_round"], row["failures"]) for row in rows] == [(r, {}) for r in range(1, 5)]
    state = ServiceState(clinic.state / DATABASE, reading=True)
    assert verify(clinic.state / AUDIT, state).problem == ""
    state.close()


def reachable(operator: Coordinator) -> bool:
    """Whether the service answers."""
    try:
        return bool(operator.ask("runs"))
    except UnreachableError:
        return False


def test_killed_within_a_round(tmp_path: Path) -> None:
    """After an update has come, and after a round that has no checkpoint yet."""
    clinic = Clinic(tmp_path)
    dies_at_each_step(clinic, [("received", 0), ("checkpoint", 1)], tmp_path)
    attempts = [line["attempt"] for line in read_lines(clinic.state / AUDIT) if line["event"] == "run-started"]
    assert attempts == [1, 2, 3]


@pytest.mark.slow
def test_killed_at_every_step(tmp_path: Path) -> None:
    """From the start of the run to the note that it has ended: twelve deaths, one run, the same bytes."""
    dies_at_each_step(Clinic(tmp_path), STEPS, tmp_path)
