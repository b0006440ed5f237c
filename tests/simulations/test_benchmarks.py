"""The engine's benchmark measures what it says, and prints one document."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import simulations.benchmarks.__main__ as command
from simulations.benchmarks import engine
from simulations.benchmarks.reference import WORKLOADS
from simulations.benchmarks.workloads import ReferenceSampler, client_name
from tests.helpers.runs import SITE

KEYS = {"cnn_cpu_over_loop", "cnn_two_workers_wall_over_loop", "linear_1000_cpu_over_loop"}


def test_sampler_asks_whom_the_loop_asks() -> None:
    """Cohorts are the reference's own, in the order of names; nothing is kept over a stop."""
    workload = WORKLOADS["cnn"]
    sampler = ReferenceSampler(workload)
    for server_round in (1, 2, 9):
        expected = [client_name(client) for client in workload.cohort(server_round)]
        assert sampler.sample(server_round, []) == expected == sorted(expected)
    assert sampler.state() == {}


@pytest.mark.parametrize(("tolerance", "printed"), [(engine.TOLERANCE, True), (-1.0, False)])
def test_figure_is_printed_only_where_the_weights_agree(
    tolerance: float, printed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our rounds and the loop's end with the same weights; if they did not, there would be no figure."""
    monkeypatch.setattr(engine, "TOLERANCE", tolerance)
    monkeypatch.setattr(engine, "WARM_UP", 0)
    seconds = iter(range(1000))
    figure = engine.ratio(WORKLOADS["cnn"], 1, lambda: float(next(seconds)), 1)
    assert (figure is not None) is printed
    if figure is not None:
        assert figure == 1.0  # by this clock every measured stretch takes one second


def test_document_has_the_form_of_every_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """`{"benchmark", "figures", "machine"}`, and nothing else on stdout; without --json a table."""
    monkeypatch.setitem(command.BENCHMARKS, "engine", lambda *, quick: {"a": 1.5, "quick": float(quick)})
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(command.main)
    document = json.loads(CliRunner().invoke(app, ["engine", "--json", "--quick"]).stdout)
    assert document["benchmark"] == "engine"
    assert document["figures"] == {"a": 1.5, "quick": 1.0}
    assert set(document["machine"]) == {"processor", "cores", "system", "python", "torch"}
    assert "1.500" in CliRunner().invoke(app, ["engine"]).stdout
    refused = CliRunner().invoke(app, ["motor"])
    assert refused.exit_code == 2
    assert "engine" in refused.output


@pytest.mark.slow
def test_quick_benchmark_prints_all_figures() -> None:
    """The real one, as its command: all three figures, each a ratio above 0."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks", "engine", "--json", "--quick"],
        cwd=Path(SITE).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert set(document) == {"benchmark", "figures", "machine"}
    assert set(document["figures"]) == KEYS
    assert all(figure > 0 for figure in document["figures"].values())
