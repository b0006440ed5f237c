"""Local training: a plain loop, and the same loop with differential privacy.

Both take the model as it was loaded and change its parameters in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from common.config import TrainingSettings
from common.privacy import NoiseSource, PrivacyPlan
from common.privacy.noise import poisson_sample
from common.schema import Examples


def train_plain(
    model: nn.Module, examples: Examples, settings: TrainingSettings, *, learning_rate: float, proximal_mu: float = 0.0
) -> float:
    """Train without privacy; the mean training loss over all steps.

    Order of examples and dropout follow torch's global generator. With `proximal_mu`, every step also pulls towards the
    parameters at the start (FedProx: Li et al. 2020, eq. 2).
    """
    parameters = list(trainable(model))
    _set_training(model)
    step = _stepper(parameters, settings, learning_rate)
    start = [p.detach().clone() for p in parameters] if proximal_mu else []
    cast = _autocast(settings, parameters[0].device)
    losses: list[Tensor] = []  # read at the end: reading each would wait for the device
    steps = 0
    for batch in _batches(examples, settings):
        for parameter in parameters:
            parameter.grad = None
        for part in _physical(batch, settings.max_physical_batch):
            with cast:
                loss = mean_loss(model(part.inputs), part.targets)
            scaled = loss if len(part) == len(batch) else loss * (len(part) / len(batch))
            scaled.backward()  # type: ignore[no-untyped-call]
            losses.append(scaled.detach())
        for parameter, origin in zip(parameters, start, strict=False):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=proximal_mu)
        step()
        steps += 1
    return (torch.stack(losses).sum() if len(losses) > 1 else losses[0]).item() / steps


def train_private(
    model: nn.Module,
    examples: Examples,
    settings: TrainingSettings,
    *,
    plan: PrivacyPlan,
    learning_rate: float,
    source: NoiseSource,
    proximal_mu: float = 0.0,
) -> None:
    """Train with DP-SGD (Abadi et al. 2016, algorithm 1), protecting each example; returns nothing that was not noised.

    `model` must have Opacus' per-example gradient hooks attached. Each of the plan's steps takes a fresh Poisson
    sample; a step over an empty sample still adds noise. What is not trained stays as it was: a layer's running
    statistics are those of private examples.
    """
    from common.privacy.optimizer import PrivateOptimizer  # Opacus takes seconds to import
    from common.privacy.per_sample import expected_warnings

    _set_training(model)
    parameters = list(trainable(model))
    fixed = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    before = [tensor.detach().clone() for tensor in fixed]
    start = [p.detach().clone() for p in parameters] if proximal_mu else []
    optimizer = PrivateOptimizer(make_optimizer(parameters, settings, learning_rate), plan=plan, source=source)
    cast = _autocast(settings, parameters[0].device)
    with expected_warnings():
        for _ in range(plan.local_steps):
            chosen = poisson_sample(len(examples), rate=plan.sampling_rate, source=source).to(examples.targets.device)
            for part in _physical(examples.take(chosen), settings.max_physical_batch):
                with cast:
                    losses = example_losses(model(part.inputs), part.targets)
                losses.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.accumulate(len(part))
            optimizer.finish_step(start=start, proximal_mu=proximal_mu)
    with torch.no_grad():
        for tensor, values in zip(fixed, before, strict=True):
            tensor.copy_(values)


def trainable(model: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters that training changes."""
    return (p for p in model.parameters() if p.requires_grad)


def make_optimizer(
    parameters: list[nn.Parameter], settings: TrainingSettings, learning_rate: float
) -> torch.optim.Optimizer:
    """A fresh local optimizer: no state survives a round."""
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=settings.momentum, weight_decay=settings.weight_decay)


def _set_training(model: nn.Module) -> None:
    if not model.training:  # walking all layers costs as much as a small one's step
        model.train()


def _stepper(parameters: list[nn.Parameter], settings: TrainingSettings, learning_rate: float) -> Callable[[], object]:
    """One optimizer step; plain SGD is one line, and an optimizer object would cost a small model more than its
    step.
    """
    if settings.optimizer != "sgd" or settings.momentum or settings.weight_decay:
        return make_optimizer(parameters, settings, learning_rate).step

    @torch.no_grad()
    def step() -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.add_(parameter.grad, alpha=-learning_rate)

    return step


def learning_rate_at(settings: TrainingSettings, server_round: int, rounds: int) -> float:
    """The local learning rate of `server_round` (from 1): warm-up, then the schedule down to zero after the last
    round.
    """
    base, warmup = settings.learning_rate, settings.warmup_rounds
    if server_round <= warmup:
        return base * server_round / (warmup + 1)
    progress = (server_round - 1 - warmup) / max(1, rounds - warmup)
    if settings.schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * progress))
    if settings.schedule == "linear":
        return base * (1 - progress)
    return base


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy averaged over examples, and over positions for next-token targets."""
    if logits.dim() > 2:
        logits, targets = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)
    return F.cross_entropy(logits, targets)


def example_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """float32[n]: each example's cross-entropy, averaged over its positions for next-token targets."""
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), reduction="none")
    return losses.view(len(targets), -1).mean(1)


def resolve_device(name: str) -> torch.device:
    """`auto` takes CUDA, then Apple's MPS, then the CPU."""
    if name != "auto":
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _batches(examples: Examples, settings: TrainingSettings) -> Iterator[Examples]:
    """Batches of one round: whole epochs, or as many steps as are fixed, going round as often as needed."""
    count, size = len(examples), settings.batch_size
    per_epoch = -(-count // size)
    steps = settings.local_steps or settings.local_epochs * per_epoch
    shuffled = examples
    for step in range(steps):
        position = step % per_epoch
        if position == 0 and settings.shuffle:
            shuffled = examples.take(torch.randperm(count).to(examples.targets.device))
        yield _slice(shuffled, position * size, size)


def _physical(batch: Examples, most: int) -> Iterator[Examples]:
    """Parts of a batch that fit in memory; none of an empty one."""
    if 0 < len(batch) <= most:
        yield batch
        return
    for begin in range(0, len(batch), most):
        yield _slice(batch, begin, most)


def _slice(examples: Examples, begin: int, size: int) -> Examples:
    end = begin + size
    return Examples(inputs=examples.inputs[begin:end], targets=examples.targets[begin:end])


def _autocast(settings: TrainingSettings, device: torch.device) -> AbstractContextManager[object]:
    if settings.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
