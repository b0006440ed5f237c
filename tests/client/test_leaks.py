"""Nothing leaves a site beside the noised weights: everything that a client emits is compared with its plan.

Replies of neighbouring data sets are compared with the noise switched off where that makes them comparable: then every
value that is not a weight has to be the same, to the byte.
"""

import json

import pytest
import torch

from client.policy import Policy
from common.errors import FailureCode
from common.flower import ARRAYS, METRICS, WEIGHT, arrays_of, client_context, failure_of, metrics_of
from common.privacy import Budget
from common.transport.records import encode_records
from tests.client.conftest import PRIVATE, plan_of, run, train_message
from tests.helpers.noise import Silence

BY_CLIENT = ("privacy.unit=client", "privacy.target_epsilon=8", "training.local_epochs=1")
ADAPTIVE = ("privacy.clipping=adaptive",)


def beside_the_weights(reply) -> tuple:
    """Everything in a reply but the values of its weights, in a form in which equal means equal."""
    if reply.has_error():
        return "error", reply.error.code, reply.error.reason
    shapes = [(name, str(v.dtype), v.shape) for name, v in arrays_of(reply.content).items()]
    sizes = [len(part) for part in encode_records(reply.content)]
    metrics = json.dumps(dict(metrics_of(reply.content)), sort_keys=True)
    return "update", shapes, sizes, metrics, sorted(reply.content), vars(reply.metadata)["_message_type"]


@pytest.mark.parametrize("clipping", ["flat", "per-layer", "adaptive"])
def test_a_private_reply_holds_weights_and_the_constant_one(client, clipping):
    """Whatever clips: an adapting norm stays at the site."""
    reply = client().answer(train_message(run(*PRIVATE, f"privacy.clipping={clipping}")))
    assert set(reply.content) == {ARRAYS, METRICS}
    assert dict(metrics_of(reply.content)) == {WEIGHT: 1.0}


def test_a_reply_by_client_holds_a_clipped_update_and_what_adapting_needs(client):
    """Not a loss, a count or a norm."""
    ample = Budget.opened(500.0, 1e-5)  # an example's part in an update is bounded by twice the norm
    flat = client(budget=ample).answer(train_message(run(*BY_CLIENT)))
    adaptive = client(budget=ample).answer(train_message(run(*BY_CLIENT, *ADAPTIVE)))
    assert dict(metrics_of(flat.content)) == {WEIGHT: 1.0}
    assert set(metrics_of(adaptive.content)) == {WEIGHT, "within"}
    assert metrics_of(adaptive.content)["within"] in {0.0, 1.0}


@pytest.mark.parametrize("delta", [1e-7, 1 / 101, 1 / 100, 1 / 101 - 1e-9])
@pytest.mark.parametrize("batch", [1, 99, 100, 101, 10_000])
@pytest.mark.parametrize("rate", [1e-6, 0.5, 1.0])
def test_no_reply_depends_on_how_many_examples_there_are(client, delta, batch, rate):
    """Sweeping delta, batch size and rate against neighbours finds no difference: their limits are constants."""
    overrides = (
        *PRIVATE, f"privacy.target_delta={delta}", f"privacy.expected_batch_size={batch}",
        f"privacy.sampling_rate={rate}", "training.local_steps=1",
    )  # fmt: skip
    message = train_message(run(*overrides))
    policies = [Policy.model_validate({"limits": {"largest_delta": 0.0099, "largest_batch_size": 5000}})]
    for policy in policies:
        seen = set()
        for number, count in enumerate((99, 100, 101)):
            one = client(count, policy=policy)
            one.ledger_path = one.folder / f"ledger-{number}-{delta}-{batch}-{rate}.jsonl"
            seen.add(str(beside_the_weights(one.answer(message))))
        assert len(seen) == 1


@pytest.mark.parametrize("counts", [(0, 1), (1, 2), (99, 100)])
def test_not_even_an_empty_site_shows(client, counts):
    """Its update is noise, of the same shape and size."""
    message = train_message(run(*PRIVATE))
    seen = set()
    for number, count in enumerate(counts):
        one = client(count)
        one.ledger_path = one.folder / f"ledger-{number}.jsonl"
        seen.add(str(beside_the_weights(one.answer(message))))
    assert len(seen) == 1


def test_a_refusal_by_policy_comes_before_the_data(client):
    """The data is not even loaded, and the code says no more than that."""
    one = client(policy=Policy.model_validate({"limits": {"units": []}}))
    one.data = None  # touching it would fail otherwise
    reply = one.answer(train_message(run(*PRIVATE)))
    assert failure_of(reply) is FailureCode.POLICY_REFUSED
    assert one.events == []


def test_a_refusal_for_want_of_budget_comes_before_the_data(client):
    """A run whose plan exceeds what is left is refused before its first round."""
    one = client(budget=Budget.opened(1.0, 1e-5))
    one.data = None
    reply = one.answer(train_message(run(*PRIVATE)))
    assert failure_of(reply) is FailureCode.BUDGET_EXHAUSTED
    assert one.events == []


class TestRetries:
    """What was paid for is sent again; nothing else is."""

    def test_a_retry_resends_the_stored_update(self, client):
        """The same bytes, no second event."""
        one, message = client(spools=True), train_message(run(*PRIVATE))
        first, second = (one.answer(message) for _ in range(2))
        assert b"".join(encode_records(first.content)) == b"".join(encode_records(second.content))
        assert len(one.events) == 1

    def test_a_retry_remembers_what_the_first_answer_did(self, client):
        """A process that was stopped meanwhile goes on with the norm of the update that it sends again; no reply tells
        it.
        """
        one, message = client(spools=True), train_message(run(*PRIVATE, "privacy.clipping=adaptive"))
        contexts = [client_context(node_id=2, partition=0) for _ in range(2)]
        first, second = (one.app(message, context) for context in contexts)
        assert b"".join(encode_records(first.content)) == b"".join(encode_records(second.content))
        assert list(second.content) == list(first.content)
        assert contexts[0].state
        assert b"".join(encode_records(contexts[0].state)) == b"".join(encode_records(contexts[1].state))

    def test_over_another_model_it_is_another_release(self, client):
        """The coordinator went back: the round is trained and paid for again."""
        one, config = client(spools=True), run(*PRIVATE)
        message = train_message(config)
        moved = {name: values + 1 for name, values in arrays_of(message.content).items()}
        first, second = one.answer(message), one.answer(train_message(config, arrays=moved))
        assert len(one.events) == 2
        assert not torch.equal(*(torch.from_numpy(next(iter(arrays_of(r.content).values()))) for r in (first, second)))

    def test_a_retry_needs_no_budget(self, client):
        """Also after the last round of the plan."""
        one, config = client(spools=True), run(*PRIVATE)
        for server_round in range(1, 6):
            message = train_message(config, server_round=server_round)
            assert failure_of(one.answer(message)) is None
        assert failure_of(one.answer(message)) is None
        assert len(one.events) == 5

    def test_a_failed_round_stores_nothing(self, client):
        """It was paid for, and it is paid for again."""
        one = client(spools=True)
        message = train_message(run(*PRIVATE))
        data, one.data = one.data, None
        assert failure_of(one.answer(message)) is FailureCode.CLIENT_FAILED
        one.data = data
        assert failure_of(one.answer(message)) is None
        assert len(one.events) == 2


DROPOUT = (*PRIVATE, "model.name=mlp", "model.options.dropout=0.5", "privacy.max_grad_norm=0.01")


def test_dropout_does_not_tie_an_example_to_its_place(client):
    """Masks that the run's seed decided would move with the batch: one more row at the front changed all others."""
    message = train_message(run(*DROPOUT))
    replies = [client(200, source=Silence()).answer(message) for _ in range(2)]
    assert all(failure_of(reply) is None for reply in replies)
    states = []
    for _ in range(2):
        client(200).answer(message)
        states.append(torch.get_rng_state())
    assert not torch.equal(*states), "masks come from the secure source, not from the run's public seed"


def test_a_message_s_types_do_not_make_the_model_smaller(client):
    """Each parameter is counted, in whatever type the weights came."""
    config = run(*PRIVATE)
    arrays = {name: values.astype("int8") for name, values in arrays_of(train_message(config).content).items()}
    one = client()
    one.answer(train_message(config, arrays=arrays))
    assert all(event.sensitivity == train_event(config).sensitivity for event in one.events)


def train_event(config):
    return plan_of(config).event(1)


def test_the_policy_speaks_before_any_work_is_done(client, monkeypatch):
    """A plan over millions of rounds takes minutes to make: it is not made for a run that is refused anyway."""
    monkeypatch.setattr("client.request.make_plan", None)
    one = client(policy=Policy.model_validate({"limits": {"units": ["none"]}}))
    assert failure_of(one.answer(train_message(run(*PRIVATE)))) is FailureCode.POLICY_REFUSED


def test_an_empty_client_sends_the_model_as_it_came(client):
    """Privacy unit client: its update is zero, as that of a client that learnt nothing."""
    message = train_message(run(*BY_CLIENT))
    reply = client(0, budget=Budget.opened(500.0, 1e-5)).answer(message)
    assert failure_of(reply) is None
    before = arrays_of(message.content)
    assert all((values == before[name]).all() for name, values in arrays_of(reply.content).items())
