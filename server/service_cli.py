"""`coterie server`, the coordinator's process, and `coterie audit-log`, what it did.

Results go to stdout, logs and hints to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import structlog
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import KitError, RunError

if TYPE_CHECKING:
    from server.service.process import Service

_INTERRUPTED = 130
_WIDE = 240

KitOption = Annotated[Path, typer.Option("--kit", help="The coordinator's kit.", show_default=False)]
StateOption = Annotated[
    Path | None, typer.Option("--state", help="Folder for all that lasts; default: `state` in the kit.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

audit_log = typer.Typer(
    name="audit-log",
    help="What the coordinator did: who came, what was asked and came back, which model was released.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def server(
    kit: KitOption,
    *,
    host: Annotated[
        str,
        typer.Option("--host", help="Address to listen at."),
    ] = "0.0.0.0",  # noqa: S104 - sites come from elsewhere; TLS decides who enters
    port: Annotated[
        int | None, typer.Option("--port", min=0, max=65535, help="Default: that of the kit's address; 0: a free one.")
    ] = None,
    state: StateOption = None,
    heartbeat: Annotated[
        float, typer.Option("--heartbeat", min=0.1, help="Seconds between signs of life; three missed: a site is gone.")
    ] = 20.0,
) -> None:
    """Coordinate a federation: take runs from operators, carry them out with the sites, keep what comes of them.

    One port. SIGTERM or Ctrl-C ends it within seconds, and a second one at once; whatever ends it, the next start goes
    on with every run where it was.
    """
    from common.kit import load_kit
    from server.service.process import Service

    _log_to_stderr()
    loaded = load_kit(kit, role="coordinator")
    service = Service(
        loaded,
        host=host,
        port=_port(loaded.address) if port is None else port,
        state=state,
        heartbeat_seconds=heartbeat,
    )
    _serve(service, loaded.federation)


@audit_log.command()
def verify(kit: KitOption, *, state: StateOption = None, as_json: JsonOption = False) -> None:
    """Check that every line is the one that was written, and that none is missing at the end."""
    from server.service.audit import verify as read

    path, heads = _log_of(kit, state)
    try:
        found = read(path, heads)
    finally:
        heads.close()
    if as_json:
        facts = {"log": str(path), "lines": found.lines, "head": found.head, "problem": found.problem or None}
        typer.echo(json.dumps(facts))
        if found.problem:
            typer.echo(f"error: {path}: {found.problem}", err=True)
            raise typer.Exit(RunError.exit_code)
        return
    if found.problem:
        raise RunError(
            f"{path}: {found.problem}", hint=f"{found.lines} lines before it are sound; compare the rest with a backup"
        )
    typer.echo(f"sound: {found.lines} lines, head {found.head}")


@audit_log.command()
def show(
    kit: KitOption,
    *,
    run: Annotated[str, typer.Option("--run", help="Only lines about this run: its id, or a beginning of it.")] = "",
    event: Annotated[str, typer.Option("--event", help="Only lines of this kind.")] = "",
    last: Annotated[int, typer.Option("--last", min=0, help="Only so many lines, the latest; 0: all.")] = 0,
    state: StateOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the lines; whether they are sound is what `verify` says."""
    from server.service.audit import read_lines

    path, heads = _log_of(kit, state)
    heads.close()
    lines = list(
        read_lines(
            path,
            wanted=lambda line: (
                (not run or str(line.get("run", "")).startswith(run)) and event in {"", line.get("event")}
            ),
        )
    )
    lines = lines[-last:] if last else lines
    if as_json:
        typer.echo(json.dumps({"log": str(path), "lines": lines}))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("line", "time (UTC)", "event", "run", "what"):
        table.add_column(column, justify="right" if column == "line" else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text(cell) for cell in _cells(line)))
    console = Console()
    (console if console.is_terminal else Console(width=_WIDE)).print(table)


def describe(line: dict[str, Any]) -> str:
    """The facts of a line for people: what identifies it left out, digests shortened."""
    rest = {k: v for k, v in line.items() if k not in {"at", "event", "number", "previous", "run"}}
    return ", ".join(f"{key} {_short(value)}" for key, value in sorted(rest.items()))


def _cells(line: dict[str, Any]) -> tuple[str, str, str, str, str]:
    number = line.get("number")
    return (
        str(number + 1) if isinstance(number, int) else "",  # as editors count, and as `verify` names them
        moment(line.get("at")),
        str(line.get("event", "")),
        str(line.get("run", ""))[:12],
        describe(line),
    )


def moment(at: object) -> str:
    """A kept time as people read it; to the second."""
    return str(at or "").replace("T", " ").partition(".")[0].partition("+")[0]


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_short(item)}" for key, item in value.items())
    if isinstance(value, list):
        return " ".join(map(_short, value))
    text = str(value)
    digest = len(text) in {32, 64} and all(c in "0123456789abcdef" for c in text)
    return text[:12] if digest else text


def _serve(service: Service, federation: str) -> None:
    """Until a signal says otherwise."""
    ended = threading.Event()

    def end(_number: int, _frame: FrameType | None) -> None:
        if ended.is_set():
            os._exit(_INTERRUPTED)
        ended.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    with service:
        where = service.listening
        typer.echo(f"coordinator of {federation} listening on {where.host}:{where.port}", err=True)
        while not ended.wait(3600):  # a plain wait could not be interrupted on every platform
            pass
        typer.echo("ending; runs go on when the server is started again", err=True)


def _log_of(kit: Path, state: Path | None) -> tuple[Path, Any]:
    from server.service.audit import AUDIT
    from server.service.process import DATABASE
    from server.service.state import ServiceState

    if not kit.is_dir():
        raise KitError(f"there is no kit {kit}", hint="name the coordinator's kit with --kit")
    folder = state or kit / "state"
    return folder / AUDIT, ServiceState(folder / DATABASE, reading=True)


def _port(address: str) -> int:
    text = address.rpartition(":")[2]
    if not text.isdecimal():
        raise KitError(f"the kit's address `{address}` has no port", hint="name one with --port")
    return int(text)


def _log_to_stderr() -> None:
    """Console on a terminal, one JSON document a line elsewhere."""
    shown: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
        structlog.processors.JSONRenderer(),
    ]
    if sys.stderr.isatty():
        shown[3:] = [structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    structlog.configure(
        processors=shown,
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
