"""`nn.LSTM`: one pass forward that keeps the gates, one backward that needs a single matrix product a time step.

**Source.** Backpropagation through time (Hochreiter and Schmidhuber 1997; torch's equations and order of gates). All
local derivatives are computed at once, outside the loop over time; the input weights' and hidden weights' gradients
are sums of outer products of one and the same gradient of the pre-activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from common.errors import PrivacyError
from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.dense import Gradient, outer
from common.privacy.bookkeeping.product import Adding, Product, weigh


@dataclass(eq=False, kw_only=True)
class _Pass:
    """One direction of one layer, time first and in the order in which it read its input.

    `inputs`: [t, n, i]; `gates`: [t, n, 4h], activated, in torch's order (input, forget, cell, output); `hidden` and
    `cells`: [t + 1, n, h] from the state before the first step; `tanh_cells`: [t, n, h].
    """

    weights: tuple[Tensor, Tensor]
    inputs: Tensor
    hidden: Tensor
    gates: Tensor
    cells: Tensor
    tanh_cells: Tensor

    def forget(self) -> None:
        """Let go of what only the backward pass needed."""
        self.gates = self.cells = self.tanh_cells = self.inputs.new_empty(0)


class LSTMCall(Call):
    """[n, t, inputs] and perhaps a constant initial state to ([n, t, directions * hidden], (h_n, c_n))."""

    layer: nn.LSTM
    passes: list[list[_Pass]]

    @property
    def rows(self) -> int:
        """Examples."""
        return len(self.inputs)

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """One padded batch and its state; states that need a gradient, packed and single sequences are refused."""
        inputs, state = (*args, *kwargs.values(), None)[:2] if len(args) + len(kwargs) < 3 else (None, None)
        self.state: tuple[Tensor, Tensor] | None = state
        if not isinstance(inputs, Tensor) or isinstance(inputs, PackedSequence) or inputs.dim() != 3:
            raise PrivacyError(
                f"{self.where} was called with something other than one padded batch [n, length, features]",
                hint="with privacy call it as lstm(inputs): no packed and no single sequence",
            )
        if state is not None and any(part.requires_grad for part in state):
            raise PrivacyError(
                f"{self.where} was given an initial state that is itself learnt",
                hint="start from zeros, or detach the state",
            )
        return inputs

    def run(self) -> Any:
        """As `nn.LSTM` does it."""
        self.names = parameter_names(self.layer)
        anchor = torch.zeros((), requires_grad=True)
        with torch.autocast(self.inputs.device.type, enabled=False):
            inputs = self.inputs.to(self.dtype)
            output, hidden, cells = _Recurrence.apply(anchor, inputs, self)  # type: ignore[no-untyped-call]
        return output, (hidden, cells)

    def forward(self, inputs: Tensor) -> Tensor:
        """Run all layers and directions, and keep what the derivative needs; the output, time first."""
        self.passes, given = [], inputs.transpose(0, 1).contiguous()
        for level in self.names:
            passes = []
            for d, names in enumerate(level):
                number = len(self.passes) * len(level) + d
                state = None if self.state is None else [s[number].detach().to(self.dtype) for s in self.state]
                weights = [getattr(self.layer, name).detach().to(self.dtype) for name in names]
                passes.append(_forward(weights, given.flip(0) if d else given, state))
            self.passes.append(passes)
            outputs = [_in_time(p.hidden[1:], d) for d, p in enumerate(passes)]
            given = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)
        return given

    def backward(self, output: Tensor | None, last: list[Tensor | None], *, below: bool) -> Tensor | None:
        """Keep the pre-activations' gradients of all passes; the input's gradient, time first, where it is needed.

        Args:
            output: Gradient of the output, time first.
            last: Gradients of h_n and c_n, [passes, n, h].
            below: Whether the input needs a gradient.
        """
        gradients: dict[tuple[int, int], Tensor] = {}
        for number in reversed(range(len(self.names))):
            directions = len(self.names[number])
            parts = [None] * directions if output is None else output.chunk(directions, dim=2)
            sums = None
            for d, part in enumerate(parts):
                recorded = self.passes[number][d]
                ends = [None if g is None else g[number * directions + d] for g in last]
                found = _backward(recorded, None if part is None else _in_time(part, d), *ends)
                gradients[number, d] = found
                recorded.forget()
                if number or below:
                    share = _in_time(found @ recorded.weights[0], d)
                    sums = share if sums is None else sums + share
            output = sums
        self.gradient = gradients
        return output if below else None

    def squared_norms(self) -> list[Tensor]:
        """In the order of the layer's parameters."""
        self.weights: dict[str, Product | Tensor] = {}
        squares: dict[str, Tensor] = {}
        for number, level in enumerate(self.names):
            for d, names in enumerate(level):
                recorded, found = self.passes[number][d], self.gradient.pop((number, d))
                gradient = Gradient(found.transpose(0, 1).contiguous())
                for name, seen in zip(names, (recorded.inputs, recorded.hidden[:-1]), strict=False):
                    product = outer(seen.transpose(0, 1), gradient, self.workspace, name)
                    self.weights[name], squares[name] = product, product.squared_norms()
                for name in names[2:]:  # the two biases are only ever used as their sum
                    self.weights[name], squares[name] = (
                        (self.weights[names[2]], squares[names[2]]) if names[2] in squares else gradient.summed()
                    )
        return [squares[name] for name, _ in self.layer.named_parameters()]

    def weighted_sums(self, factors: list[Tensor], *, how: Adding) -> list[Tensor]:
        """In the order of the layer's parameters."""
        sums = []
        for (name, _), factor in zip(self.layer.named_parameters(), factors, strict=True):
            held = self.weights[name]
            if isinstance(held, Product):
                sums.append(held.weighted_sum(factor, how=how))
            else:
                sums.append(weigh(held, factor, how=how))
        return sums


class _Recurrence(torch.autograd.Function):
    """The whole LSTM as one node; parameters are not among its inputs, so autograd computes nothing for them."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, inputs: Tensor, call: LSTMCall) -> tuple[Tensor, Tensor, Tensor]:
        """Outputs are copies: whoever overwrites them must not overwrite what is kept."""
        del anchor
        ctx.call = call
        ctx.set_materialize_grads(False)
        output = call.forward(inputs).transpose(0, 1).contiguous()
        passes = [p for level in call.passes for p in level]
        return output, torch.stack([p.hidden[-1] for p in passes]), torch.stack([p.cells[-1] for p in passes])

    @staticmethod
    def backward(ctx: Any, output: Tensor | None, hidden: Tensor | None, cells: Tensor | None) -> tuple[Any, ...]:
        """Through time."""
        ctx.call.open()
        with torch.autocast(ctx.call.inputs.device.type, enabled=False):
            given = None if output is None else output.transpose(0, 1)
            below = ctx.call.backward(given, [hidden, cells], below=ctx.needs_input_grad[1])
        return None, None if below is None else below.transpose(0, 1), None


def parameter_names(layer: nn.LSTM) -> list[list[list[str]]]:
    """Names of weight_ih, weight_hh and, if there are any, the two biases: for each layer, for each direction."""
    kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
    suffixes = ["", "_reverse"] if layer.bidirectional else [""]
    return [[[f"{kind}_l{k}{suffix}" for kind in kinds] for suffix in suffixes] for k in range(layer.num_layers)]


def _in_time(x: Tensor, direction: int) -> Tensor:
    """Turn a sequence round for the second, backward-reading direction."""
    return x.flip(0) if direction else x


def _forward(parameters: list[Tensor], inputs: Tensor, state: list[Tensor] | None) -> _Pass:
    """One direction of one layer. Views of all steps are made beforehand: indexing costs as much as a small step."""
    w_input, w_hidden, *biases = parameters
    steps, n, _ = inputs.shape
    h = w_hidden.shape[1]
    gates = nn.functional.linear(inputs, w_input, biases[0] + biases[1] if biases else None)
    hidden, cells = inputs.new_empty(steps + 1, n, h), inputs.new_empty(steps + 1, n, h)
    tanh_cells = inputs.new_empty(steps, n, h)
    for x, given in zip((hidden, cells), state or [inputs.new_zeros(n, h)] * 2, strict=True):
        x[0] = given
    transposed = w_hidden.t().contiguous()
    parts = [part.unbind(0) for part in torch.split(gates, h, dim=2)]
    for now, both, i, f, g, o, h0, h1, c0, c1, tanh in zip(
        gates.unbind(0), gates[..., : 2 * h].unbind(0), *parts, hidden[:-1].unbind(0), hidden[1:].unbind(0),
        cells[:-1].unbind(0), cells[1:].unbind(0), tanh_cells.unbind(0), strict=True,
    ):  # fmt: skip
        now.addmm_(h0, transposed)
        both.sigmoid_()
        g.tanh_()
        o.sigmoid_()
        torch.mul(f, c0, out=c1)
        c1.addcmul_(i, g)
        torch.tanh(c1, out=tanh)
        torch.mul(o, tanh, out=h1)
    return _Pass(
        weights=(w_input, w_hidden), inputs=inputs, gates=gates, hidden=hidden, cells=cells, tanh_cells=tanh_cells
    )


def _local_derivatives(recorded: _Pass) -> tuple[Tensor, Tensor]:
    """[t, n, 4h]: d pre-activation over d cell (over d hidden for the output gate); [t, n, h]: d cell over d hidden.

    In stretches that stay in a core's cache.
    """
    gates, tanh = recorded.gates, recorded.tanh_cells
    steps, n, h = tanh.shape
    local, through = torch.empty_like(gates), torch.empty_like(tanh)
    stretch = max(1, (1 << 15) // max(1, n * h)) if gates.device.type == "cpu" else steps
    for first in range(0, steps, stretch):
        a, q, d = (x[first : first + stretch] for x in (gates, tanh, local))
        i, _, g, o = torch.split(a, h, dim=2)
        torch.mul(a, a, out=d)
        torch.sub(a, d, out=d)  # s (1 - s) of the three logistic gates
        d_i, d_f, d_g, d_o = torch.split(d, h, dim=2)
        d_i.mul_(g)
        d_f.mul_(recorded.cells[first : first + len(a)])
        d_o.mul_(q)
        torch.mul(g, g, out=d_g)
        torch.addcmul(i, i, d_g, value=-1, out=d_g)
        part = through[first : first + stretch]
        torch.mul(q, q, out=part)
        torch.addcmul(o, o, part, value=-1, out=part)
    return local, through


def _backward(recorded: _Pass, output: Tensor | None, last_hidden: Tensor | None, last_cell: Tensor | None) -> Tensor:
    """Gradient with respect to the pre-activations, [t, n, 4h]."""
    local, through = _local_derivatives(recorded)
    steps, n, h = through.shape
    if output is None:
        output = through.new_zeros(()).expand(steps, n, h)
    d_hidden = output[-1].clone() if last_hidden is None else output[-1] + last_hidden
    d_cell = torch.zeros_like(d_hidden) if last_cell is None else last_cell.to(d_hidden.dtype, copy=True)
    spread = d_cell.unsqueeze(1)
    before = (*output[:-1].unbind(0), None)[-1:] + output[:-1].unbind(0)  # the step's predecessor; none at the first
    for down, earlier, f, now, three, last in zip(
        *(x[::-1] for x in (
            through.unbind(0), before, recorded.gates[..., h : 2 * h].unbind(0), local.unbind(0),
            local.view(steps, n, 4, h)[:, :, :3].unbind(0), local[..., 3 * h :].unbind(0),
        )), strict=True,
    ):  # fmt: skip
        d_cell.addcmul_(d_hidden, down)
        three.mul_(spread)
        last.mul_(d_hidden)
        if earlier is not None:
            torch.addmm(earlier, now, recorded.weights[1], out=d_hidden)
            d_cell.mul_(f)
    return local
