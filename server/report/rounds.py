"""Figures over rounds: accuracy, loss, epsilon, failures, and where the time went."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from statistics import median

from server.report.record import Record, RoundRow
from server.report.svg import Figure, Plot, Point, padded, series, thin
from server.report.words import TIMES, ceiling, count, duration, failure_sentence, joined, number, percent

MAX_LINES = 6
"""Beyond so many different courses of epsilon, a band stands in for the lines."""


def _span(rounds: Sequence[RoundRow]) -> Point:
    first, last = rounds[0].server_round, rounds[-1].server_round
    return (first, last) if last > first else (first - 0.5, last + 0.5)


def _known(rounds: Iterable[RoundRow], pick: Callable[[RoundRow], float | None]) -> list[Point]:
    return [(row.server_round, value) for row in rounds if (value := pick(row)) is not None]


def accuracy_figure(record: Record) -> Figure | None:
    """Held-out accuracy by round, against always naming the commonest class; None where nothing was measured."""
    course = _known(record.rounds, lambda row: row.accuracy)
    if not course:
        return None
    base = record.result.majority_accuracy if record.result else None
    selected = record.result.selected_round if record.result else None
    values = [y for _, y in course]
    low, high = padded([*values, *([base] if base is not None else [])], floor=0, ceiling=1)
    plot = Plot(x=_span(record.rounds), y=(low, high))
    plot.axes(x=number, y=lambda v: percent(v, 0 if high - low > 0.05 else 1), x_label="round", whole_x=True)
    if base is not None:
        plot.level(base, "commonest class")
    plot.line(course, "s1", _tip("accuracy", percent))
    chosen = next((p for p in course if p[0] == selected), None)
    if chosen:
        plot.dot(*chosen, "s1", f"round {chosen[0]:.0f}, the result: {percent(chosen[1])}", 5)
    summary = (
        f"From {percent(values[0])} in round {course[0][0]:.0f} to {percent(values[-1])} in round "
        f"{course[-1][0]:.0f}; highest {percent(max(values))}."
    )
    if chosen:
        summary += f" The larger dot marks round {selected}, whose model is the result."
    return Figure(title="Accuracy on held-out examples", summary=summary, drawing=plot.draw(summary))


def loss_figure(record: Record) -> Figure | None:
    """Held-out loss and the clients' training loss by round; None where there is neither."""
    held_out, train = _known(record.rounds, lambda row: row.loss), _known(record.rounds, lambda row: row.train_loss)
    courses = [
        (label, css, points)
        for label, css, points in (("held-out examples", "s1", held_out), ("clients' training", "s2", train))
        if points
    ]
    if not courses:
        return None
    plot = Plot(x=_span(record.rounds), y=padded((y for _, _, points in courses for _, y in points), floor=0))
    plot.axes(x=number, y=number, x_label="round", whole_x=True)
    for label, css, points in courses:
        plot.line(points, css, _tip(label, number))
    summary = " ".join(
        f"{label[0].upper()}{label[1:]}: from {number(points[0][1])} to {number(points[-1][1])}."
        for label, _, points in courses
    )
    legend = tuple((css, label) for label, css, _ in courses)
    return Figure(title="Loss", summary=summary, drawing=plot.draw(f"Loss. {summary}"), legend=legend)


def epsilon_figure(record: Record) -> Figure | None:
    """What each client had spent after each round, against the target; None for a run without privacy."""
    xs, courses = _courses(record.rounds)
    if not courses:
        return None
    target = record.config.privacy.target_epsilon
    highest = max(course[-1] for course in courses.values())
    plot = Plot(x=_span(record.rounds), y=(0, max(highest, target or 0) * 1.12 or 1))
    plot.axes(x=number, y=number, x_label="round", whole_x=True)
    if target is not None:
        plot.level(target, f"target {number(target)}")
    alike: dict[tuple[float, ...], list[str]] = {}
    for name, course in courses.items():
        alike.setdefault(course, []).append(name)
    if len(alike) <= MAX_LINES:
        legend = tuple((series(i), _group(names)) for i, names in enumerate(alike.values()))
        for (css, label), course in zip(legend, alike, strict=True):
            plot.line(list(zip(xs, course, strict=True)), css, _tip(label, ceiling))
    else:
        columns = list(zip(*courses.values(), strict=True))
        lower, middle, upper = ([(x, f(c)) for x, c in zip(xs, columns, strict=True)] for f in (min, median, max))
        plot.band(lower, upper, "s1")
        plot.line(middle, "s1", _tip("median over clients", ceiling))
        legend = (("s1", "median over clients; the band spans all of them"),)
    if any(math.isinf(value) for row in record.rounds for value in row.epsilon.values()):
        highest = math.inf  # drawn as no growth, but never called so
    limit = f", target {number(target)}" if target is not None else ""
    summary = f"The most that any client has spent after round {xs[-1]:.0f}: {ceiling(highest)}{limit}."
    return Figure(title="Epsilon spent", summary=summary, drawing=plot.draw(f"Epsilon. {summary}"), legend=legend)


def _tip(label: str, written: Callable[[float], str]) -> Callable[[Point], str]:
    return lambda point: f"round {point[0]:.0f}, {label}: {written(point[1])}"


def _group(names: Sequence[str]) -> str:
    return joined(names) if len(names) <= 4 else count(len(names), "client")


def _courses(rounds: Sequence[RoundRow]) -> tuple[list[float], dict[str, tuple[float, ...]]]:
    """Rounds, thinned where they are very many, and each client's epsilon after each of them.

    A client's last epsilon on record stands until its next; before its first it has spent nothing.
    """
    spent = {name: 0.0 for row in rounds for name in row.epsilon}
    kept = {x for x, _ in thin([(row.server_round, 0.0) for row in rounds])}
    snapshots = []
    for row in rounds:
        spent.update({name: round(value, 9) for name, value in row.epsilon.items() if math.isfinite(value)})
        if row.server_round in kept:
            snapshots.append(tuple(spent.values()))
    return sorted(kept), dict(zip(spent, zip(*snapshots, strict=True), strict=True))


def failures_figure(record: Record) -> Figure | None:
    """Clients without an update, by round and reason; None where all answered."""
    reasons = Counter(reason for row in record.rounds for reason in row.failures.values())
    if not reasons:
        return None
    ranked = [reason for reason, _ in reasons.most_common()]
    tallest = max(len(row.failures) for row in record.rounds)
    first, last = record.rounds[0].server_round, record.rounds[-1].server_round
    plot = Plot(x=(first - 0.6, last + 0.6), y=(0, tallest * 1.1))
    plot.axes(x=number, y=number, x_label="round", whole_x=True, whole_y=True)
    for row in record.rounds:
        base = 0
        for reason, n in sorted(Counter(row.failures.values()).items(), key=lambda item: ranked.index(item[0])):
            tip = f"round {row.server_round}: {count(n, 'client')}, {reason}"
            side = (row.server_round - 0.38, row.server_round + 0.38)
            plot.bar(side, (base, base + n), series(ranked.index(reason) + 1), tip)
            base += n
    asked = sum(len(row.cohort) for row in record.rounds)
    lost = f"{number(reasons.total())} of {number(asked)} requests" if asked else count(reasons.total(), "request")
    summary = f"{lost} brought no update: " + "; ".join(
        f"{number(n)} {TIMES} {failure_sentence(reason)}" for reason, n in reasons.most_common()
    )
    legend = tuple((series(i + 1), reason) for i, reason in enumerate(ranked))
    return Figure(title="Failures", summary=f"{summary}.", drawing=plot.draw(f"Failures. {summary}."), legend=legend)


def time_spent(record: Record) -> dict[str, float]:
    """Seconds by kind of work, `other` among them where a total is on record; from the rounds if there is no result."""
    tables = [record.result.seconds] if record.result and record.result.seconds else [r.seconds for r in record.rounds]
    seconds: dict[str, float] = {}
    for kind, value in (item for table in tables for item in table.items()):
        seconds[kind] = seconds.get(kind, 0.0) + (value or 0.0)
    total = seconds.pop("total", 0.0)
    parts = {kind: value for kind, value in seconds.items() if value > 0}
    other = total - sum(parts.values())
    return {**parts, "other": other} if other > 0.01 * sum(parts.values()) else parts


def time_figure(record: Record) -> Figure | None:
    """Where the time went, as one bar; None where no times are on record."""
    parts = time_spent(record)
    total = sum(parts.values())
    if total <= 0:
        return None
    plot = Plot(x=(0, total), y=(0, 1), height=44, left=0, right=0, top=4, bottom=4)
    start = 0.0
    for i, (kind, seconds) in enumerate(parts.items()):
        plot.bar((start, start + seconds), (0, 1), _time_colour(kind, i), f"{kind}: {duration(seconds)}")
        start += seconds
    summary = f"{duration(total)} in all: " + joined([f"{duration(v)} {kind}" for kind, v in parts.items()]) + "."
    legend = tuple(
        (_time_colour(kind, i), f"{kind} {duration(v)} ({percent(v / total, 0)})")
        for i, (kind, v) in enumerate(parts.items())
    )
    return Figure(title="Time", summary=summary, drawing=plot.draw(f"Time. {summary}"), legend=legend)


def _time_colour(kind: str, index: int) -> str:
    return "quiet" if kind == "other" else series(index)
