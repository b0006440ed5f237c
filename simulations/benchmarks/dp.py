"""What example-level privacy costs: DP-SGD steps of Coterie, and of Opacus's modes, against plain steps of torch.

One pair is a plain step and a private one, in turn, in the same process; a figure is the median of the pairs' ratios of
process CPU time, on one thread. The private step is the one that ships, secure noise included. Opacus runs with its own
faster, insecure noise. LSTMs are exchanged for Opacus's DPLSTM there, because it has no rule for torch's.

Memory is measured in processes of their own, as the peak of resident memory over its level at a start where the model,
its batch and torch's libraries are loaded (one plain pass over one example has been made).
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median
from time import process_time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from client.memory import keep_freed_memory
from common.config import RunConfig
from common.privacy import PrivacyPlan, SecureNoise, make_plan
from common.privacy.bookkeeping import Bookkeeping
from common.privacy.noise import GRID_STDDEV, add_noise
from common.privacy.optimizer import PrivateOptimizer
from simulations.benchmarks.reference import DP_WORKLOADS, StepWorkload, plain_step

Step = Callable[[Tensor, Tensor], None]

LEARNING_RATE, CLIPPING_NORM, NOISE_MULTIPLIER = 0.1, 1.0, 1.0
NOISE_VALUES = 1_300_000


class Pairs(NamedTuple):
    """How many pairs are measured, after one of two examples that is not."""

    ours: int
    opacus: int


PAIRS = {name: Pairs(21, 3) for name in DP_WORKLOADS} | {"resnet18": Pairs(5, 2)}
QUICK_PAIRS = {name: Pairs(11, 2) for name in DP_WORKLOADS} | {"resnet18": Pairs(2, 1)}
MEMORY = ("cnn", "lstm_b32", "lstm_b128", "transformer", "resnet18")


def figures(*, quick: bool) -> dict[str, float]:
    """All figures of the benchmark `dp`."""
    keep_freed_memory()  # as every process that trains clients does
    with _one_thread():
        found, seconds = {}, {}
        for name, workload in DP_WORKLOADS.items():
            pairs = (QUICK_PAIRS if quick else PAIRS)[name]
            found[f"{name}_dp_over_plain"], seconds[name] = ratio(workload, private_step, pairs.ours)
        hooks = ratio(DP_WORKLOADS["lstm_b32"], opacus_hooks, (QUICK_PAIRS if quick else PAIRS)["lstm_b32"].opacus)
        found["lstm_b32_speedup_over_dplstm"] = hooks[0] / found["lstm_b32_dp_over_plain"]
        best = min(
            ratio(DP_WORKLOADS["resnet18"], mode, (QUICK_PAIRS if quick else PAIRS)["resnet18"].opacus)[0]
            for mode in (opacus_hooks, opacus_ghost)
        )
        found["resnet18_dp_over_best_opacus"] = found["resnet18_dp_over_plain"] / best
        found |= noise_figures(seconds["lstm_b32"], 3 if quick else 15)
        for name in MEMORY:
            ours, theirs = (extra_memory(name, mode) for mode in ("private_step", "opacus_hooks"))
            found[f"{name}_extra_memory_over_opacus_hooks"] = ours / theirs
    return found


def ratio(workload: StepWorkload, make: Callable[[nn.Module, int], Step], pairs: int) -> tuple[float, float]:
    """Median over pairs of a step's CPU time over a plain step's; median seconds of the step itself."""
    x, y = _batch(workload)
    plain, own = _plain(_model(workload)), make(_model(workload), len(y))
    ratios, seconds = [], []
    plain(x[:2], y[:2])
    own(x[:2], y[:2])
    for _ in range(pairs):
        begin = process_time()
        plain(x, y)
        middle = process_time()
        own(x, y)
        end = process_time()
        ratios.append((end - middle) / (middle - begin))
        seconds.append(end - middle)
    return median(ratios), median(seconds)


def noise_figures(step_seconds: float, repeats: int) -> dict[str, float]:
    """Secure noise against torch's generator, and as a share of the LSTM's private step at batch 32."""
    source, sums = SecureNoise(), [torch.zeros(NOISE_VALUES, dtype=torch.float64)]
    grid = 1 / GRID_STDDEV
    zeros = [torch.zeros_like(p, dtype=torch.float64) for p in _model(DP_WORKLOADS["lstm_b32"]).parameters()]
    times: dict[str, list[float]] = {"secure": [], "added": [], "torch": [], "share": []}
    for _ in range(1 + repeats):
        for key, draw in (
            ("secure", lambda: torch.from_numpy(source.integers(NOISE_VALUES)).to(torch.float32).mul_(grid)),
            ("added", lambda: add_noise(sums, noise_stddev=1.0, source=source)),
            ("torch", lambda: torch.randn(NOISE_VALUES)),
            ("share", lambda: add_noise(zeros, noise_stddev=1.0, source=source)),
        ):
            begin = process_time()
            draw()
            times[key].append(process_time() - begin)
    middle = {key: median(values[1:]) for key, values in times.items()}
    return {
        "secure_noise_over_torch_randn": middle["secure"] / middle["torch"],
        "noised_sum_over_torch_randn": middle["added"] / middle["torch"],
        "noise_share_of_step": middle["share"] / step_seconds,
    }


def extra_memory(name: str, mode: str) -> int:
    """Kilobytes by which a few steps raise the peak of resident memory, in a process of their own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_measure_memory, args=(name, mode, theirs))
    process.start()
    theirs.close()
    try:
        extra: int = ours.recv()
    finally:
        process.join()
    return max(1, extra)


def _measure_memory(name: str, mode: str, result: Connection) -> None:
    """Runs in the measured process."""
    with _one_thread():
        workload = DP_WORKLOADS[name]
        x, y = _batch(workload)
        model = _model(workload)
        F.cross_entropy(model(x[:1]), y[:1]).backward()  # type: ignore[no-untyped-call]
        model.zero_grad()
        step = _MODES[mode](model, len(y))
        gc.collect()
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(1 if name == "resnet18" else 3):
            step(x, y)
        result.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin)


def private_step(model: nn.Module, batch_size: int) -> Step:
    """The step that ships."""
    bookkeeping = Bookkeeping(model)
    sgd = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    plan = _plan(sum(p.numel() for p in bookkeeping.parameters), batch_size)
    optimizer = PrivateOptimizer(sgd, bookkeeping=bookkeeping, plan=plan, source=SecureNoise())

    def step(x: Tensor, y: Tensor) -> None:
        F.cross_entropy(model(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.accumulate(len(y))
        optimizer.finish_step()

    return step


def opacus_hooks(model: nn.Module, batch_size: int) -> Step:
    """Opacus's default mode, with its own optimizer and noise."""
    from opacus.grad_sample import GradSampleModule
    from opacus.optimizers import DPOptimizer
    from opacus.validators.module_validator import ModuleValidator

    fixed = ModuleValidator.fix(model) if any(isinstance(layer, nn.LSTM) for layer in model.modules()) else model
    wrapped = GradSampleModule(fixed, loss_reduction="sum")
    optimizer = _opacus_optimizer(DPOptimizer, fixed, batch_size)

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(wrapped(x), y, reduction="sum").backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return _quiet(step)


def opacus_ghost(model: nn.Module, batch_size: int) -> Step:
    """Opacus's ghost clipping: norms first, then a second backward pass."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, loss_reduction="sum", max_grad_norm=CLIPPING_NORM, use_ghost_clipping=True
    )
    optimizer = _opacus_optimizer(DPOptimizerFastGradientClipping, model, batch_size)
    criterion = DPLossFastGradientClipping(wrapped, optimizer, nn.CrossEntropyLoss(reduction="sum"), "sum")

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        criterion(wrapped(x), y).backward()
        optimizer.step()

    return _quiet(step)


_MODES = {"private_step": private_step, "opacus_hooks": opacus_hooks, "opacus_ghost": opacus_ghost}


def _opacus_optimizer(kind: type[Any], model: nn.Module, batch_size: int) -> Any:
    return kind(
        torch.optim.SGD(model.parameters(), lr=LEARNING_RATE / batch_size),
        noise_multiplier=NOISE_MULTIPLIER,
        max_grad_norm=CLIPPING_NORM,
        expected_batch_size=batch_size,
        loss_reduction="sum",
    )


def _plan(dimensions: int, batch_size: int) -> PrivacyPlan:
    """One step of example-level privacy."""
    privacy = {
        "unit": "example",
        "noise_multiplier": 1.0,
        "max_grad_norm": CLIPPING_NORM,
        "expected_batch_size": batch_size,
    }
    config = RunConfig.model_validate({"rounds": 1, "training": {"local_steps": 1}, "privacy": privacy})
    return replace(make_plan(config, dimensions=dimensions, participations=1), noise_multiplier=NOISE_MULTIPLIER)


def _model(workload: StepWorkload) -> nn.Module:
    torch.manual_seed(0)
    return workload.model()


def _batch(workload: StepWorkload) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return workload.batch()


def _plain(model: nn.Module) -> Step:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    return lambda x, y: plain_step(model, optimizer, x, y)


def _quiet(step: Step) -> Step:
    """Without torch's warning, at every pass with hooks, that the first layer's input has no gradient."""
    import warnings

    def quietly(x: Tensor, y: Tensor) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Full backward hook is firing when", category=UserWarning)
            step(x, y)

    return quietly


@contextmanager
def _one_thread() -> Iterator[None]:
    """CPU time of several threads would say nothing about one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
