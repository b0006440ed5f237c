"""DP-SGD in a stack: what each member would have done alone, from the same samples and noise, and no promise less."""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch

from common.errors import FailureCode, PeerError, PrivacyError
from common.privacy import SecureNoise
from common.privacy.bookkeeping.rounding import MAX_POSITIONS, SUMMATION_ERROR
from common.schema import Examples
from simulations.insecure import FixedNoise
from simulations.stacking import Member

from .helpers import (
    IMAGES,
    TABLE,
    alone,
    assert_same,
    examples_of,
    members_of,
    model_of,
    plan_of,
    private_config,
    stacked,
    weights_of,
)

COUNTS = [9, 4, 1, 12, 7]


class Still:
    """No noise, and every example in every sample: a step's sum is all that is left."""

    def __init__(self):
        self.drawn = 0

    def integers(self, count):
        """Zeros."""
        self.drawn += count
        return np.zeros(count, dtype=np.int32)

    def words(self, count):
        """The smallest words: everything is below its threshold."""
        return np.zeros(count, dtype=np.uint64)


def fixed(count):
    """What makes each client's noise, the same at every call."""
    return [partial(FixedNoise, 3, f"client-{k}/1") for k in range(count)]


def check(config, schema, counts, *, mu=0.0, steps=None, relative=1e-5):
    model = model_of(config, schema)
    plan, members = plan_of(config, model), members_of(schema, counts, sources=fixed(len(counts)), steps=steps)
    folded = stacked(model, config, members, plan=plan, mu=mu)
    assert folded.failures == [None] * len(counts)
    sources = fixed(len(counts))
    results = [
        alone(model, config, member, plan=plan, source=source(), mu=mu)
        for member, source in zip(members, sources, strict=True)
    ]
    assert_same(folded, results, relative=relative)


class TestEquality:
    """The same noise as alone gives the same result."""

    @pytest.mark.parametrize("clipping", ["flat", "per-layer"])
    @pytest.mark.parametrize(
        ("schema", "model", "options"),
        [(TABLE, "linear", {}), (TABLE, "mlp", {"hidden": 5, "layers": 2}), (IMAGES, "mlp", {"hidden": 7})],
        ids=["linear", "mlp", "mlp-images"],
    )
    def test_of_dense_models(self, clipping, schema, model, options):
        check(private_config(model, clipping=clipping, options=options), schema, COUNTS)

    @pytest.mark.parametrize("norm", [1e-3, 1e4])
    def test_where_everything_or_nothing_is_clipped(self, norm):
        check(private_config(norm=norm), TABLE, COUNTS)

    @pytest.mark.parametrize(
        "more",
        [{"momentum": 0.9}, {"weight_decay": 0.1}, {"optimizer": "adamw"}, {"momentum": 0.5, "weight_decay": 0.1}],
    )
    def test_of_optimizers(self, more):
        check(private_config(**more), TABLE, COUNTS)

    def test_of_the_proximal_term(self):
        check(private_config(), TABLE, COUNTS, mu=0.5)

    def test_of_members_that_have_time_for_fewer_steps(self):
        check(private_config(steps=4), TABLE, COUNTS, steps=[1, None, 2, 4, 3])

    def test_of_clients_without_examples_whose_every_sample_is_empty(self):
        check(private_config(), TABLE, [0, 3, 0])

    def test_where_more_clients_than_one_are_noised_at_a_time_or_just_one(self, monkeypatch):
        for together in (1, 1 << 20):
            monkeypatch.setattr("simulations.stacking.private._TOGETHER", together)
            check(private_config(), TABLE, COUNTS)

    def test_of_the_others_where_one_fails_half_way(self):
        """What is tried again without it draws the same noise and the same samples."""
        config = private_config(rate=0.5, steps=3)
        model, members = model_of(config, TABLE), members_of(TABLE, COUNTS, sources=fixed(len(COUNTS)))
        own = members[3].examples
        unknown = Examples(inputs=own.inputs, targets=own.targets + 3)
        plan = plan_of(config, model)
        folded = stacked(model, config, [*members[:3], members[3]._replace(examples=unknown), *members[4:]], plan=plan)
        assert folded.failures == [None, None, None, FailureCode.CLIENT_FAILED, None]
        rest = [pair for k, pair in enumerate(zip(members, fixed(len(COUNTS)), strict=True)) if k != 3]
        assert_same(folded, [alone(model, config, member, plan=plan, source=source()) for member, source in rest])

    def test_of_entities(self):
        """One example of each entity that is sampled."""
        config = private_config(rate=0.7)
        model = model_of(config, TABLE)
        plan, examples = plan_of(config, model), examples_of(TABLE, 12, seed=1)
        grouped = Examples(inputs=examples.inputs, targets=examples.targets, entities=torch.arange(12) // 3)
        members = [Member(name=f"client-{k}", examples=grouped, source=source) for k, source in enumerate(fixed(3))]
        folded = stacked(model, config, members, plan=plan)
        results = [
            alone(model, config, member, plan=plan, source=source())
            for member, source in zip(members, fixed(3), strict=True)
        ]
        assert_same(folded, results)


def sums(members, *, clipping="flat", norm=0.5, largest=1e30, model=None):
    """The exact sums of one step over all examples: what has moved, in units of the divided learning rate."""
    config = private_config("linear", clipping=clipping, norm=norm, rate=1.0, steps=1, noise=1.0)
    model = model or model_of(config, TABLE)
    plan = plan_of(config, model)
    folded = stacked(model, config, members, plan=plan, rate=plan.denominator, largest=largest)
    start = weights_of(model)
    moved = [folded.weight * start[name].astype(np.float64) - total for name, total in folded.sums.items()]
    return np.concatenate([part.ravel() for part in moved]), folded, plan


def member(inputs, targets, source=None, name="client"):
    examples = Examples(inputs=inputs, targets=targets)
    source = source or Still()
    return Member(name=name, examples=examples, source=lambda: source)


class TestOneExample:
    """One example moves its client's sum by at most the clipping norm, and nobody else's at all."""

    @pytest.mark.parametrize("clipping", ["flat", "per-layer"])
    @pytest.mark.parametrize("size", [1e-3, 1.0, 1e6, 1e15])
    def test_moves_the_sum_by_at_most_the_norm(self, clipping, size):
        examples = examples_of(TABLE, 8, seed=1)
        inputs = examples.inputs.clone()
        inputs[3] *= size
        with_it, _, plan = sums([member(inputs, examples.targets)], clipping=clipping)
        rest = [k for k in range(8) if k != 3]
        without, _, _ = sums([member(inputs[rest], examples.targets[rest])], clipping=clipping)
        distance = np.linalg.norm(with_it - without)
        rounding = 2 * plan.noise_stddev / 2**20 * math.sqrt(len(with_it)) + 1e-6  # the grid, and weights in float32
        assert distance <= plan.clipping_norm * (1 + SUMMATION_ERROR) + rounding
        if size == 1:
            assert distance >= 0.99 * plan.clipping_norm

    @pytest.mark.parametrize("clipping", ["flat", "per-layer"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, 3e38])
    def test_contributes_nothing_where_it_is_not_finite(self, clipping, bad):
        examples = examples_of(TABLE, 8, seed=1)
        inputs = examples.inputs.clone()
        inputs[3] = bad
        with_it, folded, _ = sums([member(inputs, examples.targets)], clipping=clipping)
        rest = [k for k in range(8) if k != 3]
        without, _, _ = sums([member(inputs[rest], examples.targets[rest])], clipping=clipping)
        assert folded.failures == [None]
        assert np.abs(with_it - without).max() < 5e-6

    def test_stays_with_its_own_client(self):
        others = [examples_of(TABLE, 5, seed=k) for k in (1, 2)]
        own = examples_of(TABLE, 5, seed=3)
        bad = Examples(inputs=own.inputs * math.inf, targets=own.targets)
        members = [member(each.inputs, each.targets) for each in (others[0], bad, others[1])]
        everybody, _, _ = sums(members)
        two, _, _ = sums([members[0], members[2]])
        assert np.abs(everybody - two).max() < 5e-6

    def test_counts_the_same_in_any_company(self):
        """What a client sends does not depend on how many examples its neighbours in the stack have."""
        small, large = examples_of(TABLE, 2, seed=1), examples_of(TABLE, 40, seed=2)
        one, _, _ = sums([member(small.inputs, small.targets)])
        other, _, _ = sums([member(large.inputs, large.targets)])
        both, _, _ = sums([member(small.inputs, small.targets), member(large.inputs, large.targets)])
        assert np.abs(both - one - other).max() < 5e-6


class TestNoise:
    """Every step of every member has noise of its own."""

    def test_is_drawn_for_every_value_of_every_step_though_no_example_comes(self):
        config = private_config(steps=3)
        model = model_of(config, TABLE)
        plan, sources = plan_of(config, model), [Still() for _ in range(4)]
        stacked(model, config, members_of(TABLE, [0, 5, 0, 2], sources=sources), plan=plan)
        assert [source.drawn for source in sources] == [3 * plan.dimensions] * 4

    def test_moves_a_model_that_no_example_moves(self):
        config = private_config(steps=1, noise=1.0)
        model = model_of(config, IMAGES)
        plan, members = plan_of(config, model), members_of(IMAGES, [0] * 40, sources=[SecureNoise() for _ in range(40)])
        folded = stacked(model, config, members, plan=plan, rate=plan.denominator)
        start = weights_of(model)
        moved = np.concatenate([(folded.sums[n] - 40 * start[n].astype(np.float64)).ravel() for n in start])
        expected = plan.noise_stddev * math.sqrt(40)
        # a false alarm has a probability below 1e-6: five standard deviations of the estimate
        assert abs(moved.std() / expected - 1) < 5 / math.sqrt(2 * len(moved))

    @pytest.mark.parametrize("together", [1, 1 << 20])
    def test_is_another_for_each_member_where_they_share_a_source(self, together, monkeypatch):
        """Else the noise of a sum of 40 would grow by 40, not by the root of 40."""
        monkeypatch.setattr("simulations.stacking.private._TOGETHER", together)
        config = private_config(steps=1, noise=1.0)
        model, source = model_of(config, IMAGES), SecureNoise()
        plan, members = plan_of(config, model), members_of(IMAGES, [0] * 40, sources=[source] * 40)
        folded = stacked(model, config, members, plan=plan, rate=plan.denominator)
        start = weights_of(model)
        moved = np.concatenate([(folded.sums[n] - 40 * start[n].astype(np.float64)).ravel() for n in start])
        assert abs(moved.std() / (plan.noise_stddev * math.sqrt(40)) - 1) < 5 / math.sqrt(2 * len(moved))

    def test_lies_on_the_grid_with_the_sum(self):
        """Every released value is a multiple of the grid's step, so that nothing shows between the points."""
        config = private_config("linear", steps=1, rate=1.0)
        model = model_of(config, TABLE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()  # so that float32 holds what is released
        plan = plan_of(config, model)
        source = FixedNoise(1, "client/1")
        folded = stacked(model, config, members_of(TABLE, [5], sources=[source]), plan=plan, rate=plan.denominator)
        steps = np.concatenate([total.ravel() for total in folded.sums.values()]) / (plan.noise_stddev / 2**20)
        assert np.abs(steps - np.rint(steps)).max() <= np.abs(steps).max() * 2**-22

    def test_is_not_drawn_for_a_plan_of_fewer_parameters(self):
        config = private_config()
        model, source = model_of(config, TABLE), Still()
        small = plan_of(private_config("linear"), model_of(private_config("linear"), TABLE))
        with pytest.raises(PeerError):
            stacked(model, config, members_of(TABLE, [5], sources=[source]), plan=small)
        assert source.drawn == 0

    def test_is_not_done_without(self):
        config = private_config()
        model = model_of(config, TABLE)
        members = members_of(TABLE, [5, 5])
        with pytest.raises(PrivacyError, match="no source"):
            stacked(model, config, members, plan=plan_of(config, model))
        with pytest.raises(PrivacyError, match="plan"):
            stacked(model, config, members, plan=None)


def test_a_sample_beyond_what_is_summed_exactly_enough_fails_its_client_alone(monkeypatch):
    monkeypatch.setattr("simulations.stacking.private.MAX_POSITIONS", 10)
    assert MAX_POSITIONS == 2**16
    members = members_of(TABLE, [4, 20, 4], sources=[Still(), Still(), Still()])
    _, folded, _ = sums(members)
    assert [failure is None for failure in folded.failures] == [True, False, True]
    assert folded.weight == 2


def test_no_loss_leaves():
    config = private_config()
    model = copy.deepcopy(model_of(config, TABLE))
    folded = stacked(model, config, members_of(TABLE, [5], sources=fixed(1)), plan=plan_of(config, model))
    assert folded.loss == 0
