"""Runs under client-level privacy over clients that only pretend to train."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import Message
from numpy.typing import NDArray
from torch import nn

from common.config import RunConfig
from common.errors import BudgetExhaustedError
from common.flower import CONFIG, ROUND, WITHIN, arrays_of
from common.privacy import Budget, MatrixGaussian, PrivacyEvent, PrivacyPlan, make_plan
from common.privacy.noise import KeyedNoise, NoiseSource
from server.cohort import NoiseByRound, min_separation, participations
from server.coordinator import Coordinator, Job, Outcome
from server.grids import trainable_names
from server.store import RunFolder
from tests.helpers.grids import ScriptedGrid, update
from tests.helpers.runs import Log, configuration

TRAINABLE = ["layer.weight", "layer.bias"]
DIMENSIONS = 8
FIRST = 2


class Net(nn.Module):
    """Eight parameters to train; beside them a frozen one, running statistics and a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.full((2,), 7.0), requires_grad=False)
        self.register_buffer("mean", torch.full((3,), 5.0))
        self.register_buffer("count", torch.tensor(4))
        with torch.no_grad():
            self.layer.weight.copy_(torch.arange(6).view(2, 3) / 4)
            self.layer.bias.zero_()


def client_private(**changes: Any) -> RunConfig:
    """Four rounds with client-level privacy; a change of `privacy` extends its table."""
    privacy = {"unit": "client", "noise_multiplier": 1.0, "clipping_norm": 2.0, **changes.pop("privacy", {})}
    return configuration(**{"rounds": 4, "privacy": privacy, **changes})


def plan_of(config: RunConfig, clients: int, *, dimensions: int = DIMENSIONS) -> PrivacyPlan:
    """The run's plan, as whoever starts it makes it."""
    return make_plan(
        config,
        dimensions=dimensions,
        participations=participations(config.cohort, clients, config.rounds),
        min_separation=min_separation(config.cohort, clients),
        clients=clients,
    )


def fixed_noise(key: int = 0) -> KeyedNoise:
    """Noise that a test can draw twice."""
    return KeyedNoise(noise_key=bytes([key]) * 32, mask_key=bytes([key + 1]) * 32)


def by_round(server_round: int) -> KeyedNoise:
    """Noise that depends on the round alone, as a simulation that must repeat takes it."""
    return fixed_noise(server_round)


class NoNoise:
    """Zeros where there should be noise: what is released is the rounded sum itself."""

    def integers(self, count: int) -> NDArray[np.int32]:
        return np.zeros(count, np.int32)

    def words(self, count: int) -> NDArray[np.uint64]:
        return np.frombuffer(os.urandom(8 * count), np.uint64)


class MemoryLedger:
    """A ledger in memory that tells `log` of each reservation; it refuses one more than `most`, and a round of a whole
    run's event a second time.
    """

    def __init__(self, log: list[str] | None = None, *, most: int = 10**9) -> None:
        self.log = [] if log is None else log
        self.budget = Budget.opened(5.0, 1e-5)
        self.most = most
        self._events: list[PrivacyEvent] = []

    def events(self) -> list[PrivacyEvent]:
        return list(self._events)

    def reserve(self, event: PrivacyEvent, *, planned: int) -> float:
        again = any(e.server_round == event.server_round and isinstance(e, MatrixGaussian) for e in self._events)
        if len(self._events) >= self.most or again:
            raise BudgetExhaustedError("the budget is spent", hint="stop here")
        self._events.append(event)
        self.log.append(f"reserve {event.server_round}")
        return 0.0


Change = Callable[[str, int, int], Any]
"""What a client adds to every trainable value: by its name, the round, and how often it was asked before."""


@dataclass(kw_only=True)
class Sites(ScriptedGrid):
    """Clients node-2, node-3, ... that answer with the model plus a change, in the order asked."""

    clients: int
    change: Change = lambda name, server_round, before: 0.01
    within: float | None = None
    absent: Callable[[str, int], bool] = lambda name, server_round: False
    asked: list[tuple[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        ScriptedGrid.__init__(self, self._answers, range(FIRST, FIRST + self.clients))

    def _answers(self, messages: list[Message]) -> Iterator[Message]:
        for message in messages:
            name = f"node-{message.metadata.dst_node_id}"
            server_round = int(message.content[CONFIG][ROUND])
            self.asked.append((name, server_round))
            if self.absent(name, server_round):
                continue
            change = self.change(name, server_round, self.asked.count((name, server_round)) - 1)
            arrays = {
                key: (values + np.float32(change)).astype(values.dtype) if key in TRAINABLE else values
                for key, values in arrays_of(message.content).items()
            }
            metrics = {} if self.within is None else {WITHIN: self.within}
            yield Message(update(arrays, 1.0, **metrics), reply_to=message)


def coordinate(
    config: RunConfig,
    grid: Sites,
    *,
    ledger: MemoryLedger | None = None,
    noise: NoiseSource | NoiseByRound | None = None,
    folder: RunFolder | None = None,
    observer: Log | None = None,
    **job: Any,
) -> Outcome:
    """A run of `Net` over these clients; without `noise` nothing is added."""
    observer = observer or Log()
    observer.folder = folder
    job = {
        "plan": plan_of(config, grid.clients),
        "noise": noise if callable(noise) else lambda _: noise or NoNoise(),
        **job,
    }
    return Coordinator(
        Job(
            config=config,
            model=Net(),
            ledger=ledger or MemoryLedger(),
            folder=folder,
            observer=observer,
            **job,
        )
    ).run(grid)


def start() -> dict[str, NDArray[Any]]:
    """The starting model's arrays."""
    return {name: tensor.numpy().copy() for name, tensor in Net().state_dict().items()}


def flat(arrays: dict[str, NDArray[Any]], names: Sequence[str] = TRAINABLE) -> NDArray[np.float64]:
    """float64[d]: the trainable arrays one after the other."""
    return np.concatenate([np.asarray(arrays[name], np.float64).reshape(-1) for name in names])


assert trainable_names(Net()) == TRAINABLE


CLIENTS = 6

FLAT = client_private()
ADAPTIVE = client_private(privacy={"clipping": "adaptive"})
MATRIX = client_private(privacy={"mechanism": "matrix"}, cohort={"size": 2, "sampling": "cyclic"}, rounds=7)
POISSON = client_private(cohort={"size": 3, "sampling": "poisson"})
KINDS = {"flat": FLAT, "adaptive": ADAPTIVE, "matrix": MATRIX}


def within_of(config: RunConfig) -> float | None:
    return 1.0 if config.privacy.clipping == "adaptive" else None


def sites(config: RunConfig, **changes: Any) -> Sites:
    """Clients whose updates differ by name, round and attempt: an update made again is another."""

    def change(name: str, server_round: int, before: int) -> float:
        return 0.01 * int(name.removeprefix("node-")) + 0.1 * server_round + before

    return Sites(**{"clients": CLIENTS, "change": change, "within": within_of(config), **changes})
