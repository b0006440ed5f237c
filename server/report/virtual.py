"""Figures in virtual time: accuracy by the clock, what work was for nothing, how stale updates were."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from server.report.measures import SHARES, Reached, final_accuracy, reached, staleness, work
from server.report.record import ClockRow, Record
from server.report.svg import Figure, Plot, Point, padded
from server.report.words import TIMES, count, duration, joined, number, percent

_UNITS = ((86400.0, "days", 3.0), (3600.0, "hours", 2.0), (60.0, "minutes", 3.0))
"""Seconds of a unit, its name, and from how many of it on it is used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VirtualBox:
    """What the page says of a run's virtual time.

    Attributes:
        sentences: For people.
        reached: A row a share of the final accuracy: the share, the accuracy, the round, the time.
        figures: Charts.
    """

    sentences: tuple[str, ...]
    reached: tuple[tuple[str, str, str, str], ...]
    figures: tuple[Figure, ...]


def virtual_box(record: Record) -> VirtualBox | None:
    """Sentences, table and figures; None for a run without virtual time, of which all updates were fresh."""
    spent, steps = work(record.rounds), staleness(record.rounds)
    if spent is None and steps is None:
        return None
    sentences = []
    if spent is not None:
        sentences.append(
            f"On the simulated clock the run took {duration(spent.seconds)}. Devices were at work for "
            f"{duration(spent.work_seconds)} together; {percent(spent.wasted_share)} of that came to nothing: devices "
            "that went away, or were too late."
        )
    if steps is not None:
        sentences.append(
            f"Aggregation is asynchronous: when an update was used, the model had moved on by {number(steps.mean)} "
            f"steps on average, and by {number(steps.most)} at most."
        )
    figures = (accuracy_by_clock(record), work_figure(record), staleness_figure(record))
    return VirtualBox(
        sentences=tuple(sentences),
        reached=tuple(_written(share, found) for share, found in when_reached(record)),
        figures=tuple(figure for figure in figures if figure is not None),
    )


def when_reached(record: Record) -> list[tuple[float, Reached]]:
    """When shares of the final accuracy were first reached; empty where nothing was measured."""
    final = final_accuracy(record.rounds, record.result)
    return [] if final is None else [(share, reached(record.rounds, share * final)) for share in SHARES]


def _written(share: float, found: Reached) -> tuple[str, str, str, str]:
    when = number(found.server_round) if found.server_round is not None else "not reached"
    return percent(share, 0), percent(found.accuracy), when, duration(found.seconds)


def timescale(seconds: float) -> tuple[float, str]:
    """The unit in which an axis up to so many seconds is best read: its seconds, and its name."""
    return next(((size, name) for size, name, least in _UNITS if seconds >= least * size), (1.0, "seconds"))


def accuracy_by_clock(record: Record) -> Figure | None:
    """Held-out accuracy by virtual time; None where either is missing."""
    measured = [(row.clock.at_seconds, row) for row in record.rounds if row.clock and row.accuracy is not None]
    spent = work(record.rounds)
    if not measured or spent is None or spent.seconds <= 0:
        return None
    unit, name = timescale(spent.seconds)
    course: list[Point] = [(at / unit, row.accuracy or 0.0) for at, row in measured]
    low, high = padded([y for _, y in course], floor=0, ceiling=1)
    plot = Plot(x=(0, spent.seconds / unit), y=(low, high), right=24)
    plot.axes(x=number, y=lambda v: percent(v, 0 if high - low > 0.05 else 1), x_label=f"virtual {name}")
    rounds = {at / unit: row.server_round for at, row in measured}
    plot.line(course, "s1", lambda p: f"{duration(p[0] * unit)}, round {rounds[p[0]]}: {percent(p[1])}")
    times = [(share, found) for share, found in when_reached(record) if found.seconds is not None]
    told = joined([f"{percent(share, 0)} of it after {duration(found.seconds)}" for share, found in times])
    final = final_accuracy(record.rounds, record.result)
    summary = f"The final accuracy is {percent(final)}; first reached: {told}." if told else "Held-out accuracy."
    title = "Accuracy by virtual time"
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"))


def work_figure(record: Record) -> Figure | None:
    """What devices worked in each round, and how much of it was used; None without virtual time."""
    rows = [(row.server_round, row.clock) for row in record.rounds if row.clock is not None]
    tallest = max((clock.work_seconds for _, clock in rows), default=0.0)
    spent = work(record.rounds)
    if tallest <= 0 or spent is None:
        return None
    unit, name = timescale(tallest)
    plot = Plot(x=(rows[0][0] - 0.6, rows[-1][0] + 0.6), y=(0, tallest / unit * 1.08), top=26)
    plot.axes(x=number, y=number, x_label="round", y_label=name, whole_x=True)
    for server_round, clock in _bars(rows):
        side = (server_round - 0.38, server_round + 0.38)
        used = max(0.0, clock.work_seconds - clock.wasted_seconds)
        tip = f"round {server_round}: {duration(used)} used, {duration(clock.wasted_seconds)} wasted"
        plot.bar(side, (0, used / unit), "s1", tip)
        if clock.wasted_seconds > 0:
            plot.bar(side, (used / unit, clock.work_seconds / unit), "s2", tip)
    summary = (
        f"{duration(spent.wasted_seconds)} of {duration(spent.work_seconds)} wasted "
        f"({percent(spent.wasted_share)}), over all devices and rounds."
    )
    title = "Work of the devices"
    legend = (("s1", "used"), ("s2", "wasted"))
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"), legend=legend)


def _bars(rows: list[tuple[int, ClockRow]], most: int = 200) -> list[tuple[int, ClockRow]]:
    """Evenly spaced rows where they are too many for a bar each."""
    step = -(-len(rows) // most)
    return rows[::step]


def staleness_figure(record: Record) -> Figure | None:
    """How many updates were how stale; None in synchronous rounds."""
    steps = staleness(record.rounds)
    if steps is None:
        return None
    total = sum(steps.counts.values())
    summary = (
        f"{count(total, 'update')}; {percent(steps.counts.get(0, 0) / total, 0)} began from the newest model. Mean "
        f"{number(steps.mean)}, largest {number(steps.most)}."
    )
    title = "Staleness of updates"
    plot = counted(steps.counts, x_label="steps of the server since the update began", y_label="updates")
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"))


def counted(counts: Mapping[int, int], *, x_label: str, y_label: str) -> Plot:
    """A bar for each whole number, as high as it is frequent."""
    first, last = min(counts), max(counts)
    plot = Plot(x=(first - 0.6, last + 0.6), y=(0, max(counts.values()) * 1.08), top=26)
    plot.axes(x=number, y=number, x_label=x_label, y_label=y_label, whole_x=True, whole_y=True)
    for value, n in counts.items():
        plot.bar((value - 0.42, value + 0.42), (0, n), "s1 cell", f"{number(value)}: {number(n)} {TIMES}")
    return plot
