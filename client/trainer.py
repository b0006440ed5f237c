"""Local training: a plain loop, and the same loop with differential privacy.

Both take the model as it was loaded and change its parameters in place.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from common.config import TrainingSettings
from common.privacy import NoiseSource, PrivacyPlan, UnitSampler
from common.privacy.bookkeeping import Bookkeeping
from common.privacy.noise.prefetch import Prefetch
from common.schema import Examples

_WORTH_A_THREAD = 1 << 16
"""Values of noise a step; fewer are drawn in less time than a thread takes to start."""


def train_plain(
    model: nn.Module,
    examples: Examples,
    settings: TrainingSettings,
    *,
    learning_rate: float,
    proximal_mu: float = 0.0,
    most_steps: int | None = None,
) -> float:
    """Train without privacy; the mean training loss over all steps.

    Order of examples and dropout follow torch's global generator. With `proximal_mu`, every step also pulls towards the
    parameters at the start (FedProx: Li et al. 2020, eq. 2). It ends after `most_steps`, at least 1, where those are
    fewer than the settings say.
    """
    parameters = list(trainable(model))
    _set_training(model)
    step = _stepper(parameters, settings, learning_rate)
    start = [p.detach().clone() for p in parameters] if proximal_mu else []
    cast = _autocast(settings, parameters[0].device)
    losses: list[Tensor] = []  # read at the end: reading each would wait for the device
    steps = 0
    for batch in _batches(examples, settings, most_steps):
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
    bookkeeping: Bookkeeping,
    plan: PrivacyPlan,
    learning_rate: float,
    source: NoiseSource,
    proximal_mu: float = 0.0,
    clipping_norm: float | None = None,
) -> float:
    """Train with DP-SGD (Abadi et al. 2016, algorithm 1), protecting each example, or each entity where there are some.

    Each of the plan's steps takes a fresh Poisson sample; a step over an empty sample still adds noise. What is not
    trained stays as it was: a layer's running statistics are those of private examples.

    Args:
        model: Its parameters are changed in place.
        examples: The client's own.
        settings: Optimizer, precision, physical batch.
        bookkeeping: Attached to the model; gives per-example gradients.
        plan: Sampler, clipper and noise.
        learning_rate: Of this round.
        source: Secure noise.
        proximal_mu: Pull towards the parameters at the start (FedProx).
        clipping_norm: Where adaptive clipping stood after the client's last round; None starts with the plan's.

    Returns:
        The clipping norm for the client's next round. Like the parameters it follows from noised values alone.
    """
    from common.privacy.optimizer import PrivateOptimizer  # Opacus takes seconds to import

    _set_training(model)
    parameters = bookkeeping.parameters
    start = [p.detach().clone() for p in parameters] if proximal_mu else []
    cast = _autocast(settings, parameters[0].device)
    sampler = UnitSampler(examples.entities, len(examples))
    with unchanged(model), _drawn_ahead(source, plan, sum(p.numel() for p in parameters)) as noise:
        optimizer = PrivateOptimizer(
            make_optimizer(parameters, settings, learning_rate),
            bookkeeping=bookkeeping,
            plan=plan,
            source=noise,
            clipping_norm=clipping_norm,
        )
        for _ in range(plan.local_steps):
            chosen = sampler.sample(plan, source).to(examples.targets.device)
            for part in _physical(examples.take(chosen), settings.max_physical_batch):
                with cast:
                    losses = example_losses(model(part.inputs), part.targets)
                losses.sum().backward()  # type: ignore[no-untyped-call]
                optimizer.accumulate(len(part))
            optimizer.finish_step(start=start, proximal_mu=proximal_mu)
    return optimizer.clipper.norm


def _drawn_ahead(source: NoiseSource, plan: PrivacyPlan, count: int) -> AbstractContextManager[NoiseSource]:
    """The source, with each step's noise drawn by a thread while the model computes, where that is worth a thread."""
    if count < _WORTH_A_THREAD or plan.clipping == "adaptive":  # its count needs a draw of its own in between
        return nullcontext(source)
    return Prefetch(source, count=count, batches=plan.local_steps)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Put back, at the end, whatever of the model is not trained: buffers and frozen parameters."""
    fixed = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]
    before = [tensor.detach().clone() for tensor in fixed]
    yield
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


def training_seed(run_seed: int, server_round: int, client: str) -> int:
    """What seeds the order of a client's examples and its dropout: run, round and client, and nothing else."""
    text = f"{run_seed}/{server_round}/{client}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


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


def _batches(examples: Examples, settings: TrainingSettings, most: int | None) -> Iterator[Examples]:
    """Batches of one round: whole epochs, or as many steps as are fixed, going round as often as needed; at most `most`
    of them.

    Each is a copy: a model may write into its input, and the client's own data must stay as they are.
    """
    count, size, device = len(examples), settings.batch_size, examples.targets.device
    per_epoch = -(-count // size)
    steps = settings.local_steps or settings.local_epochs * per_epoch
    shuffled = examples
    for step in range(steps if most is None else min(steps, most)):
        begin = step % per_epoch * size
        if not settings.shuffle:
            yield examples.take(torch.arange(begin, min(begin + size, count), device=device))
            continue
        if begin == 0:
            shuffled = examples.take(torch.randperm(count).to(device))
        yield shuffled.part(begin, begin + size)


def _physical(batch: Examples, most: int) -> Iterator[Examples]:
    """Parts of a batch that fit in memory; none of an empty one."""
    if 0 < len(batch) <= most:
        yield batch
        return
    for begin in range(0, len(batch), most):
        yield batch.part(begin, begin + most)


def _autocast(settings: TrainingSettings, device: torch.device) -> AbstractContextManager[object]:
    if settings.precision == "bfloat16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()
