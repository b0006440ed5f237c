"""What a run's configuration says about its sums: rules, codecs, arrays; the same for client and coordinator."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

from common.aggregation import add_update, check_codec, codec_for, covered, flatten, rules_for
from common.config import load_config
from common.errors import ConfigError, PrivacyError
from common.privacy import make_plan
from common.privacy.distributed import DistributedSum
from common.secagg.fixed_point import Codec, FixedPoint

MODEL = {
    "weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "count": np.array(5, dtype=np.int64),
    "mask": np.array([True, False]),
    "bias": np.zeros(3, dtype=np.float64),
    "small": np.array([120, -3], dtype=np.int8),
}
PRIVATE = ("privacy.unit=client", "privacy.noise_multiplier=2", "cohort.min_survivors=5")


def run(*overrides):
    return load_config(None, ["privacy.secure_aggregation=true", *overrides]).config


def plan_of(config, *, clients=10, dimensions=14, **more):
    return make_plan(config, participations=1, dimensions=dimensions, clients=clients, **more)


def codec_of(config, *, participants=10, server_round=1, plan=None):
    return codec_for(config, MODEL, participants=participants, plan=plan, server_round=server_round)


class TestRules:
    """What members agree on before anything else."""

    def test_rules_are_the_configuration_s(self):
        """Every number is taken from where the run sets it."""
        config = run("secagg.honest=4", "secagg.colluding=2", "secagg.epoch_rounds=9", "cohort.min_survivors=8")
        rules = rules_for(config, bytes(range(16)))
        assert (rules.honest, rules.colluding, rules.epoch_rounds, rules.min_survivors) == (4, 2, 9, 8)
        assert (rules.fewest, rules.bits, rules.group_size) == (8, 32, 0)
        assert rules.run_id == bytes(range(16))
        assert rules.config_digest.hex() == config.digest()

    def test_another_configuration_has_other_rules(self):
        """Also one that differs in nothing that rules name."""
        assert rules_for(run(), bytes(16)).digest != rules_for(run("rounds=11"), bytes(16)).digest


class TestFixedPoint:
    """Runs in which clients add no noise."""

    def test_weights_and_losses_ride_along(self):
        """With weighting by examples: most weight of the run, the loss as a metric, all numbers of the model."""
        codec = codec_of(run("secagg.most_weight=500", "secagg.clipping_norm=3"))
        assert codec == FixedPoint(
            bits=32, dimensions=9, clipping_norm=3.0, most_weight=500, clients=10, metrics=("train_loss",)
        )

    def test_equal_weights_leave_the_ring_to_the_update(self):
        """Every weight is one."""
        assert codec_of(run("strategy.weighting=equal")).most_weight == 1

    def test_private_runs_send_no_figures(self):
        """With noise for each example the weight is one and no loss is told."""
        config = run("privacy.unit=example", "privacy.noise_multiplier=1", "training.local_steps=1")
        codec = codec_of(config, plan=plan_of(config))
        assert (codec.most_weight, codec.metrics) == (1, ())

    def test_rounds_and_starts_do_not_change_it(self):
        """It is of the run, the model's shapes and the number of participants."""
        first, later = (codec_of(run(), server_round=server_round) for server_round in (1, 2))
        assert first.digest == later.digest
        assert first.digest != codec_of(run(), participants=9).digest

    def test_what_does_not_fit_is_refused_before_the_run(self):
        """Weights too large for the ring: named when the run is planned, and again when a codec is made."""
        config = run("secagg.bits=20", "secagg.most_weight=100000")
        check_codec(config, 5)
        for refuse in (lambda: check_codec(config, 6), lambda: codec_of(config, participants=6)):
            with pytest.raises(ConfigError, match="no room for 6 clients"):
                refuse()
        check_codec(load_config(None, []).config, 10**6)


class TestDistributedNoise:
    """Runs in which each client adds its share of the noise."""

    def test_the_mechanism_is_the_plan_s(self):
        """Only floating-point arrays are in the sum, over as many coordinates as the plan counted."""
        config = run(*PRIVATE)
        plan = plan_of(config)
        codec = codec_of(config, plan=plan)
        assert isinstance(codec, DistributedSum)
        assert (codec.mechanism, codec.dimensions, codec.size) == (plan.distributed, 9, 16)

    def test_each_round_is_rotated_otherwise(self):
        """By a seed that everybody knows, of the run and the round."""
        config = run(*PRIVATE)
        plan = plan_of(config)
        rotations = {codec_of(config, plan=plan, server_round=r).rotation for r in (1, 2, 3)}
        assert len(rotations) == 3
        assert codec_of(config, plan=plan).digest == codec_of(config, plan=plan).digest

    def test_noise_is_the_same_however_many_take_part(self):
        """The mechanism is sized for the most and the fewest that a sum may have, not for those who are there."""
        config = run(*PRIVATE)
        plan = plan_of(config)
        assert codec_of(config, plan=plan).digest == codec_of(config, plan=plan, participants=6).digest

    @pytest.mark.parametrize("clients", [5, 30])
    def test_what_the_plan_does_not_cover_is_refused(self, clients):
        """More members of a sum, more values, or no plan at all."""
        config = run(*PRIVATE)
        with pytest.raises(PrivacyError, match="at most"):
            codec_of(config, plan=plan_of(config, clients=clients), participants=clients + 1)
        with pytest.raises(PrivacyError, match="does not cover"):
            codec_of(config, plan=plan_of(config, clients=clients, dimensions=8), participants=5)
        with pytest.raises(PrivacyError, match="no plan"):
            codec_of(config)

    def test_noise_for_more_honest_ones_than_are_sure_is_refused(self):
        """A plan that counts on five where a sum may have four."""
        config = run(*PRIVATE)
        plan = plan_of(config)
        assert plan.shares.honest == 4
        plan = dataclasses.replace(plan, shares=dataclasses.replace(plan.shares, honest=5))
        with pytest.raises(PrivacyError, match="not sure to hold"):
            codec_of(config, plan=plan)


def test_both_kinds_are_codecs():
    """What the protocol names is there, and an update goes through."""
    private = run(*PRIVATE)
    for codec in (codec_of(run()), codec_of(private, plan=plan_of(private))):
        used: Codec = codec
        update = np.linspace(-0.1, 0.1, codec.dimensions)
        vector = used.encode(update, weight=1.0, metrics={"train_loss": 0.5}, seed=bytes(32))
        decoded = used.decode(vector * np.uint32(1), 1)
        assert (vector.shape, vector.dtype) == ((used.size,), np.uint32)
        assert (decoded.update.shape, decoded.weight) == ((codec.dimensions,), 1.0)
        assert decoded.metrics.keys() <= {"train_loss"}
        assert (used.bits, len(used.digest)) == (32, 32)


class TestArrays:
    """From a model's arrays to a vector and back."""

    def test_sums_are_about_floating_point_arrays(self):
        """In the model's order; a counter would fill the clipping norm."""
        assert list(covered(MODEL)) == ["weight", "bias"]

    @given(arrays_of.arrays(np.float32, (2, 3), elements=st.floats(-1e3, 1e3, width=32)))
    @settings(deadline=None)
    def test_an_update_takes_the_start_to_the_trained_model(self, weight):
        """Start plus what training changed is the trained model, to the rounding of its types; the rest stays."""
        trained = MODEL | {"weight": weight, "count": np.array(45), "mask": ~MODEL["mask"]}
        update = flatten(covered(MODEL), MODEL, trained)
        assert (update.shape, update.dtype) == ((9,), np.float64)
        arrays = add_update(MODEL, update)
        assert list(arrays) == list(MODEL)
        assert np.allclose(arrays["weight"], weight, rtol=1e-6, atol=1e-6)
        assert all(arrays[name] is MODEL[name] for name in ("count", "mask", "small"))
        assert all(arrays[name].dtype == MODEL[name].dtype for name in MODEL)
        assert all(arrays[name].shape == MODEL[name].shape for name in MODEL)

    def test_overflow_is_left_to_the_codec(self):
        """A difference that is not finite is flattened as it is."""
        far = MODEL | {"bias": np.full(3, 1e308)}
        update = flatten(covered(MODEL), MODEL | {"bias": np.full(3, -1e308)}, far)
        assert np.isinf(update).sum() == 3

    def test_other_shapes_are_refused(self):
        """Arrays that are not the model's, and vectors of another length."""
        template = covered(MODEL)
        with pytest.raises(ValueError, match="'bias'"):
            flatten(template, MODEL, MODEL | {"bias": np.zeros(4)})
        with pytest.raises(ValueError, match="another length"):
            add_update(MODEL, np.zeros(13))
