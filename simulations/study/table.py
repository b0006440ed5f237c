"""A study on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.report.words import MISSING, NARROW, ceiling, duration, number, percent, points
from simulations.study.folder import Study
from simulations.study.page import target_text, verdict
from simulations.study.summary import ArmSummary, Spread, Summary


def print_study(study: Study, summary: Summary, console: Console, *, folder: str) -> None:
    """The table of arms, what it says, and where the page is, which has more columns."""
    table = Table(box=None, header_style="dim", pad_edge=False, expand=False)
    table.add_column("arm", overflow="fold", min_width=24)
    rows = [_cells(arm, summary) for arm in summary.arms]
    shown = [title for title in rows[0] if any(row[title] != MISSING for row in rows)]
    for title in shown:
        table.add_column(title, justify="right", no_wrap=True)
    for arm, row in zip(summary.arms, rows, strict=True):
        table.add_row(arm.label, *(_plain(row[title]) for title in shown))
    means = f"means over {study.repeats} repeats" if study.repeats > 1 else "one run of each"
    console.print(Text(f"{study.name}: {len(study.arms)} arms, {means}", "bold"), table, Text())
    for sentence in verdict(study, summary):
        console.print(_plain(sentence), highlight=False, markup=False)
    console.print(Text(f"\nstudy folder: {folder}\nreport:       {folder}/report.html", style="dim"))


def _cells(arm: ArmSummary, summary: Summary) -> dict[str, str]:
    """An arm's cells by their columns' titles."""
    middle = len(summary.targets) // 2
    cells = {"accuracy": _mean(arm.accuracy), "+/-": MISSING}
    if arm.against_first is not None:
        cells["+/-"] = points(arm.against_first.mean)
    if summary.targets:
        cells[_plain(f"to {percent(summary.targets[middle])}")] = target_text(arm, middle)
    return cells | {
        "virtual": MISSING if arm.virtual_seconds is None else duration(arm.virtual_seconds.mean),
        "wasted": _mean(arm.wasted),
        "worst 10th": _mean(arm.worst_tenth),
        "stale": MISSING if arm.staleness is None else number(arm.staleness.mean, 2),
        "epsilon": ceiling(arm.epsilon),
    }


def _mean(spread: Spread | None) -> str:
    return MISSING if spread is None else percent(spread.mean)


def _plain(text: str) -> str:
    """Narrow spaces are not narrow on a terminal, and break columns on some."""
    return text.replace(NARROW, " ")
