"""`coterie client` as an administrator meets it: clear errors, one document, nothing written by a dry run."""

import json
import os

import pytest
import structlog

from client.cli import LOCK
from common.disk import acquire_lock
from common.flower import failure_of
from common.kit import load_kit
from tests.helpers.agents import (
    PRIVATE,
    Asker,
    configuration,
    copied,
    make_kits,
    resources_of,
    running_agent,
)
from tests.helpers.plane import running_plane
from tests.helpers.processes import coterie

RUN = "heart"
"""The scenario of that name."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_kits(tmp_path_factory.mktemp("made") / "kits")


@pytest.fixture
def kits(made, tmp_path):
    return copied(made, tmp_path / "kits")


class TestDryRun:
    """`--dry-run`"""

    def test_in_words(self, kits, capsys):
        """What leaves, what it costs, and whether the site joins."""
        assert coterie("client", "--kit", kits / "cleveland", "--dry-run", RUN) == 0
        out = capsys.readouterr().out
        assert "cleveland joins run heart" in out
        assert "bytes a round, sealed to the coordinator alone" in out
        assert "of 10 spent" in out

    def test_as_one_document(self, kits, capsys):
        """With settings changed by hand."""
        words = ("--json", "--set", "privacy.target_epsilon=40")
        assert coterie("client", "--kit", kits / "cleveland", "--dry-run", RUN, *words) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["format"] == 1
        assert not told["joins"]
        assert "spent epsilon" in told["reasons"][0]

    def test_settings_are_for_dry_runs(self, kits, capsys):
        """A coordinator's runs come as they are."""
        assert coterie("client", "--kit", kits / "cleveland", "--set", "rounds=1") == 2
        assert "--dry-run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("party", "code", "problem"),
    [("nobody", 11, "there is no folder"), ("server", 11, "kit of the coordinator"), ("alice", 11, "of an operator")],
)
def test_another_party_s_kit_is_refused(kits, capsys, party, code, problem):
    """Exit code 11."""
    assert coterie("client", "--kit", kits / party) == code
    assert problem in capsys.readouterr().err


def test_a_site_without_rules_takes_part_in_nothing(kits, capsys):
    """The hint names the command that writes an example."""
    (kits / "cleveland" / "policy.toml").unlink()
    assert coterie("client", "--kit", kits / "cleveland", "--no-wait") == 4
    assert "coterie policy init" in capsys.readouterr().err


def test_a_second_process_on_one_kit_is_refused(kits, capsys):
    """Whatever the first does."""
    lock = acquire_lock(load_kit(kits / "cleveland", role="site").state / LOCK)
    try:
        assert coterie("client", "--kit", kits / "cleveland") == 9
    finally:
        os.close(lock)
    assert "works with the kit" in capsys.readouterr().err


def test_the_written_policy_is_one_that_can_be_read(kits, capsys):
    """With every rule that there is."""
    path = kits / "cleveland" / "new.toml"
    assert coterie("policy", "init", "--out", path) == 0
    assert coterie("policy", "check", path, "--json") == 0
    policy = json.loads(capsys.readouterr().out.splitlines()[-1])["policy"]
    text = path.read_text()
    for table, rules in policy.items():
        assert f"[{table}]" in text
        assert all(rule in text for rule in rules if rule != "order")


def test_the_ledger_of_a_kit_is_found(kits, tmp_path, capsys):
    """`coterie ledger show --kit`, after a round was paid for."""
    with running_plane(kits, tmp_path / "hub") as plane, running_agent(resources_of(plane)):
        assert failure_of(Asker(plane).ask(configuration(*PRIVATE))) is None
    assert coterie("ledger", "verify", "--kit", kits / "cleveland") == 0
    capsys.readouterr()
    assert coterie("ledger", "show", "heart", "--kit", kits / "cleveland", "--json") == 0
    (ledger,) = json.loads(capsys.readouterr().out)["ledgers"]
    assert ledger["name"] == "heart"
    assert coterie("ledger", "show", "--kit", kits / "hungary") == 8


def test_the_log_tells_nothing_of_the_data(kits, tmp_path):
    """Names, ids and codes; no number that was computed from an example, and no byte of an update."""
    with (
        structlog.testing.capture_logs() as lines,
        running_plane(kits, tmp_path / "hub") as plane,
        running_agent(resources_of(plane)),
    ):
        for config in (configuration(*PRIVATE), configuration()):
            assert failure_of(Asker(plane).ask(config)) is None
        assert failure_of(Asker(plane).ask(configuration("rounds=20000"))) is not None
    known = {
        "event", "log_level", "coordinator", "coordinator_version", "kind", "order", "failure", "reason", "run_id",
        "updates_left", "retry_in_seconds",
    }  # fmt: skip
    ours = [line for line in lines if not line["event"].startswith("plane")]
    assert {"attached", "order_received", "update_ready", "receipt", "request_refused"} <= {
        line["event"] for line in ours
    }
    assert all(line.keys() <= known for line in ours)
    assert not any(
        isinstance(value, float) for line in ours for key, value in line.items() if key != "retry_in_seconds"
    )
