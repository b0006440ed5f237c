"""What is stacked and what is not, and how chunks are cut."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from simulations.benchmarks.reference import DP_WORKLOADS, WORKLOADS
from simulations.stacking import chunk_size, why_not
from simulations.stacking.dense import read_chain

from .helpers import IMAGES, TABLE, TEXT, config_of, model_of, private_config


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(x - x.mean(0))


class Subclass(nn.Linear):
    pass


def hooked():
    model = nn.Linear(6, 3)
    model.register_forward_hook(lambda *args: None)
    return model


def shared():
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 3))


def frozen():
    model = nn.Linear(6, 3)
    return model.requires_grad_(requires_grad=False)


@pytest.mark.parametrize(
    ("model", "options", "schema"),
    [
        ("linear", {}, TABLE),
        ("mlp", {}, TABLE),
        ("mlp", {}, IMAGES),
        ("cnn", {}, IMAGES),
        ("resnet", {"width": 4}, IMAGES),
        ("inception", {"width": 4}, IMAGES),
        ("transformer", {"width": 8}, TEXT),
    ],
)
def test_built_in_models_without_recurrence_are_stacked(model, options, schema):
    config = config_of(model, options=options)
    assert why_not(model_of(config, schema), config) is None


@pytest.mark.parametrize(
    ("model", "options", "schema", "reason"),
    [
        ("lstm", {}, TEXT, "LSTM"),
        ("mlp", {"dropout": 0.1}, TABLE, "drops units out"),
        ("cnn", {"dropout": 0.1}, IMAGES, "drops units out"),
        ("transformer", {"width": 8, "dropout": 0.1}, TEXT, "drops units out"),
        ("transformer", {"width": 8, "checkpointing": True}, TEXT, "checkpointing"),
    ],
)
def test_built_in_models_that_are_not(model, options, schema, reason):
    config = config_of(model, options=options)
    assert reason in why_not(model_of(config, schema), config)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Own(), "Own"),
        (nn.Sequential(Own()), "layer `0` (Own)"),
        (Subclass(6, 3), "Subclass"),
        (nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)), "mixes the examples"),
        (nn.Sequential(nn.Flatten(0), nn.Linear(6, 3)), "flattens"),
        (nn.Embedding(6, 3, max_norm=1.0), "looks up"),
        (nn.GRU(6, 3), "GRU"),
        (nn.Sequential(nn.ELU(inplace=True), nn.Linear(6, 3)), "works in place"),
        (hooked(), "hooks"),
        (shared(), "share parameters"),
        (frozen(), "nothing to train"),
        (nn.Linear(6, 3).double(), "float32"),
        (nn.ReLU(), "nothing to train"),
    ],
)
def test_layers_that_are_not(model, reason):
    assert reason in why_not(model, config_of())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (config_of(precision="bfloat16"), "bfloat16"),
        (private_config(clipping="adaptive"), "adaptive"),
        (config_of(privacy={"unit": "client", "noise_multiplier": 1.0}), "unit"),
        (config_of(privacy={"secure_aggregation": True}), "secure aggregation"),
    ],
)
def test_settings_that_are_not(config, reason):
    assert reason in why_not(nn.Linear(6, 3), config)


def test_privacy_and_adamw_only_of_dense_chains():
    cnn, chain = model_of(config_of("cnn"), IMAGES), nn.Linear(6, 3)
    for config in (private_config(), config_of(optimizer="adamw")):
        assert why_not(chain, config) is None
        assert "only chains of dense layers" in why_not(cnn, config)


def test_a_partly_frozen_model_is_stacked_by_the_general_way():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].requires_grad_(requires_grad=False)
    assert why_not(model, config_of()) is None
    assert read_chain(model) is None


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(6, 3),
        nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Sequential(nn.ReLU(), nn.Linear(5, 5)), nn.Linear(5, 3)),
        nn.Sequential(nn.ReLU(), nn.Linear(6, 3, bias=False), nn.Dropout(0.0), nn.Identity()),
    ],
)  # fmt: skip
def test_chains_are_known(model):
    assert read_chain(model) is not None


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(6, 5), nn.Flatten()),
        nn.Sequential(nn.Linear(6, 5), nn.Tanh()),
        nn.Sequential(nn.ReLU()),
        Own(),
    ],
)
def test_what_is_no_chain(model):
    assert read_chain(model) is None


def test_the_workloads_of_the_benchmark():
    config = config_of()
    found = {name: why_not(workload.model(), config) for name, workload in WORKLOADS.items()}
    assert [name for name, reason in found.items() if reason is None] == ["cnn", "linear_1000", "mlp_100", "cnn_cifar"]
    assert why_not(DP_WORKLOADS["resnet18"].model(), config) is not None  # code of its own


class TestChunks:
    """Chunks follow from model and data alone."""

    def test_are_smaller_the_more_work_a_client_is(self):
        sizes = [chunk_size(parameters, 60) for parameters in (10, 1_000, 50_000, 10_000_000)]
        assert sizes == sorted(sizes, reverse=True)
        assert sizes[0] > sizes[-1]

    @pytest.mark.parametrize("parameters", [0, 1, 10**12])
    @pytest.mark.parametrize("examples", [0, 1, 10**12])
    def test_are_never_empty_nor_endless(self, parameters, examples):
        assert 1 <= chunk_size(parameters, examples) <= 512

    def test_do_not_depend_on_the_machine(self):
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        two = chunk_size(50_890, 60)
        torch.set_num_threads(before)
        assert two == chunk_size(50_890, 60)
