"""Book-keeping as a grad-sample mode of Opacus 1.6.0.

    register_mode()
    model, optimizer, loader = PrivacyEngine().make_private(..., grad_sample_mode="bookkeeping")

Opacus looks modes up in functions, not in a table, so `register_mode` puts functions that know one mode more in their
place. Noise, accounting and batch size are Opacus's own, with their faults; a run of Coterie uses none of this, but
`common.privacy.optimizer`.
"""

from __future__ import annotations

from typing import Any

import opacus.grad_sample
import opacus.grad_sample.utils
import opacus.optimizers
import opacus.privacy_engine
import torch
from opacus.grad_sample import AbstractGradSampleModule
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn

from common.errors import PrivacyError
from common.privacy.bookkeeping.engine import Bookkeeping

MODE = "bookkeeping"

_OWNER = "_bookkeeping_owner"


class BookkeepingModule(AbstractGradSampleModule):  # type: ignore[misc]
    """Wraps a model as Opacus's `GradSampleModule` does; parameters never get a `grad_sample`."""

    def __init__(self, m: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean") -> None:
        if not batch_first:
            raise PrivacyError("the batch must be the first dimension", hint="make_private(batch_first=True)")
        super().__init__(m, batch_first=batch_first, loss_reduction=loss_reduction)
        self.bookkeeping = Bookkeeping(m)
        self.examples = 0
        for p in self.bookkeeping.parameters:
            setattr(p, _OWNER, self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's; notes how many examples there are."""
        if self.bookkeeping.recording:
            tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            self.examples = len(tensors[0]) if tensors else 0
        return self._module(*args, **kwargs)

    def remove_hooks(self) -> None:
        """Opacus's name for it: leave the model as it was."""
        self.bookkeeping.detach()
        for p in self.bookkeeping.parameters:
            if hasattr(p, _OWNER):
                delattr(p, _OWNER)


class BookkeepingOptimizer(DPOptimizer):  # type: ignore[misc]
    """Opacus's optimizer, clipping through `PerExample`; a gradient that is not finite contributes zero."""

    @property
    def grad_samples(self) -> list[Tensor]:
        """One entry per parameter, as Opacus counts them; there are no per-example gradients to be had."""
        return [p.detach()[None] for p in self.params]

    @property
    def accumulated_iterations(self) -> int:
        """A second batch before the first is clipped is refused in its forward pass."""
        return 1

    def clip_and_accumulate(self) -> None:
        """Clip the batch just run backward, and add it to the step's sum."""
        owner: BookkeepingModule | None = next((getattr(p, _OWNER, None) for p in self.params), None)
        own = {id(p) for p in self.params}
        if owner is None or own != {id(p) for p in owner.bookkeeping.parameters}:
            raise PrivacyError(
                "the optimizer's parameters are not those of one book-kept model",
                hint="give the optimizer all trainable parameters of the wrapped model",
            )
        batch = owner.bookkeeping.collect(owner.examples)
        scale = batch.examples if owner.loss_reduction == "mean" else 1
        norms = batch.squared_norms.sum(0).sqrt() * scale
        factors = (self.max_grad_norm / (norms + 1e-6)).clamp(max=1.0) * scale
        sums = batch.weighted_sums(torch.where(norms.isfinite(), factors, 0.0))
        for p, total in zip(owner.bookkeeping.parameters, sums, strict=True):
            held: Tensor | None = getattr(p, "summed_grad", None)
            setattr(p, "summed_grad", total.to(p.dtype) if held is None else held + total.to(p.dtype))  # noqa: B010


def register_mode() -> None:
    """Make Opacus know the mode `bookkeeping`; calling it again changes nothing. Flat clipping, one device."""
    if getattr(opacus.grad_sample.utils.get_gsm_class, "knows", None) == MODE:
        return
    known_class, known_optimizer = opacus.grad_sample.utils.get_gsm_class, opacus.optimizers.get_optimizer_class

    def get_gsm_class(grad_sample_mode: str) -> type[AbstractGradSampleModule]:
        """Opacus's own, and one mode more."""
        return BookkeepingModule if grad_sample_mode == MODE else known_class(grad_sample_mode)

    def get_optimizer_class(clipping: str, distributed: bool, grad_sample_mode: str | None = None) -> type[DPOptimizer]:
        """Opacus's own, and one mode more."""
        if grad_sample_mode != MODE:
            known: type[DPOptimizer] = known_optimizer(clipping, distributed, grad_sample_mode)
            return known
        if clipping != "flat" or distributed:
            raise PrivacyError(
                f"mode `{MODE}` clips flat and on one device", hint="make_private(clipping='flat'), without DDP"
            )
        return BookkeepingOptimizer

    get_gsm_class.knows = MODE  # type: ignore[attr-defined]
    for module in (opacus.grad_sample, opacus.grad_sample.utils, opacus.privacy_engine):
        module.get_gsm_class = get_gsm_class
    for module in (opacus.optimizers, opacus.privacy_engine):
        module.get_optimizer_class = get_optimizer_class
