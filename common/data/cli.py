"""`coterie data`: list, fetch and check data sets. Results go to stdout, progress to stderr."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn

from common.site import load_site

if TYPE_CHECKING:
    from collections.abc import Iterator

    from common.data.check import DataReport
    from common.data.origins import Progress as FetchProgress

app = typer.Typer(help="Data sets: list, fetch, check.", no_args_is_help=True)

SiteOption = Annotated[Path | None, typer.Option("--site", help="Your site.toml, which registers your own data.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


@app.command("list")
def list_data(site: SiteOption = None, as_json: JsonOption = False) -> None:
    """List every data set that a run can name, and whether it is on this machine."""
    from common.data.catalogue import data_sets

    infos = data_sets(load_site(site))
    if as_json:
        _print_json([asdict(info) for info in infos])
        return
    for info in infos:
        size = f", {info.rows} rows" if info.rows else ""
        groups = f", {info.groups} groups" if info.groups else ""
        typer.echo(f"{info.name} ({info.origin}, {info.kind}{size}{groups})")
        typer.echo(f"  {info.summary}")
        if info.licence:
            typer.echo(f"  {info.licence}")
        if not info.available:
            typer.echo(f"  not on this machine: {info.how_to_get}")


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of a data set that is not shipped with Coterie.")],
    as_json: JsonOption = False,
) -> None:
    """Bring a data set onto this machine; an interrupted download continues where it stopped."""
    from common.data.fetch import fetch_data

    with _bars() as progress:
        folder = fetch_data(name, progress=progress)
    if as_json:
        _print_json({"name": name, "folder": str(folder)})
    else:
        typer.echo(f"{name} is in {folder}")


@app.command()
def check(
    name: Annotated[str, typer.Argument(help="Registered name of a data set.")],
    site: SiteOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read a data set as training would, and say in counts what is in it. Prints no record."""
    from common.data.check import check_data

    with Console(stderr=True).status(f"reading {name}"):
        report = check_data(name, site=load_site(site))
    if as_json:
        _print_json(asdict(report))
    else:
        _print_report(report)


def _print_json(document: object) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(document, indent=2))


def _print_report(report: DataReport) -> None:
    """The report as lines of plain text."""
    schema = report.schema
    shape = "x".join(map(str, schema.input_shape))
    typer.echo(f"{report.name}: {schema.kind} of {shape}, {schema.num_classes} classes")
    typer.echo(f"rows: {report.rows}, kept: {report.kept}")
    if report.entities:
        typer.echo(f"entities: {report.entities}, most rows of one: {report.largest_entity}")
    _print_counts("dropped", report.dropped)
    _print_counts("repaired", report.repaired)
    _print_counts("missing values by column", report.missing)
    _print_counts("examples by class", report.classes)
    _print_counts("examples by group", report.groups)


def _print_counts(title: str, counts: Mapping[str, int]) -> None:
    """A titled list of counts; nothing where there are none."""
    if not counts:
        return
    typer.echo(f"{title}:")
    width = max(map(len, counts))
    for name, count in counts.items():
        typer.echo(f"  {name:<{width}}  {count}")


@contextmanager
def _bars() -> Iterator[FetchProgress]:
    """A progress bar a file on stderr; on a terminal only."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def report(file: str, done: int, total: int) -> None:
            if file not in tasks:
                tasks[file] = bars.add_task(file, total=total or None)
            bars.update(tasks[file], completed=done, total=total or None)

        yield report
