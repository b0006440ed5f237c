"""A study in figures: for each arm means and ranges over its repeats, and what differs from the first arm."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Literal

from server.report.measures import (
    SHARES,
    Reached,
    accuracies,
    fairness,
    final_accuracy,
    participation,
    population,
    reached,
    staleness,
    work,
)
from server.report.record import Record
from simulations.study.arms import PlannedRun, setting_label
from simulations.study.folder import Study

_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95 %, by degrees of freedom from 1. Source: NIST/SEMATECH handbook, 1.3.6.7.2."""

Verdict = Literal["higher", "lower", "no clear difference", "one repeat"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A figure over the repeats of an arm: its values, in their order, and what they come to."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean of the values."""
        return fmean(self.values)

    @property
    def low(self) -> float:
        """The smallest."""
        return min(self.values)

    @property
    def high(self) -> float:
        """The largest."""
        return max(self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """What one choice changes against another, taken repeat by repeat (equal seeds), as a share.

    Attributes:
        mean: Mean difference.
        error: Half the width of its 95 % interval (Student's t over repeats); None with one repeat.
    """

    mean: float
    error: float | None

    @property
    def verdict(self) -> Verdict:
        """Clear where the interval leaves out zero."""
        if self.error is None:
            return "one repeat"
        if abs(self.mean) <= self.error:
            return "no clear difference"
        return "higher" if self.mean > 0 else "lower"


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetTime:
    """When the repeats of an arm reached an accuracy.

    Attributes:
        accuracy: What was to be reached.
        runs: How many repeats there are.
        rounds: First rounds, of those that reached it.
        seconds: Virtual seconds, of the same; empty without virtual time.
    """

    accuracy: float
    runs: int
    rounds: tuple[int, ...]
    seconds: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFigures:
    """One run of an arm; None where something was not measured.

    Attributes:
        folder: Below the study's folder.
        repeat: From 1.
        seeds: For people.
        accuracy: Final accuracy on held-out examples.
        virtual_seconds: Virtual time from start to end.
        wasted: Share of the devices' work that came to nothing.
        worst_tenth: Accuracy at the tenth of the clients that the model serves worst.
        median: Accuracy at the median client.
        best_tenth: Accuracy at the best-served tenth.
        gini: Gini coefficient of updates over clients.
        staleness: Mean staleness.
        epsilon: The highest epsilon that any client spent.
        wall_seconds: Real time.
    """

    folder: str
    repeat: int
    seeds: str
    accuracy: float | None
    virtual_seconds: float | None
    wasted: float | None
    worst_tenth: float | None
    median: float | None
    best_tenth: float | None
    gini: float | None
    staleness: float | None
    epsilon: float | None
    wall_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmSummary:
    """An arm over its repeats; a spread is None where a repeat has no such figure. See `RunFigures` for what they are.

    Attributes:
        label: For people.
        settings: Value by key.
        records: What its runs have written, by repeat.
        runs: One a repeat.
        against_first: Final accuracy minus the first arm's; None for the first arm, or where it was not measured.
        epsilon: The highest of any client in any repeat; None without privacy.
        targets: When accuracies were reached, one a target.
    """

    label: str
    settings: Mapping[str, str]
    records: tuple[Record, ...]
    runs: tuple[RunFigures, ...]
    accuracy: Spread | None
    against_first: Difference | None
    virtual_seconds: Spread | None
    wasted: Spread | None
    worst_tenth: Spread | None
    median: Spread | None
    best_tenth: Spread | None
    gini: Spread | None
    staleness: Spread | None
    epsilon: float | None
    targets: tuple[TargetTime, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """What one value of a setting changes against the first, over all values of the other settings."""

    label: str
    first: str
    accuracy: Difference


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """A study that is complete.

    Attributes:
        arms: In the order planned.
        effects: Of every setting, where several are varied.
        targets: Accuracies whose reaching is timed.
        of_best: What shares of the best arm's accuracy these are; empty where they were given.
    """

    arms: tuple[ArmSummary, ...]
    effects: tuple[Effect, ...]
    targets: tuple[float, ...]
    of_best: tuple[float, ...]


def summarise(study: Study, records: Mapping[str, Record]) -> Summary:
    """What a study comes to.

    Args:
        study: Its plan.
        records: What its runs have written, by their folder as planned.
    """
    of_arms = [[records[run.folder] for run in arm.runs] for arm in study.arms]
    measured = [
        [_figures(run, record) for run, record in zip(arm.runs, rows, strict=True)]
        for arm, rows in zip(study.arms, of_arms, strict=True)
    ]
    finals = [_spread([run.accuracy for run in runs]) for runs in measured]
    best = max((spread.mean for spread in finals if spread is not None), default=None)
    targets = study.targets or (() if best is None else tuple(share * best for share in SHARES))
    arms = tuple(
        ArmSummary(
            label=arm.label,
            settings=arm.settings,
            records=tuple(rows),
            runs=tuple(runs),
            accuracy=final,
            against_first=difference(final, finals[0]) if number and final and finals[0] else None,
            virtual_seconds=_spread([run.virtual_seconds for run in runs]),
            wasted=_spread([run.wasted for run in runs]),
            worst_tenth=_spread([run.worst_tenth for run in runs]),
            median=_spread([run.median for run in runs]),
            best_tenth=_spread([run.best_tenth for run in runs]),
            gini=_spread([run.gini for run in runs]),
            staleness=_spread([run.staleness for run in runs]),
            epsilon=max((run.epsilon for run in runs if run.epsilon is not None), default=None),
            targets=tuple(_target(rows, target) for target in targets),
        )
        for number, (arm, rows, runs, final) in enumerate(zip(study.arms, of_arms, measured, finals, strict=True))
    )
    return Summary(arms=arms, effects=_effects(study, finals), targets=targets, of_best=() if study.targets else SHARES)


def _figures(run: PlannedRun, record: Record) -> RunFigures:
    result, rounds = record.result, record.rounds
    spent, steps = work(rounds), staleness(rounds)
    served, taken = fairness(accuracies(result)), participation(rounds, clients=population(record))
    return RunFigures(
        folder=run.folder,
        repeat=run.repeat,
        seeds=", ".join(f"{name} {seed}" for name, seed in record.config.seeds.model_dump().items()),
        accuracy=final_accuracy(rounds, result),
        virtual_seconds=spent.seconds if spent else None,
        wasted=spent.wasted_share if spent else None,
        worst_tenth=served.worst_tenth if served else None,
        median=served.median if served else None,
        best_tenth=served.best_tenth if served else None,
        gini=taken.gini if taken else None,
        staleness=steps.mean if steps else None,
        epsilon=max(result.privacy.epsilon.values(), default=None) if result and result.privacy else None,
        wall_seconds=result.seconds.get("total") if result else None,
    )


def difference(one: Spread, other: Spread) -> Difference:
    """The mean difference over repeats that share their seeds, and its 95 % interval."""
    gaps = [a - b for a, b in zip(one.values, other.values, strict=True)]
    if len(gaps) < 2:
        return Difference(mean=gaps[0], error=None)
    freedom = len(gaps) - 1
    quantile = _T[freedom - 1] if freedom <= len(_T) else _T[-1]  # a little wide from 31 on, never too narrow
    return Difference(mean=fmean(gaps), error=quantile * stdev(gaps) / math.sqrt(len(gaps)))


def _effects(study: Study, finals: Sequence[Spread | None]) -> tuple[Effect, ...]:
    """For each varied setting, what its other values change against its first; empty where only one is varied."""
    if len(study.varied) < 2 or any(final is None for final in finals):
        return ()
    found = []
    for varied in study.varied:
        mean = {value: _averaged(study, finals, varied.key, value) for value in varied.values}
        first = varied.values[0]
        found += [
            Effect(
                label=setting_label(varied.key, value),
                first=setting_label(varied.key, first),
                accuracy=difference(mean[value], mean[first]),
            )
            for value in varied.values[1:]
        ]
    return tuple(found)


def _averaged(study: Study, finals: Sequence[Spread | None], key: str, value: str) -> Spread:
    """Final accuracy by repeat, averaged over all arms with this value."""
    rows = [
        final.values
        for arm, final in zip(study.arms, finals, strict=True)
        if arm.settings[key] == value and final is not None
    ]
    return Spread(values=tuple(map(fmean, zip(*rows, strict=True))))


def _spread(values: Sequence[float | None]) -> Spread | None:
    known = tuple(value for value in values if value is not None)
    return Spread(values=known) if known and len(known) == len(values) else None


def _target(records: Sequence[Record], accuracy: float) -> TargetTime:
    hits: list[Reached] = [reached(record.rounds, accuracy) for record in records]
    return TargetTime(
        accuracy=accuracy,
        runs=len(hits),
        rounds=tuple(hit.server_round for hit in hits if hit.server_round is not None),
        seconds=tuple(hit.seconds for hit in hits if hit.seconds is not None),
    )
