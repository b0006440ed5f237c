"""A coordinator under secure aggregation that is killed at every trip of a round, under sites that never stopped."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load

from server.service.audit import AUDIT, verify
from server.service.process import DATABASE
from server.service.state import ServiceState
from server.store import RunFolder
from simulations.loopback import free_port
from tests.helpers.agents import configuration
from tests.helpers.clinic import SITES, Clinic, end_of, simulated
from tests.helpers.processes import PATIENCE_SECONDS, wait_until
from tests.server.service.test_killed import reachable, server, submitted

OVERRIDES = ("data.sites=" + "[" + ", ".join(f'"{site}"' for site in SITES) + "]", "rounds=3",
             "privacy.secure_aggregation=true")  # fmt: skip
SET_UP = 4 * len(SITES)
"""Answers of a set-up; then come those of the trips of a round: updates, statements, shares."""


def dies(clinic: Clinic, received: Sequence[int], out: Path) -> None:
    """A run whose coordinator dies when so many more answers have come, each time, does all its rounds with all sites,
    and ends with the model that an undisturbed run ends with, but for units in the last place.
    """
    clinic.lead_to(free_port())
    with clinic.agents(*SITES), clinic.operator() as operator:
        with server(clinic, "received", received[0]) as process:
            run = submitted(operator, clinic, process, *OVERRIDES)
            assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
        for passes in received[1:]:
            with server(clinic, "received", passes) as process:
                assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL, passes
        with server(clinic) as process:
            wait_until(lambda: reachable(operator), process=None)
            status = end_of(operator, run)
            operator.fetch(run, out / "fetched")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_SECONDS) == 0
    assert status["status"] == "completed"
    rows = RunFolder.open(out / "fetched").rounds()
    assert [(row["server_round"], row["failures"]) for row in rows] == [(r, {}) for r in range(1, 4)]
    ended = load((out / "fetched" / "model.safetensors").read_bytes())
    undisturbed = load(simulated(configuration(*OVERRIDES), out / "simulated", SITES))
    assert all(np.allclose(ended[name], values, atol=1e-5) for name, values in undisturbed.items())
    state = ServiceState(clinic.state / DATABASE, reading=True)
    assert verify(clinic.state / AUDIT, state).problem == ""
    state.close()


def test_killed_after_masked_updates_came(tmp_path: Path) -> None:
    """The round is burnt, or the model moved; either way every site takes part again."""
    dies(Clinic(tmp_path), [SET_UP + 1], tmp_path)


@pytest.mark.slow
def test_killed_in_every_trip(tmp_path: Path) -> None:
    """In the set-up, among updates, statements and shares: six deaths, one run."""
    dies(Clinic(tmp_path), [1, 5, SET_UP, SET_UP + 2, SET_UP + 4, SET_UP + 7], tmp_path)
