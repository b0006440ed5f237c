"""A member that fails changes nothing but its own entry; the others are summed as if it had not been there."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from common.errors import FailureCode, ModelError, PeerError
from common.schema import Examples
from simulations.stacking import Stack

from .helpers import CPU, IMAGES, TABLE, alone, assert_same, config_of, members_of, model_of, stacked, weights_of

COUNTS = [6, 4, 9, 3]
CASES = {
    "linear": (TABLE, {}),
    "mlp": (TABLE, {"hidden": 5}),
    "cnn": (IMAGES, {"hidden": 4}),
}
TRAININGS = {"one-step": {"batch_size": 16}, "steps": {"local_epochs": 2}, "momentum": {"momentum": 0.5}}


def others(model, config, members, failed, **more):
    return [alone(model, config, member, **more) for k, member in enumerate(members) if k != failed]


def with_inputs(member, change):
    return member._replace(examples=replace(member.examples, inputs=change(member.examples.inputs.clone())))


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("which", [0, 2])
def test_one_that_diverges_fails_alone(name, training, bad, which):
    schema, options = CASES[name]
    config = config_of(name, options=options, **training)
    model, members = model_of(config, schema), members_of(schema, COUNTS)
    members[which] = with_inputs(members[which], lambda x: x.fill_(bad))
    folded = stacked(model, config, members)
    expected = [FailureCode.NON_FINITE_UPDATE if k == which else None for k in range(4)]
    assert folded.failures == expected
    assert_same(folded, others(model, config, members, which))


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_finite_values_that_are_too_large_fail(name, training):
    """The same bound that the coordinator puts on every reply, value by value."""
    schema, options = CASES[name]
    config = config_of(name, options=options, **training)
    model, members = model_of(config, schema), members_of(schema, COUNTS)
    members[1] = with_inputs(members[1], lambda x: x * 1e4)
    trained = [alone(model, config, member)[2] for member in members]
    largest = [max(np.abs(values).max() for values in arrays.values()) for arrays in trained]
    least = sorted(largest)[-2]
    assert largest[1] > 2 * least
    folded = stacked(model, config, members, largest=1.01 * least)
    assert folded.failures == [None, FailureCode.NON_FINITE_UPDATE, None, None]
    assert_same(folded, others(model, config, members, 1))
    assert stacked(model, config, members, largest=1.01 * largest[1]).failures == [None] * 4


def test_what_one_step_made_too_large_stays_so():
    """A last step that changes nothing does not hide what came before it."""
    config = config_of("linear", shuffle=False)
    model, members = model_of(config, TABLE), members_of(TABLE, [8, 8])

    def first_half(x):
        x[:4] *= 1e5
        x[4:] = 0
        return x

    members[0] = with_inputs(members[0], first_half)
    assert stacked(model, config, members, largest=100.0).failures == [FailureCode.NON_FINITE_UPDATE, None]


def test_twice_the_models_own_values_are_sound_however_small_the_bound():
    config = config_of("linear", batch_size=16)
    model, members = model_of(config, TABLE), members_of(TABLE, COUNTS)
    assert stacked(model, config, members, largest=1e-9, rate=1e-4).failures == [None] * 4
    assert stacked(model, config, members, largest=1e-9, rate=50.0).weight == 0


@pytest.mark.parametrize("name", CASES)
def test_one_without_examples_fails_alone(name):
    schema, options = CASES[name]
    config = config_of(name, options=options)
    model, members = model_of(config, schema), members_of(schema, [6, 0, 4])
    folded = stacked(model, config, members)
    assert folded.failures == [None, FailureCode.CLIENT_FAILED, None]
    assert_same(folded, others(model, config, members, 1))


def test_one_without_time_for_a_step_fails_alone():
    config = config_of()
    model, members = model_of(config, TABLE), members_of(TABLE, [6, 6, 4], steps=[None, 0, None])
    folded = stacked(model, config, members)
    assert folded.failures == [None, FailureCode.CLIENT_FAILED, None]
    assert_same(folded, others(model, config, members, 1))


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("fault", ["shape", "class"])
def test_one_whose_examples_do_not_fit_fails_alone(name, fault):
    schema, options = CASES[name]
    config = config_of(name, options=options)
    model, members = model_of(config, schema), members_of(schema, COUNTS)
    own = members[2].examples
    wrong = Examples(inputs=own.inputs[..., :4], targets=own.targets)
    if fault == "class":
        wrong = Examples(inputs=own.inputs, targets=own.targets + 3)
    members[2] = members[2]._replace(examples=wrong)
    folded = stacked(model, config, members)
    assert folded.failures == [None, None, FailureCode.CLIENT_FAILED, None]
    assert_same(folded, others(model, config, members, 2))


def test_nobody_is_left():
    config = config_of()
    model = model_of(config, TABLE)
    for members in ([], members_of(TABLE, [0, 0])):
        folded = stacked(model, config, members)
        assert (folded.weight, folded.loss) == (0, 0)
        assert folded.failures == [FailureCode.CLIENT_FAILED] * len(members)
        assert all(not total.any() for total in folded.sums.values())


def test_memory_that_runs_out_halves_the_stack(monkeypatch):
    """As an accelerator does, where torch raises OutOfMemoryError."""
    config = config_of("cnn", options={"hidden": 4})
    model, members = model_of(config, IMAGES), members_of(IMAGES, [4] * 8)
    run, sizes = Stack._run, []

    def limited(self, task, block, tally):
        sizes.append(len(block.places))
        if len(block.places) > 2:
            tally.total += 1e9  # what a block left behind when it failed half way
            raise torch.OutOfMemoryError
        return run(self, task, block, tally)

    monkeypatch.setattr("simulations.stacking.stack.block_size", lambda values, device: 8)
    monkeypatch.setattr(Stack, "_run", limited)
    folded = stacked(model, config, members)
    assert sizes == [8, 4, 2, 2, 4, 2, 2]
    assert_same(folded, [alone(model, config, member) for member in members])


@pytest.mark.parametrize("change", ["missing", "shape", "kind"])
def test_weights_of_another_model_are_refused(change):
    config = config_of()
    model = model_of(config, TABLE)
    start = weights_of(model)
    first = next(iter(start))
    if change == "missing":
        del start[first]
    else:
        start[first] = start[first][:-1] if change == "shape" else start[first].astype("U8")
    with pytest.raises(PeerError):
        Stack(model, config, device=CPU).train(
            start, members_of(TABLE, [4]), server_round=1, rate=0.1, plan=None, proximal_mu=0.0, largest=1e6
        )


def test_what_cannot_be_stacked_is_refused_with_the_reason():
    config = config_of(options={"dropout": 0.5})
    with pytest.raises(ModelError, match="drops units out") as caught:
        Stack(model_of(config, TABLE), config, device=CPU)
    assert "--batching off" in caught.value.hint
