"""`coterie secagg plan`: thresholds, tolerated losses, traffic and admissible groups, before anything runs."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.config import RunConfig, load_config
from common.config.cli import Overrides, Source
from common.errors import ConfigError

_WIDE = 100

app = typer.Typer(
    name="secagg",
    help="Secure aggregation: what sums of updates take, and what they withstand.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _root() -> None:
    """Keeps `plan` a sub-command while it is the only one."""


@app.command()
def plan(  # noqa: PLR0917 - typer reads options from the signature
    source: Source = None,
    overrides: Overrides = None,
    sites: Annotated[
        int, typer.Option("--sites", min=0, help="How many sites there are; 0: as many as data.sites or data.clients.")
    ] = 0,
    bad: Annotated[
        int, typer.Option("--bad", min=0, help="Sites that may send any update: how large may groups be?")
    ] = 0,
    colluding: Annotated[
        int | None, typer.Option("--colluding", min=0, help="Sites that may help the coordinator: secagg.colluding.")
    ] = None,
    parameters: Annotated[int, typer.Option("--parameters", min=0, help="Values of one update, for its size.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Say how small a sum can be, who may be missing, what a site sends, and how large groups may be."""
    from common.secagg_plan import sums_plan

    told = [] if colluding is None else [f"secagg.colluding={colluding}"]
    config = load_config(source, [*(overrides or ()), *told, "privacy.secure_aggregation=true"]).config
    document = sums_plan(config, sites or _sites(config), bad=bad, entries=parameters)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
        return
    console = Console()
    _show(document, console if console.is_terminal else Console(width=_WIDE))


def _sites(config: RunConfig) -> int:
    found = len(config.data.sites) or config.data.clients
    if not found:
        raise ConfigError("how many sites there are is not known", hint="say it with --sites")
    return found


def _show(document: dict[str, Any], console: Console) -> None:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column()
    for label, text in _facts(document):
        facts.add_row(label, text)
    console.print(facts)
    if document["bad"]:
        console.print()
        _show_groups(document, console)
    console.print()
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    total, one_round = document["sum"], document["round"]
    rows = [
        ("adds up", _what(document)),
        ("refuses", f"a sum of fewer than {total['fewest']} updates: every site, whatever the coordinator says"),
        ("hides an update", _claim(total["colluding"])),
        ("masks", f"shared with {total['neighbours']} others; {total['threshold']} of them restore what a site leaves"),
        ("agrees", f"when {total['quorum']} of {total['members']} have signed who is in the sum"),
        ("may be missing", _missing(document["missing"], total)),
        ("set-up", _setup(document["setup"])),
    ]
    update = f"{one_round['bits'] / 8:g} bytes a value"
    if one_round["entries"]:
        update += f", {size(one_round['update_bytes'])} an update of {one_round['entries']:,}"
    if one_round["rounding"]:
        over = ", over the mean number of examples" if one_round["weighted"] else ""
        rows.append(("rounds", f"each value of a mean by at most {one_round['rounding']:.1e}{over}"))
    return [*rows, ("a round", f"{one_round['trips']} trips; {update}")]


def _what(document: dict[str, Any]) -> str:
    sizes = document["groups"]
    if len(sizes) < 2:
        return f"the updates of all {document['asked']} sites that a round asks"
    low, high = min(sizes), max(sizes)
    each = str(low) if low == high else f"{low} or {high}"
    return f"{len(sizes)} random groups of {each}, each by itself; nobody can choose who is in a group"


def _claim(colluding: int) -> str:
    helpers = {0: "", 1: " and one site that helps it"}.get(colluding, f" and up to {colluding} sites that help it")
    return f"from a malicious coordinator{helpers}, if sites pin one another's keys; else from a curious one"


def _missing(lost: dict[str, int], total: dict[str, Any]) -> str:
    text = (
        f"{lost['update']} of {total['members']} when updates are due, {lost['statement']} when they sign, "
        f"{lost['share']} when shares are due"
    )
    if total["complete"]:
        return f"{text}; with one more the round is given up"
    return f"{text}, if chance chose them: then a round fails at most once in a million"


def _setup(setup: dict[str, Any]) -> str:
    rounds = f"{setup['epoch_rounds']} rounds" if setup["epoch_rounds"] > 1 else "one round"
    sent, received = size(setup["sent_bytes"]), size(setup["received_bytes"])
    return f"{setup['legs']} steps for {rounds}; a site sends {sent} and receives {received}"


def _sites_word(count: int) -> str:
    return "site" if count == 1 else "sites"


def _show_groups(document: dict[str, Any], console: Console) -> None:
    bad = document["bad"]
    table = Table(
        title=f"Groups that hold against {bad} bad {_sites_word(bad)} of {document['asked']}",
        title_justify="left", title_style="bold", header_style="dim", pad_edge=False, box=None,
    )  # fmt: skip
    table.add_column("strategy")
    for name in ("largest group", "groups", "of each may be missing"):
        table.add_column(name, justify="right")
    for row in document["groups_for"]:
        group = row["group_size"]
        cells = (
            ["-", "-", "too few sites"] if group is None else [str(row[k]) for k in ("group_size", "groups", "missing")]
        )
        table.add_row(row["strategy"], *cells)
    console.print(table)


def size(count: int) -> str:
    """Bytes as people write them, in powers of ten."""
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count} bytes"
