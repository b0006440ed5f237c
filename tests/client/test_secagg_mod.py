"""A client's part in sums: real clients, real members, and a coordinator that tries this and that."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord

from client.app import make_client_app
from client.policy import PERMISSIVE
from client.policy_tables import SecureAggregation
from client.secagg import MemoryMembers
from common.aggregation import codec_for, covered, flatten, rules_for
from common.crypto import PartyKeys
from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, MASKED, ROUND_STEP, SECAGG, SETUP_STEP, arrays_of, failure_of, to_record
from common.models.weights import ModelWeights
from common.secagg import Setup
from common.secagg.messages import Statement
from common.secagg.packing import packed_bytes
from common.site import Site
from tests.client.conftest import PRIVATE, Client, initial, run, train_message
from tests.helpers.summing import Summing, step_of, steps

NAMES = ("east", "north", "south", "west")
KEYS = {name: PartyKeys.generate(name, "site") for name in NAMES}
RECORDS = {name: keys.record for name, keys in KEYS.items()}


def config(*overrides):
    """A run of small sums."""
    return run("privacy.secure_aggregation=true", "training.local_epochs=1", "strategy.weighting=equal", *overrides)


@pytest.fixture
def clients(digits, tmp_path):
    """Four sites with twenty digits each."""

    def make(**fields) -> dict[str, Client]:
        made = {}
        for place, name in enumerate(NAMES):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            part = digits.take(torch.arange(20 * place, 20 * place + 20))
            made[name] = Client(part, folder, Site(), name=name, signer=KEYS[name], peers=RECORDS, **fields)
        return made

    return make


def coordinator(settings, clients) -> Summing:
    fields = dict(train_message(settings).content[CONFIG])
    return Summing(settings, {name: client.answer for name, client in clients.items()}, RECORDS, **fields)


def model(settings):
    return ModelWeights(initial(settings)).copy()


def updates(settings, clients, start, server_round=1):
    """What each client would send without masks, by name."""
    plain = settings.model_copy(update={"privacy": settings.privacy.model_copy(update={"secure_aggregation": False})})
    found = {}
    for name, client in clients.items():
        reply = client.answer(train_message(plain, arrays=start, server_round=server_round))
        found[name] = flatten(covered(start), start, arrays_of(reply.content))
    return found


class TestASum:
    """What the coordinator gets."""

    def test_is_the_mean_of_all_updates_up_to_rounding(self, clients):
        """Within the codec's bound, metrics among them."""
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        exact = updates(settings, sites, start)
        group = asking.set_up()
        round_ = asking.begin(group, start)
        asking.train(round_, start)
        codec = codec_for(settings, start, participants=len(NAMES), plan=None, server_round=1)
        told = codec.decode(asking.open(round_), len(NAMES))
        error = np.abs(told.update - np.mean(list(exact.values()), axis=0)).max()
        assert error <= codec.bound(len(NAMES), told.weight)
        assert told.weight == len(NAMES)
        assert 0 < told.metrics["train_loss"] < 10

    def test_is_the_same_however_often_it_is_made(self, clients, tmp_path):
        """Rounding depends on the run, the round and the client; masks leave nothing behind."""
        sums = []
        for attempt in range(2):
            settings, sites = config(), clients()
            for site in sites.values():
                site.folder = tmp_path / str(attempt)
            start, asking = model(settings), coordinator(settings, sites)
            round_ = asking.begin(asking.set_up(), start)
            asking.train(round_, start)
            sums.append(asking.open(round_))
        assert (sums[0] == sums[1]).all()

    def test_lacks_those_who_vanished(self, clients):
        """After they were asked: the others' masks with them are taken off."""
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        exact = updates(settings, sites, start)
        round_ = asking.begin(asking.set_up(), start)
        del asking.apps["south"]
        asking.train(round_, start)
        codec = codec_for(settings, start, participants=len(NAMES), plan=None, server_round=1)
        told = codec.decode(asking.open(round_), 3)
        left = [exact[name] for name in NAMES if name != "south"]
        assert np.abs(told.update - np.mean(left, axis=0)).max() <= codec.bound(3, told.weight)

    def test_holds_counts_that_nobody_is_told(self, clients):
        """Weights by examples ride inside of it."""
        settings, sites = config("strategy.weighting=examples"), clients()
        start, asking = model(settings), coordinator(settings, sites)
        round_ = asking.begin(asking.set_up(), start)
        asking.train(round_, start)
        codec = codec_for(settings, start, participants=len(NAMES), plan=None, server_round=1)
        assert codec.decode(asking.open(round_), len(NAMES)).weight == 80


class TestAReply:
    """What leaves a client."""

    @pytest.fixture
    def masked(self, clients):
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        round_ = asking.begin(asking.set_up(), start)
        return settings, sites, start, asking.train(round_, start)

    def test_is_one_packed_vector_and_nothing_else(self, masked):
        """No weight, no loss, no other array."""
        settings, _, start, replies = masked
        codec = codec_for(settings, start, participants=len(NAMES), plan=None, server_round=1)
        for reply in replies.values():
            assert list(reply.content) == [ARRAYS]
            arrays = arrays_of(reply.content)
            assert list(arrays) == [MASKED]
            assert arrays[MASKED].dtype == np.uint8
            assert arrays[MASKED].shape == (packed_bytes(codec.size, codec.bits),)

    def test_looks_like_noise(self, masked):
        """Every byte value is about as frequent as any other; false alarms: less than one in a billion."""
        _, _, _, replies = masked
        data = np.concatenate([arrays_of(reply.content)[MASKED] for reply in replies.values()])
        counts = np.bincount(data, minlength=256)
        expected = len(data) / 256
        statistic = float(((counts - expected) ** 2 / expected).sum())
        assert statistic < 255 + 7 * (2 * 255) ** 0.5

    def test_answers_a_step_of_the_next_set_up_on_the_way(self, clients):
        """So that an epoch follows another without a message of its own."""
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        group = asking.set_up()
        round_ = asking.begin(group, start)
        following = Setup(rules_for(settings, asking.run_id), records=RECORDS, names=NAMES)
        for name, request in round_.requests().items():
            message = asking.training(request, start, **{SETUP_STEP: following.requests()[name]})
            reply = sites[name].answer(message)
            assert set(reply.content) == {ARRAYS, SECAGG}
            following.receive(name, step_of(reply, SETUP_STEP))
            round_.add(name, arrays_of(reply.content)[MASKED])
        following.advance()
        assert following.leg == "exchange"
        asking.open(round_)

    def test_leaves_out_a_step_of_set_up_that_is_refused(self, clients):
        """The round at hand does not depend on it."""
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        round_ = asking.begin(asking.set_up(), start)
        request = round_.requests()["north"]
        reply = sites["north"].answer(asking.training(request, start, **{SETUP_STEP: b"nonsense"}))
        assert list(reply.content) == [ARRAYS]


class TestARequest:
    """What a client refuses, before it trains."""

    @pytest.fixture
    def ready(self, clients):
        """An epoch that is set up, and a round that nobody has heard of."""
        settings, sites = config(*PRIVATE), clients()
        start, asking = model(settings), coordinator(settings, sites)
        return settings, sites, start, asking, asking.set_up()

    def test_of_a_run_without_masks_brings_no_steps(self, clients):
        """Nor does a step alone."""
        plain, sites = config("privacy.secure_aggregation=false"), clients()
        message = train_message(plain)
        message.content[SECAGG] = steps(**{ROUND_STEP: b"x"})
        assert failure_of(sites["north"].answer(message)) is FailureCode.INVALID_REQUEST
        alone = coordinator(plain, sites).step(ROUND_STEP, b"x")
        assert failure_of(sites["north"].answer(alone)) is FailureCode.INVALID_REQUEST

    def test_without_a_step_gets_nothing(self, ready):
        """An update never leaves without masks because somebody left them out."""
        settings, sites, start, _, _ = ready
        message = train_message(settings, arrays=start)
        assert failure_of(sites["north"].answer(message)) is FailureCode.AGGREGATION_REFUSED
        assert sites["north"].events == []

    @pytest.mark.parametrize("change", ["float", "two dimensions", "another key", "config"])
    def test_with_steps_of_another_form_is_refused(self, ready, change):
        """Whatever they are."""
        settings, sites, start, _, _ = ready
        wrong = {
            "float": to_record({ROUND_STEP: np.zeros(3, np.float32)}),
            "two dimensions": to_record({ROUND_STEP: np.zeros((3, 1), np.uint8)}),
            "another key": to_record({"step": np.zeros(3, np.uint8)}),
            "config": train_message(settings, arrays=start).content["config"],
        }[change]
        message = train_message(settings, arrays=start)
        message.content[SECAGG] = wrong
        assert failure_of(sites["north"].answer(message)) is FailureCode.INVALID_REQUEST

    def test_with_a_step_that_is_nonsense_is_refused(self, ready):
        """Of a round or alone; no byte string ends the client."""
        _, sites, start, asking, _ = ready
        for data in (b"", b"\0", bytes(100), b"x" * 1000):
            trained = sites["north"].answer(asking.training(data, start))
            asked = sites["north"].answer(asking.step(ROUND_STEP, data))
            assert {failure_of(trained), failure_of(asked)} == {FailureCode.AGGREGATION_REFUSED}

    def test_of_an_epoch_that_a_client_has_lost_says_so(self, ready):
        """It joins the next one."""
        _, sites, start, asking, group = ready
        round_ = asking.begin(group, start)
        sites["north"].members = MemoryMembers()  # its process was started anew
        asking.train(round_, start)
        assert asking.failures == {FailureCode.NOT_IN_EPOCH.slug}
        assert set(round_.survivors) == set(NAMES) - {"north"}
        asking.open(round_)

    def test_costs_nothing_when_it_is_refused(self, ready):
        """No training, no entry in the ledger, no use of the model."""
        _, sites, start, asking, group = ready
        round_ = asking.begin(group, start)
        for site in sites.values():
            site.policy = replace_policy(smallest_cohort=5)
            site.app = make_client_app(site)
        asking.train(round_, start)
        assert asking.failures == {FailureCode.POLICY_REFUSED.slug}
        for site in sites.values():
            assert site.events == []
            assert not site.journal(asking.run_id).find(round_.header)

    def test_with_another_model_gives_noise(self, ready):
        """The masks are for the model that came: who sends one client another model learns nothing of it."""
        _, sites, start, asking, group = ready
        round_ = asking.begin(group, start)
        other = {name: values + 1 for name, values in start.items()}
        for name, request in round_.requests().items():
            sent = other if name == "north" else start
            reply = sites[name].answer(asking.training(request, sent))
            round_.add(name, arrays_of(reply.content)[MASKED])
        agree = round_.agree()
        answers = asking.ask(ROUND_STEP, dict.fromkeys(round_.survivors, agree))
        assert Statement.from_bytes(answers["north"]).header != round_.header

    def test_for_another_round_gives_noise(self, ready):
        """What the configuration of the message says of the round counts."""
        _, sites, start, asking, group = ready
        round_ = asking.begin(group, start, server_round=1)
        reply = sites["north"].answer(asking.training(round_.requests()["north"], start, server_round=2))
        assert reply.has_content()
        uses = sites["north"].journal(asking.run_id)
        assert uses.find(round_.header) is None


def replace_policy(**table):
    return PERMISSIVE.model_copy(
        update={"secure_aggregation": SecureAggregation(**{"colluding": 0, "smallest_cohort": 2} | table)}
    )


class TestAnUpdate:
    """Is masked once, ever."""

    @pytest.fixture
    def begun(self, clients):
        settings, sites = config(*PRIVATE), clients(spools=True)
        start, asking = model(settings), coordinator(settings, sites)
        group = asking.set_up()
        round_ = asking.begin(group, start)
        asking.train(round_, start)
        return sites, start, asking, group, round_

    def test_is_refused_under_another_index(self, begun):
        """The model was trained on, and nobody says that the round was given up."""
        sites, start, asking, group, _ = begun
        again = asking.begin(group, start, server_round=2)
        asking.train(again, start, server_round=2)
        assert asking.failures == {FailureCode.AGGREGATION_REFUSED.slug}
        assert len(sites["north"].events) == 1

    def test_is_refused_after_a_restart_too(self, begun):
        """The journal does not forget."""
        sites, start, asking, _, _ = begun
        for site in sites.values():
            site.members = MemoryMembers()
        again = asking.begin(asking.set_up(), start, server_round=2)
        asking.train(again, start, server_round=2)
        assert asking.failures == {FailureCode.AGGREGATION_REFUSED.slug}

    def test_is_made_anew_once_its_round_is_burnt(self, begun):
        """By the word of enough others; it costs another entry in the ledger."""
        sites, start, asking, group, round_ = begun
        certificate = asking.burn(round_)
        again = asking.begin(group, start, burnt=[certificate], server_round=2)
        asking.train(again, start, server_round=2)
        assert asking.failures == set()
        asking.open(again)
        assert len(sites["north"].events) == 2

    def test_is_refused_under_the_same_index(self, begun):
        """The very message, once more."""
        sites, start, asking, _, round_ = begun
        message = asking.training(round_.requests()["north"], start)
        assert failure_of(sites["north"].answer(message)) is FailureCode.AGGREGATION_REFUSED

    def test_is_not_stored(self, begun):
        """A spool would let it be masked a second time."""
        sites, _, _, _, _ = begun
        assert not (sites["north"].folder / "spool").exists()

    def test_that_failed_has_used_up_its_round(self, clients):
        """Whatever goes wrong after the journal was written, the client does not begin again."""
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        group = asking.set_up()
        round_ = asking.begin(group, start)
        north = sites["north"]
        broken = replace(north.examples, targets=north.examples.targets + 100)
        north.examples, sound = broken, north.examples
        reply = north.answer(asking.training(round_.requests()["north"], start))
        assert failure_of(reply) is FailureCode.CLIENT_FAILED
        north.examples = sound
        again = asking.begin(group, start, server_round=2)
        reply = north.answer(asking.training(again.requests()["north"], start, server_round=2))
        assert failure_of(reply) is FailureCode.AGGREGATION_REFUSED

    def test_nothing_is_stated_about_one_that_was_not_masked(self, clients):
        """A client whose training failed has no part in the sum."""
        settings, sites = config(), clients()
        start, asking = model(settings), coordinator(settings, sites)
        round_ = asking.begin(asking.set_up(), start)
        north = sites["north"]
        north.examples = replace(north.examples, targets=north.examples.targets + 100)
        asking.train(round_, start)
        assert set(round_.survivors) == set(NAMES) - {"north"}
        answers = asking.ask(ROUND_STEP, dict.fromkeys(NAMES, round_.agree()))
        assert "north" not in answers

    @pytest.mark.parametrize("weighting", ["equal", "examples"])
    @pytest.mark.parametrize("spoilt", ["not finite", "overflows", "no examples"])
    def test_that_is_none_looks_like_any_other(self, clients, spoilt, weighting):
        """Who has what data must not show in who fails: it is in the sum, and counts for nothing."""
        settings, sites = config(f"strategy.weighting={weighting}"), clients()
        start, asking = model(settings), coordinator(settings, sites)
        north, exact = sites["north"], updates(settings, sites, start)
        north.examples = {
            "not finite": replace(north.examples, inputs=north.examples.inputs * float("nan")),
            "overflows": replace(north.examples, inputs=north.examples.inputs * 3e38),
            "no examples": north.examples.take(torch.arange(0)),
        }[spoilt]
        round_ = asking.begin(asking.set_up(), start)
        replies = asking.train(round_, start)
        assert asking.failures == set()
        assert {len(arrays_of(reply.content)[MASKED]) for reply in replies.values()} == {round_codec(settings, start)}
        codec = codec_for(settings, start, participants=len(NAMES), plan=None, server_round=1)
        told = codec.decode(asking.open(round_), len(NAMES))
        left = [exact[name] for name in NAMES if name != "north"]
        assert told.weight == (3 if weighting == "equal" else 60)
        assert np.abs(told.update - np.mean(left, axis=0)).max() <= codec.bound(len(NAMES), told.weight)


def round_codec(settings, start):
    """Bytes of a masked update."""
    codec = codec_for(settings, start, participants=len(NAMES), plan=None, server_round=1)
    return packed_bytes(codec.size, codec.bits)


def test_the_replies_hold_no_record_but_arrays(clients):
    """The record of steps holds bytes alone."""
    settings, sites = config(), clients()
    asking = coordinator(settings, sites)
    asking.set_up()
    for reply in asking.replies.values():
        assert list(reply.content) == [SECAGG]
        assert isinstance(reply.content[SECAGG], ArrayRecord)
