"""Local optimizers over stacked parameters: torch's SGD and AdamW, one row of numbers for each member."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.config import TrainingSettings

_BETAS, _EPSILON = (0.9, 0.999), 1e-8
"""Torch's own defaults, which `client.trainer.make_optimizer` uses."""


class Updates:
    """The optimizer of one block of members; all of them are at the same step.

    Source: torch.optim.SGD and torch.optim.AdamW in their plain forms; the proximal term is FedProx (Li et al. 2020,
    eq. 2), added to the gradient before the optimizer sees it, as in `client.trainer`.
    """

    def __init__(self, settings: TrainingSettings, *, rate: float, proximal_mu: float, start: Tensor) -> None:
        """Prepare.

        Args:
            settings: Optimizer, momentum, weight decay.
            rate: Learning rate.
            proximal_mu: Pull towards the start.
            start: float32[size]: the parameters before training.
        """
        self._settings, self.rate, self._mu, self._start = settings, rate, proximal_mu, start
        self._first: Tensor | None = None
        self._second: Tensor | None = None

    @property
    def affine(self) -> bool:
        """Whether a step is `keep * parameters + pull * start - rate * gradient`: SGD without momentum."""
        return self._settings.optimizer == "sgd" and not self._settings.momentum

    @property
    def keep(self) -> float:
        """See `affine`."""
        return 1.0 - self.rate * (self._settings.weight_decay + self._mu)

    @property
    def pull(self) -> float:
        """See `affine`."""
        return self.rate * self._mu

    def apply(self, rows: Tensor, gradients: Tensor, *, step: int, first: int = 0, members: int = 0) -> None:
        """Take one step in place.

        Args:
            rows: float32[k, size]: parameters of k members.
            gradients: float32[k, size]; used as scratch memory.
            step: From 0.
            first: Place of the first of them in the block.
            members: Of the block.
        """
        settings = self._settings
        if self._mu and step:  # at the start there is nothing to pull
            gradients.add_(rows - self._start, alpha=self._mu)
        if settings.optimizer == "adamw":
            self._adamw(rows, gradients, step, slice(first, first + len(rows)), members or len(rows))
            return
        if settings.weight_decay:
            gradients.add_(rows, alpha=settings.weight_decay)
        if settings.momentum:
            if self._first is None:
                self._first = torch.zeros(members or len(rows), rows.shape[1], device=rows.device)
            gradients = self._first[first : first + len(rows)].mul_(settings.momentum).add_(gradients)
        rows.add_(gradients, alpha=-self.rate)

    def _adamw(self, rows: Tensor, gradients: Tensor, step: int, own: slice, members: int) -> None:
        if self._first is None or self._second is None:
            self._first = torch.zeros(members, rows.shape[1], device=rows.device)
            self._second = torch.zeros_like(self._first)
        mean, square = self._first[own], self._second[own]
        rows.mul_(1.0 - self.rate * self._settings.weight_decay)
        mean.lerp_(gradients, 1.0 - _BETAS[0])
        square.mul_(_BETAS[1]).addcmul_(gradients, gradients, value=1.0 - _BETAS[1])
        size = self.rate / (1.0 - _BETAS[0] ** (step + 1))
        scale = (square.sqrt() / math.sqrt(1.0 - _BETAS[1] ** (step + 1))).add_(_EPSILON)
        rows.addcdiv_(mean, scale, value=-size)
