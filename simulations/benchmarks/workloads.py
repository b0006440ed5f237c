"""The reference workloads as models and data that a `site.toml` names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from common.config import DataSettings
from common.schema import ClientData, DataSchema, Examples, Federation
from simulations.benchmarks.reference import WORKLOADS, Workload


def model_name(workload: Workload) -> str:
    """The name under which `site.toml` registers a workload's model and data."""
    return f"{workload.name.replace('_', '-')}-reference"


def cnn(schema: DataSchema) -> nn.Module:  # noqa: ARG001 - the reference's model is fixed
    """The model of the `cnn` workload, with its starting weights."""
    return WORKLOADS["cnn"].initial_model()


def linear_1000(schema: DataSchema) -> nn.Module:  # noqa: ARG001
    """The model of the `linear_1000` workload, with its starting weights."""
    return WORKLOADS["linear_1000"].initial_model()


def cnn_data(settings: DataSettings, seed: int) -> Federation:  # noqa: ARG001 - the reference's data is fixed
    """The clients of the `cnn` workload."""
    return _federation("cnn", DataSchema(kind="image", input_shape=(1, 28, 28), num_classes=10))


def linear_1000_data(settings: DataSettings, seed: int) -> Federation:  # noqa: ARG001
    """The clients of the `linear_1000` workload."""
    return _federation("linear_1000", DataSchema(kind="tabular", input_shape=(32,), num_classes=2))


def client_name(client: int) -> str:
    """Names that sort as the numbers do."""
    return f"client-{client:06d}"


class ReferenceSampler:
    """Asks whom the reference's schedule asks; a coordinator's sampler."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:  # noqa: ARG002 - fixed by the schedule
        """The clients of a round, sorted."""
        return [client_name(client) for client in self._workload.cohort(server_round)]

    def state(self) -> dict[str, int]:
        """Nothing: the schedule depends on the round only."""
        return {}

    def restore(self, state: Mapping[str, int]) -> None:
        """Nothing to restore."""


def _federation(name: str, schema: DataSchema) -> Federation:
    workload = WORKLOADS[name]
    clients = []
    for number in range(workload.clients):
        inputs, targets = workload.inputs(number)
        examples = Examples(inputs=inputs, targets=targets)
        clients.append(ClientData(name=client_name(number), train=examples, test=examples))
    return Federation(schema=schema, clients=tuple(clients), test=clients[0].train)
