"""Simulated members: their keys and journals are the run's, their secrets go wherever their client goes."""

from __future__ import annotations

import pickle  # as multiprocessing does
import stat
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from safetensors.numpy import load_file

from common.config import RunConfig
from common.errors import FailureCode, RunError
from common.flower import CONFIG, ROUND, SECAGG, SECAGG_TYPE, SETUP_STEP, failure_of
from server.roster import request_record
from simulations.engines import inline_grid
from simulations.inline import app_factory
from simulations.run import execute
from simulations.sealing import KEYS, Sealing
from simulations.sites import JOURNALS
from tests.helpers.runs import as_bytes, configuration, prepared, run
from tests.helpers.summing import steps
from tests.simulations.test_ray import on_ray

NAMES = ["client-00", "client-01", "client-02", "client-03"]


def masked(**changes: Any) -> RunConfig:
    """`tiny` on `blobs` under secure aggregation."""
    return configuration(privacy={"secure_aggregation": True}, strategy={"weighting": "equal"}, **changes)


class TestKeys:
    def test_are_made_once_for_a_run(self, tmp_path: Path) -> None:
        """A run that is resumed goes on with those that signed what is in its folder."""
        first, again = Sealing.for_clients(NAMES, folder=tmp_path), Sealing.for_clients(NAMES, folder=tmp_path)
        assert first.records == again.records
        assert stat.S_IMODE((tmp_path / KEYS).stat().st_mode) == 0o600

    def test_are_different_for_every_party_and_run(self, tmp_path: Path) -> None:
        """Two parties of one name and two roles, too."""
        (tmp_path / "other").mkdir()
        first, other = Sealing.for_clients(["coordinator"], folder=tmp_path), Sealing.for_clients(["coordinator"])
        keys = {
            record.ed25519
            for parties in (first, other)
            for record in (parties.coordinator.record, parties.records["coordinator"])
        }
        assert len(keys) == 4

    def test_of_a_run_without_a_folder_are_forgotten(self, tmp_path: Path) -> None:
        """Nothing is written anywhere."""
        assert Sealing.for_clients(NAMES).records != Sealing.for_clients(NAMES).records
        assert not (tmp_path / KEYS).exists()

    def test_that_cannot_be_kept_are_an_error(self, tmp_path: Path) -> None:
        """Before anything is signed with them."""
        with pytest.raises(RunError):
            Sealing.for_clients(NAMES, folder=tmp_path / "none")

    def test_of_clients_go_to_workers_and_the_coordinators_do_not(self, tmp_path: Path) -> None:
        """As under sealing."""
        parties = Sealing.for_clients(NAMES)
        sites = prepared(tmp_path, masked()).sites.keyed(parties.clients, journals=tmp_path)
        sent = pickle.dumps(sites)
        assert parties.coordinator._seeds["ed25519"] not in sent
        assert all(keys._seeds["ed25519"] in sent for keys in parties.clients.sites)
        assert "federation" in sites.__dict__, "the data is not loaded twice"


class TestOnRay:
    @pytest.mark.slow
    @pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
    def test_members_stay_with_their_nodes(self, tmp_path: Path) -> None:
        """Whichever of Ray's processes answers next: the inline engine's model."""
        tables = {"privacy": {"secure_aggregation": True}, "strategy": {"weighting": "equal"}}
        code, _, err = on_ray(tmp_path, "--out", "ray", **tables)
        assert code == 0, err
        found = load_file(tmp_path / "ray" / "model.safetensors")
        expected = execute(prepared(tmp_path, masked(rounds=2, data={"clients": 3}))).arrays
        assert max(float(abs(found[name] - expected[name]).max()) for name in expected) <= 1e-5


class TestJournals:
    def test_lie_in_the_runs_folder(self, tmp_path: Path) -> None:
        """One for each client: every round once, with what it said about it."""
        run(tmp_path / "run", masked())
        for name in NAMES:
            (journal,) = (tmp_path / "run" / JOURNALS / name).iterdir()
            lines = journal.read_text().splitlines()
            assert [('"used"' in line, '"stated"' in line) for line in lines] == [(True, False), (False, True)] * 3

    def test_of_a_run_without_a_folder_are_forgotten(self, tmp_path: Path) -> None:
        """The same run can be made again."""
        possible = prepared(tmp_path, masked())
        assert as_bytes(dict(execute(possible).arrays)) == as_bytes(dict(execute(possible).arrays))
        assert not (tmp_path / JOURNALS).exists()


def test_a_client_without_keys_takes_part_in_no_sum(tmp_path: Path) -> None:
    """It is refused, not trained in the open."""
    possible = prepared(tmp_path, masked())
    record = ConfigRecord({**request_record(possible.config), ROUND: 1})
    content = RecordDict({CONFIG: record, SECAGG: steps(**{SETUP_STEP: b"x"})})
    with inline_grid(possible, app_factory, workers=1) as grid:
        asked = [Message(content, node, SECAGG_TYPE) for node in grid.get_node_ids()]
        assert {failure_of(reply) for reply in grid.send_and_receive(asked)} == {FailureCode.AGGREGATION_REFUSED}
