"""Exact per-example gradients of LSTMs for Opacus, in about the time of another plain step.

Opacus has samplers for linear, convolution, embedding and norm layers, but none for `torch.nn.LSTM`; its own `DPLSTM`
is 22-40 times slower than `nn.LSTM` and renames the weights, so that a private site and the coordinator would no longer
hold the same model. `register_samplers` fills the gap through Opacus's extension point:

    register_samplers(model)
    hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=True)
    with expected_warnings():
        loss.backward()                       # every parameter p now has p.grad_sample: float32[n, *p.shape]

It also refuses, before anything is trained, the layers whose per-example gradients Opacus gets wrong.

**Guarantee.** Row i of `grad_sample` is the gradient of example i's loss alone, whatever else is in the batch. An empty
batch gives gradients with no rows.

**Source.** Backpropagation through time with all local derivatives computed at once, and weight gradients from the
recorded pairs (input, gradient of the pre-activations) as in "book-keeping", Bu et al., arXiv 2210.00038. Departure:
gradients are instantiated per example, because Opacus clips them across all layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks, register_grad_sampler
from opacus.grad_sample.embedding import compute_embedding_grad_sample
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient, prepare_layer
from torch import Tensor, nn

from common.errors import PrivacyError

_GUARDED = "_coterie_lstm_guard"
_PREPARED = "ft_compute_sample_grad"  # Opacus's own name; it removes the attribute together with its hooks


def register_samplers(model: nn.Module) -> None:
    """Make Opacus's hooks exact for `model`. Call it before every `GradSampleHooks(model, ...)`.

    Parameters, their names and the forward pass stay as they are.

    Args:
        model: Any model; layers without trainable parameters of their own need nothing.

    Raises:
        PrivacyError: A trainable layer has no exact per-example gradient: an LSTM with dropout between its layers,
            a projection or time first; another recurrent layer; a layer that mixes parameters of its own with
            trainable sub-layers (`nn.MultiheadAttention` is one).
    """
    for name, layer in model.named_modules():
        if not any(p.requires_grad for p in layer.parameters(recurse=False)):
            continue
        where = f"layer `{name or type(layer).__name__}` ({type(layer).__name__})"
        if isinstance(layer, nn.LSTM):
            _check_lstm(layer, where)
            register_grad_sampler(type(layer))(lstm_grad_sample)
            if not hasattr(layer, _GUARDED):
                setattr(layer, _GUARDED, layer.register_forward_hook(_guard_call, with_kwargs=True))
        elif isinstance(layer, nn.RNNBase):
            raise PrivacyError(f"{where} has no per-example gradients", hint="use nn.LSTM with batch_first=True")
        elif isinstance(layer, nn.Embedding):
            register_grad_sampler(type(layer))(_embedding_grad_sample)
        elif GradSampleHooks.GRAD_SAMPLERS.get(type(layer), _functional_grad_sample) is _functional_grad_sample:
            _prepare_functional(layer, where)


@contextmanager
def expected_warnings() -> Iterator[None]:
    """Silence what torch warns of at every backward pass with hooks: that the first layer's input has no gradient."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing when", category=UserWarning)
        yield


def _check_lstm(layer: nn.LSTM, where: str) -> None:
    """Refuse the variants that `lstm_grad_sample` does not compute."""
    if not layer.batch_first:
        raise PrivacyError(f"{where} takes time first", hint="build it with batch_first=True")
    if layer.proj_size:
        raise PrivacyError(f"{where} projects its hidden state", hint="build it with proj_size=0")
    if layer.dropout and layer.num_layers > 1:
        raise PrivacyError(
            f"{where} drops out between its layers, which cannot be recomputed",
            hint="build it with dropout=0 and put an nn.Dropout after it",
        )
    if not all(p.requires_grad for p in layer.parameters()):
        raise PrivacyError(f"{where} is frozen in part", hint="freeze all of its parameters or none")


def _guard_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Refuse calls in which a gradient would pass Opacus's hooks by: they see the first input and first output only."""
    attached = all(hasattr(p, "grad_sample") for p in layer.parameters())
    if not (attached and layer.training and torch.is_grad_enabled()):
        return
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or args[0].dim() != 3:
        raise PrivacyError(
            f"{type(layer).__name__} was called with more than one padded batch [n, length, features]",
            hint="with privacy call it as lstm(inputs): no initial state, no packed sequence",
        )
    if isinstance(output, tuple):
        for state in output[1]:
            if state.requires_grad:
                state.register_hook(_refuse_state_gradient)


def _refuse_state_gradient(_gradient: Tensor) -> None:
    """The loss depends on h_n or c_n: their gradient would be missing from every example's."""
    raise PrivacyError(
        "the loss depends on an LSTM's final state, whose gradient Opacus's hooks do not see",
        hint="use the output sequence instead: `lstm(inputs)[0][:, -1]`",
    )


def _prepare_functional(layer: nn.Module, where: str) -> None:
    """Let Opacus differentiate a layer that nobody wrote a sampler for."""
    if any(p.requires_grad for child in layer.children() for p in child.parameters()):
        raise PrivacyError(
            f"{where} mixes parameters of its own with trainable sub-layers: their gradients cannot be told apart by "
            "example",
            hint="put its own parameters into a layer without sub-layers; for attention use nn.Linear projections and "
            "scaled_dot_product_attention",
        )
    register_grad_sampler(type(layer))(_functional_grad_sample)
    if not hasattr(layer, _PREPARED):
        prepare_layer(layer, batch_first=True)  # copies the layer, so it must come before the hooks


def _functional_grad_sample(
    layer: nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Opacus's own fallback, which fails on the empty batches that Poisson sampling draws now and then."""
    if len(backprops) == 0:
        return {p: p.new_zeros((0, *p.shape)) for p in layer.parameters() if p.requires_grad}
    result: dict[nn.Parameter, Tensor] = ft_compute_per_sample_gradient(layer, activations, backprops)
    return result


def _embedding_grad_sample(
    layer: nn.Embedding, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Opacus's own, which forgets that the padding's vector is never trained, and fixes cuDNN's mode when empty."""
    if len(backprops) == 0:
        return {p: p.new_zeros((0, *p.shape)) for p in layer.parameters()}
    result: dict[nn.Parameter, Tensor] = compute_embedding_grad_sample(layer, activations, backprops)
    if layer.padding_idx is not None:
        for gradient in result.values():
            gradient[:, layer.padding_idx] = 0.0
    return result


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pass:
    """One direction of one layer, time first and in the order in which it read its input.

    `inputs`: [t, n, i]; `gates`: [t, n, 4h], activated, in torch's order (input, forget, cell, output); `hidden`:
    [t + 1, n, h] and `cells`: [t + 1, n, h], both from the zero state before the first step.
    """

    weights: tuple[Tensor, Tensor]
    inputs: Tensor
    gates: Tensor
    hidden: Tensor
    cells: Tensor
    tanh_cells: Tensor


@torch.no_grad()
def lstm_grad_sample(layer: nn.LSTM, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    """Per-example gradients of all parameters of an LSTM, in the form that Opacus calls.

    Args:
        layer: An `nn.LSTM` with batch_first, any number of layers, one or two directions, started from zero states.
        activations: Its input, float32[n, t, i], as the only element.
        backprops: Gradient of the summed loss with respect to its output sequence, float32[n, t, directions * h].

    Returns:
        Parameter to float32[n, *parameter.shape]; no rows for an empty batch.
    """
    dtype = next(layer.parameters()).dtype
    with torch.autocast(device_type=backprops.device.type, enabled=False):
        inputs, output_gradient = (x.transpose(0, 1).to(dtype) for x in (activations[0], backprops))
        passes, names = [], _parameter_names(layer)
        for level in names:
            passes.append([_forward(layer, level[d], inputs.flip(0) if d else inputs) for d in range(len(level))])
            inputs = torch.cat([_in_time(p.hidden[1:], d) for d, p in enumerate(passes[-1])], dim=2)
        result: dict[nn.Parameter, Tensor] = {}
        for number in reversed(range(len(names))):
            below = []
            for d, part in enumerate(output_gradient.chunk(len(names[number]), dim=2)):
                recorded = passes[number][d]
                gate_gradient = _backward(recorded, _in_time(part, d))
                result |= _instantiate(layer, names[number][d], recorded, gate_gradient)
                if number:
                    below.append(_in_time(gate_gradient @ recorded.weights[0], d))
            output_gradient = torch.stack(below).sum(0) if below else output_gradient
    return result


def _in_time(x: Tensor, direction: int) -> Tensor:
    """Turn a sequence round for the second, backward-reading direction."""
    return x.flip(0) if direction else x


def _parameter_names(layer: nn.LSTM) -> list[list[list[str]]]:
    """Names of weight_ih, weight_hh and, if there are any, the two biases: for each layer, for each direction."""
    kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if layer.bias else [])]
    suffixes = ["", "_reverse"] if layer.bidirectional else [""]
    return [[[f"{kind}_l{k}{suffix}" for kind in kinds] for suffix in suffixes] for k in range(layer.num_layers)]


def _forward(layer: nn.LSTM, names: list[str], inputs: Tensor) -> _Pass:
    """Recompute one direction, keeping what the derivative needs."""
    w_input, w_hidden, *biases = (getattr(layer, name) for name in names)
    steps, n, _ = inputs.shape
    h = w_hidden.shape[1]
    gates = torch.nn.functional.linear(inputs, w_input, sum(biases) if biases else None)
    hidden, cells = inputs.new_zeros(steps + 1, n, h), inputs.new_zeros(steps + 1, n, h)
    tanh_cells = inputs.new_empty(steps, n, h)
    transposed = w_hidden.t().contiguous()
    for t in range(steps):
        now = gates[t].addmm_(hidden[t], transposed)
        i_f, g, o = now[:, : 2 * h].sigmoid_(), now[:, 2 * h : 3 * h].tanh_(), now[:, 3 * h :].sigmoid_()
        torch.mul(i_f[:, h:], cells[t], out=cells[t + 1])
        cells[t + 1].addcmul_(i_f[:, :h], g)
        torch.tanh(cells[t + 1], out=tanh_cells[t])
        torch.mul(o, tanh_cells[t], out=hidden[t + 1])
    return _Pass(
        weights=(w_input, w_hidden), inputs=inputs, gates=gates, hidden=hidden, cells=cells, tanh_cells=tanh_cells
    )


def _backward(recorded: _Pass, output_gradient: Tensor) -> Tensor:
    """Gradient with respect to the pre-activations, [t, n, 4h]. One matrix product a step; the rest is done at once."""
    i, f, g, o = recorded.gates.chunk(4, dim=2)
    steps, n, h = o.shape
    # d pre-activation = local * d cell (input, forget, cell gate) or local * d hidden (output gate)
    local = torch.cat(
        [g * i * (1 - i), recorded.cells[:-1] * f * (1 - f), i * (1 - g * g), recorded.tanh_cells * o * (1 - o)], dim=2
    )
    through_tanh = o * (1 - recorded.tanh_cells.square())
    by_gate = local.view(steps, n, 4, h)
    d_hidden, d_cell = output_gradient[-1], torch.zeros_like(output_gradient[-1])
    for t in range(steps - 1, -1, -1):
        d_cell.addcmul_(d_hidden, through_tanh[t])
        by_gate[t, :, :3].mul_(d_cell.unsqueeze(1))
        by_gate[t, :, 3].mul_(d_hidden)
        if t:
            d_hidden = torch.addmm(output_gradient[t - 1], local[t], recorded.weights[1])
            d_cell.mul_(f[t])
    return local


def _instantiate(
    layer: nn.LSTM, names: list[str], recorded: _Pass, gate_gradient: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Sum the outer products over time, example by example."""
    by_example = gate_gradient.permute(1, 2, 0)
    gradients = [
        torch.bmm(by_example, recorded.inputs.transpose(0, 1)),
        torch.bmm(by_example, recorded.hidden[:-1].transpose(0, 1)),
    ]
    if layer.bias:
        gradients += [gate_gradient.sum(0)] * 2  # the two biases are only ever used as their sum
    return {getattr(layer, name): gradient for name, gradient in zip(names, gradients, strict=True)}
