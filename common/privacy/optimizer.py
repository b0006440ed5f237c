"""Opacus' DPOptimizer with its faults mended: secure noise, public batch size, empty batches, non-finite gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from common.errors import PrivacyError
from common.privacy.noise import NoiseSource, normal_like
from common.privacy.plan import PrivacyPlan


class PrivateOptimizer(DPOptimizer):  # type: ignore[misc]
    """Clips per-example gradients, sums them over any number of physical batches, adds noise once, steps.

    Guarantee: One example changes the sum by at most `max_grad_norm` in L2 norm, whatever its gradient: a gradient
    that is not finite contributes zero (in Opacus 1.6.0 it makes every parameter NaN, which tells that the record is
    there). A step over no examples still adds noise and still counts. The divisor is the plan's public constant (in
    Opacus it is derived from the number of rows).
    """

    def __init__(self, optimizer: torch.optim.Optimizer, *, plan: PrivacyPlan, source: NoiseSource) -> None:
        super().__init__(
            optimizer,
            noise_multiplier=plan.noise_multiplier,
            max_grad_norm=plan.max_grad_norm,
            expected_batch_size=plan.expected_batch_size,
        )
        self._source = source

    def accumulate(self, examples: int) -> None:
        """Clip the per-example gradients of the physical batch just run backward, and add them to the step's sum.

        Args:
            examples: Number of examples in that batch.

        Raises:
            PrivacyError: A layer saw more or fewer rows than there are examples. Each row would be clipped by itself,
            and
                one example could change the sum by many times the bound.
        """
        if any(len(gradient) != examples for gradient in self.grad_samples):
            raise PrivacyError(
                "a layer of the model saw other rows than there are examples",
                hint="keep the batch as the first dimension of every layer's input",
            )
        self.clip_and_accumulate()
        for parameter in self.params:
            parameter.grad_sample = None
            parameter.grad = None

    def finish_step(self, *, start: Sequence[Tensor] = (), proximal_mu: float = 0.0) -> None:
        """Add noise to the step's sum, divide by the public constant, and let the wrapped optimizer step.

        With `proximal_mu` the step also pulls towards `start` (FedProx); that depends on what was noised only.
        """
        for parameter in self.params:
            if parameter.summed_grad is None:
                parameter.summed_grad = torch.zeros_like(parameter)
        self.add_noise()
        for parameter in self.params:
            parameter.grad /= self.expected_batch_size
            parameter.summed_grad = None
        for parameter, origin in zip(self.params, start, strict=False):
            parameter.grad.add_(parameter.detach() - origin, alpha=proximal_mu)
        self.original_optimizer.step()

    def clip_and_accumulate(self) -> None:
        """Opacus' clipping, with gradients that are not finite replaced by zero first."""
        gradients = self.grad_samples
        if len(gradients[0]) == 0:
            return
        squares = torch.stack([g.flatten(1).float().square().sum(1) for g in gradients]).sum(0)
        finite = squares.isfinite()
        factor = (self.max_grad_norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
        factor = torch.where(finite, factor, 0.0)
        every_one = bool(finite.all())
        for parameter, gradient in zip(self.params, gradients, strict=True):
            kept = gradient if every_one else _without(gradient, finite)
            clipped = torch.einsum("i,i...", factor.to(parameter.dtype), kept.to(parameter.dtype))
            parameter.summed_grad = clipped if parameter.summed_grad is None else parameter.summed_grad + clipped

    def add_noise(self) -> None:
        """Gaussian noise of standard deviation noise_multiplier * max_grad_norm on every coordinate of the sum."""
        stddev = self.noise_multiplier * self.max_grad_norm
        for parameter in self.params:
            noise = normal_like(parameter.summed_grad, stddev=stddev, source=self._source)
            parameter.grad = (parameter.summed_grad + noise).view_as(parameter)


def _without(gradient: Tensor, keep: Tensor) -> Tensor:
    """`gradient` with the examples that are not to be kept set to zero (zero times infinity would be NaN)."""
    return gradient.masked_fill(~keep.view(-1, *([1] * (gradient.dim() - 1))), 0.0)
