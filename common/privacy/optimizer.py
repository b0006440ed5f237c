"""Opacus' DPOptimizer with its faults mended: book-kept gradients, secure noise on a grid, public divisor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from common.privacy.bookkeeping import Bookkeeping
from common.privacy.noise import NoiseSource, add_noise
from common.privacy.plan import PrivacyPlan


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips per-example gradients, sums them over any number of physical batches, adds noise once, steps.

    Guarantee: One example changes the sum by at most the clipping norm in L2 norm, whatever its gradient: one that is
    not finite contributes zero (in Opacus 1.6.0 it makes every parameter NaN, which tells that the record is there). A
    step over no examples still adds noise and still counts. The divisor is the plan's public constant (in Opacus it is
    derived from the number of rows). The sum is rounded to the grid that the noise lies on, so that nothing of it shows
    between the grid's points.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        bookkeeping: Bookkeeping,
        plan: PrivacyPlan,
        source: NoiseSource,
        clipping_norm: float | None = None,
    ) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.clipping_norm,
            expected_batch_size=plan.denominator,
        )
        self.clipper = plan.clipper(clipping_norm)
        self._relative_noise = plan.noise_stddev / plan.clipping_norm  # the sensitivity grows with the norm
        self._bookkeeping = bookkeeping
        self._parameters: list[Any] = bookkeeping.parameters  # Opacus hangs `summed_grad` on them
        self._source = source
        self._at_start = True
        self._lost: dict[int, Tensor] = {}

    def accumulate(self, examples: int) -> None:
        """Clip the gradients of the physical batch just run backward, and add them to the step's sum.

        Args:
            examples: Number of examples in that batch.

        Raises:
            PrivacyError: A layer saw more or fewer rows than there are examples: each row would be clipped by itself,
                and one example could change the sum by many times the bound.
        """
        batch = self._bookkeeping.collect(examples)
        factors = self.clipper.factors(batch.squared_norms)
        sums = batch.weighted_sums(factors, first=self._at_start)
        self._at_start = False
        for k, (parameter, part) in enumerate(zip(self._parameters, sums, strict=True)):
            if parameter.summed_grad is None:
                parameter.summed_grad = part
            else:
                self._lost[k] = _add_exactly(parameter.summed_grad, part, self._lost.get(k))

    def finish_step(self, *, start: Sequence[Tensor] = (), proximal_mu: float = 0.0) -> None:
        """Add noise to the step's sum, divide by the public constant, and let the wrapped optimizer step.

        With `proximal_mu` the step also pulls towards `start` (FedProx); that depends on what was noised only.
        """
        self.add_noise()
        self.clipper.step_finished(self._source)
        for parameter, origin in zip(self._parameters, start, strict=False):
            parameter.grad.add_(parameter.detach() - origin, alpha=proximal_mu)
        self.original_optimizer.step()

    def add_noise(self) -> None:
        """Round the sum to the noise's grid, add the noise, on every coordinate and also where no example came, and
        divide by the plan's public constant.
        """
        for k, lost in self._lost.items():
            self._parameters[k].summed_grad.add_(lost)
        self._lost.clear()
        sums = [
            torch.zeros_like(p, dtype=torch.float64) if p.summed_grad is None else p.summed_grad
            for p in self._parameters
        ]
        stddev = self._relative_noise * self.clipper.norm
        released = add_noise(sums, noise_stddev=stddev, source=self._source, divisor=self.expected_batch_size)
        self._at_start = True
        for parameter, noisy in zip(self._parameters, released, strict=True):
            parameter.grad, parameter.summed_grad = noisy.to(parameter.dtype), None


def _add_exactly(total: Tensor, part: Tensor, lost: Tensor | None) -> Tensor:
    """Add `part` to `total` in place; what rounding has lost so far, this time included.

    So the error does not grow with the number of physical batches (Neumaier 1974; Knuth's two-sum).
    """
    before = total.clone()
    total.add_(part)
    virtual = total - before
    error = (before - (total - virtual)).add_(part - virtual)
    return error if lost is None else lost.add_(error)
