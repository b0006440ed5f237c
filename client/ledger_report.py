"""What `coterie ledger show` says of a ledger: first as plain values, then as tables for people."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from client.ledger_lookup import Entry
from common.errors import PrivacyError
from common.guarantee import UPDATE_REPLACED, against
from common.privacy.accounting.accountant import ACCOUNTANTS, Accountant, Relation, against_coordinator, spent
from common.privacy.accounting.budget import Budget
from common.privacy.events import DistributedNoise, NonPrivate, PrivacyEvent, SampledGaussian, Unit
from common.privacy.ledger.standing import Standing

UNITS = {"example": "each example", "entity": "each entity", "client": "each client's whole data"}
WIDE = 200
"""Columns of a table that is not shown on a terminal, so that nothing in it is cut off."""

_SHORT = 12
_NEARLY = 0.8
MANY = 8
"""With more ledgers each has a line only."""
_UNITS: tuple[Unit, ...] = ("example", "client")


def facts(entry: Entry) -> dict[str, Any]:
    """An entry as JSON values. Infinity is null."""
    standing = entry.standing
    document: dict[str, Any] = {
        "name": entry.name,
        "where": entry.where,
        "simulated": standing.simulated,
        "problem": entry.problem or None,
    }
    if entry.problem:
        return document
    return document | {
        "names": sorted(standing.names),
        "unit": standing.unit,
        "relation": "add/remove",
        "budget": asdict(standing.budget),
        "spent": _finite(standing.spent),
        "share": _finite(standing.share),
        "epsilon": _epsilons(standing),
        "events": groups(standing.events, example="entity" if standing.unit == "entity" else "example"),
        "budgets": [
            {"time": record.get("time"), **record["budget"]}
            for record in entry.records
            if record["record"] in {"opened", "budget"}
        ],
        "decisions": standing.decisions,
    }


def groups(events: Iterable[PrivacyEvent], *, example: str = "example") -> list[dict[str, Any]]:
    """Equal events of one run together, with the rounds that they cover; in the order of each first one.

    Args:
        events: What was released.
        example: What the data set calls an example.
    """
    rounds: dict[PrivacyEvent, list[int]] = {}
    for event in events:
        rounds.setdefault(replace(event, server_round=1), []).append(event.server_round)
    return [
        {"run": event.run, "rounds": ranges(at), "events": len(at), "kind": event.KIND, **_mechanism(event, example)}
        for event, at in rounds.items()
    ]


def ranges(numbers: Iterable[int]) -> str:
    """Numbers as people write them: `1-3, 5`."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _mechanism(event: PrivacyEvent, example: str) -> dict[str, Any]:
    if isinstance(event, NonPrivate):
        return {"unit": None, "trust": None, "noise_multiplier": None, "sampling_rate": None, "steps": None}
    unit = example if event.unit == "example" else event.unit
    values: dict[str, Any] = {"unit": unit, "trust": event.trust, "noise_multiplier": event.noise_multiplier}
    if isinstance(event, SampledGaussian):
        return values | {"sampling_rate": event.sampling_rate, "steps": event.steps}
    if isinstance(event, DistributedNoise):
        shares = {"mechanism": event.mechanism, "honest": event.shares, "colluding": event.colluding}
        return values | {"sampling_rate": None, "steps": event.steps, "shares": shares, "relation": UPDATE_REPLACED}
    return values | {"sampling_rate": None, "steps": None, "rounds_covered": event.rounds}


def _epsilons(standing: Standing) -> list[dict[str, Any]]:
    """What each accountant says, for each unit, against everybody else and against the coordinator.

    `client` is left out where some event protects single examples only: it is infinite, and nobody claimed anything.
    """
    events = standing.events
    claimed = all(getattr(event, "unit", "client") == "client" for event in events)
    units: tuple[Unit, ...] = ("client",) if standing.unit == "client" else _UNITS if claimed else ("example",)
    return [
        {
            "unit": unit,
            "accounting": accountant.name,
            "relation": accountant.relation,
            "gate": isinstance(accountant, _Gate),
            "epsilon": _told(accountant, events, standing.budget, unit),
            "against_coordinator": _told(accountant, against_coordinator(events), standing.budget, unit),
        }
        for unit in units
        for accountant in (_Gate(f"Renyi, order {standing.budget.order}", standing.budget), *ACCOUNTANTS)
    ]


@dataclass(frozen=True, slots=True)
class _Gate:
    """The gate as one accountant among the others."""

    name: str
    budget: Budget
    relation: Relation = "add/remove"

    def epsilon(self, events: Iterable[PrivacyEvent], *, delta: float, unit: Unit = "example") -> float:
        return spent(events, budget=replace(self.budget, delta=delta), unit=unit)


def _told(accountant: Accountant, events: Sequence[PrivacyEvent], budget: Budget, unit: Unit) -> float | None:
    """An accountant's figure; None where it is infinite or cannot be computed, which is no less."""
    try:
        return _finite(accountant.epsilon(events, delta=budget.delta, unit=unit))
    except PrivacyError:
        return None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def render(document: dict[str, Any]) -> RenderableType:
    """What `facts` says, for people."""
    title = Text(document["name"], style="bold")
    if document["simulated"]:
        title.append("  simulated: nothing real was released", style="yellow")
    if document["problem"]:
        return Group(
            title, Padding(Text(f"cannot be trusted: {document['problem']}", style="red"), (0, 0, 0, 2), expand=False)
        )
    parts: list[RenderableType] = [_budget(document), _epsilon_table(document), _event_table(document["events"])]
    parts.extend(_sums_note(document["events"]))
    if len(document["budgets"]) > 1:
        parts.append(_budget_table(document["budgets"]))
    if document["decisions"]:
        parts.append(_decision_table(document["decisions"]))
    also = [name for name in document["names"] if name != document["name"]]
    if also and not document["simulated"]:
        title.append(f"  also known as {', '.join(also)}", style="dim")
    return Group(title, *(Padding(part, (0, 0, 1, 2), expand=False) for part in parts))


def overview(entries: Sequence[Entry]) -> RenderableType:
    """Many ledgers, a line each."""
    table = _table("ledger", "protects", "spent", "of epsilon", "used", "events", right=("spent", "of epsilon", "used"))
    for entry in entries:
        if entry.problem:
            table.add_row(entry.name, Text(f"cannot be trusted: {entry.problem}", style="red"))
            continue
        standing = entry.standing
        share = _finite(standing.share)
        used = "all" if share is None or share >= 1 else f"{100 * share:.1f} %"
        epsilon = number(_finite(standing.spent)), f"{standing.budget.epsilon:.4g}"
        table.add_row(entry.name, standing.unit, *epsilon, used, str(len(standing.events)))
    simulated = any(entry.standing.simulated for entry in entries if not entry.problem)
    told = "simulated: nothing real was released; " if simulated else ""
    return Group(table, Text(f"{told}--data NAME shows one of them", style="dim"))


def console() -> Console:
    """Standard output; wide where it is no terminal."""
    plain = Console()
    return plain if plain.is_terminal else Console(width=WIDE)


def number(value: float | None) -> str:
    """An epsilon for people."""
    return "infinite" if value is None else f"{value:.4g}"


def _budget(document: dict[str, Any]) -> RenderableType:
    budget, used, share = document["budget"], document["spent"], document["share"]
    style = "red" if share is None or share >= 1 else "yellow" if share > _NEARLY else "green"
    bar = ProgressBar(
        total=1.0,
        completed=1.0 if share is None else min(share, 1.0),
        width=24,
        complete_style=style,
        finished_style=style,
    )
    fits = "nothing more fits" if share is None or share >= 1 else f"{100 * share:.1f} % of what fits"
    line = Table.grid(padding=(0, 1))
    line.add_row(bar, Text(f"epsilon {number(used)} of {budget['epsilon']:g} spent: {fits}", style=style))
    line.add_row("", Text(f"at delta {budget['delta']:g}, for {UNITS[document['unit']]} added or removed", style="dim"))
    return line


def _table(*columns: str, right: Iterable[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return table


def _epsilon_table(document: dict[str, Any]) -> RenderableType:
    rows = document["epsilon"]
    several = len({row["unit"] for row in rows}) > 1
    figures = ("epsilon", "against the coordinator")
    table = _table(*(("unit",) if several else ()), "accounting", "relation", *figures, right=figures)
    for row in rows:
        unit = (Text(row["unit"]),) if several else ()
        name = Text(row["accounting"] + (" (the gate)" if row["gate"] else ""), style="bold" if row["gate"] else "")
        relation = Text(row["relation"])
        table.add_row(*unit, name, relation, *(Text(number(row[key])) for key in ("epsilon", "against_coordinator")))
    note = Text("below the gate: as if all parameters had been fixed beforehand", style="dim")
    return Group(table, note)


def _event_table(events: Sequence[dict[str, Any]]) -> RenderableType:
    if not events:
        return Text("no events", style="dim")
    figures = ("noise multiplier", "rate", "steps")
    table = _table("run", "rounds", "release", "protects", "trusts", *figures, right=figures)
    for event in events:
        noise, rate, steps = (event[key] for key in ("noise_multiplier", "sampling_rate", "steps"))
        short = event["run"] if " " in event["run"] else event["run"][:_SHORT]
        rounds = event["rounds"]
        if "rounds_covered" in event:
            rounds = ranges(range(int(rounds), int(rounds) + event["rounds_covered"])) if rounds.isdigit() else rounds
        cells = (
            short,
            rounds,
            event["kind"],
            event["unit"] or "nobody",
            _trusted(event),
            "-" if noise is None else f"{noise:.4g}",
            "-" if rate is None else f"{rate:.4g}",
            "-" if steps is None else str(steps),
        )
        table.add_row(*(Text(cell, style="red" if noise is None else "") for cell in cells))
    return table


def _trusted(event: dict[str, Any]) -> str:
    """Whom the guarantee of an event rests on."""
    if shares := event.get("shares"):
        honest = shares["honest"]
        return f"{honest} site{'s' if honest > 1 else ''} of each sum"
    return event["trust"] or "everybody"


def _sums_note(events: Sequence[dict[str, Any]]) -> Iterator[Text]:
    """What holds of noise that the clients of a sum add; nothing where there was none."""
    colluding = [event["shares"]["colluding"] for event in events if "shares" in event]
    if colluding:
        yield Text(
            f"{DistributedNoise.KIND} holds {against('cohort', min(colluding))}; for a client it compares "
            f"{UPDATE_REPLACED}; every line counts it by Renyi accounting",
            style="dim",
        )


def _budget_table(budgets: Sequence[dict[str, Any]]) -> RenderableType:
    table = _table("budget set (UTC)", "epsilon", "delta", "order", right=("epsilon", "delta", "order"))
    for budget in budgets:
        values = (f"{budget['epsilon']:g}", f"{budget['delta']:g}", str(budget["order"]))
        table.add_row(Text(str(budget["time"] or "")), *(Text(value) for value in values))
    return table


def _decision_table(decisions: Sequence[dict[str, Any]]) -> RenderableType:
    table = _table("accepted (UTC)", "what was wrong", "assumed", "kept as")
    for decision in decisions:
        assumed = "all spent" if decision["assumed"] == "spent" else "nothing lost"
        cells = (str(decision["time"]), decision["problem"], assumed, ", ".join(decision["kept"]))
        table.add_row(*(Text(cell, style="yellow") for cell in cells))
    return table
