"""`nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`: outer products of output gradients and the windows that were looked at."""

from __future__ import annotations

import math
from itertools import chain

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.conv import _ConvNd

from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.dense import Gradient
from common.privacy.bookkeeping.product import Adding, Product, weigh
from common.privacy.bookkeeping.rounding import sizes_above


class ConvolutionCall(Call):
    """[n, channels, *size] to [n, filters, *size]; without the first dimension it is one example."""

    layer: nn.Conv1d | nn.Conv2d | nn.Conv3d

    @property
    def rows(self) -> int:
        """Examples."""
        return len(self.inputs) if self._batched else 1

    @property
    def _batched(self) -> bool:
        return self.inputs.dim() == self.layer.weight.dim()

    def forward(self, inputs: Tensor) -> Tensor:
        """As in the layer's own class."""
        layer = self.layer
        bias = None if layer.bias is None else layer.bias.detach()
        output: Tensor = layer._conv_forward(inputs, layer.weight.detach(), bias)  # noqa: SLF001 - all of `forward`
        return output

    def squared_norms(self) -> list[Tensor]:
        """Weight, then bias."""
        layer, n = self.layer, self.rows
        gradient = Gradient(self.gradient.to(self.dtype).reshape(n, layer.out_channels, -1), positions=2)
        positions = gradient.source.shape[2]
        inputs = self.inputs.detach().to(self.dtype)
        padded = padded_for(layer, inputs if self._batched else inputs.unsqueeze(0))
        sizes = self.gradient.shape[-len(layer.kernel_size) :]
        groups, filters, kernel = layer.groups, layer.out_channels // layer.groups, math.prod(layer.kernel_size)

        def block(first: int, last: int) -> tuple[Tensor, Tensor]:
            seen = windows(layer, padded[first:last], sizes).view((last - first) * groups, -1, positions)
            return gradient.part(first, last).reshape((last - first) * groups, filters, -1), seen.transpose(1, 2)

        def magnitude(first: int, last: int) -> Tensor:
            """No value is in more windows than the kernel has elements."""
            return sizes_above(padded[first:last]).mul_(kernel**0.5) * gradient.spread[first:last]

        self.product = Product(
            rows=n,
            positions=positions,
            inputs=layer.in_channels // groups * kernel,
            outputs=filters,
            groups=groups,
            block=block,
            magnitude=magnitude,
            like=gradient.source,
            workspace=self.workspace,
            key="weight",
        )
        squares = [self.product.squared_norms()]
        if len(self.parameters) > 1:
            self.bias, square = gradient.summed()
            squares.append(square)
        return squares

    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """Weight, then bias."""
        sums = [self.product.weighted_sum(factors[0], how=how).view(self.layer.weight.shape)]
        if len(self.parameters) > 1:
            sums.append(weigh(self.bias, factors[1], how=how))
        return sums


def padded_for(layer: _ConvNd, inputs: Tensor) -> Tensor:
    """The inputs as the kernel sees them, contiguous: with zeros or a continuation of the image round them."""
    if layer.padding == "valid":
        sides = [0] * (2 * len(layer.kernel_size))
    elif isinstance(layer.padding, str):  # "same"
        totals = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        sides = list(chain.from_iterable((t // 2, t - t // 2) for t in reversed(totals)))
    else:
        sides = list(chain.from_iterable((p, p) for p in reversed(layer.padding)))
    if any(sides):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, sides, mode=mode)
    return inputs.contiguous()


def windows(layer: _ConvNd, padded: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """[n, channels, *kernel, *sizes], contiguous: what each element of the kernel met at each output position."""
    steps = padded.stride()[2:]
    kernel = [s * d for s, d in zip(steps, layer.dilation, strict=True)]
    moves = [s * m for s, m in zip(steps, layer.stride, strict=True)]
    shape = (*padded.shape[:2], *layer.kernel_size, *sizes)
    return padded.as_strided(shape, (*padded.stride()[:2], *kernel, *moves), padded.storage_offset()).contiguous()
