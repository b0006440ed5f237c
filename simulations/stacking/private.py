"""DP-SGD for a block of members whose model is a chain of dense layers: the promises of `common.privacy.optimizer`.

What that module does for one client is done here for many, each with its own sample, sum and noise. Bounds on norms,
factors, samples and noise come from the same functions; only the products run over a stack. A chain gives every layer
one vector an example, so that an example's gradient of a weight is one outer product: its norm is the product of two
norms, and a weighted sum over examples is one product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PrivacyError
from common.privacy import NoiseSource, PrivacyPlan, UnitSampler
from common.privacy.bookkeeping.rounding import MAX_POSITIONS, ROUND_UP, exactly, norms_above, squares_above
from common.privacy.noise import add_noise
from common.schema import Examples
from simulations.stacking.batches import Pool
from simulations.stacking.dense import Chain, Dense, Products, Ragged, Same, Taken
from simulations.stacking.layout import Layout
from simulations.stacking.updates import Updates
from simulations.stacking.verdict import Tally

_TOGETHER = 1 << 17
"""Values of a sum that are formed, noised and applied before the next: they stay in the cache meanwhile."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """Examples of one step, one member after the other: inputs [rows, ...], targets int64[rows], rows by member."""

    inputs: Tensor
    targets: Tensor
    sizes: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Weighed:
    """One layer's sums before they are formed: by member float64[o, n] and float32[n, i]; float64[members, o]."""

    layer: Dense
    left: Sequence[Tensor]
    right: Sequence[Tensor]
    biases: Tensor


class _Drawn:
    """A source that has drawn what it will be asked for, and gives it once."""

    def __init__(self, values: NDArray[np.int32]) -> None:
        self._values: NDArray[np.int32] | None = values

    def integers(self, count: int) -> NDArray[np.int32]:
        """See `NoiseSource`."""
        values, self._values = self._values, None
        if values is None or len(values) != count:
            raise PrivacyError("other noise was asked for than was drawn")
        return values

    def words(self, count: int) -> NDArray[np.uint64]:
        """Not drawn ahead: random bits come from the member's own source."""
        raise PrivacyError(f"{count} random bits were asked for of noise")


class PrivateBlock:
    """Trains members with DP-SGD (Abadi et al. 2016, algorithm 1), one example or entity of each protected.

    Guarantee: That of `common.privacy.optimizer.PrivateOptimizer`, for each member by itself: one example changes its
    sum by at most the clipping norm, whatever its gradient (one that is not finite contributes zero); a step over no
    examples still adds noise; the divisor is the plan's public constant; the sum is rounded to the noise's grid. A
    member's samples and noise come from its own source in the order in which `client.trainer.train_private` draws them.

    **Proof of the bound on rounding.** Squared norms are never below the true ones (`norms_above`, `squares_above`),
    and factors follow from them in float64, as there. A sum over at most MAX_POSITIONS examples is formed in float64;
    each term is a product of factor, gradient and input, and passes at most 2 multiplications and as many additions as
    there are examples. That is less than `rounding.summation_error` allows for.
    """

    def __init__(
        self, chain: Chain, layout: Layout, start: Tensor, *, updates: Updates, tally: Tally, plan: PrivacyPlan
    ) -> None:
        self._chain, self._layout, self._updates, self._tally = chain, layout, updates, tally
        self._start, self._plan = start, plan
        self._clipper = plan.clipper()
        self._noise_stddev = plan.noise_stddev / plan.clipping_norm * self._clipper.norm
        self._order = {place.name: k for k, place in enumerate(layout.places)}

    def train(
        self,
        examples: Sequence[Examples],
        counts: Sequence[int],
        sources: Sequence[NoiseSource],
        steps: list[int],
        weights: Tensor,
    ) -> list[bool]:
        """Whether each member's result was sound.

        Args:
            examples: Of each member.
            counts: How many; may be none.
            sources: Of each.
            steps: Of each, in descending order.
            weights: float64[members].
        """
        for source in sources:
            source.words(1)  # by which `client.app` seeds what nothing here draws from
        pool = Pool(examples, counts, self._start.device, pad=False)
        samplers = [UnitSampler(each.entities, count) for each, count in zip(examples, counts, strict=True)]
        rows = self._start.expand(len(steps), -1).clone()
        stacked = self._layout.views(rows)
        with exactly():
            for step in range(steps[0]):
                active = sum(own > step for own in steps)
                sample = self._sample(pool, samplers[:active], sources)
                products: Products = Same(self._layout.views(self._start))
                if step:
                    products = Ragged({name: values[:active] for name, values in stacked.items()}, sample.sizes)
                taken = self._chain.run(sample.inputs.flatten(1), sample.targets, 1.0, products)[1]
                self._release(taken, sample.sizes, sources[:active], rows[:active], step=step, members=len(steps))
        return self._tally.add(rows, torch.zeros_like(weights), weights)

    def _sample(self, pool: Pool, samplers: Sequence[UnitSampler], sources: Sequence[NoiseSource]) -> _Sample:
        """A Poisson sample of each member."""
        chosen = [
            sampler.sample(self._plan, source).numpy() for sampler, source in zip(samplers, sources, strict=False)
        ]
        sizes = [len(each) for each in chosen]
        if max(sizes) > MAX_POSITIONS:
            raise PrivacyError(
                f"a sample of {max(sizes)} examples; at most {MAX_POSITIONS} are summed exactly enough",
                hint="train the clients one by one",
            )
        rows = np.concatenate([each + start for each, start in zip(chosen, pool.starts, strict=False)])
        inputs, targets = pool.take(rows)
        return _Sample(inputs=inputs, targets=targets, sizes=sizes)

    def _release(
        self,
        taken: list[Taken],
        sizes: list[int],
        sources: Sequence[NoiseSource],
        rows: Tensor,
        *,
        step: int,
        members: int,
    ) -> None:
        """Clip, sum, add noise, divide, and let every member's optimizer step."""
        sums = self._weighed(taken, sizes)
        together = max(1, _TOGETHER // self._layout.size)
        total = torch.empty(min(together, len(rows)), self._layout.size, dtype=torch.float64, device=rows.device)
        views = self._layout.views(total)
        places = {each.layer.weight: list(views[each.layer.weight]) for each in sums}
        drawn = iter(self._draw(sources, together))
        for first in range(0, len(rows), together):
            last = min(len(rows), first + together)
            for each in sums:
                parts = zip(places[each.layer.weight], each.left[first:last], each.right[first:last], strict=False)
                for place, left, right in parts:
                    torch.mm(left, right.double(), out=place)
                if each.layer.bias is not None:
                    views[each.layer.bias][: last - first] = each.biases[first:last]
            (released,) = add_noise(
                [total[: last - first]],
                noise_stddev=self._noise_stddev,
                source=next(drawn),
                divisor=self._plan.denominator,
            )
            self._updates.apply(rows[first:last], released, step=step, first=first, members=members)

    def _draw(self, sources: Sequence[NoiseSource], together: int) -> list[_Drawn]:
        """One step's noise, each member's from its own source, for so many members together.

        Drawing needs tables and room that fill a core's cache: so all of it comes before the sums. Members that share
        a source share a draw.
        """
        size, groups = self._layout.size, range(0, len(sources), together)
        if all(source is sources[0] for source in sources):
            values = sources[0].integers(size * len(sources))
            return [_Drawn(values[size * first : size * (first + together)]) for first in groups]
        return [
            _Drawn(np.concatenate([source.integers(size) for source in sources[first : first + together]]))
            for first in groups
        ]

    def _weighed(self, taken: list[Taken], sizes: list[int]) -> list[_Weighed]:
        """Each layer's gradients times the clipping factors, in float64, member by member."""
        squares = self._squared_norms(taken)
        finite = bool(squares.isfinite().all())
        factors = self._clipper.factors(squares).expand(len(squares), -1)
        owners = torch.repeat_interleave(torch.tensor(sizes, device=squares.device))
        weighed = []
        for each in taken:
            factor = factors[self._order[each.layer.weight]].unsqueeze(1)
            gradients, inputs = each.gradients, each.inputs
            if not finite:  # zero times infinity is not nothing
                gradients, inputs = gradients.masked_fill(factor == 0, 0.0), inputs.masked_fill(factor == 0, 0.0)
            exact = gradients.double()
            left, biases = exact * factor, exact
            if each.layer.bias is not None:
                own = exact * factors[self._order[each.layer.bias]].unsqueeze(1)
                biases = own.new_zeros(len(sizes), own.shape[1]).index_add_(0, owners, own)
            weighed.append(
                _Weighed(
                    layer=each.layer,
                    left=left.t().split_with_sizes(sizes, 1),
                    right=inputs.split_with_sizes(sizes),
                    biases=biases,
                )
            )
        return weighed

    def _squared_norms(self, taken: list[Taken]) -> Tensor:
        """float64[parameters, rows]: never below the true ones; an outer product's is the product of two."""
        rows = len(taken[0].inputs)
        squares = torch.zeros(len(self._order), rows, dtype=torch.float64, device=self._start.device)
        for each in taken:
            norms = norms_above(each.gradients, 1).mul_(norms_above(each.inputs, 1)).mul_(ROUND_UP)
            squares[self._order[each.layer.weight]] = norms.square_().mul_(ROUND_UP)
            if each.layer.bias is not None:
                squares[self._order[each.layer.bias]] = squares_above(each.gradients)
        return squares
