"""`report.html` of a study: one page without scripts, out of the parts of a run's report."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from common.disk import atomic_file
from server.report.svg import Format
from server.report.template import filled
from server.report.words import MISSING, ceiling, count, duration, joined, number, percent, points
from simulations.study.figures import colour, study_figures
from simulations.study.folder import Study
from simulations.study.summary import ArmSummary, Difference, Spread, Summary

REPORT = "report.html"

_MANY_ARMS = 4
"""From so many comparisons on, chance alone finds a clear difference now and then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """A column of the table of arms: for each of them a figure, and what stands below it."""

    title: str
    cells: tuple[tuple[str, str], ...]


def write_study_report(path: Path, study: Study, summary: Summary) -> Path:
    """Write the page into a study's folder, and return its path.

    **Guarantee**: as of a run's page: equal folders give equal pages, no script, nothing from a network, all escaped.
    """
    page = render(path, study, summary)
    with atomic_file(path / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path / REPORT


def render(path: Path, study: Study, summary: Summary) -> str:
    """The page of a study."""
    config = study.arms[0].runs[0].config
    values: dict[str, Any] = {
        "name": study.name,
        "private": any(run.config.private for arm in study.arms for run in arm.runs),
        "lead": _lead(study),
        "verdict": verdict(study, summary),
        "figures": study_figures(summary),
        "columns": columns(summary),
        "arms": [(colour(i), arm.label) for i, arm in enumerate(summary.arms)],
        "repeats": study.repeats,
        "command": study.command,
        "resume": f"coterie study --resume {shlex.quote(str(path))}",
        "varied": [(varied.key, ", ".join(varied.values)) for varied in study.varied],
        "overrides": study.overrides,
        "runs": [
            (arm.label, run, f"coterie simulate --rerun {shlex.quote(str(path / run.folder))}")
            for arm in summary.arms
            for run in arm.runs
        ],
        "virtual": config.simulation.virtual,
    }
    return filled("study.html", values, package="simulations.study")


def _lead(study: Study) -> str:
    config = study.arms[0].runs[0].config
    varied = joined([f"{v.key} ({', '.join(v.values)})" for v in study.varied])
    each = "once" if study.repeats == 1 else f"{number(study.repeats)} times, each time with other seeds"
    return (
        f"{count(len(study.arms), 'arm')} that differ in {varied}: each trains {config.model.name} on "
        f"{config.data.name} {each}."
    )


def verdict(study: Study, summary: Summary) -> list[str]:
    """What the study says of its question, in sentences."""
    if all(arm.accuracy is None for arm in summary.arms):
        return ["No accuracy was measured."]
    first = summary.arms[0].label
    sentences = []
    if summary.effects:
        sentences += [
            f"{effect.label} instead of {effect.first}, over all values of the other settings: "
            f"{_changes(effect.accuracy)}."
            for effect in summary.effects
        ]
    else:
        sentences += [
            f"{arm.label} instead of {first}: {_changes(arm.against_first)}."
            for arm in summary.arms[1:]
            if arm.against_first is not None
        ]
    sentences += _quickest(summary)
    if study.repeats == 1:
        sentences.append("With one run of each arm, no difference can be told from chance: add --repeats 3 or more.")
    else:
        sentences.append(
            f"± is the 95 % interval over {count(study.repeats, 'repeat')} (Student's t, differences between runs with "
            "the same seeds); a difference is called clear where that leaves out zero."
        )
    if len(summary.arms) > _MANY_ARMS:
        sentences.append(
            f"Of {len(summary.arms)} arms some look better by chance: repeat the best with fresh seeds before you "
            "believe it."
        )
    return sentences


def _changes(difference: Difference) -> str:
    """What a difference says of accuracy."""
    said = f"{points(difference.mean)}{_error(difference)} points of accuracy"
    words = {"higher": "clearly higher", "lower": "clearly lower"}.get(difference.verdict, difference.verdict)
    return said if difference.error is None else f"{said}, {words}"


def _error(difference: Difference) -> str:
    return "" if difference.error is None else f" ± {100 * difference.error:.1f}"


def _quickest(summary: Summary) -> list[str]:
    """Which arm came first to the accuracy in the middle of those that are timed."""
    if not summary.targets:
        return []
    middle = len(summary.targets) // 2
    goal = percent(summary.targets[middle])
    virtual = all(arm.virtual_seconds is not None for arm in summary.arms)
    times = []
    for arm in summary.arms:
        target = arm.targets[middle]
        values = target.seconds if virtual else tuple(map(float, target.rounds))
        if values and len(values) == target.runs:
            times.append((fmean(values), arm.label))
    if not times:
        return [f"No arm reached {goal} in every run."]
    ranked = sorted(times)
    never = len(summary.arms) - len(ranked)
    unit = duration if virtual else lambda n: f"{number(n)} rounds"
    (quickest, first), (slowest, last) = ranked[0], ranked[-1]
    sentence = f"{goal} was reached first with {first}, after {unit(quickest)} on average"
    if len(ranked) > 1 and unit(slowest) == unit(quickest):
        sentence = f"{goal} was reached after {unit(quickest)} on average, with every arm alike"
    elif len(ranked) > 1:
        sentence += f", last with {last}, after {unit(slowest)}"
    sentence += f"; {count(never, 'arm')} did not reach it in every run" if never else ""
    return [f"{sentence}."]


def columns(summary: Summary) -> list[Column]:
    """The table of arms: its columns, as far as any arm has figures for them."""
    arms = summary.arms
    table = [
        Column(title="Accuracy", cells=tuple(_cell(arm.accuracy, percent) for arm in arms)),
        Column(title="Against the first arm", cells=tuple(_against(arm) for arm in arms)),
    ]
    for k, target in enumerate(summary.targets):
        cells = tuple((target_text(arm, k), "") for arm in arms)
        table.append(Column(title=f"To {percent(target)}", cells=cells))
    for title, pick, text in (
        ("Virtual time", [arm.virtual_seconds for arm in arms], duration),
        ("Wasted work", [arm.wasted for arm in arms], percent),
        ("Worst tenth of clients", [arm.worst_tenth for arm in arms], percent),
        ("Median client", [arm.median for arm in arms], percent),
        ("Gini of updates", [arm.gini for arm in arms], number),
        ("Mean staleness", [arm.staleness for arm in arms], number),
    ):
        table.append(Column(title=title, cells=tuple(_cell(spread, text) for spread in pick)))
    table.append(Column(title="Highest epsilon", cells=tuple((ceiling(arm.epsilon), "") for arm in arms)))
    return [column for column in table if any(cell != MISSING for cell, _ in column.cells)]


def _cell(spread: Spread | None, text: Format) -> tuple[str, str]:
    """Mean, and below it the range over repeats where there is one."""
    if spread is None:
        return MISSING, ""
    low, high = text(spread.low), text(spread.high)
    return text(spread.mean), "" if low == high else _range(low, high)


def _range(low: str, high: str) -> str:
    """`84.1 to 85.0 %`: a unit that both share stands once."""
    parts = low.rsplit("\u202f", 1)
    return f"{parts[0]} to {high}" if len(parts) == 2 and high.endswith(f"\u202f{parts[1]}") else f"{low} to {high}"


def _against(arm: ArmSummary) -> tuple[str, str]:
    if arm.against_first is None:
        return MISSING, ""
    return points(arm.against_first.mean), _error(arm.against_first).strip()


def target_text(arm: ArmSummary, index: int) -> str:
    """When an arm reached a target: on average, of how many repeats."""
    target = arm.targets[index]
    if not target.rounds:
        return "not reached"
    rounds: Sequence[float] = target.rounds
    said = duration(fmean(target.seconds)) if target.seconds else f"round {number(fmean(rounds))}"
    return said if len(rounds) == target.runs else f"{said} ({len(rounds)} of {target.runs})"
