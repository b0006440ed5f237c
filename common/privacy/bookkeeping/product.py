"""Per-example sums of outer products: the gradients of every weight matrix, instantiated only where that is cheaper.

Example i of a layer with weight [o, i] saw inputs a_1 .. a_T and output gradients g_1 .. g_T; its gradient is
sum_t g_t a_t^T. Its norm is found either from that matrix, or from two T x T matrices of inner products ("ghost norm"):

    |sum_t g_t a_t^T|^2 = sum_ts (g_t . g_s) (a_t . a_s)

**Source.** Ghost norm and the choice: Li et al., arXiv 2110.05679, section 4; Bu et al., arXiv 2210.00038, section 3.
Departures: what is chosen by is measured time, not the number of multiplications; instantiated gradients are kept for
the weighted sum where they are small; norms are rounded up; sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from common.privacy.bookkeeping.rounding import (
    CANCELLATION,
    MAX_POSITIONS,
    QUICK_ROWS,
    ROUND_UP,
    TINY,
    gamma,
    norms_above,
    squares_above,
    widen,
)

_FAST, _SLOW, _TOUCH = 1 / 55, 1 / 26, 2.0
"""Nanoseconds on one core: a multiplication in a float32 and a float64 product; an element instantiated and summed."""

Adding = Literal["quick", "exact", "masked"]
"""How a weighted sum is formed: `quick`, partly in float32 (`rounding.QUICK_ROWS`); `exact`, in float64; `masked`,
also in float64, leaves out examples whose factor is zero, whose gradients may then be anything; else they are finite.
"""

_KEPT = 1 << 24
"""Most elements of a layer's instantiated gradients that are kept between norm and weighted sum (64 MiB)."""


@dataclass(eq=False)
class Workspace:
    """Memory that a layer keeps from step to step: taking it anew costs more page faults than the sum costs time."""

    memory: dict[object, Tensor] = field(default_factory=dict)

    def take(self, key: object, count: int, like: Tensor) -> Tensor:
        """[count] elements of undefined value; valid until the same key is taken again."""
        held = self.memory.get(key)
        if held is None or held.numel() < count or (held.dtype, held.device) != (like.dtype, like.device):
            self.memory[key] = held = like.new_empty(count)
        return held[:count]


@dataclass(kw_only=True)
class Product:
    """Sums over positions of outer products, one for each example and group.

    Attributes:
        rows: Number of examples.
        positions: T above.
        inputs: Columns of the weight matrix (of one group's).
        outputs: Its rows (of one group's).
        groups: Independent weight matrices.
        block: (first, last) to gradients [m * groups, outputs, T] and inputs [m * groups, T, inputs] of m examples.
        magnitude: (first, last) to float64[m]: at least the product of the Frobenius norms of gradients and inputs.
        like: A tensor of the dtype and on the device of the computation.
        workspace: Where instantiated gradients are kept.
        key: Their name in it.
    """

    rows: int
    positions: int
    inputs: int
    outputs: int
    block: Callable[[int, int], tuple[Tensor, Tensor]]
    magnitude: Callable[[int, int], Tensor]
    like: Tensor
    workspace: Workspace
    key: object
    groups: int = 1
    _kept: Tensor | None = None

    def squared_norms(self) -> Tensor:
        """float64[rows]: at least the squared norms, of the exact sums and of what `weighted_sum` adds."""
        if self._ghostly():
            parts = [self._ghost(*self.block(*bounds)) for bounds in self._blocks()]
            return torch.cat(parts).view(self.rows, self.groups).sum(1).mul_(ROUND_UP)
        size = self._size()
        instantiated = None
        if self.rows * size <= _KEPT:
            instantiated = self._kept = self.workspace.take(self.key, self.rows * size, self.like).view(-1, size)
        # exact and instantiated gradient differ by at most gamma(T) |G|_F |A|_F, and by what underflows
        relative, lost = gamma(self.positions, self.like.dtype), self.positions * TINY * size**0.5
        parts = [
            widen(squares_above(part), self.magnitude(first, first + len(part)).mul_(relative).add_(lost))
            for first, part in self._instances(instantiated)
        ]
        return torch.cat(parts)

    def weighted_sum(self, factors: Tensor, *, how: Adding) -> Tensor:
        """float64[groups * outputs, inputs]: the sum over examples of factor times gradient.

        Args:
            factors: float64[rows].
            how: See `Adding`.
        """
        if self._ghostly():
            return self._weighted_product(factors, how=how)
        if self._kept is not None:
            return weigh(self._kept, factors, how=how).view(-1, self.inputs)
        total = self.like.new_zeros(self._size(), dtype=torch.float64)
        for first, part in self._instances(None):
            total += weigh(part, factors[first : first + len(part)], how=how)
        return total.view(-1, self.inputs)

    def _size(self) -> int:
        return self.groups * self.outputs * self.inputs

    def _ghostly(self) -> bool:
        """Whether to do without instantiation, by estimated time; a single position needs neither."""
        t, both, size = self.positions, self.inputs + self.outputs, self.inputs * self.outputs
        if t == 1 or t > MAX_POSITIONS:
            return t == 1
        ghost = t * t * both * _FAST + t * size * _SLOW + t * both
        times = 1 if self.rows * self._size() <= _KEPT else 2  # what is not kept is instantiated twice
        return ghost < times * t * size * _FAST + _TOUCH * size

    def _blocks(self) -> Iterator[tuple[int, int]]:
        """Ranges of examples whose inputs fit into a core's cache, or into little of a device's memory."""
        room = 1 << (20 if self.like.device.type == "cpu" else 26)
        example = max(1, self.groups * self.positions * max(self.inputs, self.outputs), self._size())
        step = max(1, room // example)
        for first in range(0, self.rows, step):
            yield first, min(self.rows, first + step)

    def _instances(self, out: Tensor | None) -> Iterator[tuple[int, Tensor]]:
        """First example and gradients [m, size], block by block; written to `out` [rows, size] where it is given."""
        for first, last in self._blocks():
            gradients, inputs = self.block(first, last)
            if out is None:
                part = torch.bmm(gradients, inputs).view(last - first, -1)
            else:
                part = out[first:last]
                torch.bmm(gradients, inputs, out=part.view(-1, self.outputs, self.inputs))
            yield first, part

    def _ghost(self, gradients: Tensor, inputs: Tensor) -> Tensor:
        """float64[m * groups]: squared norms from inner products, each at least the true one.

        Every elementary product g_tk g_sk a_tl a_sl passes o + i + T + 1 roundings, so the error is at most
        gamma(o + i + T + 1) sum_ts |g_t| |g_s| |a_t| |a_s| = gamma S^2. With cancelling positions that is far more
        than the result, which can even come out negative: hence the maximum.
        """
        g, a = norms_above(gradients, 1), norms_above(inputs, 2)
        total = (g * a).sum(1).mul_(ROUND_UP)
        if self.positions == 1:
            return total.square_()
        grams = torch.bmm(gradients.transpose(1, 2), gradients).mul_(torch.bmm(inputs, inputs.transpose(1, 2)))
        found = grams.sum(2).double().sum(1)
        error = total.square().mul_(gamma(self.inputs + self.outputs + self.positions + 2, self.like.dtype))
        lost = self.outputs * a.sum(1).square_() + self.inputs * g.sum(1).square_() + self.positions**2
        least = total.div_(CANCELLATION).square_()
        return torch.maximum(found.add_(error).add_(lost.mul_(2.0 * TINY)), least)

    def _weighted_product(self, factors: Tensor, *, how: Adding) -> Tensor:
        """One float64 product a block: sum_i sum_t (factor_i g_it) a_it^T."""
        groups, outputs, t = self.groups, self.outputs, self.positions
        total = self.like.new_zeros(groups, outputs, self.inputs, dtype=torch.float64)
        for first, last in self._blocks():
            gradients, inputs = self.block(first, last)
            m, part = last - first, factors[first:last]
            if how == "masked":
                out = (part == 0).repeat_interleave(groups).view(-1, 1, 1)
                gradients, inputs = gradients.masked_fill(out, 0.0), inputs.masked_fill(out, 0.0)
            left = (
                gradients.reshape(m, groups, outputs, t)
                .permute(1, 2, 0, 3)
                .to(torch.float64, copy=True)
                .mul_(part.view(1, 1, m, 1))
            )
            right = inputs.reshape(m, groups, t, self.inputs).transpose(0, 1).double()
            total.baddbmm_(left.reshape(groups, outputs, m * t), right.reshape(groups, m * t, self.inputs))
        return total.view(-1, self.inputs)


def weigh(rows: Tensor, factors: Tensor, *, how: Adding) -> Tensor:
    """float64[p]: sum over i of factors[i] * rows[i], for `rows` [n, p]; `how` as in `Adding`."""
    n, width = rows.shape
    total = rows.new_empty(width, dtype=torch.float64)
    if rows.numel() == 0:
        return total.zero_()
    if how == "quick" and rows.dtype == torch.float32:
        return _weigh_quickly(rows, factors, total)
    out = (factors == 0).unsqueeze(1)
    step = max(512, (1 << (16 if rows.device.type == "cpu" else 24)) // n)  # columns whose float64 copy fits a cache
    for first in range(0, width, step):
        part = rows[:, first : first + step].double()
        torch.mv(
            (part.masked_fill(out, 0.0) if how == "masked" else part).t(), factors, out=total[first : first + step]
        )
    return total


def _weigh_quickly(rows: Tensor, factors: Tensor, total: Tensor) -> Tensor:
    """Sums of up to `QUICK_ROWS` rows in float32, as one product (zeros add no error); sums of these in float64."""
    n, width = rows.shape
    index = torch.arange(n, device=rows.device)
    left = rows.new_zeros(-(-n // QUICK_ROWS), n)
    left[index // QUICK_ROWS, index] = factors.to(rows.dtype)
    step = max(2048, (1 << (17 if rows.device.type == "cpu" else 26)) // n)
    for first in range(0, width, step):
        part, place = left @ rows[:, first : first + step], total[first : first + step]
        place.copy_(part[0])
        for other in part[1:]:
            place.add_(other)
    return total
