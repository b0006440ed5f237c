"""A block of members of any other model: `torch.func.vmap` over a stack of parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from client.trainer import example_losses
from simulations.stacking.batches import Batch
from simulations.stacking.layout import Layout
from simulations.stacking.updates import Updates
from simulations.stacking.verdict import Tally


class MappedBlock:
    """Trains members step by step; those whose last step it was go to the tally."""

    def __init__(self, model: nn.Module, layout: Layout, start: Tensor, *, updates: Updates, tally: Tally) -> None:
        self._model, self._layout, self._start, self._updates, self._tally = model, layout, start, updates, tally

    def train(self, batches: Iterable[Batch], steps: list[int], weights: Tensor) -> list[bool]:
        """Whether each member's result was sound; arguments as in `DenseBlock.train`."""
        sound = [False] * len(steps)
        rows = self._start.expand(len(steps), -1).clone()
        losses = torch.zeros(len(steps), dtype=torch.float64, device=rows.device)
        for step, batch in enumerate(batches):
            active = len(batch.targets)
            found, gradients = self._gradients(rows[:active], batch)
            losses[:active] += found
            self._updates.apply(rows[:active], gradients, step=step, members=len(steps))
            going = sum(own > step + 1 for own in steps[:active])
            if going < active:
                ended = slice(going, active)
                sound[ended] = self._tally.add(rows[ended], losses[ended] / (step + 1), weights[ended])
        return sound

    def _gradients(self, rows: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Losses [members] and gradients [members, size]: one backward pass for all."""
        shares = batch.shares
        if not isinstance(shares, Tensor):
            shares = torch.full(batch.targets.shape[:2], shares, device=rows.device)
        parameters = {name: values.requires_grad_() for name, values in self._layout.views(rows.detach()).items()}

        def loss(own: dict[str, Tensor], inputs: Tensor, targets: Tensor, share: Tensor) -> Tensor:
            return (example_losses(functional_call(self._model, own, (inputs,)), targets) * share).sum()

        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no rule for stacks
            losses: Tensor = vmap(loss)(parameters, batch.inputs, batch.targets, shares)
        found = torch.autograd.grad(losses.sum(), list(parameters.values()))
        return losses.detach(), torch.cat([part.flatten(1) for part in found], 1)
