"""`nn.Linear`: a sum of outer products over all positions of an example, and a sum of output gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.product import Adding, Product, Workspace, weigh
from common.privacy.bookkeeping.rounding import gamma, sizes_above, squares_above, widen


class DenseCall(Call):
    """[n, ..., inputs] to [n, ..., outputs]; a single vector is one example."""

    layer: nn.Linear

    @property
    def rows(self) -> int:
        """Examples."""
        return 1 if self.inputs.dim() == 1 else len(self.inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """As in `nn.Linear`."""
        bias = self.layer.bias
        return F.linear(inputs, self.layer.weight.detach(), None if bias is None else bias.detach())

    def squared_norms(self) -> list[Tensor]:
        """Weight, then bias."""
        gradient = Gradient(self.flat(self.gradient))
        self.product = outer(self.flat(self.inputs.detach()), gradient, self.workspace, "weight")
        squares = [self.product.squared_norms()]
        if len(self.parameters) > 1:
            self.bias, square = gradient.summed()
            squares.append(square)
        return squares

    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """Weight, then bias."""
        sums = [self.product.weighted_sum(factors[0], how=how)]
        if len(self.parameters) > 1:
            sums.append(weigh(self.bias, factors[1], how=how))
        return sums

    def flat(self, x: Tensor) -> Tensor:
        """[n, t, features] in the dtype of the computation."""
        n, features = self.rows, x.shape[-1]
        return x.to(self.dtype).reshape(n, x.numel() // max(1, n * features), features)


class Gradient:
    """Gradients of a layer's output, whose sums and norms are taken when a block of them is in the cache anyway.

    Args:
        source: [n, t, o]; [n, o, t] with `positions` 2.
        positions: The dimension that t is.
    """

    def __init__(self, source: Tensor, *, positions: int = 1) -> None:
        self.source, self._positions, self._seen = source, positions, 0
        self.spread = source.new_empty(len(source), dtype=torch.float64)
        self._sums = source.new_empty(len(source), source.shape[3 - positions])

    def part(self, first: int, last: int) -> Tensor:
        """The examples from `first` to `last`; the first time in ascending order."""
        part = self.source[first:last]
        if last > self._seen:
            self.spread[first:last] = sizes_above(part)
            torch.sum(part, self._positions, out=self._sums[first:last])
            self._seen = last
        return part

    def summed(self) -> tuple[Tensor, Tensor]:
        """Sums over positions, [n, o], and float64[n] their squared norms, rounded up; after all parts were seen.

        A sum over t is off by at most gamma(t) times the sum of the norms at all positions, which is at most root t
        times the Frobenius norm.
        """
        t = self.source.shape[self._positions]
        squares = squares_above(self._sums)
        if t == 1:
            return self._sums, squares
        return self._sums, widen(squares, self.spread * (t**0.5 * gamma(t, self.source.dtype)))


def outer(inputs: Tensor, gradient: Gradient, workspace: Workspace, key: object) -> Product:
    """The product of inputs [n, t, i] and gradients [n, t, o]."""
    n, positions, width = inputs.shape
    return Product(
        rows=n,
        positions=positions,
        inputs=width,
        outputs=gradient.source.shape[2],
        block=lambda first, last: (gradient.part(first, last).transpose(1, 2), inputs[first:last]),
        magnitude=lambda first, last: sizes_above(inputs[first:last]) * gradient.spread[first:last],
        like=gradient.source,
        workspace=workspace,
        key=key,
    )
