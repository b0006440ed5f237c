"""What a layer's pass leaves behind, and how its output gradient is caught."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import PrivacyError
from common.privacy.bookkeeping.product import Adding, Workspace


class Call(ABC):
    """One forward pass of one layer, with its parameters cut off from autograd.

    The layer's output is computed by torch's own functions from detached parameters; so the backward pass computes
    input gradients only, and a hook on the output takes the gradient that per-example gradients are made of.

    Attributes:
        parameters: The layer's own, in the order of all results.
        rows: Examples that the layer saw.
        gradient: Of the output; None where the loss does not depend on it.
    """

    def __init__(self, layer: nn.Module, where: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer, self.where = layer, where
        self.parameters = tuple(layer.parameters(recurse=False))
        self.workspace: Workspace = layer.__dict__["forward"].workspace
        self.gradient: Any = None
        self.closed = False
        self.inputs = self.read(args, kwargs)
        self._version = self.inputs._version  # noqa: SLF001 - what autograd itself compares

    @property
    @abstractmethod
    def rows(self) -> int:
        """Examples that the layer saw."""

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """The layer's output, from detached parameters."""

    @abstractmethod
    def squared_norms(self) -> list[Tensor]:
        """float64[rows] for each parameter: never below the true squared norm. Once, and with a gradient only."""

    @abstractmethod
    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """For each parameter and its float64[rows]: the float64 sum; `how` as in `product.Adding`."""

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The layer's only input."""
        values = [*args, *kwargs.values()]
        if len(values) != 1 or not isinstance(values[0], Tensor):
            raise PrivacyError(
                f"{self.where} was called with something other than one tensor", hint="call it with one batch"
            )
        return values[0]

    def run(self) -> Any:
        """The layer's output, with the gradient's way to `take` prepared."""
        if self.inputs.requires_grad:
            output = self.forward(self.inputs)
            if output.requires_grad:
                output.register_hook(self.take)  # type: ignore[no-untyped-call]  # torch gives it no types
                return output
        anchor = torch.zeros((), requires_grad=True)
        return _Source.apply(anchor, self.take, self.forward, self.inputs.detach())  # type: ignore[no-untyped-call]

    def take(self, gradient: Tensor) -> None:
        """Keep the output's gradient."""
        self.open()
        self.gradient = gradient.detach()

    def open(self) -> None:
        """Refuse a second backward pass through what was collected, or will be collected once."""
        if self.closed:
            raise PrivacyError(
                f"a backward pass went through {self.where} more than once", hint="run forward again for each backward"
            )
        self.closed = True

    def close(self) -> None:
        """Take no gradient any more, and refuse inputs that are no longer what the layer saw."""
        self.closed = True
        if self.inputs._version != self._version:  # noqa: SLF001
            raise PrivacyError(
                f"the input of {self.where} was overwritten before its gradients were collected",
                hint="replace the operation that works in place",
            )

    @property
    def dtype(self) -> torch.dtype:
        """In which gradients are computed: that of the parameters, and at least float32."""
        return torch.float64 if self.parameters[0].dtype == torch.float64 else torch.float32


class _Source(torch.autograd.Function):
    """A layer whose input needs no gradient: its output must require one all the same."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, take: Callable[[Tensor], None], forward: Callable[[Tensor], Tensor], inputs: Tensor
    ) -> Tensor:
        """Compute the output anew: autograd forbids working in place on a view of an input."""
        del anchor
        ctx.take = take
        return forward(inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        """Hand over the gradient; nothing lies below."""
        ctx.take(gradient)
        return None, None, None, None
