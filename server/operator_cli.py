"""What an operator does with a federation: `coterie submit`, `status`, `stop`, `sites`, `logs`, `fetch`, `runs --kit`.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import json
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from common.config.cli import Overrides
from common.errors import ConfigError, RunError

KitOption = Annotated[Path, typer.Option("--kit", help="The operator's kit.", show_default=False)]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
FollowOption = Annotated[bool, typer.Option("--follow", help="Go on showing what changes, until the run ends.")]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run's id, a beginning of it, its name, or `latest`.", show_default=False),
]


def submit(
    source: Annotated[str, typer.Argument(metavar="RUN.TOML|SCENARIO", help="What to run.", show_default=False)],
    kit: KitOption,
    *,
    overrides: Overrides = None,
    follow: FollowOption = False,
    as_json: JsonOption = False,
) -> None:
    """Sign a run and put it into the coordinator's queue.

    A scenario's comparison is left out: it is a study for simulations.
    """
    from common.config import load_config
    from common.secagg_plan import warnings_of
    from server.operator_view import print_status
    from server.remote import reaching

    config = load_config(source, overrides or []).config
    if config.comparison.enabled:
        config = load_config(source, [*(overrides or []), "comparison.enabled=false"]).config
        typer.echo("note: the comparison is for simulations, and is left out", err=True)
    for warning in () if as_json else warnings_of(config, len(config.data.sites) or None):
        typer.echo(f"warning: {warning}", err=True)
    with reaching(_kit(kit)) as coordinator:
        status = coordinator.submit(config)
        if not follow:
            if as_json:
                _print_json(status)
            else:
                print_status(status)
                typer.echo(f"hint: coterie status {status['run'][:12]} --kit {kit} --follow", err=True)
            return
        if not as_json:
            typer.echo(f"run {status['run']}", err=True)
        status = _follow(coordinator, status["run"], as_json=as_json)
    _end(status, as_json=as_json)


def status(run: RunArgument, kit: KitOption, *, follow: FollowOption = False, as_json: JsonOption = False) -> None:
    """Show where a run stands: queued and what for, its round and who has answered, how good the model is."""
    from server.operator_view import print_status
    from server.remote import reaching

    with reaching(_kit(kit)) as coordinator:
        if follow:
            found = _follow(coordinator, coordinator.ask("status", run)["run"], as_json=as_json)
        else:
            found = coordinator.ask("status", run)
    if follow:
        _end(found, as_json=as_json)
    elif as_json:
        _print_json(found)
    else:
        print_status(found)


def stop(run: RunArgument, kit: KitOption, *, as_json: JsonOption = False) -> None:
    """End a run. What it has learnt so far stays in its folder at the coordinator."""
    from server.remote import reaching

    with reaching(_kit(kit)) as coordinator:
        found = coordinator.ask("stop", run)
    if as_json:
        _print_json(found)
    else:
        typer.echo(f"run {found['run']} is {found['status']}")


def sites(kit: KitOption, *, as_json: JsonOption = False) -> None:
    """List the federation's sites: who is attached, since when, and what they do."""
    from server.operator_view import print_sites
    from server.remote import reaching

    with reaching(_kit(kit)) as coordinator:
        found = coordinator.ask("sites")
    if as_json:
        _print_json(found)
    else:
        print_sites(found["sites"], now=datetime.now(UTC).timestamp())


def logs(run: RunArgument, kit: KitOption, *, follow: FollowOption = False, as_json: JsonOption = False) -> None:
    """Show what the coordinator's audit log says of a run."""
    from server.operator_view import log_line
    from server.remote import reaching

    with reaching(_kit(kit)) as coordinator:
        if follow:
            lines = []
            for document in coordinator.follow("logs", coordinator.ask("status", run)["run"]):
                lines.append(document["line"])
                if not as_json:
                    typer.echo(log_line(document["line"]))
            if as_json:
                _print_json({"lines": lines})
            return
        found = coordinator.ask("logs", run)
    if as_json:
        _print_json(found)
    else:
        for line in found["lines"]:
            typer.echo(log_line(line))


def fetch(
    run: RunArgument,
    kit: KitOption,
    *,
    out: Annotated[Path, typer.Option("--out", help="New folder for the run.", show_default=False)],
    as_json: JsonOption = False,
) -> None:
    """Fetch a finished run's model, result and report, sealed for this operator alone, into a new run folder."""
    from server.remote import reaching

    with reaching(_kit(kit)) as coordinator:
        found = coordinator.fetch(run, out)
    files = sorted(path.name for path in out.iterdir() if path.is_file())
    if as_json:
        _print_json({"run": found["run"], "folder": str(out), "files": files, "accuracy": found["accuracy"]})
    else:
        typer.echo(f"run {found['run']} is in {out}")
        typer.echo(f"hint: coterie predict {out} --data csv:new.csv; report: {out / 'report.html'}", err=True)


def list_remote_runs(kit: Path, *, as_json: bool) -> None:
    """`coterie runs --kit`: the coordinator's queue, newest first."""
    from server.operator_view import print_runs
    from server.remote import reaching

    with reaching(_kit(kit)) as coordinator:
        found = coordinator.ask("runs")
    if as_json:
        _print_json(found)
    elif found["runs"]:
        print_runs(found["runs"])
    else:
        typer.echo("there are no runs yet", err=True)
        typer.echo(f"hint: coterie submit RUN.TOML --kit {kit}", err=True)


def _follow(coordinator: Any, run: str, *, as_json: bool) -> dict[str, Any]:
    """Show a run until it ends; its last status."""
    from server.operator_view import PlainView, TerminalView

    view = TerminalView() if sys.stderr.isatty() and not as_json else PlainView(quiet=as_json)
    last: dict[str, Any] = {}
    with view:
        for last in coordinator.follow("status", run):
            view.show(last)
    if not last:
        raise RunError("the coordinator told nothing of the run", hint="`coterie status RUN --kit KIT` asks again")
    return last


def _end(status: dict[str, Any], *, as_json: bool) -> None:
    """Print how a run ended; a run that failed is this command's failure, too."""
    from server.operator_view import print_status

    if as_json:
        _print_json(status)
    else:
        print_status(status)
    if status["status"] == "failed":
        problem = status.get("problem") or {}
        if not as_json:
            typer.echo(f"error: {problem.get('message', 'the run failed')}", err=True)
            if problem.get("hint"):
                typer.echo(f"hint: {problem['hint']}", err=True)
        raise typer.Exit(int(problem.get("exit_code") or RunError.exit_code))


def _kit(folder: Path) -> Any:
    from common.kit import load_kit

    if not folder.exists():
        raise ConfigError(f"there is no kit {folder}", hint="name the operator's kit with --kit")
    return load_kit(folder, role="operator")


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, allow_nan=False))
