"""The benchmark of simulation at scale measures what it says, and prints exactly its figures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.config import load_config
from simulations.benchmarks.cohort import loop, population, suite, workers
from simulations.benchmarks.reference import WORKLOADS, Workload
from simulations.benchmarks.workloads import ReferenceSampler, client_name, model_name
from simulations.run import prepare
from tests.helpers.runs import SITE, configuration, prepared, private, run

KEYS = {
    "linear_1000_cpu_over_loop",
    "mlp_100_cpu_over_loop",
    "mlp_100_dp_cpu_over_plain_loop",
    "cnn_cifar_cpu_over_loop",
    "lstm_cpu_over_loop",
    "population_1m_rss_mb",
    "two_workers_wall",
}
FEW = Workload(
    name="linear_1000",
    clients=1000,
    clients_per_round=30,
    examples=20,
    batch_size=20,
    learning_rate=0.1,
    model=WORKLOADS["linear_1000"].model,
    inputs=WORKLOADS["linear_1000"].inputs,
)


@pytest.fixture
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty clients of a linear model, and a clock by which every stretch takes one second."""
    seconds = iter(range(1000))
    monkeypatch.setattr(loop, "WORKLOADS", {"few": FEW})
    monkeypatch.setattr(loop, "process_time", lambda: float(next(seconds)))


@pytest.mark.usefixtures("_few")
class TestRatio:
    @pytest.mark.parametrize(("tolerance", "printed"), [(loop.TOLERANCE, True), (-1.0, False)])
    def test_is_there_only_where_the_weights_agree(
        self, tolerance: float, printed: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Our rounds, stacked or not, and the loop's end with the same weights."""
        monkeypatch.setattr(loop, "TOLERANCE", tolerance)
        assert loop.ratio("few", 2) == (1.0 if printed else None)


def test_with_privacy_ledgers_are_what_counts(tmp_path: Path) -> None:
    """Noise makes other weights: every client's ledger has to hold every round, and its epsilon to be finite."""
    run(tmp_path / "run", private(rounds=2))
    assert loop._accounted(prepared(tmp_path / "run", private(rounds=2)))
    assert not loop._accounted(prepared(tmp_path / "run", private(rounds=3)))
    assert not loop._accounted(prepared(tmp_path / "other", private(rounds=2)))
    assert not loop._accounted(prepared(tmp_path / "other", configuration()))


SLOW = pytest.mark.slow


@pytest.mark.parametrize("name", ["linear_1000", "mlp_100", pytest.param("cnn_cifar", marks=SLOW), "lstm"])
def test_workloads_are_the_references_own(name: str, tmp_path: Path) -> None:
    """Model, weights at the start and examples are those that the loop trains on."""
    workload = WORKLOADS[name]
    few = loop.configuration(workload, 1)
    made = prepare(few, folder=tmp_path, site_file=loop.SITE)
    expected = workload.initial_model().state_dict()
    assert made.model.state_dict().keys() == expected.keys()
    assert all(bool((tensor == expected[key]).all()) for key, tensor in made.model.state_dict().items())
    client = made.federation.clients[7]
    inputs, targets = workload.inputs(7)
    assert client.name == client_name(7)
    assert bool((client.train.inputs == inputs).all())
    assert bool((client.train.targets == targets).all())
    assert few.model.name == model_name(workload)
    assert ReferenceSampler(workload).sample(3, []) == [client_name(c) for c in workload.cohort(3)]


def test_private_workload_has_the_same_steps_and_batches() -> None:
    """Three steps of twenty examples on average, as the plain loop's epoch has."""
    config = loop.configuration(WORKLOADS["mlp_100"], 10, private=True)
    assert config.training.local_steps == 3
    assert config.privacy.expected_batch_size == 20
    assert config.privacy.sampling_rate * 60 == pytest.approx(20)


def test_population_is_made_when_it_is_asked_for(tmp_path: Path) -> None:
    """A million clients take no time to describe, and each is the reference's."""
    made = prepare(population.configuration(1_000_000), folder=tmp_path, site_file=loop.SITE)
    assert len(made.federation.clients) == 1_000_000
    inputs, _ = WORKLOADS["linear_1000"].inputs(999_999)
    assert bool((made.federation.clients[999_999].train.inputs == inputs).all())


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own() -> None:
    """A run over two hundred thousand clients, a hundred a round, adds less than their names alone would take."""
    assert 0 < suite.population_megabytes(200_000) < 200


@pytest.mark.parametrize(("digests", "figure"), [(["a", "a"], 0.5), (["a", "b"], None)])
def test_two_workers_have_to_end_with_the_bytes_of_one(
    digests: list[str], figure: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounds in turn; without the same bytes there is no figure."""
    rounds = suite._WARM_UP + 2
    answers = {1: iter([*["2.0"] * rounds, digests[0]]), 2: iter([*["1.0"] * rounds, digests[1]])}
    told: list[int] = []

    class Fake:
        def __init__(self, name: str, number: int, count: int, *, package: str) -> None:
            assert (name, count, package) == ("workers", rounds, "cohort")
            self.number = number

        def __enter__(self) -> int:
            return self.number

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(suite, "module", Fake)
    monkeypatch.setattr(suite, "tell", told.append)
    monkeypatch.setattr(suite, "line", lambda number: next(answers[number]))
    assert suite.two_workers(2) == figure
    assert told == [1, 2] * rounds


def test_worker_process_trains_a_round_for_each_line() -> None:
    """It prints as many figures as it was given lines, then a digest."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks.cohort.workers", "1", "2"],
        cwd=Path(SITE).parents[3],
        input="\n\n",
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, digest = done.stdout.split()
    assert float(first) > 0
    assert float(second) > 0
    assert len(digest) == 64
    assert workers.WORKLOAD == "cnn"


def test_configurations_are_ones_that_anybody_could_run(tmp_path: Path) -> None:
    """Nothing in them is hidden: written to a file and read again they are the same."""
    from common.config.render import to_toml

    path = tmp_path / "run.toml"
    for config in (loop.configuration(WORKLOADS["mlp_100"], 9, private=True), population.configuration(1_000_000)):
        path.write_text(to_toml(config))
        assert load_config(str(path)).config == config


@pytest.mark.slow
def test_quick_benchmark_prints_all_figures() -> None:
    """The real one, as its command: all seven figures."""
    done = subprocess.run(
        [sys.executable, "-m", "simulations.benchmarks", "cohort", "--json", "--quick"],
        cwd=Path(SITE).parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    document = json.loads(done.stdout)
    assert set(document) == {"benchmark", "figures", "machine"}
    assert set(document["figures"]) == KEYS
    assert all(figure > 0 for figure in document["figures"].values())
