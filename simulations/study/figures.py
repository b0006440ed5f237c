"""The charts of a study: a colour for each arm, the mean over repeats, and the range from lowest to highest."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from statistics import fmean

from server.report.record import Record
from server.report.svg import SERIES, Figure, Format, Plot, Point, cut, padded, series
from server.report.virtual import timescale
from server.report.words import count, duration, number, percent
from simulations.study.summary import ArmSummary, Spread, Summary, TargetTime

GRID = 120
"""Moments at which courses over virtual time are compared."""

ROW = 24
LABEL = 40
"""Most characters of an arm's name beside an axis."""

BANDS = 4
"""Of more arms bands would hide each other."""

LINE = "The line is the mean over repeats."
RANGE = "The line is the mean over repeats, the band spans all of them."


def study_figures(summary: Summary) -> list[Figure]:
    """All charts that a study has the figures for."""
    makers = (final_figure, rounds_figure, clock_figure, targets_figure, wasted_figure, clients_figure)
    return [figure for make in makers if (figure := make(summary)) is not None]


def colour(index: int) -> str:
    """CSS class of an arm."""
    return series(index)


def drawn(summary: Summary) -> list[tuple[int, ArmSummary]]:
    """The arms that have a line: the best by final accuracy, so many as colours can tell apart, in their order."""
    arms = list(enumerate(summary.arms))
    best = sorted(arms, key=lambda item: -(item[1].accuracy.mean if item[1].accuracy else -math.inf))
    return sorted(best[:SERIES], key=lambda item: item[0])


def rounds_figure(summary: Summary) -> Figure | None:
    """Held-out accuracy by round."""
    courses = []
    for index, arm in drawn(summary):
        tables = [{row.server_round: row.accuracy for row in r.rounds if row.accuracy is not None} for r in arm.records]
        shared = sorted(set.intersection(*map(set, tables))) if tables else []
        courses.append((index, arm, [(float(x), tuple(table[x] for table in tables)) for x in shared]))
    return _courses(
        "Accuracy by round", courses, len(summary.arms), x_label="round", whole=True,
        x_text=lambda x: f"round {number(x)}",
    )  # fmt: skip


def clock_figure(summary: Summary) -> Figure | None:
    """Held-out accuracy by virtual time: at each moment that of the newest evaluated model."""
    ends = [arm.virtual_seconds.low for arm in summary.arms if arm.virtual_seconds is not None]
    if not ends or max(ends) <= 0:
        return None
    unit, name = timescale(max(ends))
    courses = []
    for index, arm in drawn(summary):
        tables = [found for record in arm.records if (found := _measured(record)) is not None]
        if len(tables) < len(arm.records):
            continue
        begin = max(times[0] for times, _ in tables)
        end = min(times[-1] for times, _ in tables)  # beyond it a repeat has ended
        moments = [begin + (end - begin) * i / (GRID - 1) for i in range(GRID)] if end > begin else [begin]
        points = [
            (at / unit, tuple(values[bisect_right(times, at + 1e-9) - 1] for times, values in tables)) for at in moments
        ]
        courses.append((index, arm, points))
    label = f"virtual {name}, as long as every repeat lasted"
    return _courses(
        "Accuracy by virtual time", courses, len(summary.arms), x_label=label, whole=False, from_zero=True,
        x_text=lambda x: duration(x * unit),
    )  # fmt: skip


def _measured(record: Record) -> tuple[list[float], list[float]] | None:
    """Moments of the evaluations and what they found; None where there is none."""
    rows = [(row.clock.at_seconds, row.accuracy) for row in record.rounds if row.clock and row.accuracy is not None]
    return ([at for at, _ in rows], [accuracy for _, accuracy in rows]) if rows else None


Course = tuple[int, ArmSummary, list[tuple[float, tuple[float, ...]]]]
"""An arm's index, the arm, and at each place on the axis the accuracy of every repeat."""


def _courses(
    title: str, courses: Sequence[Course], arms: int, *, x_label: str, whole: bool, x_text: Callable[[float], str],
    from_zero: bool = False,
) -> Figure | None:  # fmt: skip
    known = [(index, arm, points) for index, arm, points in courses if points]
    if not known:
        return None
    xs = [x for _, _, points in known for x, _ in points]
    first, last = 0.0 if from_zero else min(xs), max(xs)
    low, high = padded([y for _, _, points in known for _, ys in points for y in ys], floor=0, ceiling=1)
    plot = Plot(x=(first, last) if last > first else (first - 0.5, first + 0.5), y=(low, high), height=300, right=24)
    plot.axes(x=number, y=lambda v: percent(v, 0 if high - low > 0.05 else 1), x_label=x_label, whole_x=whole)
    banded = len(known) <= BANDS and any(len(ys) > 1 for _, _, points in known for _, ys in points)
    for index, _, points in known:
        if banded:
            plot.band([(x, min(ys)) for x, ys in points], [(x, max(ys)) for x, ys in points], colour(index))
    for index, arm, points in known:
        means: list[Point] = [(x, fmean(ys)) for x, ys in points]
        plot.line(means, colour(index), _tip(arm.label, x_text))
    left_out = f" The {len(known)} best of {arms} arms; the table has all." if arms > len(known) else ""
    legend = tuple((colour(index), arm.label) for index, arm, _ in known)
    summary = f"{RANGE if banded else LINE}{left_out}"
    return Figure(
        title=title, summary=summary, drawing=plot.draw(f"{title}. The table holds the figures."), legend=legend
    )


def _tip(label: str, x_text: Callable[[float], str]) -> Callable[[Point], str]:
    return lambda point: f"{label}, {x_text(point[0])}: {percent(point[1])}"


def final_figure(summary: Summary) -> Figure | None:
    """Final accuracy of every arm."""
    title = "Final accuracy"
    spreads = [(arm.label, arm.accuracy) for arm in summary.arms]
    told = "On held-out examples: the dot is the mean over repeats, the line spans all of them."
    wide = any(arm.virtual_seconds is not None for arm in summary.arms)  # two courses follow, side by side
    return _rows(title, told, spreads, percent, from_zero=False, wide=wide)


def wasted_figure(summary: Summary) -> Figure | None:
    """Share of the devices' work that came to nothing."""
    title = "Wasted work"
    spreads = [(arm.label, arm.wasted) for arm in summary.arms]
    told = (
        "Share of the virtual seconds for which devices were at work without any use of it: they went away, or were "
        "too late. Mean and range over repeats."
    )
    return _rows(title, told, spreads, percent, from_zero=True)


def _rows(
    title: str, told: str, spreads: Sequence[tuple[str, Spread | None]], text: Format, *, from_zero: bool,
    wide: bool = False,
) -> Figure | None:  # fmt: skip
    """A row for each arm: mean and range, on a bar if the axis begins at zero."""
    known = [spread for _, spread in spreads if spread is not None]
    if not known or (from_zero and not any(spread.high > 0 for spread in known)):
        return None
    ends = [end for spread in known for end in (spread.low, spread.high)]
    span = (0.0, max(ends) * 1.06) if from_zero else padded(ends, floor=0, ceiling=1)
    fine = 0 if span[1] - span[0] > 0.05 else 1
    plot = Plot(
        x=span, y=(len(spreads), 0), width=1080 if wide else 520, height=ROW * len(spreads) + 40,
        left=_margin([label for label, _ in spreads]),
        right=86 if wide else 62, top=8, bottom=32,
    )  # fmt: skip
    plot.axes(x=lambda v: percent(v, fine), y=None)
    for i, (label, spread) in enumerate(spreads):
        _name(plot, i + 0.5, label)
        if spread is not None:
            _mark(plot, spread.values, i, colour(i), f"{label}: {_spoken(spread, text)}", bar=from_zero)
        plot.text(plot.right + 8, plot.py(i + 0.5) + 4, text(spread.mean) if spread is not None else "not measured")
    return Figure(title=title, summary=told, drawing=plot.draw(f"{title}. {told}"), wide=wide)


def _mark(plot: Plot, values: Sequence[float], row: float, css: str, tip: str, *, bar: bool) -> None:
    """Mean and range of some values in a row of height 1."""
    if bar:
        plot.bar((0, fmean(values)), (row + 0.16, row + 0.84), css, tip, opacity=0.4)
    plot.whisker((min(values), max(values)), row + 0.5, css)
    plot.dot(fmean(values), row + 0.5, css, tip, 4.5)


def _spoken(spread: Spread, text: Format) -> str:
    if len(spread.values) == 1:
        return text(spread.mean)
    return f"{text(spread.mean)}, from {text(spread.low)} to {text(spread.high)}"


def targets_figure(summary: Summary) -> Figure | None:
    """How long each arm took to accuracies, in virtual time or, where there is none, in rounds."""
    virtual = all(arm.virtual_seconds is not None for arm in summary.arms)
    times = [[_times(target, virtual=virtual) for target in arm.targets] for arm in summary.arms]
    longest = max((t for arm in times for values in arm for t in values), default=0.0)
    if longest <= 0:
        return None
    unit, name = timescale(longest) if virtual else (1.0, "rounds")
    block = len(summary.arms) + 1
    total = block * len(summary.targets) - 1
    labels = [f"{percent(target)}" for target in summary.targets]
    plot = Plot(
        x=(0, longest / unit * 1.06), y=(total, 0), width=1080, height=20 * total + 56,
        left=_margin([arm.label for arm in summary.arms]) + 96, right=120, top=6, bottom=42,
    )  # fmt: skip
    plot.axes(x=number, y=None, x_label=f"virtual {name}" if virtual else name)
    for k, label in enumerate(labels):
        middle = plot.py(k * block + (block - 1) / 2)
        plot.text(8, middle + (0 if summary.of_best else 4), label, css="row strong")
        if summary.of_best:
            plot.text(8, middle + 14, f"{percent(summary.of_best[k], 0)} of the best", css="note")
        for i, arm in enumerate(summary.arms):
            row, values, target = k * block + i, times[i][k], arm.targets[k]
            _name(plot, row + 0.5, arm.label)
            said = _when(values, target, virtual=virtual)
            if values:
                scaled = [value / unit for value in values]
                _mark(plot, scaled, row, colour(i), f"{arm.label} to {label}: {said}", bar=True)
            plot.text(plot.right + 8, plot.py(row + 0.5) + 4, said)
    told = (
        "Time to the first evaluation with at least this accuracy, mean and range over the repeats that reached it. "
        "Shorter is better; where not all did, their number stands at the right."
    )
    title = "Time to accuracy" if virtual else "Rounds to accuracy"
    return Figure(title=title, summary=told, drawing=plot.draw(f"{title}. The table holds the figures."), wide=True)


def _times(target: TargetTime, *, virtual: bool) -> tuple[float, ...]:
    return target.seconds if virtual else tuple(map(float, target.rounds))


def _when(values: Sequence[float], target: TargetTime, *, virtual: bool) -> str:
    if not values:
        return "not reached"
    said = duration(fmean(values)) if virtual else number(fmean(values))
    return said if len(values) == target.runs else f"{said} ({len(values)} of {target.runs})"


def clients_figure(summary: Summary) -> Figure | None:
    """How evenly each arm's model serves clients: worst tenth, median, best tenth."""
    arms = [(i, arm) for i, arm in enumerate(summary.arms) if arm.worst_tenth and arm.median and arm.best_tenth]
    counts = {len(r.result.clients) for _, arm in arms for r in arm.records if r.result}
    if not arms or max(counts, default=0) < 2:
        return None
    triples = [
        [spread.mean for spread in (arm.worst_tenth, arm.median, arm.best_tenth) if spread is not None]
        for _, arm in arms
    ]
    span = padded([value for triple in triples for value in triple], floor=0, ceiling=1)
    plot = Plot(
        x=span, y=(len(arms), 0), height=ROW * len(arms) + 52, left=_margin([arm.label for _, arm in arms]), right=62,
        top=8, bottom=44,
    )  # fmt: skip
    plot.axes(x=lambda v: percent(v, 0), y=None, x_label="accuracy on clients' own held-out examples")
    for row, ((i, arm), (worst, middle, best)) in enumerate(zip(arms, triples, strict=True)):
        _name(plot, row + 0.5, arm.label)
        tip = f"{arm.label}: worst tenth {percent(worst)}, median {percent(middle)}, best tenth {percent(best)}"
        plot.whisker((worst, best), row + 0.5, colour(i))
        plot.dot(worst, row + 0.5, colour(i), tip, 3.2)
        plot.dot(best, row + 0.5, colour(i), tip, 3.2)
        plot.dot(middle, row + 0.5, colour(i), tip, 5.5)
        plot.text(plot.right + 8, plot.py(row + 0.5) + 4, percent(worst))
    told = (
        "From the mean of the tenth of the clients that is served worst (its figure at the right) over the median to "
        f"the mean of the best tenth; means over repeats, {count(max(counts), 'client')} measured."
    )
    title = "Spread over clients"
    return Figure(title=title, summary=told, drawing=plot.draw(f"{title}. {told}"))


def _margin(labels: Sequence[str]) -> int:
    return 16 + round(6.1 * max(len(cut(label, LABEL)) for label in labels))


def _name(plot: Plot, row: float, label: str) -> None:
    plot.text(plot.left - 8, plot.py(row) + 4, cut(label, LABEL), css="row", anchor="end", title=label)
