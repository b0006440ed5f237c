"""The benchmark of DP-SGD steps measures what it says, and prints one document."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from typer.testing import CliRunner

import simulations.benchmarks.__main__ as command
from common.privacy.bookkeeping import Bookkeeping
from simulations.benchmarks import dp
from simulations.benchmarks.reference import DP_WORKLOADS, StepWorkload
from tests.helpers.runs import SITE

KEYS = {
    *(f"{name}_dp_over_plain" for name in DP_WORKLOADS),
    *(f"{name}_extra_memory_over_opacus_hooks" for name in DP_WORKLOADS),
    "resnet18_dp_over_best_opacus",
    "lstm_b32_speedup_over_dplstm",
    "secure_noise_over_torch_randn",
    "noised_sum_over_torch_randn",
    "noise_share_of_step",
}

SMALL = StepWorkload(
    name="small",
    batch_size=4,
    model=lambda: nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)),
    batch=lambda: (torch.randn(4, 3), torch.randint(2, (4,))),
)


@pytest.mark.parametrize("mode", [dp.private_step, dp.opacus_hooks, dp.opacus_ghost])
def test_a_step_is_a_clipped_one(mode, monkeypatch):
    """Every mode that is timed moves parameters by the mean of clipped per-example gradients, where noise is low."""
    monkeypatch.setattr(dp, "CLIPPING_NORM", 0.05)
    monkeypatch.setattr(dp, "NOISE_MULTIPLIER", 1e-3)
    x, y = dp._batch(SMALL)
    model = dp._model(SMALL)
    expected = [p.detach().clone() for p in model.parameters()]
    for i in range(4):
        gradients = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        norm = torch.cat([g.flatten() for g in gradients]).norm()
        for p, g in zip(expected, gradients, strict=True):
            p.sub_(0.1 * g * min(1.0, 0.05 / float(norm)) / 4)
    mode(model, 4)(x, y)
    for p, there in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), there, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("name", ["cnn", "lstm_b32", "transformer"])
def test_reference_models_are_book_kept_exactly(name):
    """What is timed computes the gradients of one example at a time."""
    workload = DP_WORKLOADS[name]
    x, y = (part[:3] for part in dp._batch(workload))
    model = dp._model(workload)
    plain = copy.deepcopy(model)
    bookkeeping = Bookkeeping(model)
    F.cross_entropy(model(x), y, reduction="sum").backward()
    factors = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
    found = bookkeeping.collect(3).weighted_sums(factors)
    losses = F.cross_entropy(plain(x), y, reduction="none")
    expected = torch.autograd.grad((losses * factors.float()).sum(), list(plain.parameters()))
    for total, gradient in zip(found, expected, strict=True):
        assert (total - gradient).norm() <= 1e-5 * gradient.norm()


def test_a_figure_is_the_median_of_interleaved_pairs(monkeypatch):
    """A plain step and a private one take turns; the first pair, of two examples, warms up and does not count."""
    ticks, order = iter(range(1000)), []
    monkeypatch.setattr(dp, "process_time", lambda: float(next(ticks)))
    monkeypatch.setattr(dp, "_plain", lambda model: lambda x, y: order.append(("plain", len(x))))
    found = dp.ratio(SMALL, lambda model, n: lambda x, y: order.append(("own", len(x))), 3)
    assert found == (1.0, 1.0)  # by this clock every measured stretch takes one second
    assert order == [("plain", 2), ("own", 2), *[("plain", 4), ("own", 4)] * 3]


def test_noise_is_timed_against_torchs():
    """All figures are ratios above 0."""
    found = dp.noise_figures(1.0, 1)
    assert set(found) == {
        "secure_noise_over_torch_randn",
        "noised_sum_over_torch_randn",
        "noise_share_of_step",
    }
    assert all(value > 0 for value in found.values())


def test_all_figures_are_in_the_document(monkeypatch):
    """Keys are those that are documented, and a figure that compares two is their ratio."""
    monkeypatch.setattr(dp, "ratio", lambda workload, mode, pairs: ((3.0 if mode is dp.private_step else 12.0), 1.0))
    monkeypatch.setattr(dp, "extra_memory", lambda name, mode: 100 if mode == "private_step" else 400)
    monkeypatch.setattr(dp, "noise_figures", lambda seconds, repeats: dp_noise)
    dp_noise = {
        "secure_noise_over_torch_randn": 2.0,
        "noised_sum_over_torch_randn": 3.0,
        "noise_share_of_step": 0.2,
    }
    app = typer.Typer(add_completion=False)
    app.command()(command.main)
    document = json.loads(CliRunner().invoke(app, ["dp", "--json", "--quick"]).stdout)
    assert document["benchmark"] == "dp"
    assert set(document["figures"]) == KEYS
    assert document["figures"]["lstm_b32_speedup_over_dplstm"] == 4.0
    assert document["figures"]["resnet18_dp_over_best_opacus"] == 0.25
    assert document["figures"]["cnn_extra_memory_over_opacus_hooks"] == 0.25


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    """A step's extra memory is at least that of its gradients, and does not depend on what was measured before."""
    first, second = (dp.extra_memory("lstm_b32", "private_step") for _ in range(2))
    assert min(first, second) > 4 * 1_412_354 // 1024
    assert max(first, second) < 1.5 * min(first, second)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_quick_benchmark_prints_all_figures():
    """The real one, as its command: every figure above 0."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks", "dp", "--json", "--quick"],
        cwd=Path(SITE).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert set(document) == {"benchmark", "figures", "machine"}
    assert set(document["figures"]) == KEYS
    assert all(figure > 0 for figure in document["figures"].values())
