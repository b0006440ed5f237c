"""What the coordinator measures on examples of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from common.schema import Examples


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Accuracy (share in [0, 1]) and mean cross-entropy over `count` predictions."""

    accuracy: float
    loss: float
    count: int


@torch.no_grad()
def evaluate(model: nn.Module, examples: Examples, *, batch_size: int) -> Evaluation:
    """Accuracy and loss of `model`; next-token targets count one prediction a position.

    Edge cases: no examples give accuracy and loss 0 with count 0.
    """
    correct, loss, count = 0, 0.0, 0
    for logits, targets in _predictions(model, examples, batch_size):
        correct += int((logits.argmax(1) == targets).sum())
        loss += float(F.cross_entropy(logits, targets, reduction="sum"))
        count += len(targets)
    return Evaluation(accuracy=correct / max(count, 1), loss=loss / max(count, 1), count=count)


@torch.no_grad()
def probabilities(model: nn.Module, examples: Examples, *, batch_size: int) -> Tensor:
    """float32[predictions, classes]: the model's class probabilities."""
    return torch.cat([logits.softmax(1) for logits, _ in _predictions(model, examples, batch_size)])


def majority_accuracy(targets: Tensor) -> float:
    """Accuracy of always predicting the most common class of `targets`; 0 without examples."""
    return float(targets.flatten().bincount().max() / targets.numel()) if targets.numel() else 0.0


def _predictions(model: nn.Module, examples: Examples, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    device = next(model.parameters()).device
    model.eval()
    for begin in range(0, len(examples), batch_size):
        inputs = examples.inputs[begin : begin + batch_size].to(device)
        targets = examples.targets[begin : begin + batch_size].to(device).reshape(-1)
        logits = model(inputs)
        yield logits.reshape(-1, logits.shape[-1]).float(), targets
