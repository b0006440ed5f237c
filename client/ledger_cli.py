"""`coterie ledger`: what was released about each data set of a site, and what its administrator decides about that.

Results go to stdout, questions and hints to stderr.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from common.errors import LedgerError

if TYPE_CHECKING:
    from client.ledger_lookup import Entry
    from common.privacy.accounting.budget import Budget

app = typer.Typer(
    name="ledger",
    rich_markup_mode="markdown",  # joins the lines of a paragraph
    help="The record of what was released about each data set, and its budget.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

WhatArgument = Annotated[
    str,
    typer.Argument(
        metavar="[NAME|FOLDER]",
        help="A data set; or a site's state folder; or the folder of a simulated run. Default: all of --state.",
        show_default=False,
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The data set.", show_default=False)]
StateOption = Annotated[
    Path,
    typer.Option(
        "--kit", "--state", help="A site's kit; or a folder which holds `ledger` and `identity`; or a run's folder."
    ),
]
ClientOption = Annotated[str | None, typer.Option("--data", help="One data set of a folder; simulated: one client.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Do not ask.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]
EpsilonOption = Annotated[float | None, typer.Option("--epsilon", help="Ceiling over everything in the ledger.")]
DeltaOption = Annotated[float | None, typer.Option("--delta", help="Delta of the ceiling.")]
OrderOption = Annotated[int | None, typer.Option("--order", help="Order of Renyi accounting.")]


@app.command()
def show(
    what: WhatArgument = "",
    *,
    state: StateOption = Path("state"),
    data: ClientOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what was spent, by whom and how it is counted. In JSON, null stands for an infinite epsilon.

    The gate is what rounds are refused by. The figures below it say what the same releases would have cost had all
    their parameters been fixed beforehand. "Against the coordinator" is infinite where the coordinator adds the noise.
    """
    from client.ledger_lookup import entries_of
    from client.ledger_report import MANY, console, facts, overview, render

    entries = entries_of(what, state, data)
    if as_json:
        _end_with_json(entries, relation="add/remove", ledgers=[facts(entry) for entry in entries])
    out = console()
    if len(entries) > MANY:
        out.print(overview(entries))
    for entry in entries if len(entries) <= MANY else ():
        out.print(render(facts(entry)))
    _raise_problems(entries)


@app.command()
def verify(
    what: WhatArgument = "",
    *,
    state: StateOption = Path("state"),
    data: ClientOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check that each ledger is what was written: every line's hash, and the counter kept with the identity key."""
    from client.ledger_lookup import entries_of

    entries = entries_of(what, state, data)
    if as_json:
        rows = [
            {"name": e.name, "where": e.where, "simulated": e.standing.simulated, "records": len(e.records)}
            | {"events": len(e.standing.events), "decisions": len(e.standing.decisions), "problem": e.problem or None}
            for e in entries
        ]
        _end_with_json(entries, ledgers=rows)
    for entry in entries:
        simulated = ", simulated" if entry.standing.simulated else ""
        accepted = f", {len(entry.standing.decisions)} accepted by hand" if entry.standing.decisions else ""
        if not entry.problem:
            counts = f"{len(entry.records)} records, {len(entry.standing.events)} events"
            typer.echo(f"{entry.name}: sound ({counts}{accepted}{simulated})")
    _raise_problems(entries)


@app.command()
def export(
    what: WhatArgument = "",
    *,
    state: StateOption = Path("state"),
    data: ClientOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="A new file instead of stdout.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write one ledger's records, one a line as they were chained, or with --json as one document.

    An export holds no secret: content is named by fingerprints that only this site can compute.
    """
    from client.ledger_lookup import entries_of

    entries = entries_of(what, state, data)
    if len(entries) != 1:
        names = ", ".join(entry.name for entry in entries)
        raise LedgerError(f"there are {len(entries)} ledgers", hint=f"name one of them: {names}")
    _raise_problems(entries)
    entry = entries[0]
    if as_json:
        text = json.dumps({"format": 1, "name": entry.name, "records": list(entry.records)}, indent=2) + "\n"
    else:
        text = "".join(json.dumps(r, sort_keys=True, separators=(",", ":")) + "\n" for r in entry.records)
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as e:
        raise LedgerError(f"{out} cannot be written: {e.strerror}", hint="choose another path with --out") from e
    typer.echo(f"{len(entry.records)} records are in {out}", err=True)


@app.command()
def budget(
    name: NameArgument,
    *,
    epsilon: EpsilonOption = None,
    delta: DeltaOption = None,
    order: OrderOption = None,
    state: StateOption = Path("state"),
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show or change the budget of a data set. A change is a record in the ledger; nothing that was spent is forgotten.

    The order stays as it was fixed when the budget opened: a ceiling that is reached step by step holds for an order
    that does not depend on what was seen. Another --order can be given where nothing was spent yet, or knowingly.
    """
    from dataclasses import asdict, replace

    from client.ledger_lookup import entry_of, existing

    ledger = existing(state, name)
    before = ledger.budget
    given = {
        key: value for key, value in (("epsilon", epsilon), ("delta", delta), ("order", order)) if value is not None
    }
    after = replace(before, **given)  # type: ignore[arg-type]
    if given:
        _confirm(f"Change the budget of {name} from {_words(before)} to {_words(after)}?", yes=yes)
        ledger.set_budget(after)
    spent = ledger.standing().spent
    if as_json:
        from client.ledger_report import facts

        entry = entry_of(ledger)
        _print_json({"format": 1, "name": name, "budget": asdict(after), "spent": facts(entry)["spent"]})
    else:
        typer.echo(f"{name}: {_words(after)}, add/remove; spent by the gate: {spent:.4g}")


@app.command()
def accept(
    name: NameArgument,
    *,
    assume_spent: Annotated[
        bool, typer.Option("--assume-spent", help="What cannot be read had spent the whole budget. The default.")
    ] = False,
    assume_nothing_lost: Annotated[
        bool, typer.Option("--assume-nothing-lost", help="All that was released is in the lines that can be read.")
    ] = False,
    epsilon: EpsilonOption = None,
    delta: DeltaOption = None,
    order: OrderOption = None,
    state: StateOption = Path("state"),
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Decide what becomes of a ledger that cannot be trusted. Until then the site trains nothing on its data set.

    First look for the right files: a ledger or an identity folder that was restored from a backup can be put back, and
    then nothing needs to be decided.

    Otherwise the ledger goes on from its first lines that are sound. Of the rest nobody knows. By default
    (--assume-spent) the budget counts as spent: one event is added that uses it up, and only what `coterie ledger
    budget` adds later can be spent. With --assume-nothing-lost the rest is taken to be nothing: that is right where you
    know it, such as a counter that was restored from a backup while all lines of the ledger are sound; anywhere else it
    breaks the promise made to the people in the data.

    Nothing is deleted: the files are kept beside their places as NAME.damaged-1, and the ledger says for ever what was
    expected, what was found and what was assumed. Where neither the ledger nor its counter tells the budget, give it
    with --epsilon and --delta.
    """
    from client.ledger_lookup import existing
    from common.privacy.accounting.budget import Budget
    from common.privacy.ledger.administration import accept as write_decision
    from common.privacy.ledger.administration import findings

    if assume_spent and assume_nothing_lost:
        raise typer.BadParameter("--assume-spent and --assume-nothing-lost contradict each other")
    ledger = existing(state, name)
    known = None if epsilon is None or delta is None else Budget.opened(epsilon, delta, order)
    found = findings(ledger)
    if not found["problem"]:
        raise LedgerError(f"the ledger of {name} can be trusted: there is nothing to decide", hint="go on as it is")
    expected = found["expected"]
    lines = [
        f"{ledger.path} cannot be trusted: {found['problem']}",
        f"  expected: {'unknown' if expected is None else expected['records']} records",
        f"  sound:    {found['found']['records']} records",
        "  assumed about the rest: " + ("nothing was lost" if assume_nothing_lost else "it spent the whole budget"),
    ]
    for line in lines:
        typer.echo(line, err=True)
    _confirm("Write this decision into the ledger?", yes=yes)
    decision = write_decision(ledger, assume="nothing-lost" if assume_nothing_lost else "spent", budget=known)
    if as_json:
        _print_json({"format": 1, "name": name, "decision": decision})
        return
    typer.echo(f"{name}: accepted; what was found is kept as {', '.join(decision['kept']) or 'nothing: it was gone'}")
    if not assume_nothing_lost:
        typer.echo(f"hint: `coterie ledger budget {name} --epsilon E` gives it more than was assumed spent", err=True)


def _end_with_json(entries: Sequence[Entry], **document: Any) -> NoReturn:
    """Print one document and end; with the exit code of a ledger error where one cannot be trusted."""
    _print_json({"format": 1, **document})
    raise typer.Exit(LedgerError.exit_code if any(entry.problem for entry in entries) else 0)


def _raise_problems(entries: Sequence[Entry]) -> None:
    """Raise LedgerError for the first that cannot be trusted."""
    for entry in entries:
        if entry.problem:
            raise LedgerError(
                f"{entry.where} cannot be trusted: {entry.problem}",
                hint=f"put the right file back, or decide with `coterie ledger accept {entry.name}`",
            )


def _confirm(question: str, *, yes: bool) -> None:
    """Ask, unless told not to; who cannot be asked must say `--yes`."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise LedgerError("this needs a decision, and nobody can be asked here", hint="add --yes")
    typer.echo(f"{question} [y/N] ", nl=False, err=True)  # click's own prompt writes to stdout
    if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
        raise typer.Abort


def _words(value: Budget) -> str:
    return f"epsilon {value.epsilon:g} at delta {value.delta:g} (order {value.order})"


def _print_json(document: dict[str, Any]) -> None:
    typer.echo(json.dumps(document, indent=2))
