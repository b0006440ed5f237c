"""The reference workloads as models and data that a `site.toml` names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from common.config import DataSettings
from common.data.population import Population
from common.names import NumberedNames
from common.schema import ClientData, DataSchema, Examples, Federation
from simulations.benchmarks.reference import WORKLOADS, Workload


def model_name(workload: Workload) -> str:
    """The name under which `site.toml` registers a workload's model and data."""
    return f"{workload.name.replace('_', '-')}-reference"


def _reference_model(name: str) -> Callable[[DataSchema], nn.Module]:
    """A workload's model, with its starting weights."""

    def build(schema: DataSchema) -> nn.Module:  # noqa: ARG001 - the reference's model is fixed
        return WORKLOADS[name].initial_model()

    return build


def _reference_data(name: str, schema: DataSchema) -> Callable[[DataSettings, int], Federation]:
    """A workload's clients."""

    def load(settings: DataSettings, seed: int) -> Federation:  # noqa: ARG001 - the reference's data is fixed
        return _federation(name, schema)

    return load


_ROWS = DataSchema(kind="tabular", input_shape=(32,), num_classes=2)

cnn = _reference_model("cnn")
cnn_data = _reference_data("cnn", DataSchema(kind="image", input_shape=(1, 28, 28), num_classes=10))
linear_1000 = _reference_model("linear_1000")
linear_1000_data = _reference_data("linear_1000", _ROWS)
mlp_100 = _reference_model("mlp_100")
mlp_100_data = _reference_data("mlp_100", DataSchema(kind="tabular", input_shape=(784,), num_classes=10))
cnn_cifar = _reference_model("cnn_cifar")
cnn_cifar_data = _reference_data("cnn_cifar", DataSchema(kind="image", input_shape=(3, 32, 32), num_classes=10))
lstm = _reference_model("lstm")
lstm_data = _reference_data(
    "lstm", DataSchema(kind="tokens", input_shape=(80,), num_classes=81, vocabulary_size=81, per_position=True)
)


def population_data(settings: DataSettings, seed: int) -> Federation:  # noqa: ARG001 - a client's number is its seed
    """As many clients of the `linear_1000` workload as are wanted, each made when it is asked for."""
    inputs = WORKLOADS["linear_1000"].inputs

    def make(number: int) -> ClientData:
        x, y = inputs(number)
        examples = Examples(inputs=x, targets=y)
        return ClientData(name=names[number], train=examples, test=examples)

    names = NumberedNames(settings.clients)
    return Federation(schema=_ROWS, clients=Population(names, make), test=make(0).train)


def client_name(client: int) -> str:
    """Names that sort as the numbers do."""
    return f"client-{client:06d}"


class ReferenceSampler:
    """Asks whom the reference's schedule asks; a coordinator's sampler."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        self._names = [client_name(client) for client in range(workload.clients)]

    def sample(self, server_round: int, clients: Sequence[str]) -> list[str]:  # noqa: ARG002 - fixed by the schedule
        """The clients of a round, sorted."""
        return [self._names[client] for client in self._workload.cohort(server_round)]

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
