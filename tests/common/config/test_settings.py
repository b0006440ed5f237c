"""Which values a run may have, and which names a message may carry."""

import json
import math
from contextlib import suppress
from typing import Literal, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from common.config import ModelSettings, RunConfig, load_config
from common.config.load import parse_config, setting_fields
from common.errors import ConfigError
from tests.common.config.conftest import PRIVATE

IMPOSSIBLE = [
    ("rounds", "0"),
    ("rounds", "1.5"),
    ("rounds", "ten"),
    ("name", "''"),
    ("data.clients", "-1"),
    ("data.clients", "10000001"),
    ("data.alpha", "0"),
    ("data.alpha", "-0.5"),
    ("data.alpha", "nan"),
    ("data.partition", "random"),
    ("data.test_fraction", "0"),
    ("data.test_fraction", "1"),
    ("data.size_ratio", "0.5"),
    ("data.size_ratio", "inf"),
    ("data.sequence_length", "0"),
    ("data.sequence_length", "65537"),
    ("training.local_epochs", "-1"),
    ("training.local_epochs", "10001"),
    ("training.batch_size", "0"),
    ("training.max_physical_batch", "0"),
    ("training.learning_rate", "0"),
    ("training.learning_rate", "inf"),
    ("training.momentum", "1"),
    ("training.momentum", "nan"),
    ("training.weight_decay", "-1"),
    ("training.device", "tpu"),
    ("strategy.name", "fedsgd"),
    ("strategy.trim_fraction", "0.5"),
    ("cohort.size", "-1"),
    ("cohort.deadline_seconds", "inf"),
    ("cohort.over_sampling", "-0.1"),
    ("asynchronous.buffer_size", "-1"),
    ("asynchronous.staleness_exponent", "-0.5"),
    ("asynchronous.max_staleness", "1001"),
    ("simulation.devices.examples_per_second", "-1"),
    ("simulation.devices.examples_per_second", "inf"),
    ("simulation.devices.availability", "0"),
    ("simulation.devices.dropout", "1"),
    ("simulation.devices.straggler_slowdown", "0.5"),
    ("simulation.devices.trace", "devices.jsonl"),
    ("cohort.over_sampling", "1.1"),
    ("cohort.over_sampling", "nan"),
    ("privacy.unit", "row"),
    ("privacy.clipping_norm", "0"),
    ("privacy.clipping", "layer"),
    ("privacy.target_quantile", "1"),
    ("privacy.clipping_learning_rate", "0"),
    ("privacy.mechanism", "laplace"),
    ("cohort.sampling", "random"),
    ("privacy.target_epsilon", "0"),
    ("privacy.target_epsilon", "-1"),
    ("privacy.target_epsilon", "nan"),
    ("privacy.target_epsilon", "inf"),
    ("privacy.target_delta", "0"),
    ("privacy.target_delta", "0.011"),
    ("privacy.target_delta", "nan"),
    ("privacy.noise_multiplier", "0"),
    ("privacy.noise_multiplier", "inf"),
    ("privacy.max_grad_norm", "0"),
    ("privacy.max_grad_norm", "1e-7"),
    ("privacy.max_grad_norm", "1e7"),
    ("privacy.max_grad_norm", "nan"),
    ("privacy.sampling_rate", "0"),
    ("privacy.sampling_rate", "1.1"),
    ("privacy.sampling_rate", "nan"),
    ("privacy.expected_batch_size", "0"),
    ("privacy.secure_aggregation", "maybe"),
    ("secagg.epoch_rounds", "0"),
    ("secagg.epoch_rounds", "65"),
    ("secagg.honest", "1"),
    ("secagg.colluding", "-1"),
    ("secagg.bits", "8"),
    ("secagg.clipping_norm", "0"),
    ("secagg.clipping_norm", "inf"),
    ("secagg.most_weight", "0"),
    ("secagg.group_size", "-1"),
    ("secagg.noise", "laplace"),
    ("seeds.data", "-1"),
    ("seeds.training", str(2**63)),
    ("simulation.byzantine_scale", "nan"),
    ("model.options.hidden", "nan"),
    ("model.options.hidden", "-inf"),
    ("model.options.hidden", "[1]"),
]

BY_CLIENT = ("privacy.unit=client", "privacy.target_epsilon=1")
SUMS = "privacy.secure_aggregation=true"
BUFFER = "asynchronous.buffer_size=3"
DEVICES = "simulation.devices"
VIRTUAL = f"{DEVICES}.examples_per_second=10"

CONTRADICTIONS = [
    ("data.clients", ["data.clients=0"]),
    ("data.sites", ["data.sites=['a']"]),
    ("data.folds", ["data.folds=1"]),
    ("comparison.enabled", ["comparison.enabled=true"]),
    ("data.fold", ["data.folds=3", "data.fold=3"]),
    ("training.local_epochs", ["training.local_epochs=0"]),
    ("training.momentum", ["training.optimizer=adamw", "training.momentum=0.9"]),
    ("evaluation.patience", ["evaluation.every=0", "evaluation.patience=2"]),
    ("cohort.min_survivors", ["cohort.size=2", "cohort.min_survivors=3"]),
    ("cohort.over_sampling", ["cohort.over_sampling=0.5"]),
    ("asynchronous.buffer_size", [BUFFER, "cohort.size=2"]),
    ("cohort.min_survivors", [BUFFER, "cohort.min_survivors=4"]),
    ("strategy.name", [BUFFER, "strategy.name=krum"]),
    ("asynchronous.buffer_size", [BUFFER, *BY_CLIENT]),
    ("cohort.sampling", [BUFFER, "cohort.sampling=balanced"]),
    ("cohort.over_sampling", [BUFFER, "cohort.size=5", "cohort.over_sampling=0.5"]),
    ("transport.compression", [BUFFER, "transport.compression=top-k"]),
    ("simulation.devices.examples_per_second", [f"{DEVICES}.dropout=0.1"]),
    ("simulation.devices.partial_work", [VIRTUAL, f"{DEVICES}.partial_work=true"]),
    (
        "simulation.devices.partial_work",
        [VIRTUAL, f"{DEVICES}.partial_work=true", "cohort.deadline_seconds=9", *PRIVATE],
    ),
    ("cohort.sampling", [VIRTUAL, f"{DEVICES}.availability=0.5", "cohort.sampling=balanced"]),
    ("strategy.name", [SUMS, "strategy.name=qfedavg", "secagg.group_size=4"]),
    ("strategy.name", [SUMS, "strategy.name=krum"]),
    ("secagg.group_size", [SUMS, "secagg.group_size=2"]),
    ("cohort.size", [SUMS, "cohort.size=2"]),
    ("cohort.sampling", [SUMS, "cohort.size=5", "cohort.sampling=poisson"]),
    ("cohort.over_sampling", [SUMS, "cohort.size=5", "cohort.over_sampling=0.2"]),
    ("transport.compression", [SUMS, "transport.compression=bf16"]),
    ("secagg.bits", [SUMS, "secagg.bits=16"]),
    ("privacy.mechanism", [SUMS, *BY_CLIENT, "privacy.mechanism=matrix"]),
    ("privacy.clipping", [SUMS, *BY_CLIENT, "privacy.clipping=adaptive"]),
    ("privacy.target_epsilon", ["privacy.unit=example", "training.local_steps=1"]),
    ("privacy.noise_multiplier", [*PRIVATE, "privacy.noise_multiplier=2"]),
    ("training.local_steps", ["privacy.unit=example", "privacy.target_epsilon=1"]),
    ("strategy.name", [*PRIVATE, "strategy.name=qfedavg"]),
    ("strategy.name", [*BY_CLIENT, "strategy.name=krum"]),
    ("cohort.min_survivors", [*BY_CLIENT, "cohort.min_survivors=2"]),
    ("cohort.over_sampling", [*BY_CLIENT, "cohort.size=2", "cohort.over_sampling=0.5"]),
    ("transport.compression", [*BY_CLIENT, "transport.compression=top-k"]),
    ("cohort.over_sampling", ["cohort.sampling=poisson", "cohort.size=2", "cohort.over_sampling=0.5"]),
    ("privacy.clipping", [*BY_CLIENT, "privacy.clipping=per-layer"]),
    ("privacy.mechanism", [*PRIVATE, "privacy.mechanism=matrix"]),
    ("privacy.mechanism", [*BY_CLIENT, "privacy.mechanism=matrix", "cohort.size=2"]),
    ("rounds", [*BY_CLIENT, "privacy.mechanism=matrix", "cohort.sampling=cyclic", "rounds=5001"]),
    ("privacy.mechanism", [*BY_CLIENT, "privacy.mechanism=matrix", "privacy.clipping=adaptive"]),
    ("cohort.sampling", [*PRIVATE, "cohort.sampling=poisson"]),
    ("privacy.expected_batch_size", [*PRIVATE, "data.max_examples=100", "privacy.expected_batch_size=101"]),
]

NOT_NAMES = [
    "", "../secret", "/etc/passwd", "a/b", "a\\b", "os:system", "evil.py", "pkg.module", "python:evil.py:run",
    "cnn\n", "cnn\x00", " cnn", "-cnn", "é", "a" * 65,
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), IMPOSSIBLE)
def test_an_impossible_value_is_refused_by_the_settings_name(config, key, value):
    """Zero, negative, infinite and not-a-number where they mean nothing; the message names the setting."""
    with pytest.raises(ConfigError, match=f"`{key}`") as caught:
        config(f"{key}={value}")
    assert caught.value.hint


@pytest.mark.parametrize(("key", "overrides"), CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(config, key, overrides):
    """Each rule between settings refuses, names the setting to change, and says how."""
    with pytest.raises(ConfigError, match=f"`{key}`") as caught:
        config(*overrides)
    assert caught.value.hint


def test_every_rule_between_settings_has_a_case_above():
    """A new rule without a test fails here."""
    assert [key for _, key, _, _ in RunConfig().rules()] == [key for key, _ in CONTRADICTIONS]


def test_a_private_run_takes_a_target_or_noise_but_not_both(config):
    """One of the two says how much noise there is."""
    base = ("privacy.unit=example", "training.local_steps=1")
    assert config(*base, "privacy.noise_multiplier=1.5").privacy.target_epsilon is None
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier"):
        config(*base, "privacy.noise_multiplier=1.5", "privacy.target_epsilon=3")


class TestSecureAggregation:
    """What a run may ask for that shows the coordinator nothing but sums."""

    def test_without_it_its_settings_are_free(self, config):
        """A file may keep its [secagg] table, and what only secure aggregation refuses, while it is off."""
        kept = config("secagg.group_size=2", "secagg.bits=16", "strategy.name=krum", "cohort.size=2")
        assert not kept.privacy.secure_aggregation
        assert kept.digest() != config("strategy.name=krum", "cohort.size=2").digest()

    @pytest.mark.parametrize("strategy", ["fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan"])
    def test_robust_strategies_compare_groups(self, config, strategy):
        """They see the groups' means in place of single updates, also where clients add noise."""
        chosen = [f"strategy.name={strategy}", "secagg.group_size=4"]
        assert config(SUMS, *chosen).secagg.group_size == 4
        assert config(SUMS, *BY_CLIENT, *chosen).distributed

    def test_noise_of_the_clients_does_not_hide_how_many_answered(self, config):
        """So that a round may ask for more than one survivor; where the coordinator adds noise it may not."""
        assert config(SUMS, *BY_CLIENT, "cohort.min_survivors=5").distributed
        with pytest.raises(ConfigError, match="min_survivors"):
            config(*BY_CLIENT, "cohort.min_survivors=5")

    @pytest.mark.parametrize(("honest", "colluding"), [(2, 0), (2, 1), (3, 4)])
    def test_a_group_is_never_smaller_than_a_sum_may_be(self, config, honest, colluding):
        """Nor a cohort smaller than a group; the smallest admissible ones are admitted."""
        fewest = honest + colluding
        chosen = [f"secagg.honest={honest}", f"secagg.colluding={colluding}"]
        assert config(SUMS, *chosen, f"secagg.group_size={fewest}", f"cohort.size={fewest}")
        with pytest.raises(ConfigError, match=r"secagg\.group_size"):
            config(SUMS, *chosen, f"secagg.group_size={fewest - 1}")
        for size, group in ((fewest - 1, 0), (fewest, fewest + 1)):
            with pytest.raises(ConfigError, match=r"cohort\.size"):
                config(SUMS, *chosen, f"secagg.group_size={group}", f"cohort.size={size}")

    def test_small_rings_take_small_weights(self, config):
        """16 bits add up equal weights, weights of a private run (always 1), and counts below a stated bound."""
        for chosen in (["strategy.weighting=equal"], ["secagg.most_weight=10000"], PRIVATE):
            assert config(SUMS, "secagg.bits=16", *chosen).secagg.bits == 16
        with pytest.raises(ConfigError, match=r"secagg\.bits"):
            config(SUMS, "secagg.bits=16", "secagg.most_weight=10923")

    def test_clients_that_lie_can_be_simulated(self, config):
        """To show what groups are for."""
        assert config(SUMS, "simulation.byzantine_clients=2").simulation.byzantine_clients == 2

    def test_whose_noise_it_is_follows_from_two_settings(self, config):
        """Of unit client alone: the coordinator's, or, inside sums, the clients' own."""
        units = [(), PRIVATE, BY_CLIENT]
        found = [[(c.central, c.distributed) for c in (config(*unit), config(SUMS, *unit))] for unit in units]
        assert found == [[(False, False)] * 2, [(False, False)] * 2, [(True, False), (False, True)]]


def test_a_privacy_budget_has_no_default():
    """Nobody gets a privacy budget without having chosen it."""
    assert RunConfig().privacy.target_epsilon is None
    assert RunConfig().privacy.noise_multiplier is None


class TestRegisteredNamesOnly:
    """A run's configuration travels to every site, so nothing in it can name a path, a module or code."""

    @pytest.mark.parametrize("text", NOT_NAMES)
    @pytest.mark.parametrize(
        "tree",
        [
            lambda t: {"name": t},
            lambda t: {"model": {"name": t}},
            lambda t: {"model": {"options": {t: 1}}},
            lambda t: {"model": {"options": {"kind": t}}},
            lambda t: {"data": {"name": t}},
            lambda t: {"data": {"partition": "natural", "sites": [t]}},
        ],
        ids=["name", "model.name", "option", "option value", "data.name", "data.sites"],
    )
    def test_what_is_not_a_registered_name_is_refused(self, tree, text):
        """Paths, modules, sources and file names are not names."""
        with pytest.raises(ConfigError):
            parse_config(json.dumps(tree(text)))

    @given(st.text(min_size=1))
    @settings(deadline=None, max_examples=200)
    def test_a_name_cannot_hold_what_paths_and_imports_need(self, text):
        """Whatever is accepted has no separator, dot, colon or white space."""
        try:
            name = ModelSettings(name=text).name
        except ValidationError:
            return
        assert name.isascii()
        assert name.replace("-", "").replace("_", "").isalnum()

    def test_every_text_in_a_configuration_is_a_name_or_a_choice(self):
        """A new setting that takes free text fails here."""

        def free_texts(node, path):
            if isinstance(node, list):
                for item in node:
                    yield from free_texts(item, path)
            elif isinstance(node, dict):
                if node.get("type") == "string" and "enum" not in node and not node.get("pattern", "").startswith("^["):
                    yield path
                if node.get("type") == "object" and "properties" not in node and "patternProperties" not in node:
                    yield path
                for key, child in node.items():
                    yield from free_texts(child, f"{path}/{key}")

        assert list(free_texts(RunConfig.model_json_schema(), "")) == []


class TestDigest:
    """The digest names a configuration to every party."""

    def test_equal_configurations_have_equal_digests(self, config):
        """However they were written: order of keys, 1 or 1.0, a default given or left out."""
        one = parse_config('{"rounds": 5, "training": {"learning_rate": 1, "momentum": 0.0}}')
        two = parse_config('{"training": {"learning_rate": 1.0}, "rounds": 5}')
        assert one.digest() == two.digest() == config("rounds=5", "training.learning_rate=1").digest()
        assert len(one.digest()) == 64

    def test_the_order_of_options_does_not_matter(self, config):
        """A table has none."""
        one, two = ({"model": {"options": options}} for options in ({"a": 1, "b": 2}, {"b": 2, "a": 1}))
        assert RunConfig.model_validate(one).digest() == RunConfig.model_validate(two).digest()

    def test_every_setting_changes_the_digest(self):
        """Two parties with one digest agree on everything."""
        config, digests = RunConfig(), {RunConfig().digest()}
        keys = [key for key, _ in setting_fields()]
        for key, field in setting_fields():
            digests.add(_changed(config, key.split("."), field.annotation).digest())
        assert len(digests) == len(keys) + 1

    def test_model_options_change_the_digest(self, config):
        """True, 1 and 1.0 are different options."""
        values = ("true", "1", "1.0", "a", "2")
        assert len({config(f"model.options.x={value}").digest() for value in values}) == len(values)


def _changed(table, path, annotation):
    """A table with another value at a dotted key."""
    first, *rest = path
    value = getattr(table, first)
    return table.model_copy(update={first: _changed(value, rest, annotation) if rest else _another(value, annotation)})


def _another(value, annotation):
    """A value other than `value`, of its kind."""
    if get_origin(annotation) is Literal:
        return next(choice for choice in annotation.__args__ if choice != value)
    if isinstance(value, bool):
        return not value
    if value is None:
        return 0.5
    return {int: lambda: value + 1, float: lambda: value / 2 - 0.25, str: lambda: value + "x"}.get(
        type(value), lambda: ["x"] if value == [] else {"x": 1}
    )()


def test_a_configuration_cannot_be_changed_after_it_was_checked(config):
    """What was validated is what runs."""
    with pytest.raises(ValidationError):
        config().rounds = 3
    with pytest.raises(ValidationError):
        config().privacy.target_epsilon = math.inf


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(deadline=None, max_examples=150)
def test_no_text_from_a_peer_crashes_the_parser(data):
    """Whatever arrives is a configuration or a ConfigError."""
    with suppress(ConfigError):
        parse_config(data.decode("utf-8", "surrogateescape"))


def test_what_a_peer_sent_may_nest_as_deep_as_it_likes():
    """Neither the parser's stack nor its message grows with it."""
    with pytest.raises(ConfigError) as caught:
        parse_config("[" * 1_000_000)
    assert len(str(caught.value)) < 200


def test_defaults_are_a_valid_run():
    """`coterie simulate` without a file has something to run."""
    assert load_config(None).config == RunConfig() == load_config(None).plain
