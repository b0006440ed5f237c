"""What a run's rounds and clients amount to in figures: when an accuracy was reached, what work was wasted, how stale
updates were, how evenly clients took part and were served. The page, the table and a study all take theirs from here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median, pstdev
from typing import Any

from server.report.record import Record, Result, RoundRow

SHARES = (0.9, 0.95, 0.99)
"""Shares of an accuracy whose reaching is timed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reached:
    """When an accuracy was reached: the first evaluation that found it; no later one need have.

    Attributes:
        accuracy: What was to be reached.
        server_round: None if it never was.
        seconds: Virtual seconds since the start; None without virtual time.
    """

    accuracy: float
    server_round: int | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """A run in virtual time.

    Attributes:
        seconds: Virtual seconds from start to end.
        work_seconds: How long devices were at work, all together.
        wasted_seconds: The part of it that came to nothing.
    """

    seconds: float
    work_seconds: float
    wasted_seconds: float

    @property
    def wasted_share(self) -> float:
        """Share of the work that came to nothing, 0 to 1; 0 where there was no work."""
        return self.wasted_seconds / self.work_seconds if self.work_seconds > 0 else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Fairness:
    """How evenly a model serves clients, each measured on its own held-out examples.

    Attributes:
        clients: How many were measured.
        worst_tenth: Mean accuracy of the tenth that it serves worst, at least one client.
        median: Half of the clients are served better.
        best_tenth: Mean accuracy of the tenth that it serves best, at least one client.
        deviation: Standard deviation over clients.
    """

    clients: int
    worst_tenth: float
    median: float
    best_tenth: float
    deviation: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Participation:
    """How evenly updates came from the clients of a population.

    Attributes:
        clients: The population.
        took_part: Clients of which at least one update was used.
        fewest: Updates of the client with fewest.
        median: Updates of the client in the middle.
        most: Updates of the client with most.
        gini: Gini coefficient of updates over clients: 0 if all gave equally many, towards 1 if few gave all.
        counts: Number of clients by number of updates, fewest first.
    """

    clients: int
    took_part: int
    fewest: int
    median: float
    most: int
    gini: float
    counts: Mapping[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Staleness:
    """How many of the server's steps updates were behind when they were used.

    Attributes:
        mean: Over all updates.
        most: The largest.
        counts: Number of updates by staleness, freshest first.
    """

    mean: float
    most: int
    counts: Mapping[int, int]


def reached(rounds: Sequence[RoundRow], accuracy: float) -> Reached:
    """When an evaluation first found at least this accuracy."""
    row = next((row for row in rounds if row.accuracy is not None and row.accuracy >= accuracy - 1e-12), None)
    if row is None:
        return Reached(accuracy=accuracy, server_round=None, seconds=None)
    at = row.clock.at_seconds if row.clock else None
    return Reached(accuracy=accuracy, server_round=row.server_round, seconds=at)


def final_accuracy(rounds: Sequence[RoundRow], result: Result | None) -> float | None:
    """The result's accuracy, or while there is none the last that was measured."""
    if result is not None and result.accuracy is not None:
        return result.accuracy
    return next((row.accuracy for row in reversed(rounds) if row.accuracy is not None), None)


def work(rounds: Sequence[RoundRow]) -> Work | None:
    """Virtual time and work; None for a run without virtual time."""
    clocks = [row.clock for row in rounds if row.clock is not None]
    if not clocks:
        return None
    return Work(
        seconds=clocks[-1].at_seconds,
        work_seconds=sum(clock.work_seconds for clock in clocks),
        wasted_seconds=sum(clock.wasted_seconds for clock in clocks),
    )


def fairness(accuracies: Collection[float]) -> Fairness | None:
    """How evenly clients are served; None where none was measured."""
    if not accuracies:
        return None
    ranked = sorted(accuracies)
    tenth = max(1, len(ranked) // 10)
    return Fairness(
        clients=len(ranked),
        worst_tenth=fmean(ranked[:tenth]),
        median=median(ranked),
        best_tenth=fmean(ranked[-tenth:]),
        deviation=pstdev(ranked),
    )


def accuracies(result: Result | None) -> list[float]:
    """The final model's accuracy at every client that was measured."""
    return [c.accuracy for c in result.clients.values() if c.accuracy is not None] if result else []


def participation(rounds: Sequence[RoundRow], *, clients: int) -> Participation | None:
    """How evenly the clients of a population gave updates; None where nobody did.

    Args:
        rounds: The run's rounds.
        clients: The population; clients of which no update came count with none.
    """
    given = Counter(name for row in rounds for name in row.survivors)
    if not given:
        return None
    ranked = sorted(given.values())
    silent = max(0, clients - len(ranked))
    total, population = sum(ranked), silent + len(ranked)
    weighted = sum((silent + place) * n for place, n in enumerate(ranked, 1))  # those with none add nothing
    counts = Counter(ranked)
    return Participation(
        clients=population,
        took_part=len(ranked),
        fewest=0 if silent else ranked[0],
        median=_middle(ranked, silent),
        most=ranked[-1],
        gini=max(0.0, 2 * weighted / (population * total) - (population + 1) / population),
        counts=dict(sorted(({0: silent} if silent else {}).items())) | dict(sorted(counts.items())),
    )


def _middle(ranked: Sequence[int], silent: int) -> float:
    """Median of the ranked counts with so many zeros before them."""
    population = silent + len(ranked)
    pair = ((population - 1) // 2, population // 2)
    return sum(ranked[place - silent] if place >= silent else 0 for place in pair) / 2


def staleness(rounds: Sequence[RoundRow]) -> Staleness | None:
    """How stale updates were; None for a run in synchronous rounds, or without updates."""
    counts = Counter(steps for row in rounds for steps in (row.staleness or {}).values())
    if not counts:
        return None
    mean = sum(steps * n for steps, n in counts.items()) / counts.total()
    return Staleness(mean=mean, most=max(counts), counts=dict(sorted(counts.items())))


def population(record: Record) -> int:
    """How many clients a run has, as far as its folder says."""
    result = record.result
    if result is not None and result.population is not None and result.population.clients:
        return result.population.clients
    if result is not None and result.clients:
        return len(result.clients)
    return record.config.data.clients or len({name for row in record.rounds for name in row.cohort})


def describe_course(
    rounds: Sequence[Mapping[str, Any]], *, accuracy: float | None, clients: int, measured: Collection[float]
) -> dict[str, Any]:
    """The same as JSON values, for `result.json`; a part that a run has not is null.

    Args:
        rounds: Rows as `rounds.jsonl` holds them.
        accuracy: The run's final accuracy, or None.
        clients: The population.
        measured: Accuracy at each client that was measured.
    """
    rows = [RoundRow.model_validate(row) for row in rounds]
    taken, steps, clock, served = (
        participation(rows, clients=clients), staleness(rows), work(rows), fairness(measured),
    )  # fmt: skip
    return {
        "reached": [{"share": s, **asdict(reached(rows, s * accuracy))} for s in SHARES] if accuracy else [],
        "virtual": clock and {**asdict(clock), "wasted_share": clock.wasted_share},
        "staleness": steps and {"mean": steps.mean, "most": steps.most},
        "participation": taken and {k: v for k, v in asdict(taken).items() if k != "counts"},
        "fairness": served and asdict(served),
    }
