"""`nn.LayerNorm` and `nn.GroupNorm`: sums of output gradient times normalised input."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.dense import Gradient
from common.privacy.bookkeeping.product import Adding, weigh
from common.privacy.bookkeeping.rounding import gamma, sizes_above, squares_above, widen


class _NormCall(Call):
    """Computes with mean and deviation at hand, which the parameters' gradients need again."""

    mean: Tensor
    deviation: Tensor
    """One over the standard deviation."""

    def detached(self) -> tuple[Any, Any]:
        """Weight and bias without gradients."""
        bias = self.layer.bias
        return self.layer.weight.detach(), None if bias is None else bias.detach()  # type: ignore[operator]

    @abstractmethod
    def positions(self, x: Tensor) -> Tensor:
        """[n, t, parameters] from a tensor shaped as the input."""

    @abstractmethod
    def normalised(self) -> Tensor:
        """The input without its mean, over its standard deviation."""

    def squared_norms(self) -> list[Tensor]:
        """Weight, then bias.

        A product passes 3 roundings and t - 1 additions; by Cauchy and Schwarz the sums of absolute values are at most
        root t times the norm of all products together.
        """
        with_deviation = self.normalised()
        products = self.positions(with_deviation.mul_(self.gradient.to(self.dtype)))
        t = products.shape[1]
        self.weight = products.sum(1)
        error = sizes_above(products).mul_(t**0.5 * gamma(t + 4, self.dtype))
        squares = [widen(squares_above(self.weight), error)]
        if len(self.parameters) > 1:
            gradient = Gradient(self.positions(self.gradient.to(self.dtype)))
            gradient.part(0, self.rows)
            self.bias, square = gradient.summed()
            squares.append(square)
        return squares

    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """Weight, then bias."""
        sums = [weigh(self.weight, factors[0], how=how)]
        if len(self.parameters) > 1:
            sums.append(weigh(self.bias, factors[1], how=how))
        return sums


class LayerNormCall(_NormCall):
    """[n, ..., *normalized_shape]; one tensor of the normalised shape alone is one example."""

    layer: nn.LayerNorm

    @property
    def rows(self) -> int:
        """Examples."""
        return 1 if self.inputs.dim() == len(self.layer.normalized_shape) else len(self.inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """As in `nn.LayerNorm`."""
        weight, bias = self.detached()
        shape = list(self.layer.normalized_shape)
        output, mean, deviation = torch.native_layer_norm(inputs.to(weight.dtype), shape, weight, bias, self.layer.eps)
        self.mean, self.deviation = mean.detach(), deviation.detach()
        return output

    def normalised(self) -> Tensor:
        """The input without its mean, over its standard deviation."""
        return self.inputs.detach().to(self.dtype).sub(self.mean).mul_(self.deviation)

    def positions(self, x: Tensor) -> Tensor:
        """Everything between the first dimension and the normalised ones."""
        size = self.layer.weight.numel()
        return x.reshape(self.rows, x.numel() // max(1, self.rows * size), size)


class GroupNormCall(_NormCall):
    """[n, channels, ...]."""

    layer: nn.GroupNorm

    @property
    def rows(self) -> int:
        """Examples."""
        return len(self.inputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """As in `nn.GroupNorm`."""
        weight, bias = self.detached()
        n, channels = inputs.shape[:2]
        output, mean, deviation = torch.native_group_norm(
            inputs.to(weight.dtype).contiguous(), weight, bias, n, channels, inputs[0, 0].numel() if n else 1,
            self.layer.num_groups, self.layer.eps,
        )  # fmt: skip
        self.mean, self.deviation = mean.detach(), deviation.detach()
        return output

    def normalised(self) -> Tensor:
        """The input without its mean, over its standard deviation."""
        grouped = self.inputs.detach().to(self.dtype).reshape(self.rows, self.layer.num_groups, -1)
        return grouped.sub(self.mean.unsqueeze(2)).mul_(self.deviation.unsqueeze(2)).view(self.inputs.shape)

    def positions(self, x: Tensor) -> Tensor:
        """Pixels, as a view with the channels last."""
        return x.reshape(self.rows, self.layer.num_channels, -1).transpose(1, 2)
