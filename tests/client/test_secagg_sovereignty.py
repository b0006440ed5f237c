"""A coordinator that turns on its sites under secure aggregation: real kits, real policies, real journals.

Every request is signed by an operator; what is wrong with it is what it asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Message

from client.admission import admission_mod
from client.app import make_client_app
from client.enrolment import confirm
from client.resources import SiteResources, site_resources
from client.secagg import FileJournal, FolderMembers, MemoryMembers, Seat
from common.aggregation import codec_for, rules_for
from common.config import RunConfig
from common.crypto import PartyKeys, authorize
from common.enrolment import federation_fingerprint
from common.errors import FailureCode, RefusedError
from common.flower import ARRAYS, COHORT, ROUND_STEP, SECAGG, SETUP_STEP, client_context, failure_of
from common.kit import UNCONFIRMED, load_kit
from common.secagg import Rules, Setup
from common.secagg.messages import Advertise, Train
from common.site import Site
from tests.helpers.agents import FEDERATION, RUN_ID, configuration, copied, make_kits, start_of
from tests.helpers.summing import Summing, step_of

NAMES = ("cleveland", "hungary", "switzerland", "va-long-beach")
SUMS = ("privacy.secure_aggregation=true",)
REFUSED, POLICY = FailureCode.AGGREGATION_REFUSED, FailureCode.POLICY_REFUSED


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_kits(tmp_path_factory.mktemp("made") / "kits", NAMES)


@pytest.fixture
def kits(made: Path, tmp_path: Path) -> Path:
    """Kits of four hospitals."""
    return copied(made, tmp_path / "kits")


def site(kits: Path, name: str, **how: object) -> SiteResources:
    """A site as its process finds it."""
    return site_resources(load_kit(kits / name, role="site"), **how)  # type: ignore[arg-type]


def app_of(resources: SiteResources) -> Callable[[Message], Message]:
    """A site's app behind its admission, without the seal around it."""
    app = make_client_app(resources, outer=[admission_mod(resources.admission)])
    return lambda message: app(message, client_context(node_id=2, partition=0))


def coordinator(kits: Path, config: RunConfig, sites: Iterable[SiteResources] = ()) -> Summing:
    """A coordinator with an operator's word for a run."""
    alice = load_kit(kits / "alice", role="operator").keys
    fields = {
        "run-id": RUN_ID.hex(),
        "authorization": authorize(alice, federation=FEDERATION, run_id=RUN_ID.hex(), config_digest=config.digest()),
        COHORT: json.dumps(NAMES),
    }
    there = {resources.kit.name: resources for resources in sites or [site(kits, name) for name in NAMES]}
    records = load_kit(kits / "server", role="coordinator").sites
    return Summing(config, {name: app_of(resources) for name, resources in there.items()}, records, **fields)


def summed(asking: Summing) -> np.ndarray:  # type: ignore[type-arg]
    """One honest round."""
    start = start_of(asking.config, Site())
    round_ = asking.begin(asking.set_up(), start)
    asking.train(round_, start)
    assert asking.failures == set()
    return asking.open(round_)


class TestAnHonestRound:
    def test_opens_a_sum_of_all(self, kits: Path) -> None:
        """Real sites, each with its own journal."""
        config = configuration(*SUMS)
        asking = coordinator(kits, config)
        start = start_of(config, Site())
        codec = codec_for(config, start, participants=4, plan=None, server_round=1)
        assert codec.decode(summed(asking), 4).weight == 4
        for name in NAMES:
            (journal,) = (kits / name / "state" / "secagg").glob("*.jsonl")
            assert journal.stem == RUN_ID.hex()

    def test_is_the_same_with_a_process_for_every_message(
        self, kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As under Flower's runtime: nothing is kept but in files."""
        monkeypatch.setattr(SiteResources, "rounding", lambda *_: bytes(32))
        config = configuration(*SUMS)
        expected = summed(coordinator(copied(kits, tmp_path / "other"), config))
        asking = coordinator(kits, config)

        def anew(name: str) -> Callable[[Message], Message]:
            folder = tmp_path / "memory" / name
            folder.mkdir(parents=True)

            def answer(message: Message) -> Message:
                return app_of(site(kits, name, members=FolderMembers(folder)))(message)

            return answer

        asking.apps = {name: anew(name) for name in NAMES}
        assert (summed(asking) == expected).all()
        assert not list((tmp_path / "memory").rglob("*.tmp"))

    def test_is_rounded_as_nobody_can_foresee(self, kits: Path, tmp_path: Path) -> None:
        """Twice the same updates, from the same model in the same run: two sums, apart by rounding and no more.

        Were rounding known, each number that is one client's rounding would be known to be that client's.
        """
        config = configuration(*SUMS)
        one, other = (summed(coordinator(copied(kits, tmp_path / name), config)) for name in ("one", "other"))
        apart = (one - other).view(np.int32)[:-1]
        assert 0 < np.abs(apart).max() <= len(NAMES)

    def test_leaves_no_secret_on_the_disk(self, kits: Path) -> None:
        """Keys of later rounds and the others' shares are in the process alone."""
        there = [site(kits, name) for name in NAMES]
        asking = coordinator(kits, configuration(*SUMS), there)
        summed(asking)
        secrets = []
        for resources in there:
            members = resources.members
            assert isinstance(members, MemoryMembers)
            for _, member in members._members.values():
                for epoch in member._epochs.values():
                    held = [*epoch.pair_keys.values(), *epoch.held.values()]
                    secrets += [epoch.self_keys[:32], *(secret[:32] for secret in held)]
        assert len(secrets) >= 4 * (1 + 3 + 3)
        assert all(len(secret) == 32 for secret in secrets)
        written = [path.read_bytes() for path in kits.glob("*/state/**/*") if path.is_file()]
        assert written
        for data in written:
            assert not any(secret in data or secret.hex().encode() in data for secret in secrets)


class TestAWeakRun:
    @pytest.mark.parametrize("weak", ["colluding=0", "bits=16"])
    def test_is_refused_at_every_step(self, kits: Path, weak: str) -> None:
        """Though an operator signed it."""
        asking = coordinator(kits, configuration(*SUMS, f"secagg.{weak}"))
        strict = "[secure_aggregation]\nleast_bits = 24\n"
        policy = kits / "cleveland" / "policy.toml"
        policy.write_text(policy.read_text() + strict)
        app = app_of(site(kits, "cleveland"))
        start = start_of(asking.config, Site())
        for message in (
            asking.step(SETUP_STEP, b"x"),
            asking.step(ROUND_STEP, b"x"),
            asking.training(b"x", start),
        ):
            assert failure_of(app(message)) is POLICY

    @pytest.mark.parametrize(
        "change",
        [
            {"honest": 1},
            {"colluding": 0},
            {"epoch_rounds": 64},
            {"bits": 16},
            {"group_size": 3},
            {"smallest_cohort": 2},
            {"min_survivors": 1, "honest": 3},
            {"run_id": bytes(16)},
            {"config_digest": bytes(32)},
        ],
        ids="-".join,
    )
    def test_gets_no_keys_under_rules_that_are_not_the_runs(self, kits: Path, change: dict[str, object]) -> None:
        """A coordinator cannot set up a sum that is weaker than what was signed."""
        config = configuration(*SUMS)
        asking = coordinator(kits, config)
        weaker: Rules = replace(rules_for(config, RUN_ID), **change)
        advertise = Advertise(epoch=bytes(16), rules=weaker.digest).to_bytes()
        asking.ask(SETUP_STEP, dict.fromkeys(NAMES, advertise))
        assert asking.failures == {REFUSED.slug}

    def test_is_none_where_a_site_wants_sums(self, kits: Path) -> None:
        """A run that leaves them out is not joined."""
        policy = kits / "cleveland" / "policy.toml"
        policy.write_text(policy.read_text() + "[privacy]\nrequire_secure_aggregation = true\n")
        asking = coordinator(kits, configuration())
        app, start = app_of(site(kits, "cleveland")), start_of(asking.config, Site())
        message = asking.training(b"x", start)
        del message.content[SECAGG]
        assert failure_of(app(message)) is POLICY

    def test_has_no_fewer_participants_than_it_says(self, kits: Path) -> None:
        """Two of four are no sum; nor is one."""
        config = configuration(*SUMS)
        asking, start = coordinator(kits, config), start_of(config, Site())
        group = asking.set_up()
        for ranks in ((0, 1), (0,), ()):
            train = Train(epoch=group.epoch, index=1, participants=ranks, certificates=())
            reply = asking.apps["cleveland"](asking.training(train.to_bytes(), start))
            assert failure_of(reply) is REFUSED
        round_ = asking.begin(group, start)
        asking.train(round_, start)
        assert asking.failures == set()


class TestOneRunIdForTwoConfigurations:
    """An operator who helps the coordinator signs it for both: noise for many honest sites, sums of few."""

    @pytest.mark.parametrize("kept", ["memory", "files"])
    def test_is_the_first_ones(self, kits: Path, tmp_path: Path, kept: str) -> None:
        """A member goes by the rules that it was made with; the other configuration gets neither keys nor updates."""
        there = []
        for name in NAMES:
            folder = tmp_path / name
            folder.mkdir()
            there.append(site(kits, name, members=MemoryMembers() if kept == "memory" else FolderMembers(folder)))
        config, other = configuration(*SUMS), configuration(*SUMS, "secagg.honest=3")
        asking, more = coordinator(kits, config, there), coordinator(kits, other, there)
        group, start = asking.set_up(), start_of(config, Site())
        round_ = asking.begin(group, start)
        more.train(round_, start)
        assert more.failures == {REFUSED.slug}
        more.ask(SETUP_STEP, Setup(rules_for(other, RUN_ID), records=more.records, names=NAMES).requests())
        assert more.failures == {REFUSED.slug}
        asking.train(round_, start)
        assert asking.failures == set()


class TestPins:
    def test_decide_who_is_in_a_roster(self, kits: Path) -> None:
        """A site that does not know one of the others stays out; the others go on."""
        _forget(kits / "cleveland", "switzerland")
        asking = coordinator(kits, configuration(*SUMS))
        assert asking.set_up().names == ("hungary", "switzerland", "va-long-beach")
        assert site(kits, "cleveland").secagg_claim == "malicious coordinator"

    def test_are_not_replaced_by_what_a_coordinator_sends(self, kits: Path) -> None:
        """A coordinator that puts its own keys in a site's place is found out by all."""
        config = configuration(*SUMS)
        asking = coordinator(kits, config)
        own = PartyKeys.generate("switzerland", "site")
        impostor = site(kits, "switzerland")
        impostor = replace(impostor, kit=replace(impostor.kit, keys=own))
        seat = Seat(
            name="switzerland",
            signer=own,
            peers={**impostor.kit.sites, "switzerland": own.record},
            rules=rules_for(config, RUN_ID),
            journal=FileJournal(kits / "impostor", RUN_ID),
            most_aborts=20,
        )
        member = seat.new()
        setup = Setup(seat.rules, records=seat.peers, names=NAMES)
        for name, request in setup.requests().items():
            if name == "switzerland":
                setup.receive(name, member.answer(request))
            else:
                reply = asking.apps[name](asking.step(SETUP_STEP, request))
                setup.receive(name, step_of(reply, SETUP_STEP))
        setup.advance()
        asking.ask(SETUP_STEP, {name: request for name, request in setup.requests().items() if name != "switzerland"})
        assert asking.failures == {REFUSED.slug}

    def test_that_came_through_the_coordinator_do_not_count(self, kits: Path) -> None:
        """Until somebody has compared them with what others have."""
        _bring(kits / "cleveland", ("hungary", "switzerland", "va-long-beach"))
        assert site(kits, "cleveland").not_agreed == ["hungary", "switzerland", "va-long-beach"]
        asking = coordinator(kits, configuration(*SUMS))
        assert "cleveland" not in asking.set_up().names
        kit = load_kit(kits / "hungary", role="site")
        with pytest.raises(RefusedError, match="fingerprint"):
            confirm(kits / "cleveland", "00" * 16)
        assert "cleveland" not in coordinator(kits, configuration(*SUMS)).set_up().names
        read_out = federation_fingerprint((kit.folder / "ca.pem").read_bytes(), kit.pins())
        confirm(kits / "cleveland", read_out)
        assert coordinator(kits, configuration(*SUMS)).set_up().names == NAMES

    def test_count_where_the_policy_says_that_it_does_not_matter(self, kits: Path) -> None:
        """And the claim is smaller then."""
        _bring(kits / "cleveland", ("hungary",))
        policy = kits / "cleveland" / "policy.toml"
        policy.write_text(policy.read_text() + "[secure_aggregation]\nrequire_pins = false\n")
        assert coordinator(kits, configuration(*SUMS)).set_up().names == NAMES
        assert site(kits, "cleveland").secagg_claim == "curious coordinator"
        assert site(kits, "cleveland").not_agreed == []


class TestAModel:
    def test_is_trained_on_once_by_all_processes_of_a_site(self, kits: Path) -> None:
        """What the first has masked, the second does not mask again."""
        config = configuration(*SUMS)
        summed(coordinator(kits, config))
        again, start = coordinator(kits, config), start_of(config, Site())
        round_ = again.begin(again.set_up(), start)
        again.train(round_, start)
        assert again.failures == {REFUSED.slug}

    def test_is_trained_on_again_once_all_know_that_the_round_is_burnt(self, kits: Path) -> None:
        """Also by processes that never had the round's secrets."""
        config = configuration(*SUMS)
        first, start = coordinator(kits, config), start_of(config, Site())
        round_ = first.begin(first.set_up(), start)
        first.train(round_, start)
        second = coordinator(kits, config)
        certificate = second.burn(round_)
        again = second.begin(second.set_up(), start, burnt=[certificate])
        second.train(again, start)
        assert second.failures == set()

    def test_is_not_trained_on_where_the_journal_is_damaged(self, kits: Path) -> None:
        """A site that does not know what it has done does nothing."""
        config = configuration(*SUMS)
        summed(coordinator(kits, config))
        (journal,) = (kits / "cleveland" / "state" / "secagg").glob("*.jsonl")
        journal.write_text("nonsense\n")
        again = coordinator(kits, config)
        again.ask(SETUP_STEP, {"cleveland": b"x"})
        assert again.failures == {FailureCode.CLIENT_FAILED.slug}


def test_a_message_without_masks_is_never_answered_with_an_update(kits: Path) -> None:
    """Whatever is left out of it."""
    config = configuration(*SUMS)
    asking, start = coordinator(kits, config), start_of(config, Site())
    message = asking.training(b"", start)
    del message.content[SECAGG]
    reply = asking.apps["cleveland"](message)
    assert failure_of(reply) is REFUSED
    assert ARRAYS not in (reply.content if reply.has_content() else {})


def _forget(kit: Path, name: str) -> None:
    """A kit that was made before a site joined."""
    path = kit / "parties.json"
    document = json.loads(path.read_text())
    document["parties"] = [party for party in document["parties"] if party["name"] != name]
    path.write_text(json.dumps(document))


def _bring(kit: Path, names: Iterable[str]) -> None:
    """A kit whose pins of these came through the coordinator."""
    pins = load_kit(kit, role="site").sites
    document = {"format": 1, "key_ids": [pins[name].key_id.hex() for name in names]}
    (kit / UNCONFIRMED).write_text(json.dumps(document))
