"""The tape: attaches to a model, records each layer's pass, and turns it into per-example norms and weighted sums."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import PrivacyError
from common.privacy.bookkeeping.call import Call
from common.privacy.bookkeeping.product import Adding, Workspace
from common.privacy.bookkeeping.rounding import MAX_PHYSICAL_BATCH, QUICK_EXAMPLES, exactly
from common.privacy.bookkeeping.rules import rules_for

_MARK = "grad_sample"
"""Opacus's attribute on parameters; models look for it to know that their layers are being watched."""


class Bookkeeping:
    """Attaches to a model; between forward and backward it tapes (input, output gradient) of every layer.

        bookkeeping = Bookkeeping(model)
        losses(model(inputs)).sum().backward()           # leaves every .grad as it was
        gradients = bookkeeping.collect(len(inputs))
        norms = gradients.squared_norms.sum(0).sqrt()    # float64[n], over all parameters
        sums = gradients.weighted_sums((C / norms).clamp(max=1.0))

    It records while the model is in training mode and gradients are enabled; else the model is as it was.

    Attributes:
        parameters: The trainable ones, in `model.parameters()` order.

    **Guarantee.** What a layer contributes is known exactly, or refused: at construction where the model's structure
    shows it, else during forward, backward or `collect`. Names, state and predictions of the model do not change.

    **Source.** Bu et al., arXiv 2210.00038 ("book-keeping"): one backward pass, no second one.

    Raises:
        PrivacyError: On construction, for what cannot be done exactly: parameters shared between layers, batch norm,
            recurrent layers other than `nn.LSTM`, its variants with time first, projection or dropout between layers,
            layers that mix parameters with trainable sub-layers (`nn.MultiheadAttention`), partly frozen layers.
    """

    parameters: list[nn.Parameter]

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        rules = list(rules_for(model))
        for layer, where, _ in rules:
            if "forward" in layer.__dict__ and not _plain(layer):
                raise PrivacyError(
                    f"{where} has a forward pass of its own, or is already watched", hint="detach() the other one first"
                )
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self._calls: dict[nn.Module, Call] = {}
        self._collected = 0
        self._layers = [layer for layer, _, _ in rules]
        self._guards = []
        for layer, where, rule in rules:
            layer.__dict__["forward"] = _Watched(self, layer, where, rule)
        for p in self.parameters:
            setattr(p, _MARK, None)
            self._guards.append(p.register_hook(self._guard))  # type: ignore[no-untyped-call]  # torch gives it none

    @property
    def recording(self) -> bool:
        """Whether a forward pass now would be taped."""
        return self.model.training and torch.is_grad_enabled()

    def collect(self, examples: int) -> PerExample:
        """Turn the tape into per-example gradients, after `loss.sum().backward()`; empties the tape.

        Memory of the previous result is used again, so that one must not be asked for sums any more.

        Args:
            examples: Rows of the batch; 0 for an empty one.

        Raises:
            PrivacyError: A layer saw other rows than there are examples: each row would be clipped by itself, and one
                example could change the sum by many times the bound. Or a layer's input was overwritten meanwhile, or
                there are more examples than `SUMMATION_ERROR` covers.
        """
        if examples > MAX_PHYSICAL_BATCH:
            raise PrivacyError(
                f"a physical batch of {examples} examples; at most {MAX_PHYSICAL_BATCH} are summed exactly enough",
                hint="split the batch",
            )
        calls, self._calls = list(self._calls.values()), {}
        for call in calls:
            call.close()
            if call.rows != examples:
                raise PrivacyError(
                    f"{call.where} saw other rows than there are examples",
                    hint="keep the batch as the first dimension of every layer's input",
                )
        self._collected += 1
        return PerExample(self, [c for c in calls if c.gradient is not None] if examples else [], examples)

    def discard(self) -> None:
        """Forget what was taped: a step that failed half way."""
        for call in self._calls.values():
            call.closed = True
        self._calls = {}

    def detach(self) -> None:
        """Leave the model as it was."""
        self.discard()
        for layer in self._layers:
            if isinstance(layer.__dict__.get("forward"), _Watched):
                del layer.__dict__["forward"]
        for guard in self._guards:
            guard.remove()
        for p in self.parameters:
            if hasattr(p, _MARK):
                delattr(p, _MARK)

    def _guard(self, _gradient: Tensor) -> None:
        """A parameter got a gradient of its own: it was used elsewhere than in its layer's forward pass."""
        if self.model.training:
            raise PrivacyError(
                "a parameter was used outside of its layer's own forward pass",
                hint="use parameters only by calling the layers that hold them",
            )

    def record(self, layer: nn.Module, call: Call) -> Any:
        """Run a layer's pass and put it on the tape."""
        if layer in self._calls:
            raise PrivacyError(
                f"{call.where} was called twice before its gradients were collected",
                hint="give each place in the model a layer of its own, without recomputation; discard() after a "
                "failed step",
            )
        output = call.run()
        self._calls[layer] = call
        return output


class PerExample:
    """Gradients of one physical batch, known by their norms and by their weighted sums. Valid until the next `collect`.

    Attributes:
        examples: Number of examples n.
        squared_norms: float64[parameters, n]: each example's squared gradient norm for each parameter, never below the
            true one, nor below that of what `weighted_sums` adds for it; infinite or NaN where not finite.
    """

    def __init__(self, owner: Bookkeeping, calls: list[Call], examples: int) -> None:
        self.examples = examples
        self._owner, self._calls, self._number = owner, calls, owner._collected  # noqa: SLF001 - of one module
        self._parameters = owner.parameters
        self._places = {id(p): k for k, p in enumerate(self._parameters)}
        device = self._parameters[0].device if self._parameters else None
        rows: list[Tensor] = [torch.zeros(examples, dtype=torch.float64, device=device)] * len(self._parameters)
        with exactly():
            for call in calls:
                for p, squares in zip(call.parameters, call.squared_norms(), strict=True):
                    rows[self._places[id(p)]] = squares.to(device)
            self.squared_norms = torch.stack(rows) if rows else torch.zeros(0, examples, dtype=torch.float64)
            self._finite = bool(self.squared_norms.isfinite().all())

    def weighted_sums(self, factors: Tensor, *, first: bool = False) -> list[Tensor]:
        """The sums over examples of factor times gradient.

        **Guarantee.** An example with factor 0 contributes exactly nothing, even if its gradient is not finite. What
        rounding adds to the sums is bounded by `summation_error`.

        Args:
            factors: float64[n] for all parameters, or float64[parameters, n].
            first: Whether this is the first physical batch of a step: up to `QUICK_EXAMPLES` examples of a step may be
                added up partly in float32.

        Returns:
            float64 tensors shaped as the parameters; zeros where the loss does not depend on one.

        Raises:
            PrivacyError: A later batch has been collected, and taken this one's memory.
        """
        if self._number != self._owner._collected:  # noqa: SLF001
            raise PrivacyError(
                "per-example gradients were asked for after the next batch had been collected",
                hint="take the weighted sums of one batch before the next",
            )
        how: Adding = "masked"
        if self._finite:
            how = "quick" if first and self.examples <= QUICK_EXAMPLES else "exact"
        each = factors.double().expand(len(self._parameters), self.examples)
        sums: list[Tensor | None] = [None] * len(self._parameters)
        with exactly():
            for call in self._calls:
                places = [self._places[id(p)] for p in call.parameters]
                own = [each[k].to(p.device) for k, p in zip(places, call.parameters, strict=True)]
                for k, total in zip(places, call.weighted_sums(own, how=how), strict=True):
                    sums[k] = total
            return [
                torch.zeros(p.shape, dtype=torch.float64, device=p.device) if total is None else total.view(p.shape)
                for p, total in zip(self._parameters, sums, strict=True)
            ]


class _Watched:
    """Stands in the place of a layer's forward pass."""

    def __init__(self, owner: Bookkeeping, layer: nn.Module, where: str, rule: type[Call]) -> None:
        self.owner, self.layer, self.where, self.rule = owner, layer, where, rule
        self.workspace = Workspace()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Taped, or as it always was."""
        if not self.owner.recording:
            return type(self.layer).forward(self.layer, *args, **kwargs)
        return self.owner.record(self.layer, self.rule(self.layer, self.where, args, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """A copied model is an ordinary one: nobody watches it."""
        copied = memo[id(self.layer)]  # a layer's copy is announced before its attributes are copied
        return MethodType(type(copied).forward, copied)


def _plain(layer: nn.Module) -> bool:
    """Whether the instance's forward pass is its class's own: what `deepcopy` leaves of a watched layer."""
    forward = layer.__dict__["forward"]
    return isinstance(forward, MethodType) and forward.__func__ is type(layer).forward and forward.__self__ is layer
