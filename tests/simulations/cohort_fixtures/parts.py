"""Twenty clients of 8 to 27 examples; client 5 is the one in trouble."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable

import torch

from common.config import DataSettings
from common.data.population import Population
from common.names import NumberedNames
from common.schema import ClientData, DataSchema, Examples, Federation

SCHEMA = DataSchema(kind="tabular", input_shape=(4,), num_classes=3)
TROUBLED = 5


def _examples(seed: int, count: int) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(count) % 3
    inputs = torch.nn.functional.one_hot(targets, 4).float() + 0.4 * torch.randn(count, 4, generator=generator)
    return Examples(inputs=inputs, targets=targets)


def _federation(settings: DataSettings, trouble: Callable[[Examples], Examples]) -> Federation:
    names = NumberedNames(settings.clients or 20)

    def make(index: int) -> ClientData:
        train = _examples(index, 8 + index)
        return ClientData(
            name=names[index], train=trouble(train) if index == TROUBLED else train, test=_examples(100 + index, 4)
        )

    return Federation(schema=SCHEMA, clients=Population(names, make), test=_examples(1000, 60))


def lazy(settings: DataSettings, seed: int) -> Federation:
    return _federation(settings, lambda train: train)


def one_raises(settings: DataSettings, seed: int) -> Federation:
    def fail(train: Examples) -> Examples:
        raise RuntimeError("secret: 17")

    return _federation(settings, fail)


def one_kills(settings: DataSettings, seed: int) -> Federation:
    """Its worker ends as one does that the system ends for its memory; the coordinator's process lives."""

    def kill(train: Examples) -> Examples:
        if multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return train

    return _federation(settings, kill)


def one_is_empty(settings: DataSettings, seed: int) -> Federation:
    return _federation(settings, lambda train: train.take(torch.arange(0)))


def one_diverges(settings: DataSettings, seed: int) -> Federation:
    return _federation(settings, lambda train: Examples(inputs=train.inputs * 1e30, targets=train.targets))


def far_apart(settings: DataSettings, seed: int) -> Federation:
    """Its examples are of another width than the model's."""
    return _federation(settings, lambda train: Examples(inputs=train.inputs[:, :2], targets=train.targets))
