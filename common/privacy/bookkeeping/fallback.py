"""Layers that have no rule of their own: run again, example by example, by automatic differentiation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from common.errors import PrivacyError
from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.product import Adding, weigh
from common.privacy.bookkeeping.rounding import squares_above

_CLOSE, _ROUGH = 1e-3, 1e-1
"""How far an output may be from that of its example alone, relative to the largest: in float32, under autocast."""


class FallbackCall(Call):
    """[n, ...] to [n, ...] by any function that treats examples one by one.

    Squared norms are those of the instantiated gradients, rounded up; how exactly the layer's own arithmetic computes
    them cannot be known here.

    **Guarantee.** A layer whose output for an example is another one than in the batch, because it mixes examples or
    draws random numbers, is refused.
    """

    @property
    def rows(self) -> int:
        """Examples."""
        return len(self.inputs)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One tensor, first; whatever else is given must be a plain constant."""
        rest = [*args[1:], *kwargs.values()]
        if not args or not isinstance(args[0], Tensor) or not args[0].dim() or not all(map(_constant, rest)):
            raise PrivacyError(
                f"{self.where} has no rule for its gradients, and was called with something other than one batch",
                hint="pass one tensor [n, ...] first, and only numbers and text besides",
            )
        self.bare = _Bare(self.layer)
        self.rest, self.named = args[1:], kwargs
        device = args[0].device.type
        self.rough = torch.is_autocast_enabled(device) or args[0].dtype in (torch.bfloat16, torch.float16)
        return args[0]

    def forward(self, inputs: Tensor) -> Tensor:
        """As the layer does it, from detached parameters."""
        output = functional_call(self.bare, self._parameters(), (inputs, *self.rest), self.named)
        if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != len(inputs):
            raise PrivacyError(
                f"{self.where} has no rule for its gradients, and its output is not one tensor [n, ...]",
                hint="let it return one tensor whose first dimension is the batch",
            )
        self.output = output.detach().clone()
        return output

    def squared_norms(self) -> list[Tensor]:
        """Of what automatic differentiation gives."""
        n = self.rows
        parameters = self._parameters()
        inputs, gradient = self.inputs.detach(), self.gradient
        dtype = self.parameters[0].dtype
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        found, outputs = self._differentiate(parameters, inputs, gradient.to(dtype))
        scale = self.output.abs().amax() if self.output.numel() else 0.0
        limit = (_ROUGH if self.rough else _CLOSE) * scale
        apart = (outputs - self.output).abs()
        if bool((apart > limit).any()) and bool(torch.isfinite(self.output).all()):
            raise PrivacyError(
                f"{self.where} treats an example in a batch otherwise than alone",
                hint="it must neither mix examples nor draw random numbers: put nn.Dropout outside of it",
            )
        self.gradients = [found[name].to(self.dtype).reshape(n, -1) for name, _ in self._own()]
        return [squares_above(rows) for rows in self.gradients]

    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """In the order of the layer's parameters."""
        return [
            weigh(rows, factor, how=how).view(p.shape)
            for rows, factor, p in zip(self.gradients, factors, self.parameters, strict=True)
        ]

    def _own(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.layer.named_parameters(recurse=False))

    def _parameters(self) -> dict[str, Tensor]:
        return {f"layer.{name}": p.detach() for name, p in self._own()}

    def _differentiate(
        self, parameters: dict[str, Tensor], inputs: Tensor, gradient: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Gradients [n, ...] by name and outputs [n, ...]; all at once, or one by one where torch has no rule."""

        def loss(parameters: dict[str, Tensor], x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
            output = functional_call(self.bare, parameters, (x.unsqueeze(0), *self.rest), self.named)[0]
            return (output * g).sum(), output

        single = grad(loss, has_aux=True)
        with _quietly(), torch.enable_grad():
            try:
                found, outputs = vmap(single, in_dims=(None, 0, 0))(parameters, inputs, gradient)
            except RuntimeError:  # an operation without a rule for batches, or a random one
                rows = [single(parameters, x, g) for x, g in zip(inputs, gradient, strict=True)]
                found = {name: torch.stack([row[0][name] for row in rows]) for name in parameters}
                outputs = torch.stack([row[1] for row in rows])
        return {name.removeprefix("layer."): rows for name, rows in found.items()}, outputs


class _Bare(nn.Module):
    """A layer under its class's own forward pass, whatever stands in the instance's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's."""
        return type(self.layer).forward(self.layer, *args, **kwargs)


def _constant(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's warnings that an operation is slow under `vmap`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
        yield
