"""Figures of simulation at scale: stacked cohorts against the plain loop, memory of a large population, two workers."""

from __future__ import annotations

from statistics import median

from simulations.benchmarks.cohort import loop
from simulations.benchmarks.plane.processes import line, module, tell

POPULATION = 1_000_000
_WARM_UP = 3


def figures(*, quick: bool) -> dict[str, float]:
    """All figures; one whose weights, ledgers or bytes are not as they have to be is left out."""
    runs = 1 if quick else 4
    measured = {
        "linear_1000_cpu_over_loop": loop.ratio("linear_1000", 8 if quick else 30),
        "mlp_100_cpu_over_loop": loop.ratio("mlp_100", 5 if quick else 20),
        "mlp_100_dp_cpu_over_plain_loop": loop.ratio("mlp_100", 4 if quick else 20, private=True),
        "cnn_cifar_cpu_over_loop": loop.ratio("cnn_cifar", 3, runs=runs),
        "lstm_cpu_over_loop": loop.ratio("lstm", 4, runs=runs),
        "population_1m_rss_mb": population_megabytes(POPULATION),
        "two_workers_wall": two_workers(5 if quick else 20),
    }
    return {key: value for key, value in measured.items() if value is not None}


def population_megabytes(clients: int) -> float:
    """Peak memory of a run over so many clients, over its start, in a process of its own."""
    with module("population", clients, package="cohort") as process:
        return float(line(process))


def two_workers(pairs: int) -> float | None:
    """Median over pairs of a round's wall time with two workers over that with one; None if the weights differ."""
    rounds = _WARM_UP + pairs
    with (
        module("workers", 1, rounds, package="cohort") as alone,
        module("workers", 2, rounds, package="cohort") as together,
    ):
        ratios = []
        for _ in range(rounds):
            seconds = []
            for process in (alone, together):
                tell(process)
                seconds.append(float(line(process)))
            ratios.append(seconds[1] / seconds[0])
        same = line(alone) == line(together)
    return median(ratios[_WARM_UP:]) if same else None
