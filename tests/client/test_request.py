"""What a training message may ask for; everything else is refused with one code and no word."""

import json

import pytest
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from client.request import parse_query, parse_request
from common.errors import FailureCode, PeerError
from common.flower import CONFIG
from tests.client.conftest import PRIVATE, plan_of, run, train_message


def refused(message) -> bool:
    with pytest.raises(PeerError) as caught:
        parse_request(message)
    return caught.value.failure is FailureCode.INVALID_REQUEST


def changed(*path, to):
    """A plain run's configuration with one entry changed, as text."""
    tree = json.loads(run().canonical_json())
    node = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = to
    return json.dumps(tree)


def test_an_honest_plain_request_is_understood():
    """Which run, which round, how strong the pull; no plan."""
    config = run()
    request = parse_request(train_message(config, server_round=3, proximal_mu=0.5))
    assert (request.config, request.digest) == (config, config.digest())
    assert (request.server_round, request.proximal_mu, request.plan) == (3, 0.5, None)


def test_an_honest_private_request_has_the_run_s_plan():
    """The same as the coordinator made."""
    config = run(*PRIVATE)
    assert parse_request(train_message(config)).plan == plan_of(config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run", None),
        ("run", ""),
        ("run", "{"),
        ("run", 1),
        ("run", b"{}"),
        ("run", ["{}"]),
        ("server_round", None),
        ("server_round", 0),
        ("server_round", -1),
        ("server_round", 6),
        ("server_round", 2**62),
        ("server_round", True),
        ("server_round", 1.0),
        ("server_round", "1"),
        ("server_round", [1]),
        ("proximal_mu", -0.1),
        ("proximal_mu", float("nan")),
        ("proximal_mu", float("inf")),
        ("proximal_mu", True),
        ("proximal_mu", "0.1"),
        ("proximal_mu", [0.1]),
    ],
    ids=str,
)
def test_what_is_missing_or_of_the_wrong_kind_is_refused(field, value):
    """A flag is no number, a round lies within the run, and text is not converted."""
    assert refused(train_message(run(), **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("noise_multiplier", None),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", -1.0),
        ("noise_multiplier", 1),
        ("noise_multiplier", float("nan")),
        ("noise_multiplier", float("inf")),
        ("noise_multiplier", 1e300),
        ("noise_multiplier", 1e-300),
        ("noise_multiplier", 0.01),
        ("renyi_order", None),
        ("renyi_order", 0),
        ("renyi_order", 1),
        ("renyi_order", 2.0),
        ("renyi_order", 2),
        ("renyi_order", 2**62),
        ("clients", None),
        ("clients", 0),
        ("clients", 2.0),
        ("min_separation", None),
        ("min_separation", 0),
        ("min_separation", 1.5),
        ("participations", None),
        ("participations", 0),
        ("participations", -3),
        ("participations", True),
        ("participations", 5.0),
        ("participations", 6),
        ("participations", 2**62),
    ],
    ids=str,
)
def test_a_private_run_needs_noise_that_keeps_its_promise(field, value):
    """Neither too little, nor not a number, nor more rounds than there are."""
    assert refused(train_message(run(*PRIVATE), **{field: value}))


def test_a_message_cannot_replace_the_noise_that_the_run_names():
    """The digest would name one run, and another would take place."""
    config = run("privacy.unit=example", "privacy.noise_multiplier=3", "training.local_steps=1")
    assert parse_request(train_message(config)).plan.noise_multiplier == 3
    assert refused(train_message(config, noise_multiplier=0.001))


@pytest.mark.parametrize(
    "text",
    [
        changed("hook", to="x"),
        changed("training", "callback", to="x"),
        changed("model", "source", to="evil.py:build"),
        changed("data", "path", to="/etc/passwd"),
        changed("model", "name", to="os:system"),
        changed("model", "name", to="../own.py:build"),
        changed("model", "name", to="my.module"),
        changed("model", "options", to={"code": "__import__('os')"}),
        changed("data", "name", to="python:evil.py:load"),
        changed("data", "name", to="csv:/etc/passwd"),
        changed("data", "sites", to=["../../etc"]),
        changed("rounds", to=0),
        changed("privacy", "unit", to="example"),
        changed("training", "learning_rate", to=float("nan")),
    ],
    ids=lambda text: text[-60:],
)
def test_a_configuration_that_is_not_a_run_is_refused(text):
    """Unknown keys, code, paths and modules where names belong, impossible values, privacy without a budget."""
    assert refused(train_message(run(), run=text))


@pytest.mark.parametrize(
    "content", [RecordDict(), RecordDict({CONFIG: MetricRecord()}), RecordDict({"x": ConfigRecord()})]
)
def test_a_message_without_a_configuration_is_refused(content):
    """Or with a record of another kind under its name."""
    message = train_message(run())
    message.content = content
    assert refused(message)


def test_a_query_needs_neither_noise_nor_participations():
    """A coordinator asks for names before there is a plan."""
    config = run(*PRIVATE)
    request = parse_query(train_message(config, noise_multiplier=None, participations=None))
    assert (request.config, request.plan) == (config, None)


def test_a_query_is_checked_as_a_request_is():
    """It names a run too."""
    with pytest.raises(PeerError):
        parse_query(train_message(run(), run=changed("model", "name", to="os:system")))


@pytest.mark.parametrize("value", [None, 0.0, -1.0, float("nan"), float("inf"), 1e7, 1e-9, 1, "1"], ids=str)
def test_a_run_by_client_needs_a_clipping_norm(value):
    """A bound within reason; only where the unit is a client."""
    config = run("privacy.unit=client", "privacy.target_epsilon=8")
    assert parse_request(train_message(config)).clipping_norm == 1.0
    assert refused(train_message(config, clipping_norm=value))
    assert parse_request(train_message(run(*PRIVATE))).clipping_norm == 0.0


class TestDistributedNoise:
    """Runs whose clients add the noise: the message says what it was calibrated to, and the site counts again."""

    CONFIG = run("privacy.unit=client", "privacy.secure_aggregation=true", "privacy.target_epsilon=8")

    def message(self, **fields):
        return train_message(self.CONFIG, **fields)

    def test_the_plan_is_the_coordinator_s_to_the_last_step_of_the_grid(self):
        """Both sides make the same codec of it."""
        request, plan = parse_request(self.message()), plan_of(self.CONFIG)
        assert request.plan == plan
        assert request.plan.distributed.digest == plan.distributed.digest

    def test_no_message_says_how_updates_are_clipped(self):
        """The configuration does, whatever stands in the request."""
        for norm in (None, 1e6, "x"):
            assert parse_request(self.message(clipping_norm=norm)).clipping_norm == 1.0

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("noise_multiplier", 0.5),
            ("noise_multiplier", float("inf")),
            ("renyi_order", 2),
            ("clients", 2),
            ("clients", 0),
            ("participations", 6),
            ("min_separation", 0),
        ],
        ids=str,
    )
    def test_what_does_not_keep_the_promise_is_refused(self, field, value):
        """Too little noise, or fewer clients than a sum needs."""
        assert refused(self.message(**{field: value}))


def test_the_plan_counts_every_value_that_the_message_s_model_has():
    """Each is rounded to the noise's grid; a site takes no message's word for how many there are."""
    config = run(*PRIVATE)
    assert parse_request(train_message(config)).plan.dimensions == 650
