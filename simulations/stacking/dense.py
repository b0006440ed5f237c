"""Chains of dense layers by hand: every member's forward and backward pass as one product a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

_FEW_CLASSES = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """One `nn.Linear` by the names of its parameters."""

    weight: str
    bias: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Taken:
    """What a layer saw: its weight's gradient is the sum over examples of gradient times input.

    Attributes:
        layer: Which.
        inputs: float32[..., i].
        gradients: float32[..., o], of the layer's output.
    """

    layer: Dense
    inputs: Tensor
    gradients: Tensor


class Products(Protocol):
    """How members' weights and examples are multiplied."""

    def forward(self, inputs: Tensor, layer: Dense) -> Tensor:
        """A layer's output, [..., o]."""

    def backward(self, gradients: Tensor, layer: Dense) -> Tensor:
        """The gradient of its input, [..., i]."""


class Same:
    """All members have the same weights, as in their first step: one product for all, however examples are laid out."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Parameters by name, [*shape]."""
        self._parameters = parameters

    def forward(self, inputs: Tensor, layer: Dense) -> Tensor:
        """See `Products`."""
        weight, bias = self._parameters[layer.weight], None if layer.bias is None else self._parameters[layer.bias]
        rows = F.linear(inputs.reshape(-1, inputs.shape[-1]), weight, bias)
        return rows.view(*inputs.shape[:-1], len(weight))

    def backward(self, gradients: Tensor, layer: Dense) -> Tensor:
        """See `Products`."""
        weight = self._parameters[layer.weight]
        return (gradients.reshape(-1, len(weight)) @ weight).view(*gradients.shape[:-1], weight.shape[1])


class Stacked:
    """Each member has weights of its own, and all have equally many rows: [members, n, ...]."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        """Parameters by name, [members, *shape]."""
        self._parameters = parameters

    def forward(self, inputs: Tensor, layer: Dense) -> Tensor:
        """See `Products`."""
        weight = self._parameters[layer.weight].transpose(1, 2)
        if layer.bias is None:
            return torch.bmm(inputs, weight)
        return torch.baddbmm(self._parameters[layer.bias].unsqueeze(1), inputs, weight)

    def backward(self, gradients: Tensor, layer: Dense) -> Tensor:
        """See `Products`."""
        return torch.bmm(gradients, self._parameters[layer.weight])


class Ragged:
    """Each member has weights of its own and any number of rows: [all rows, ...], one member after the other."""

    def __init__(self, parameters: Mapping[str, Tensor], sizes: list[int]) -> None:
        """Parameters by name, [members, *shape], and the members' numbers of rows."""
        self._parameters, self._sizes = parameters, sizes

    def forward(self, inputs: Tensor, layer: Dense) -> Tensor:
        """See `Products`."""
        weights = self._parameters[layer.weight]
        outputs = inputs.new_empty(len(inputs), weights.shape[1])
        parts = zip(inputs.split_with_sizes(self._sizes), weights, outputs.split_with_sizes(self._sizes), strict=False)
        if layer.bias is None:
            for x, weight, out in parts:
                torch.mm(x, weight.t(), out=out)
        else:
            for (x, weight, out), bias in zip(parts, self._parameters[layer.bias], strict=False):
                torch.addmm(bias, x, weight.t(), out=out)
        return outputs

    def backward(self, gradients: Tensor, layer: Dense) -> Tensor:
        """See `Products`."""
        weights = self._parameters[layer.weight]
        inputs = gradients.new_empty(len(gradients), weights.shape[2])
        for x, weight, out in zip(
            gradients.split_with_sizes(self._sizes), weights, inputs.split_with_sizes(self._sizes), strict=False
        ):
            torch.mm(x, weight, out=out)
        return inputs


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What a model does to one example: dense layers, and None for a ReLU."""

    operations: tuple[Dense | None, ...]

    def run(
        self, inputs: Tensor, targets: Tensor, shares: Tensor | float, products: Products
    ) -> tuple[Tensor, list[Taken]]:
        """Losses and gradients of one step.

        Args:
            inputs: float32[..., features].
            targets: int64[...].
            shares: float32[...], or one number: what each example's loss counts.
            products: Of the members' weights.

        Returns:
            float32[...]: each example's loss times its share; and what gradients are made of, the last layer first.
        """
        x = inputs
        seen: list[Tensor] = []
        for operation in self.operations:
            seen.append(x)
            x = F.relu(x) if operation is None else products.forward(x, operation)
        losses, gradient = _cross_entropy(x, targets, shares)
        taken = []
        left = sum(operation is not None for operation in self.operations)
        outputs = [*seen[1:], x]
        for operation, before, after in zip(reversed(self.operations), reversed(seen), reversed(outputs), strict=True):
            if operation is None:
                gradient = torch.ops.aten.threshold_backward(gradient, after, 0)
                continue
            taken.append(Taken(layer=operation, inputs=before, gradients=gradient))
            left -= 1
            if not left:
                break
            gradient = products.backward(gradient, operation)
        return losses, taken


def read_chain(model: nn.Module) -> Chain | None:
    """The model as a chain, or None where it is anything else.

    Flattening is known at the front only, where it leaves each example a vector.
    """
    operations: list[Dense | None] = []
    seen: set[int] = set()

    def read(layer: nn.Module, name: str) -> bool:
        if id(layer) in seen or not ordinary(layer):
            return False
        seen.add(id(layer))
        kind, dot = type(layer), f"{name}." if name else ""
        if kind is nn.Sequential:
            return all(read(child, f"{dot}{part}") for part, child in layer.named_children())
        if isinstance(layer, nn.Linear) and kind is nn.Linear:
            whole = all(p.requires_grad for p in layer.parameters())
            operations.append(Dense(weight=f"{dot}weight", bias=None if layer.bias is None else f"{dot}bias"))
            return whole
        if isinstance(layer, nn.Flatten):
            return (layer.start_dim, layer.end_dim) == (1, -1) and not any(operations)
        if kind is nn.ReLU:
            operations.append(None)
            return True
        return kind is nn.Identity or (isinstance(layer, nn.Dropout) and not layer.p)

    if not read(model, "") or not any(operations):
        return None
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    shared = len(names) != len(list(model.parameters()))
    return None if shared else Chain(operations=tuple(operations))


def ordinary(layer: nn.Module) -> bool:
    """Whether a layer does what its class says: no hooks, and no forward pass of the instance's own."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return "forward" not in layer.__dict__ and not any(getattr(layer, name, None) for name in hooks)


def _log_softmax(logits: Tensor) -> Tensor:
    """Over the last dimension; over the first of a transposed copy where classes are too few to compute side by side.

    That takes a quarter of the time.
    """
    if logits.shape[-1] > _FEW_CLASSES:
        return logits.log_softmax(-1)
    logs = logits.reshape(-1, logits.shape[-1]).t().contiguous().log_softmax(0)
    return logs.t().contiguous().view(logits.shape)


def _cross_entropy(logits: Tensor, targets: Tensor, shares: Tensor | float) -> tuple[Tensor, Tensor]:
    """Each example's loss and the logits' gradient, times its share; as `torch.nn.functional.cross_entropy`."""
    own = targets.unsqueeze(-1)
    logs = _log_softmax(logits)
    losses = logs.gather(-1, own).squeeze(-1)
    gradient = logs.exp_()
    gradient.scatter_add_(-1, own, gradient.new_full((1,), -1.0).expand(own.shape))
    scale = shares.unsqueeze(-1) if isinstance(shares, Tensor) else shares
    return losses.mul_(shares).neg_(), gradient.mul_(scale)
