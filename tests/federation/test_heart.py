"""A whole federation as separate processes: what it trains is what a simulation trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.service.audit import AUDIT, read_lines
from simulations import federation
from simulations.federation import compare
from simulations.loopback import SITES, LocalFederation
from tests.helpers.processes import coterie


def test_separate_processes_reach_the_model_of_a_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six processes, loopback, everything sealed: byte for byte the simulation's model, and all of it on record."""
    found = compare(tmp_path, overrides=["rounds=3"])
    assert found["identical"]
    assert (found["rounds"], found["sites"]) == (3, list(SITES))
    assert found["accuracy"] > found["majority_accuracy"]
    server = tmp_path / "kits" / "server"
    assert coterie("audit-log", "verify", "--kit", server) == 0
    assert coterie("predict", tmp_path / "fetched", "--data", "heart", "--out", tmp_path / "rows.csv") == 0
    assert coterie("runs", "--root", server / "state" / "runs") == 0
    assert "completed" in capsys.readouterr().out
    detached = [line["party"] for line in read_lines(server / "state" / AUDIT) if line["event"] == "site-detached"]
    assert sorted(detached) == sorted(SITES), "every site was ended in good order"


@pytest.mark.slow
def test_make_federation_prints_what_it_found(capsys: pytest.CaptureFixture[str]) -> None:
    """All twenty rounds, in a folder that is gone afterwards; one JSON document on stdout."""
    assert federation.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model_sha256"] == found["simulated_sha256"]
    assert found["rounds"] == 20


def test_models_that_differ_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The target fails where the promise does."""
    facts = {
        "accuracy": 0.8, "majority_accuracy": 0.5, "model_sha256": "a", "simulated_sha256": "b", "identical": False,
        "agrees": False,
        "seconds": {"federation": 1.0, "simulation": 1.0}, "secure_aggregation": None,
    }  # fmt: skip
    monkeypatch.setattr(federation, "compare", lambda *_, **__: facts)
    assert federation.main([]) == 1
    assert "THE MODELS DIFFER" in capsys.readouterr().out


def test_a_coordinator_that_cannot_start_is_told(tmp_path: Path) -> None:
    """With the end of its log, instead of waiting for it."""
    from common.errors import RunError

    with LocalFederation(tmp_path, server_options=["--no-such-option"]) as parties:
        parties.server.start()
        with pytest.raises(RunError, match="no-such-option"):
            parties.wait_until_answered()
