"""What the coordinator answers its operators, over the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.config import load_config
from common.crypto import authorize
from common.errors import ConfigError, CoterieError, RefusedError, RunError, UnreachableError
from common.transport.channel import OperatorCalls, channel
from common.transport.wire_pb2 import SubmitRequest
from server.provisioning.denied import deny
from server.remote import Coordinator
from tests.helpers.agents import FEDERATION, configuration
from tests.helpers.clinic import SITES, Clinic

RUN_ID = "ab" * 16


@pytest.fixture(scope="module")
def clinic(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clinic]:
    """A service without sites: whatever is queued waits."""
    made = Clinic(tmp_path_factory.mktemp("clinic"))
    with made.serving():
        yield made


@pytest.fixture
def alice(clinic: Clinic) -> Iterator[Coordinator]:
    with clinic.operator("alice") as coordinator:
        yield coordinator


def sent(clinic: Clinic, text: str, authorization: str, *, operator: str = "alice") -> dict:
    """The answer to a submission of a test's own making."""
    kit = clinic.kit(operator)
    connection = channel(kit.address, kit.tls())
    try:
        answer = OperatorCalls(connection).submit(SubmitRequest(config=text, authorization=authorization))
    finally:
        connection.close()
    return json.loads(answer.json)


def signed(clinic: Clinic, digest: str, *, operator: str = "alice", run_id: str = RUN_ID) -> str:
    return authorize(clinic.kit(operator).keys, federation=FEDERATION, run_id=run_id, config_digest=digest)


class TestSubmitting:
    def test_a_run_is_queued_for_all_sites_unless_it_names_them(self, alice: Coordinator) -> None:
        """It says at once whom it waits for."""
        status = alice.submit(configuration())
        assert (status["status"], status["sites"]) == ("queued", sorted(SITES))
        assert status["waiting_for_sites"] == sorted(SITES)
        assert alice.submit(configuration('data.sites=["hungary"]'))["sites"] == ["hungary"]

    def test_the_same_submission_twice_is_one_run(self, clinic: Clinic, alice: Coordinator) -> None:
        """An operator whose connection broke in between does not train twice."""
        config = configuration("name=once")
        authorization = signed(clinic, config.digest(), run_id="cd" * 16)
        first = sent(clinic, config.canonical_json(), authorization)
        assert sent(clinic, config.canonical_json(), authorization)["run"] == first["run"]
        assert [run["name"] for run in alice.ask("runs")["runs"]].count("once") == 1

    def test_another_run_under_the_same_id_is_refused(self, clinic: Clinic) -> None:
        for name in ("one", "two"):
            config = configuration(f"name={name}")
            answer = sent(clinic, config.canonical_json(), signed(clinic, config.digest(), run_id="ef" * 16))
        assert answer["error"]["code"] == RunError.code

    def test_what_was_signed_is_what_runs(self, clinic: Clinic) -> None:
        """Another configuration than the signed one is refused, and so is another spelling of it."""
        config = configuration()
        authorization = signed(clinic, config.digest())
        changed = configuration("rounds=4").canonical_json()
        spelled = json.dumps(json.loads(config.canonical_json()))
        for text in (changed, spelled):
            assert sent(clinic, text, authorization)["error"]["code"] == RefusedError.code

    def test_nobody_submits_what_another_has_signed(self, clinic: Clinic) -> None:
        """The TLS identity and the signature must be the same operator's."""
        config = configuration()
        answer = sent(clinic, config.canonical_json(), signed(clinic, config.digest(), operator="mallory"))
        assert answer["error"]["code"] == RefusedError.code
        assert "mallory" in answer["error"]["message"]

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"rounds": 0}', '{"unknown": 1}'])
    def test_what_is_no_configuration_is_refused(self, clinic: Clinic, text: str) -> None:
        assert sent(clinic, text, signed(clinic, "0" * 64))["error"]["code"] == ConfigError.code

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ('data.sites=["hungaria"]', "no site `hungaria`"),
            ("data.pooled=true", "`data.pooled` is for simulations only"),
            ("simulation.byzantine_clients=1", "byzantine_clients` is for simulations only"),
            ("cohort.size=7", "only 3 clients"),
            ("strategy.name=bulyan", "bulyan"),
            ("model.name=cnn", ""),
            ("model.name=nothing", "nothing"),
        ],
    )
    def test_what_cannot_end_well_is_refused_at_once(self, alice: Coordinator, change: str, words: str) -> None:
        """With the words of whoever refuses it, and a hint: the operator need not look into any log."""
        with pytest.raises(CoterieError) as caught:
            alice.submit(configuration(change, "strategy.malicious_clients=1"))
        assert words.lower() in str(caught.value).lower()
        assert caught.value.hint

    def test_a_comparison_is_for_simulations(self, alice: Coordinator) -> None:
        with pytest.raises(ConfigError, match=r"comparison\.enabled"):
            alice.submit(load_config("heart", ["privacy.unit=none"]).config)

    def test_a_private_run_is_calibrated_before_it_is_queued(self, alice: Coordinator) -> None:
        """A target that no noise can reach is refused now, not after a night."""
        private = ["privacy.unit=example", "training.local_steps=1", "privacy.target_epsilon=1e-7"]
        with pytest.raises(CoterieError) as caught:
            alice.submit(configuration(*private))
        assert caught.value.exit_code == 8

    def test_a_data_set_that_only_sites_know_is_queued(self, alice: Coordinator) -> None:
        """Its shape is asked when the run starts."""
        assert alice.submit(configuration("data.name=patients"))["status"] == "queued"
        with pytest.raises(ConfigError, match="only 3 clients"):
            alice.submit(configuration("data.name=patients", "cohort.size=7"))


class TestAsking:
    def test_unknown_runs_suggest_near_ones(self, alice: Coordinator) -> None:
        alice.submit(configuration("name=pneumonia"))
        with pytest.raises(RunError, match="no run `pneumona`") as caught:
            alice.ask("status", "pneumona")
        assert "`pneumonia`" in caught.value.hint

    def test_latest_and_beginnings_name_a_run(self, alice: Coordinator) -> None:
        run = alice.submit(configuration())["run"]
        assert {alice.ask("status", wanted)["run"] for wanted in ("latest", run, run[:12])} == {run}

    def test_runs_are_listed_newest_first(self, alice: Coordinator) -> None:
        run = alice.submit(configuration())["run"]
        listed = alice.ask("runs")["runs"]
        assert listed[0]["run"] == run
        assert [r["submitted"] for r in listed] == sorted((r["submitted"] for r in listed), reverse=True)

    def test_sites_are_listed_with_who_is_there(self, clinic: Clinic, alice: Coordinator) -> None:
        """Attached, denied, and by which key they are known."""
        with clinic.agents("hungary"):
            assert clinic.service is not None
            sites: dict = {}
            while not sites.get("hungary", {}).get("attached"):
                sites = {site["name"]: site for site in alice.ask("sites")["sites"]}
        assert sorted(sites) == sorted(SITES)
        assert sites["cleveland"]["attached"] is False
        assert sites["hungary"]["version"]
        assert sites["hungary"]["key_id"] == clinic.kit("hungary").keys.record.key_id.hex()

    def test_a_run_that_waits_is_stopped_at_once(self, alice: Coordinator) -> None:
        """And whoever followed it is told so."""
        run = alice.submit(configuration())["run"]
        following = alice.follow("status", run)
        assert next(following)["status"] == "queued"
        assert alice.ask("stop", run)["status"] == "stopped"
        *_, last = following
        assert last["status"] == "stopped"
        assert [line["event"] for line in alice.ask("logs", run)["lines"]] == [
            "run-submitted", "stop-requested", "run-ended",
        ]  # fmt: skip

    def test_the_log_of_a_run_can_be_followed_to_its_end(self, alice: Coordinator) -> None:
        run = alice.submit(configuration())["run"]
        following = alice.follow("logs", run)
        assert next(following)["line"]["event"] == "run-submitted"
        alice.ask("stop", run)
        assert [document["line"]["event"] for document in following] == ["stop-requested", "run-ended"]

    @pytest.mark.parametrize("what", ["", "secrets", "download" * 100])
    def test_a_question_that_there_is_not_is_refused(self, alice: Coordinator, what: str) -> None:
        alice.submit(configuration())
        with pytest.raises(RefusedError):
            alice.ask(what, "latest")
        with pytest.raises(RefusedError):
            next(alice.follow(what, "latest"))

    def test_a_run_without_a_result_cannot_be_fetched(self, alice: Coordinator, tmp_path: Path) -> None:
        alice.submit(configuration())
        with pytest.raises(RunError, match="has no result: it is queued"):
            alice.fetch("latest", tmp_path / "out")
        assert list(tmp_path.iterdir()) == []


class TestAdmission:
    def test_sites_are_no_operators(self, clinic: Clinic) -> None:
        """A site's certificate opens none of these calls."""
        with Coordinator(clinic.kit("hungary")) as intruder, pytest.raises(UnreachableError, match="let you in"):
            intruder.ask("runs")

    def test_an_operator_who_is_shut_out_is_not_answered(self, tmp_path: Path) -> None:
        """From the next call on, without a restart."""
        clinic = Clinic(tmp_path)
        with clinic.serving(), clinic.operator("mallory") as mallory:
            assert mallory.ask("runs") == {"runs": []}
            deny(clinic.kits / "server", "mallory")
            with pytest.raises(UnreachableError, match="let you in"):
                mallory.ask("runs")

    def test_sites_that_are_shut_out_are_left_out_of_new_runs(self, tmp_path: Path) -> None:
        """A run over all sites would wait for them for ever; one that names them is refused."""
        clinic = Clinic(tmp_path)
        deny(clinic.kits / "server", "hungary")
        with clinic.serving(), clinic.operator() as operator:
            assert operator.submit(configuration())["sites"] == ["cleveland", "switzerland"]
            with pytest.raises(ConfigError, match="deny list"):
                operator.submit(configuration('data.sites=["hungary"]'))
