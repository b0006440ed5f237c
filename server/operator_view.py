"""What an operator sees of a federation: tables, one line a change, and a live view on a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Final, Self

import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

_WIDE: Final = 240
_STYLES: Final = {
    "completed": "green",
    "running": "cyan",
    "queued": "yellow",
    "stopping": "yellow",
    "stopped": "yellow",
    "failed": "red",
}
_ON_THE_WAY: Final = frozenset({"asked", "away", "idle", "fetching", "working", "sending"})

Status = dict[str, Any]


def print_status(status: Status) -> None:
    """Where a run stands, as a small table."""
    _print(status_table(status))


def status_table(status: Status) -> RenderableType:
    """Where a run stands."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    state = Text(status["status"], _STYLES.get(status["status"], ""))
    table.add_row("run", Text(f"{status['run']}  {status['name']}"))
    table.add_row("status", state if not status.get("step") else Text.assemble(state, f", {status['step']}"))
    for label, text in _facts(status):
        table.add_row(label, Text(text))
    return table


def _facts(status: Status) -> Iterable[tuple[str, str]]:
    if status["waiting_for_sites"]:
        yield "waits for", f"sites {', '.join(status['waiting_for_sites'])} (not attached)"
    if status["waiting_for_runs"]:
        yield "waits for", f"runs {', '.join(run[:12] for run in status['waiting_for_runs'])} (same sites)"
    yield "rounds", f"{status['rounds_done']} of {status['rounds']}"
    if status["replies"] and status["status"] == "running":
        yield f"round {status['round']}", "; ".join(f"{site}: {state}" for site, state in status["replies"].items())
    last = status["last_round"]
    if status["accuracy"] is not None:
        base = status.get("majority_accuracy")
        yield (
            "accuracy",
            f"{status['accuracy']:.3f}" + (f" (always the most common class: {base:.3f})" if base is not None else ""),
        )
    elif last:
        yield f"round {last['round']}", _figures(last)
    yield "sites", ", ".join(status["sites"])
    yield "operator", status["operator"]
    yield "submitted", _moment(status["submitted"])
    if status["started"]:
        yield "started", _moment(status["started"]) + (f", attempt {status['attempt']}" * (status["attempt"] > 1))
    if status["finished"]:
        yield "finished", _moment(status["finished"])
    if status["problem"]:
        yield "problem", status["problem"]["message"]


def print_runs(runs: list[Status]) -> None:
    """The queue as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("run", "name", "status", "rounds", "accuracy", "operator", "submitted (UTC)", "sites"):
        right = column in {"rounds", "accuracy"}
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for run in runs:
        accuracy = run["accuracy"]
        table.add_row(
            Text(run["run"][:12]),
            Text(run["name"]),
            Text(run["status"], _STYLES.get(run["status"], "")),
            f"{run['rounds_done']}/{run['rounds']}",
            "-" if accuracy is None else f"{100 * accuracy:.1f} %",
            Text(run["operator"]),
            _moment(run["submitted"]),
            Text(", ".join(run["sites"])),
        )
    _print(table)


def print_sites(sites: list[dict[str, Any]], *, now: float) -> None:
    """The sites as a table."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("site", "attached", "for", "state", "run", "version", "key"):
        table.add_column(column, overflow="fold")
    for site in sites:
        attached = Text("yes", "green") if site["attached"] else Text("denied" if site["denied"] else "no", "red")
        since = "-" if site["since"] is None else _span(now - site["since"])
        table.add_row(
            Text(site["name"]),
            attached,
            since,
            site["state"] or "-",
            (site["run"] or "-")[:12],
            Text(site["version"] or "-"),
            site["key_id"][:16],
        )
    _print(table)


def log_line(line: dict[str, Any]) -> str:
    """One line of the audit log for people."""
    from server.service_cli import describe, moment

    return f"{moment(line.get('at'))}  {line.get('event', '')}  {describe(line)}".rstrip()


class PlainView:
    """A line on stderr for whatever changes: for files, pipes and journals."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._told: set[str] = set()

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End."""

    def show(self, status: Status) -> None:
        """Tell what was not told yet."""
        for line in _lines(status):
            if line not in self._told:
                self._told.add(line)
                if not self._quiet:
                    typer.echo(line, err=True)


class TerminalView:
    """The same as a small display that redraws itself, on a terminal; rounds that are over stay as lines."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._round = 0

    def __enter__(self) -> Self:
        """Begin."""
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; what was redrawn goes."""
        self._live.stop()

    def show(self, status: Status) -> None:
        """Draw what is now."""
        last = status["last_round"]
        if last and last["round"] > self._round:
            self._round = last["round"]
            self._console.print(Text(f"round {last['round']} of {status['rounds']}: {_figures(last)}"))
        bar = ProgressBar(total=status["rounds"], completed=status["rounds_done"], width=40)
        self._live.update(Group(bar, status_table(status)), refresh=True)


def _lines(status: Status) -> Iterable[str]:
    """What can be told of a status in whole lines, each worth telling once."""
    if status["status"] == "queued":
        for label, text in _facts(status):
            if label == "waits for":
                yield f"waits for {text}"
    else:
        again = f", attempt {status['attempt']}" if status["attempt"] > 1 else ""
        yield status["status"] + again
    if status["status"] == "running" and status["step"] and status["step"] != "training":
        yield status["step"]
    for site, state in status["replies"].items():
        if state not in _ON_THE_WAY and state not in {"used", "received"}:
            yield f"round {status['round']}: {site}: {state}"
    last = status["last_round"]
    if last:
        yield f"round {last['round']} of {status['rounds']}: {_figures(last)}"
    if status["problem"] and status["status"] != "failed":
        yield f"problem: {status['problem']['message']}"


def _figures(last: dict[str, Any]) -> str:
    parts = []
    if "survivors" in last:
        parts.append(f"{last['survivors']} of {last['asked']} answered")
    if last["accuracy"] is not None:
        parts.append(f"accuracy {last['accuracy']:.3f}")
    loss = last["train_loss"] if last["loss"] is None else last["loss"]
    if loss is not None:
        parts.append(f"loss {loss:.3f}")
    if "seconds" in last:
        parts.append(f"{last['seconds']:.1f} s")
    return ", ".join(parts)


def _moment(at: str | None) -> str:
    return (at or "-").replace("T", " ").partition(".")[0].partition("+")[0]


def _span(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{max(0, round(seconds))} s"


def _print(what: RenderableType) -> None:
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(what)
