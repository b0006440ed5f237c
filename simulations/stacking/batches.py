"""Which examples each step takes, for several clients at once; the same as `client.trainer` takes for one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.trainer import training_seed
from common.config import RunConfig, TrainingSettings
from common.schema import Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One step's examples of the members that take it.

    Attributes:
        inputs: [members, n, ...]; rows that pad a short batch are zero.
        targets: int64[members, n] or int64[members, n, positions]; zero where padded.
        shares: float32[members, n]: by what each example's loss is multiplied in the mean of its batch, 0 where padded.
            A plain number where all are equal.
    """

    inputs: Tensor
    targets: Tensor
    shares: Tensor | float


class Pool:
    """The examples of several members, one member after the other, and one row of zeros to pad with."""

    def __init__(
        self, examples: Sequence[Examples], counts: Sequence[int], device: torch.device, *, pad: bool = True
    ) -> None:
        inputs, targets = [each.inputs for each in examples], [each.targets for each in examples]
        if pad:
            inputs.append(inputs[0].new_zeros(1, *inputs[0].shape[1:]))
            targets.append(targets[0].new_zeros(1, *targets[0].shape[1:]))
        self.inputs, self.targets = torch.cat(inputs).to(device), torch.cat(targets).to(device)
        self.counts = counts
        self.starts = np.cumsum([0, *counts])
        self.nothing = int(self.starts[-1])

    def take(self, table: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Inputs and targets [*table.shape, ...] of the rows that `table` (int64, of any shape) names."""
        rows = torch.from_numpy(table.reshape(-1)).to(self.inputs.device)
        inputs, targets = self.inputs.index_select(0, rows), self.targets.index_select(0, rows)
        return inputs.view(*table.shape, *inputs.shape[1:]), targets.view(*table.shape, *targets.shape[1:])

    def span(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The same rows of every member, without a copy, where all have equally many."""
        members, count = len(self.counts), self.counts[0]
        inputs = self.inputs[: self.nothing].view(members, count, *self.inputs.shape[1:])
        targets = self.targets[: self.nothing].view(members, count, *self.targets.shape[1:])
        return inputs[:, first:last], targets[:, first:last]


def steps_of(count: int, settings: TrainingSettings) -> int:
    """Steps that a client with `count` examples takes in one round, without privacy."""
    return settings.local_steps or settings.local_epochs * -(-count // settings.batch_size)


def plain_batches(
    names: Sequence[str],
    examples: Sequence[Examples],
    counts: Sequence[int],
    steps: Sequence[int],
    config: RunConfig,
    *,
    server_round: int,
    device: torch.device,
) -> Iterator[Batch]:
    """Every step's batch, for the members that still take part in it.

    Guarantee: Each member sees the same examples in the same batches as in `client.trainer.train_plain`, in the order
    that its own seed gives.

    Args:
        names: Of the members.
        examples: Of each.
        counts: How many; one or more.
        steps: Of each; never more than of the member before it, so that those who go on are always the first ones.
        config: Of the run.
        server_round: From 1.
        device: Where batches are wanted.
    """
    settings = config.training
    size = settings.batch_size
    if not settings.shuffle and min(counts) == max(counts):
        pool = Pool(examples, counts, device, pad=False)
        yield from _spans(pool, steps, size)
        return
    pool = Pool(examples, counts, device)
    table, lengths = _table(pool, names, steps, config, server_round)
    for step in range(steps[0]):
        active = _active(steps, step)
        length = lengths[:active, step]
        width = int(length.max())
        inputs, targets = pool.take(np.ascontiguousarray(table[:active, step, :width]))
        if int(length.min()) == width:
            yield Batch(inputs=inputs, targets=targets, shares=1.0 / width)
            continue
        places, own = np.arange(width), length[:, None]
        shares = np.where(places < own, 1.0 / own, 0.0).astype(np.float32)
        yield Batch(inputs=inputs, targets=targets, shares=torch.from_numpy(shares).to(device))


def _spans(pool: Pool, steps: Sequence[int], size: int) -> Iterator[Batch]:
    """Batches of members that have equally many examples and visit them as they lie."""
    count = pool.counts[0]
    per_epoch = -(-count // size)
    for step in range(steps[0]):
        first = step % per_epoch * size
        last, active = min(count, first + size), _active(steps, step)
        inputs, targets = pool.span(first, last)
        yield Batch(inputs=inputs[:active], targets=targets[:active], shares=1.0 / (last - first))


def _active(steps: Sequence[int], step: int) -> int:
    """How many members, the first ones, take this step."""
    active = len(steps)
    while steps[active - 1] <= step:
        active -= 1
    return active


def _table(
    pool: Pool, names: Sequence[str], steps: Sequence[int], config: RunConfig, server_round: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of the pool, int64[members, steps, batch size], and how many of each batch count, int64[members, steps]."""
    settings = config.training
    size = min(settings.batch_size, max(pool.counts))
    table = np.full((len(names), steps[0], size), pool.nothing, dtype=np.int64)
    lengths = np.zeros((len(names), steps[0]), dtype=np.int64)
    generator = torch.Generator()
    for member, (name, own, count) in enumerate(zip(names, steps, pool.counts, strict=True)):
        start, per_epoch = pool.starts[member], -(-count // settings.batch_size)
        if settings.shuffle:
            generator.manual_seed(training_seed(config.seeds.training, server_round, name))
        order = np.arange(start, start + count)
        epoch = np.full(per_epoch * settings.batch_size, pool.nothing, dtype=np.int64)
        for step in range(0, own, per_epoch):
            if settings.shuffle:
                order = torch.randperm(count, generator=generator).numpy() + start
            epoch[:count] = order
            last = min(own, step + per_epoch)
            table[member, step:last] = epoch.reshape(per_epoch, -1)[: last - step, :size]
            lengths[member, step:last] = settings.batch_size
            if last == step + per_epoch:
                lengths[member, last - 1] = count - (per_epoch - 1) * settings.batch_size
    return table, lengths
