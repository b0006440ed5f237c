"""A stack gives what its members would have given one after the other, within 1e-5 relative."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from client.trainer import learning_rate_at
from simulations.stacking import Stack

from .helpers import (
    CPU,
    IMAGES,
    NEXT,
    TABLE,
    TEXT,
    alone,
    assert_same,
    config_of,
    members_of,
    model_of,
    stacked,
    weights_of,
)

UNEVEN = [9, 4, 1, 12, 7, 4]
MODELS = {
    "linear": (TABLE, {}),
    "mlp": (TABLE, {"hidden": 5, "layers": 2}),
    "mlp-images": (IMAGES, {"hidden": 5}),
    "cnn": (IMAGES, {"hidden": 4}),
    "resnet": (IMAGES, {"width": 4, "blocks": 1, "groups": 2}),
    "inception": (IMAGES, {"width": 4, "groups": 2}),
    "transformer": (TEXT, {"width": 8, "heads": 2, "layers": 1}),
    "transformer-next": (NEXT, {"width": 8, "heads": 2, "layers": 1}),
}
TRAININGS = {
    "one-epoch": {},
    "epochs": {"local_epochs": 3},
    "steps": {"local_steps": 5},
    "unshuffled": {"shuffle": False, "local_epochs": 2},
    "momentum": {"momentum": 0.9, "local_epochs": 2},
    "weight-decay": {"weight_decay": 0.1, "local_epochs": 2},
    "momentum-decay": {"momentum": 0.5, "weight_decay": 0.1, "local_epochs": 2},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1, "local_epochs": 2},
    "physical": {"max_physical_batch": 3},
}


def check(name, counts, *, mu=0.0, server_round=1, rate=0.05, steps=None, strategy=None, seeds=None, **training):
    schema, options = MODELS[name]
    config = config_of(name.partition("-")[0], options=options, strategy=strategy, seeds=seeds, **training)
    model, members = model_of(config, schema), members_of(schema, counts, steps=steps)
    more = {"mu": mu, "server_round": server_round, "rate": rate}
    folded = stacked(model, config, members, **more)
    assert folded.failures == [None] * len(members)
    assert_same(folded, [alone(model, config, member, **more) for member in members])


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("name", ["linear", "mlp", "mlp-images"])
def test_dense_models_with_uneven_clients(name, training):
    check(name, UNEVEN, **training)


@pytest.mark.parametrize("training", TRAININGS.values(), ids=TRAININGS)
@pytest.mark.parametrize("name", ["linear", "mlp"])
def test_dense_models_with_even_clients(name, training):
    check(name, [6, 6, 6, 6, 6], **training)


@pytest.mark.parametrize("name", ["cnn", "resnet", "inception", "transformer", "transformer-next"])
def test_other_models(name):
    check(name, [5, 4, 2], momentum=0.5, weight_decay=0.1, local_epochs=2)


@pytest.mark.parametrize("more", [{}, {"momentum": 0.9}, {"weight_decay": 0.2}, {"optimizer": "adamw"}])
def test_the_proximal_term(more):
    check("mlp", [9, 4, 3], mu=0.7, local_epochs=2, **more)


def test_the_proximal_term_of_other_models():
    check("cnn", [9, 4, 3], mu=0.7, local_epochs=2, weight_decay=0.1)


@pytest.mark.parametrize("weighting", ["examples", "equal"])
def test_weighting(weighting):
    check("mlp", UNEVEN, strategy={"weighting": weighting})


@pytest.mark.parametrize("name", ["mlp", "cnn"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_members_that_have_time_for_fewer_steps(name, shuffle):
    check(name, [9, 9, 9, 9], steps=[1, None, 2, 4], local_epochs=2, shuffle=shuffle)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_schedules_and_rounds(schedule):
    config = config_of(schedule=schedule, warmup_rounds=1)
    for server_round in (1, 3):
        rate = learning_rate_at(config.training, server_round, config.rounds)
        check("mlp", UNEVEN, server_round=server_round, rate=rate, schedule=schedule, warmup_rounds=1)


def test_the_order_of_examples_follows_the_training_seed():
    check("mlp", UNEVEN, seeds={"training": 7}, local_epochs=2)


def test_what_is_frozen_stays_as_it_came():
    """Not as it was in the model that the stack was made of."""
    config = config_of("cnn", options={"hidden": 4})
    model, blank = model_of(config, IMAGES), model_of(config, IMAGES, seed=1)
    for each in (model, blank):
        each.conv1.requires_grad_(requires_grad=False)
    members = members_of(IMAGES, [5, 3])
    folded = Stack(blank, config, device=CPU).train(
        weights_of(model), members, server_round=1, rate=0.1, plan=None, proximal_mu=0.0, largest=1e6
    )
    assert_same(folded, [alone(model, config, member) for member in members])


@pytest.mark.parametrize("shuffle", [True, False])
def test_relu_that_works_in_place(shuffle):
    config = config_of(local_epochs=2, shuffle=shuffle)
    torch.manual_seed(3)
    dense = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    torn = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.LayerNorm(5), nn.Linear(5, 3))
    for model in (dense, torn):
        members = members_of(TABLE, [5, 5, 5])
        before = [member.examples.inputs.clone() for member in members]
        folded = stacked(model, config, members)
        assert all((old == member.examples.inputs).all() for old, member in zip(before, members, strict=True))
        assert_same(folded, [alone(model, config, member) for member in members])


def test_a_single_client():
    check("mlp", [5], local_epochs=2)


def test_more_clients_than_are_computed_at_a_time(monkeypatch):
    monkeypatch.setattr("simulations.stacking.chunks._CACHE_VALUES", 400)
    check("mlp", UNEVEN * 3, local_epochs=2)


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_uneven_clients_are_one_computation(name, monkeypatch):
    """A stack that fails is halved until it is right, which would hide that it was wrong."""
    run, calls = Stack._run, []
    monkeypatch.setattr(Stack, "_run", lambda *args: calls.append(args) or run(*args))
    monkeypatch.setattr("simulations.stacking.stack.block_size", lambda values, device: len(UNEVEN))
    check(name, UNEVEN, local_epochs=2)
    assert len(calls) == 1


def test_results_do_not_depend_on_what_was_trained_before():
    schema, options = MODELS["mlp"]
    config = config_of(options=options, local_epochs=2, momentum=0.9)
    model, members = model_of(config, schema), members_of(schema, UNEVEN)
    first, again = stacked(model, config, members), stacked(model, config, members)
    assert all((first.sums[name] == again.sums[name]).all() for name in first.sums)
    assert first.loss == again.loss
