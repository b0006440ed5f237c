"""`coterie client`: the site's process, and what a run would do here."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, TextIO, cast

import typer

from common.errors import RunError

if TYPE_CHECKING:
    from client.agent import Agent

LOCK = "client.lock"
"""File in a site's state folder; held by the one process that works for the site."""

_INTERRUPTED = 130


def client(
    kit: Annotated[Path, typer.Option("--kit", help="The site's kit.")],
    *,
    site: Annotated[
        Path | None, typer.Option("--site", help="Own models and data; default: site.toml in the kit.")
    ] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="The site's own rules; default: policy.toml in the kit.")
    ] = None,
    run: Annotated[
        str | None, typer.Option("--dry-run", metavar="RUN.TOML", help="Only tell what this run would do here.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="With --dry-run: dotted.key=value, as often as needed.")
    ] = None,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that SIGTERM leaves for the work at hand and for sending.")
    ] = 30.0,
    threads: Annotated[
        int, typer.Option("--threads", min=1, help="CPU threads of training; the last bits of a result depend on it.")
    ] = 1,
    wait: Annotated[
        bool, typer.Option("--wait/--no-wait", help="Wait for a coordinator that cannot be reached at first.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Work for a federation: connect to its coordinator, train what the site's policy allows, send sealed updates.

    Only outbound connections are made. SIGTERM or Ctrl-C lets it finish what is at hand; a second one ends it at once,
    and nothing is lost either way.
    """
    import torch

    from client.resources import site_resources
    from common.kit import load_kit

    torch.set_num_threads(threads)
    loaded = load_kit(kit, role="site")
    resources = site_resources(loaded, site_file=site, policy_file=policy)
    if run is not None:
        from client.dry_run import dry_run
        from common.config import load_config

        _tell(dry_run(load_config(run, settings or []).config, resources), as_json=as_json)
        return
    if settings:
        raise typer.BadParameter("--set goes with --dry-run: a coordinator's runs come as they are")

    from client.agent import make_agent
    from client.memory import keep_freed_memory

    _configure_log()
    keep_freed_memory()
    with _alone(loaded.state):
        agent = make_agent(resources, wait=wait)
        handler = _drains(agent, grace)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, handler)
        agent.run()
        if as_json:
            typer.echo(json.dumps({"format": 1, "site": loaded.name, "updates_left": len(agent.outbox)}))
        if agent.working:  # training cannot be stopped from outside; its thread would outlive the interpreter's end
            sys.stdout.flush()
            os._exit(0)


def _drains(agent: Agent, grace: float) -> Any:
    """A signal's handler: the first ends the agent in good order, the second at once."""
    seen: list[int] = []

    def handle(number: int, _frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            os._exit(_INTERRUPTED)
        agent.drain(grace)

    return handle


@contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Keep other processes from working with this kit on this machine.

    Raises:
        RunError: One does already.
    """
    from common.disk import acquire_lock, disk_errors

    try:
        with disk_errors(state / LOCK):
            lock = acquire_lock(state / LOCK)
    except RunError as e:
        if isinstance(e.__cause__, OSError):
            raise
        raise RunError(f"a client works with the kit {state.parent} already", hint="stop that one first") from e
    try:
        yield
    finally:
        os.close(lock)


def _configure_log() -> None:
    """Log to stderr: for people on a terminal, as JSON lines elsewhere."""
    import structlog

    terminal = sys.stderr.isatty()
    renderer: Any = (
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if terminal
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(cast("TextIO", _Patient(sys.stderr))),
    )


class _Patient:
    """A stream that may be closed, or full: a line that cannot be logged must not cost an order."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Write what can be written."""
        with suppress(OSError, ValueError):
            self._stream.write(text)

    def flush(self) -> None:
        """See `write`."""
        with suppress(OSError, ValueError):
            self._stream.flush()


def _tell(document: dict[str, Any], *, as_json: bool) -> None:
    """Print a dry run."""
    if as_json:
        typer.echo(json.dumps(document))
        return
    from client.dry_run_text import lines

    for line in lines(document):
        typer.echo(line)
