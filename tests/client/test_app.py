"""The client as its coordinator sees it: what it answers, and what never leaves it."""

import json
from io import StringIO

import numpy as np
import pytest
import structlog
import torch
from flwr.app import Error, Message

from client.app import TRAIN_LOSS
from common.errors import FailureCode
from common.flower import ARRAYS, CONFIG, METRICS, WEIGHT, arrays_of, config_of, failure_of, metrics_of
from common.models.weights import ModelWeights
from common.privacy import SampledGaussian
from common.schema import read_schema
from common.transport.records import encode_records
from tests.client.conftest import PRIVATE, initial, plan_of, run, train_message
from tests.helpers.noise import Silence

QUOTED = "patient-4711-has-diabetes"

FAULTY = f'''
import torch
from torch import nn

class Faulty(nn.Linear):
    def forward(self, x):
        if self.training:
            raise {{kind}}(f"{QUOTED} {{{{x.sum()}}}}")
        return super().forward(x)

def build(schema):
    """A model that quotes an example where it fails."""
    return Faulty(64, 10)
'''

FAILS_ONCE = '''
from pathlib import Path
import torch
from torch import nn

class FailsOnce(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)
        self.calls = 0

    def forward(self, x):
        hidden = self.first(x)
        if self.training:
            self.calls += 1
            if self.calls == 2 and not (Path(__file__).parent / "failed").exists():
                (Path(__file__).parent / "failed").touch()
                raise MemoryError
        return self.second(hidden.relu())

def build(schema):
    """A model that runs out of memory in its second step, once."""
    with open(Path(__file__).parent / "builds", "a") as file:
        file.write("x")
    return FailsOnce()
'''

WITNESS = '''
from pathlib import Path
from torch import nn

class Witness(nn.Linear):
    def forward(self, x):
        if self.training:
            folder = Path(__file__).parent
            (folder / "witnessed").write_bytes((folder / "ledger.jsonl").read_bytes())
        return super().forward(x)

def build(schema):
    """A model that keeps what the ledger says when it is first trained."""
    return Witness(64, 10)
'''


MIXING = '''
from torch import nn

def build(schema):
    """A model in which every example reaches every gradient."""
    return nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))
'''


def emitted(value):
    """All single values in what a client sends, but for weights: numbers and texts."""
    if isinstance(value, dict):
        return [item for key, inner in value.items() for item in (key, *emitted(inner))]
    if isinstance(value, list | tuple):
        return [item for inner in value for item in emitted(inner)]
    return [value]


class TestPlain:
    """Without privacy."""

    def test_it_answers_trained_weights_their_weight_and_the_loss(self, client):
        """As many weights as came, of the same kind, changed."""
        config = run()
        start = ModelWeights(initial(config)).copy()
        reply = client(200).answer(train_message(config))
        metrics, arrays = dict(metrics_of(reply.content)), arrays_of(reply.content)
        assert set(reply.content) == {ARRAYS, METRICS}
        assert metrics[WEIGHT] == 200
        assert 0 < metrics[TRAIN_LOSS] < 2.4
        assert set(metrics) == {WEIGHT, TRAIN_LOSS}
        assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == {k: (v.shape, v.dtype) for k, v in start.items()}
        assert all(not np.array_equal(arrays[name], start[name]) for name in start)

    def test_equal_weighting_hides_the_number_of_examples(self, client):
        """Every client counts as one."""
        reply = client(137).answer(train_message(run("strategy.weighting=equal")))
        assert metrics_of(reply.content)[WEIGHT] == 1.0

    @pytest.mark.parametrize(
        "overrides", [(), ("training.momentum=0.9",), ("training.optimizer=adamw",), ("model.name=mlp",)], ids=str
    )
    def test_the_same_message_is_answered_alike(self, client, overrides):
        """Nothing of a round is left for the next, and order and dropout depend on run, round and client alone."""
        config = run(*overrides)
        one = client()
        first, second = (one.answer(train_message(config)) for _ in range(2))
        for name, values in arrays_of(first.content).items():
            np.testing.assert_array_equal(values, arrays_of(second.content)[name])

    def test_another_round_visits_examples_in_another_order(self, client):
        """So rounds do not repeat one another."""
        one = client()
        replies = [one.answer(train_message(run(), server_round=r)) for r in (1, 2)]
        weights = [arrays_of(reply.content) for reply in replies]
        assert not all(np.array_equal(weights[0][name], weights[1][name]) for name in weights[0])

    def test_the_pull_of_fedprox_is_in_the_message(self, client):
        """A stronger pull stays closer."""
        config, one = run("training.local_epochs=5"), client()
        start = ModelWeights(initial(config)).copy()

        def distance(mu):
            arrays = arrays_of(one.answer(train_message(config, proximal_mu=mu)).content)
            return sum(float(np.square(arrays[name] - start[name]).sum()) for name in start)

        assert distance(5.0) < distance(0.5) < distance(0.0)

    def test_a_client_that_has_time_for_fewer_steps_takes_so_many(self, client):
        """As if the run asked for no more; and counts with all its examples."""
        short, asked = client(time_for=2), client()
        few = short.answer(train_message(run("training.local_epochs=3")))
        same = asked.answer(train_message(run("training.local_steps=2")))
        assert metrics_of(few.content)[WEIGHT] == metrics_of(same.content)[WEIGHT] == 200
        for name, values in arrays_of(few.content).items():
            np.testing.assert_array_equal(values, arrays_of(same.content)[name])

    def test_a_site_does_not_take_part_without_privacy_unless_it_says_so(self, client):
        """Its ledger admits no release without noise, and nothing is trained."""
        one = client(counts_plain_runs=True)
        assert failure_of(one.answer(train_message(run()))) is FailureCode.BUDGET_EXHAUSTED
        assert one.events == []

    def test_a_simulation_without_privacy_keeps_no_ledger(self, client):
        """There is nothing to count."""
        one = client()
        one.answer(train_message(run()))
        assert not one.ledger_path.exists()

    def test_training_that_diverges_is_a_typed_failure(self, client):
        """No update that is not finite."""
        reply = client().answer(train_message(run("training.learning_rate=1e38")))
        assert failure_of(reply) is FailureCode.NON_FINITE_UPDATE


class TestPrivate:
    """Everything that leaves a site is a release: with privacy, only what the plan says."""

    def test_it_emits_noised_weights_and_constants_of_the_plan(self, client, capfd):
        """Not a loss, a count, a norm or a name: in the reply, its metadata, the log or on the terminal."""
        config = run(*PRIVATE)
        one, message = client(), train_message(config)
        start = arrays_of(message.content)
        with structlog.testing.capture_logs() as logs:
            reply = one.answer(message)
        arrays = arrays_of(reply.content)
        assert {k: (v.shape, v.dtype) for k, v in arrays.items()} == {k: (v.shape, v.dtype) for k, v in start.items()}
        assert all((arrays[name] != start[name]).mean() > 0.99 for name in arrays)
        assert set(reply.content) == {ARRAYS, METRICS}
        assert dict(metrics_of(reply.content)) == {WEIGHT: 1.0}
        public = dict(vars(message.metadata))
        clocks = {"_created_at", "_ttl"}  # Flower's; when a reply arrives, its receiver sees anyway
        meta = {name: value for name, value in vars(reply.metadata).items() if name not in clocks}
        assert set(emitted(list(meta.values()))) <= {*emitted(list(public.values())), "", "train"}
        assert logs == []
        assert capfd.readouterr() == ("", "")

    def test_the_number_of_steps_does_not_depend_on_time(self, client):
        """The ledger counts all of the plan's steps, and all are taken."""
        config = run(*PRIVATE)
        replies = [client(200, source=Silence(), time_for=most).answer(train_message(config)) for most in (1, None)]
        for name, values in arrays_of(replies[0].content).items():
            np.testing.assert_array_equal(values, arrays_of(replies[1].content)[name])

    def test_neighbours_of_any_size_have_replies_of_one_shape(self, client):
        """Nothing tells how many examples there are, down to the number of bytes."""
        config = run(*PRIVATE)
        sizes = set()
        for count in (1, 50, 199, 200):
            reply = client(count).answer(train_message(config))
            parts = encode_records(reply.content)
            arrays = {name: (v.shape, v.dtype) for name, v in arrays_of(reply.content).items()}
            sizes.add((str(arrays), str(dict(metrics_of(reply.content))), tuple(len(part) for part in parts)))
        assert len(sizes) == 1

    def test_without_a_stored_update_a_second_answer_has_fresh_noise(self, client):
        """It is a second release, with an event of its own."""
        config, one = run(*PRIVATE), client()
        first, second = (arrays_of(one.answer(train_message(config)).content) for _ in range(2))
        assert all((first[name] == second[name]).mean() < 0.2 for name in first)
        assert len(one.events) == 2

    def test_the_ledger_has_the_event_before_the_first_step(self, client):
        """What the model itself sees in the file when it is trained is what the ledger says afterwards."""
        config = run(*PRIVATE, "model.name=own")
        one = client(module=WITNESS)
        weights = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
        reply = one.answer(train_message(config, server_round=2, arrays=weights))
        assert failure_of(reply) is None
        witnessed = (one.folder / "witnessed").read_bytes()
        assert witnessed == one.ledger_path.read_bytes()
        assert one.events == [plan_of(config).event(2)]
        assert json.loads(witnessed.splitlines()[-1])["event"]["steps"] == 2

    @pytest.mark.parametrize("kind", ["train", "train.default"])
    def test_no_name_for_training_goes_round_the_ledger(self, client, kind):
        """Flower answers both."""
        one = client()
        assert failure_of(one.answer(train_message(run(*PRIVATE), kind=kind))) is None
        assert [type(event) for event in one.events] == [SampledGaussian]

    def test_a_whole_run_stays_within_its_budget_and_one_round_more_is_refused(self, client):
        """With a typed reply, no training, and nothing written."""
        config = run(*PRIVATE, "model.name=own")
        one = client(module=WITNESS)
        weights = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
        for server_round in range(1, 6):
            reply = one.answer(train_message(config, server_round=server_round, arrays=weights))
            assert failure_of(reply) is None
        (one.folder / "witnessed").unlink()
        before = one.ledger_path.read_bytes()
        reply = one.answer(train_message(config, server_round=5, arrays=weights))
        assert (reply.error.code, reply.error.reason) == (1004, FailureCode.BUDGET_EXHAUSTED.sentence)
        assert one.ledger_path.read_bytes() == before
        assert not (one.folder / "witnessed").exists()

    @pytest.mark.parametrize("damage", ["folder", "cut off"])
    def test_without_a_sound_ledger_nothing_is_trained(self, client, damage):
        """It cannot be read, or not be written."""
        one = client(module=WITNESS)
        if damage == "folder":
            one.ledger_path.mkdir()
        else:
            one.ledger_path.write_bytes(b'{"kind": "poisson')
        weights = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
        reply = one.answer(train_message(run(*PRIVATE, "model.name=own"), arrays=weights))
        assert failure_of(reply) is FailureCode.CLIENT_FAILED
        assert not (one.folder / "witnessed").exists()

    def test_a_failed_round_leaves_nothing_for_the_next(self, client):
        """Half a step's gradients would count an example twice: the model is built anew, and the event stays."""
        config = run(*PRIVATE, "model.name=own")
        one = client(module=FAILS_ONCE)
        weights = {
            "first.weight": np.zeros((16, 64), np.float32), "first.bias": np.zeros(16, np.float32),
            "second.weight": np.zeros((10, 16), np.float32), "second.bias": np.zeros(10, np.float32),
        }  # fmt: skip
        replies = [one.answer(train_message(config, server_round=r, arrays=weights)) for r in (1, 2, 3)]
        assert [failure_of(reply) for reply in replies] == [FailureCode.CLIENT_FAILED, None, None]
        assert (one.folder / "builds").read_text() == "xx"
        assert len(one.events) == 3


class TestRefusals:
    """A failure is a code and a fixed sentence."""

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda a: a.update(bias=np.zeros(11, np.float32)),
            lambda a: a.pop("bias"),
            lambda a: a.update(extra=np.zeros(1, np.float32)),
            lambda a: a.update(bias=np.array(["x"] * 10)),
            lambda a: a.clear(),
        ],
        ids=["shape", "missing", "extra", "text", "none"],
    )
    def test_weights_of_another_model_are_an_invalid_request(self, client, spoil):
        """Nothing is trained."""
        weights = {name.rpartition(".")[2]: v for name, v in ModelWeights(initial(run())).copy().items()}
        assert set(weights) == {"weight", "bias"}
        names = {name.rpartition(".")[2]: name for name in ModelWeights(initial(run())).copy()}
        spoil(weights)
        arrays = {names.get(name, name): values for name, values in weights.items()}
        assert failure_of(client().answer(train_message(run(), arrays=arrays))) is FailureCode.INVALID_REQUEST

    @pytest.mark.parametrize("key", [ARRAYS, CONFIG])
    def test_a_message_without_weights_or_configuration_is_an_invalid_request(self, client, key):
        """Nothing is made up."""
        message = train_message(run())
        del message.content[key]
        assert failure_of(client().answer(message)) is FailureCode.INVALID_REQUEST

    @pytest.mark.parametrize("kind", ["ValueError", "RuntimeError", "KeyError", "torch.OutOfMemoryError"])
    @pytest.mark.parametrize("private", [False, True], ids=["plain", "private"])
    def test_the_text_of_an_exception_stays_at_the_site(self, client, capfd, kind, private):
        """It can quote an example: neither reply, log nor terminal have it; the log has the kind and the place."""
        config = run(*(PRIVATE if private else ()), "model.name=own")
        weights = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
        one = client(module=FAULTY.format(kind=kind))
        with structlog.testing.capture_logs() as logs:
            reply = one.answer(train_message(config, arrays=weights))
        one.answer(train_message(config, arrays=weights))  # and through structlog's own renderer
        assert (reply.error.code, reply.error.reason) == (1001, FailureCode.CLIENT_FAILED.sentence)
        assert not reply.has_content()
        (entry,) = logs
        assert entry["event"] == "client_failed"
        assert entry["error"] == kind.rpartition(".")[2]
        assert "own.py:" in entry["where"]
        captured = capfd.readouterr()
        for text in (str(vars(reply.metadata)), str(reply.error), str(logs), captured.out, captured.err):
            assert QUOTED not in text

    def test_a_log_that_cannot_be_written_does_not_cost_the_reply(self, client):
        """A service whose stderr was closed still answers with the code."""
        closed = StringIO()
        closed.close()
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(closed))
        weights = {"weight": np.zeros((10, 64), np.float32), "bias": np.zeros(10, np.float32)}
        reply = client(module=FAULTY.format(kind="ValueError")).answer(
            train_message(run("model.name=own"), arrays=weights)
        )
        assert failure_of(reply) is FailureCode.CLIENT_FAILED

    def test_an_unknown_model_is_a_typed_failure(self, client):
        """A name that this site has not registered."""
        reply = client().answer(train_message(run(), run=run("model.name=nothing-here").canonical_json()))
        assert failure_of(reply) is FailureCode.CLIENT_FAILED

    def test_an_unsuitable_model_is_refused_with_privacy(self, client):
        """Batch norm mixes examples; no update is sent."""
        reply = client(module=MIXING).answer(train_message(run(*PRIVATE, "model.name=own"), arrays={}))
        assert failure_of(reply) is FailureCode.CLIENT_FAILED


class TestQuery:
    """A coordinator may ask who is there."""

    @pytest.mark.parametrize("overrides", [(), PRIVATE], ids=["plain", "private"])
    def test_it_answers_what_is_public_and_nothing_else(self, client, overrides):
        """Its name, and how a model for its data looks. Before there is a plan, so without noise; and nothing is
        written in the ledger.
        """
        message = train_message(run(*overrides), kind="query", noise_multiplier=None, participations=None)
        del message.content[ARRAYS]
        one = client()
        reply = one.answer(message)
        assert set(reply.content) == {CONFIG}
        told = dict(config_of(reply.content))
        schema = read_schema(told.pop("schema"))
        assert told == {"client": "ward-7"}
        assert (schema.kind, schema.input_shape, schema.num_classes) == ("tabular", (64,), 10)
        assert not one.ledger_path.exists()

    def test_a_query_about_nothing_is_refused(self, client):
        """It names a run."""
        message = train_message(run(), kind="query", run="{}{}")
        assert failure_of(client().answer(message)) is FailureCode.INVALID_REQUEST


@pytest.mark.parametrize("kind", ["evaluate", "train.other", "query.other", "evaluate.default"])
def test_there_is_nothing_else_to_ask_for(client, kind):
    """No evaluation: its result would be a release."""
    with pytest.raises(ValueError, match="registered"):
        client().answer(train_message(run(), kind=kind))


def test_an_error_from_the_coordinator_is_not_work(client):
    """A message without content is a typed failure."""
    message = train_message(run())
    error = Message(Error(code=1, reason="x"), reply_to=message)
    error.metadata.__dict__["_message_type"] = "train"
    assert failure_of(client().answer(error)) in set(FailureCode)


def test_torch_s_threads_and_generator_are_as_a_seed_says(client):
    """The seed of order and dropout is the run's, whatever was drawn before."""
    one, states = client(), []
    for noise in (1, 2):
        torch.manual_seed(noise)
        one.answer(train_message(run()))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
