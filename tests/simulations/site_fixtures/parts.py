"""Models and data of a user: three classes in the plane, and models that fail in every way a client can."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.config import DataSettings
from common.schema import ClientData, DataSchema, Examples, Federation

SCHEMA = DataSchema(kind="tabular", input_shape=(3,), num_classes=3)
MARK = 7.0
"""Third feature of every example of a client in trouble; 0 with all others."""
BLOCK = "COTERIE_TEST_BLOCK_AT"
"""Environment variable: the training step, counted from 1 in each process, that never ends."""


def wait_for_ever() -> None:
    threading.Event().wait()


def fail() -> None:
    raise RuntimeError("secret: 17")


def lose_an_interrupt() -> None:
    """What Ctrl-C does in the moment of a destructor."""

    class Gone:
        def __del__(self) -> None:
            raise KeyboardInterrupt

    Gone()


TROUBLES: dict[str, Callable[[], object]] = {
    "none": lambda: None,
    "raise": fail,
    "hang": wait_for_ever,
    "exit": lambda: os._exit(3),
    "interrupt": lose_an_interrupt,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
}


class Tiny(nn.Module):
    """Logits of a linear layer; `trouble` befalls a training step over examples with the mark."""

    def __init__(self, trouble: str) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self._trouble = trouble
        self._steps = 0
        self._block_at = int(os.environ.get(BLOCK, "0"))

    def forward(self, inputs: Tensor) -> Tensor:
        """float32[n, 3] from float32[n, 3]."""
        logits: Tensor = self.layer(inputs[:, :2])
        if not self.training:
            return logits
        self._steps += 1
        if self._steps == self._block_at:
            wait_for_ever()
        if bool((inputs[:, 2] == MARK).any()):
            if self._trouble == "nan":
                return logits * float("nan")
            TROUBLES[self._trouble]()
        return logits


def tiny(schema: DataSchema, *, trouble: str = "none") -> nn.Module:
    return Tiny(trouble)


class Wide(nn.Module):
    """A model of `megabytes`, most of which no gradient reaches, and a counter of integers."""

    def __init__(self, megabytes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.register_buffer("ballast", torch.arange(megabytes * 2**18, dtype=torch.float32))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """float32[n, 3] from float32[n, 3]."""
        if self.training:
            self.calls += 1
        logits: Tensor = self.layer(inputs)
        return logits


def wide(schema: DataSchema, *, megabytes: int = 20) -> nn.Module:
    return Wide(megabytes)


def _examples(generator: torch.Generator, n: int, mark: float = 0.0) -> Examples:
    targets = torch.arange(n) % 3
    angle = targets * (2 * torch.pi / 3)
    centres = torch.stack([angle.cos(), angle.sin()], dim=1)
    points = centres + 0.3 * torch.randn(n, 2, generator=generator)
    return Examples(inputs=torch.cat([points, torch.full((n, 1), mark)], dim=1), targets=targets)


def _federation(settings: DataSettings, seed: int, **changes: Any) -> Federation:
    """Client i has 12 + 3i examples to train on and 6 of its own held out."""
    clients = []
    for i in range(settings.clients or 4):
        generator = torch.Generator().manual_seed(1000 * seed + i)
        mark = MARK if i in changes.get("marked", ()) else 0.0
        train, test = _examples(generator, 12 + 3 * i, mark), _examples(generator, 6)
        clients.append(ClientData(name=changes.get("name", "client-{:02d}").format(i), train=train, test=test))
    test = _examples(torch.Generator().manual_seed(seed + 1), 60)
    return Federation(schema=SCHEMA, clients=tuple(clients), test=test)


def blobs(settings: DataSettings, seed: int) -> Federation:
    return _federation(settings, seed)


def one_in_trouble(settings: DataSettings, seed: int) -> Federation:
    return _federation(settings, seed, marked={1})


def odd_names(settings: DataSettings, seed: int) -> Federation:
    return _federation(settings, seed, name="[/red] {}")


def nothing_held_out(settings: DataSettings, seed: int) -> Federation:
    federation = _federation(settings, seed)
    none = federation.test.take(torch.arange(0))
    clients = tuple(ClientData(name=c.name, train=c.train, test=none) for c in federation.clients)
    return Federation(schema=SCHEMA, clients=clients, test=none)


def an_empty_client(settings: DataSettings, seed: int) -> Federation:
    federation = _federation(settings, seed)
    empty = ClientData(name="empty", train=federation.test.take(torch.arange(0)), test=federation.test)
    return Federation(schema=SCHEMA, clients=(*federation.clients, empty), test=federation.test)


def labels_out_of_range(settings: DataSettings, seed: int) -> Federation:
    federation = _federation(settings, seed)
    wrong = Examples(inputs=federation.test.inputs, targets=federation.test.targets + 1)
    return Federation(schema=SCHEMA, clients=federation.clients, test=wrong)


def text(settings: DataSettings, seed: int) -> Federation:
    """Sequences that count up: the next token is one more."""
    generator = torch.Generator().manual_seed(seed)

    def sequences(n: int) -> Examples:
        begin = torch.randint(8, (n, 1), generator=generator)
        tokens = (begin + torch.arange(6)) % 8
        return Examples(inputs=tokens[:, :-1], targets=tokens[:, 1:])

    schema = DataSchema(kind="tokens", input_shape=(5,), num_classes=8, vocabulary_size=8, per_position=True)
    clients = tuple(ClientData(name=f"role-{i}", train=sequences(12), test=sequences(4)) for i in range(2))
    return Federation(schema=schema, clients=clients, test=sequences(8))
