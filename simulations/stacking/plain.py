"""A block of members whose model is a chain of dense layers, without privacy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from simulations.stacking.batches import Batch
from simulations.stacking.dense import Chain, Products, Same, Stacked, Taken
from simulations.stacking.layout import Layout
from simulations.stacking.updates import Updates
from simulations.stacking.verdict import Tally

_ADDED_ROWS = 4096
"""Examples whose gradients are summed in float32 before their sum goes on in float64."""


class DenseBlock:
    """Trains members step by step; those whose last step it was go to the tally.

    Two things make it quick: in the first step all members have the same weights, so that the products of all are one
    product; and of the last step of plain SGD only the sum over members is formed, unless somebody's result could be
    unsound.
    """

    def __init__(self, chain: Chain, layout: Layout, start: Tensor, *, updates: Updates, tally: Tally) -> None:
        self._chain, self._layout, self._updates, self._tally = chain, layout, updates, tally
        self._start = start
        self._same = Same(layout.views(start))
        self._rows = start.new_empty(0)
        self._bound = torch.empty(0)
        self._members = 0

    def train(self, batches: Iterable[Batch], steps: list[int], weights: Tensor) -> list[bool]:
        """Whether each member's result was sound.

        Args:
            batches: One a step.
            steps: Of each member, in descending order.
            weights: float64[members].
        """
        sound = [False] * len(steps)
        self._members = len(steps)
        several = sum(own > 1 for own in steps)
        self._rows = self._start.expand(several, -1).clone() if several else self._start.new_empty(0, len(self._start))
        stacked = self._layout.views(self._rows)
        norm = torch.linalg.vector_norm(self._start).double()
        self._bound = norm.expand(len(steps)).clone()
        losses = torch.zeros(len(steps), dtype=torch.float64, device=self._start.device)
        for step, batch in enumerate(batches):
            active = len(batch.targets)
            going = sum(own > step + 1 for own in steps[:active])
            products: Products = self._same
            if step:
                products = Stacked({name: values[:active] for name, values in stacked.items()})
            found, taken = self._chain.run(batch.inputs.flatten(2), batch.targets, batch.shares, products)
            losses[:active] += found.sum(1)
            if going < active:
                ended = slice(going, active)
                mean = losses[ended] / (step + 1)
                sound[ended] = self._end(taken, ended, step, mean, weights[ended])
            if going:
                self._step(_part(taken, slice(0, going)), self._rows[:going], step)
        return sound

    def _step(self, taken: list[Taken], rows: Tensor, step: int, first: int = 0) -> None:
        """One optimizer step of members in place."""
        updates = self._updates
        if not updates.affine:
            gradients = torch.empty_like(rows)
            self._write(taken, self._layout.views(gradients))
            updates.apply(rows, gradients, step=step, first=first, members=self._members)
            return
        stacked, keep, rate = self._layout.views(rows), updates.keep, updates.rate
        for each in taken:
            weight = stacked[each.layer.weight]
            weight.baddbmm_(each.gradients.transpose(1, 2), each.inputs, beta=keep, alpha=-rate)
            if each.layer.bias is not None:
                bias = stacked[each.layer.bias]
                (bias if keep == 1.0 else bias.mul_(keep)).sub_(each.gradients.sum(1), alpha=rate)
        if updates.pull:
            rows.add_(self._start, alpha=updates.pull)
        self._widen(taken, slice(first, first + len(rows)))

    def _write(self, taken: list[Taken], gradients: Mapping[str, Tensor]) -> None:
        for each in taken:
            gradients[each.layer.weight].baddbmm_(each.gradients.transpose(1, 2), each.inputs, beta=0)
            if each.layer.bias is not None:
                torch.sum(each.gradients, 1, out=gradients[each.layer.bias])

    def _widen(self, taken: list[Taken], own: slice) -> Tensor:
        """Follow a bound on the norm of each member's parameters through a step; NaN where anything is."""
        updates, bound = self._updates, self._bound[own]
        bound *= abs(updates.keep)
        bound += updates.pull * torch.linalg.vector_norm(self._start).double() if updates.pull else 0.0
        for each in taken:
            gradients, inputs = _norms(each.gradients), _norms(each.inputs)
            n = each.inputs.shape[1]
            bound += updates.rate * gradients * (inputs + n**0.5)
        return bound

    def _end(self, taken: list[Taken], ended: slice, step: int, losses: Tensor, weights: Tensor) -> list[bool]:
        """Add members that have taken their last step."""
        own = _part(taken, ended)
        if self._updates.affine and bool(losses.isfinite().all()):
            bound = self._widen(own, ended) * (1 + 1e-3)  # for what rounding adds
            if bool((bound <= self._tally.least_limit).all()):
                self._add(own, ended, step, losses, weights)
                return [True] * len(losses)
        rows = self._rows[ended] if step else self._start.expand(len(losses), -1).clone()
        self._step(own, rows, step, first=ended.start)
        return self._tally.add(rows, losses, weights)

    def _add(self, taken: list[Taken], ended: slice, step: int, losses: Tensor, weights: Tensor) -> None:
        """Add what the last step of plain SGD makes of members, without forming it for any of them."""
        updates, tally, layout = self._updates, self._tally, self._layout
        if step:
            before = torch.zeros_like(tally.total)
            for first in range(ended.start, ended.stop, 16):
                part = slice(first, min(ended.stop, first + 16))
                before += weights[first - ended.start : part.stop - ended.start].float() @ self._rows[part]
        else:
            before = self._start.double() * weights.sum()
        tally.total.add_(before, alpha=updates.keep).add_(
            self._start.double(), alpha=updates.pull * float(weights.sum())
        )
        sums = layout.views(tally.total)
        rate, factors = updates.rate, weights.float().view(-1, 1, 1)
        for each in taken:
            gradients = each.gradients * factors
            together = max(1, _ADDED_ROWS // each.inputs.shape[1])
            for first in range(0, len(gradients), together):
                left = gradients[first : first + together].flatten(0, 1)
                right = each.inputs[first : first + together].flatten(0, 1)
                sums[each.layer.weight].sub_(left.t() @ right, alpha=rate)
                if each.layer.bias is not None:
                    sums[each.layer.bias].sub_(left.sum(0), alpha=rate)
        tally.count(losses, weights)


def _part(taken: list[Taken], own: slice) -> list[Taken]:
    """What a range of members saw."""
    if own.start == 0 and taken and own.stop == len(taken[0].inputs):
        return taken
    return [Taken(layer=each.layer, inputs=each.inputs[own], gradients=each.gradients[own]) for each in taken]


def _norms(x: Tensor) -> Tensor:
    """float64[members]: Frobenius norms."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=(1, 2))
    return norms.double()
