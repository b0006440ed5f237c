"""`coterie privacy plan`: what a run would cost, under both neighbouring relations, before anything is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.config.cli import Overrides
from common.errors import ConfigError
from common.guarantee import against

if TYPE_CHECKING:
    from client.policy import Policy
    from common.privacy import PrivacyPlan

app = typer.Typer(
    name="privacy", help="What differential privacy costs.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _root() -> None:
    """Keeps `plan` a sub-command while it is the only one."""


@app.command()
def plan(  # noqa: PLR0917 - typer reads options from the signature
    source: Annotated[str, typer.Argument(help="A scenario's name or a TOML file.")],
    overrides: Overrides = None,
    site: Annotated[Path | None, typer.Option("--site", help="Your own models and data: a site.toml.")] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="A site's policy.toml: also say whether it takes part.")
    ] = None,
    what_if: Annotated[
        bool, typer.Option("--what-if", help="Also: epsilon for other noise and rounds, noise for other targets.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print a run's noise, its epsilon after each round, and what it costs at a site."""
    from common.config import load_config

    config = load_config(source, overrides or ()).config
    if not config.private:  # a scenario's [dp] table comes with the unit
        config = load_config(source, [*(overrides or ()), "privacy.unit=example"]).config
    if config.privacy.target_epsilon is None and config.privacy.noise_multiplier is None:
        raise ConfigError(f"{source} has no privacy target", hint="for example --set privacy.target_epsilon=3")
    from client.policy import load_policy
    from simulations.planning import describe_plan
    from simulations.planning import what_if as other_plans
    from simulations.run import prepare

    rules = load_policy(policy) if policy else None
    prepared = prepare(config, folder=Path(), site_file=site)
    clients = len(prepared.federation.clients)
    if prepared.plan is None:
        raise ConfigError("the run is not private", hint="set privacy.unit")
    document = describe_plan(prepared.plan, config, clients=clients)
    if rules is not None:
        document["policy"] = _verdict(rules, config, prepared.plan)
    if what_if:
        document["what_if"] = other_plans(prepared.plan, config, clients=clients)
    if as_json:
        typer.echo(json.dumps(document, allow_nan=False))
    else:
        _show(document, Console())


def _verdict(policy: Policy, config: Any, plan: PrivacyPlan) -> dict[str, Any]:
    """Whether a site with this policy and an empty ledger takes part, and what is left then."""
    from common.errors import PeerError
    from common.privacy import spent

    try:
        policy.check(config)
        policy.check_plan(plan)
        refused = False
    except PeerError:
        refused = True
    budget = policy.opened_budget()
    cost = spent([plan.event(r + 1) for r in range(plan.participations)], budget=budget)
    joins = not refused and cost <= budget.epsilon
    return {"joins": joins, "within_limits": not refused, "epsilon": cost, "budget_epsilon": budget.epsilon,
            "budget_delta": budget.delta, "order": budget.order}  # fmt: skip


def _show(document: dict[str, Any], console: Console) -> None:
    facts = Table(box=None, show_header=False, pad_edge=False)
    facts.add_column(style="dim")
    facts.add_column()
    protects = {"example": "each example (or entity) at each client", "client": "each client's whole data"}
    shares = document["shares"]
    held = against(document["trust"], shares and shares["colluding"])
    facts.add_row("protects", f"{protects[document['unit']]}, {held}")
    facts.add_row(
        "budget", f"epsilon {document['budget']['epsilon']:.4g} at delta {document['budget']['delta']:g}, "
        f"{document['relation']}, Renyi order {document['budget']['order']}"
    )  # fmt: skip
    facts.add_row(
        "noise", f"multiplier {document['noise_multiplier']:.4g}: standard deviation {document['noise_stddev']:.4g} on "
        f"each of {document['dimensions']:,} coordinates of a sum with sensitivity {document['sensitivity']:.6g}"
    )  # fmt: skip
    if shares:
        facts.add_row(
            "shares", f"that is the {shares['mechanism']} noise of {shares['honest']} honest clients; each client of a "
            f"sum ({shares['clients']} at most) adds as much, in a ring of {shares['bits']} bits"
        )  # fmt: skip
    facts.add_row("clipping", f"{document['clipping']}, norm {document['clipping_norm']:g}")
    sampled = f"rate {document['sampling_rate']:.3g}" if document["sampling_rate"] < 1 else "no amplification"
    divisor = "the number of survivors" if shares else f"{document['denominator']:g}"
    facts.add_row(
        "releases", f"{document['rounds']} rounds, a client takes part in at most {document['participations']}, "
        f"{document['local_steps']} a round; {sampled}; divided by {divisor}"
    )  # fmt: skip
    console.print(facts)
    console.print()
    table = Table("after rounds", box=None, header_style="dim", pad_edge=False)
    for name in ("epsilon (gate)", "best order*", "privacy loss*", "replace-one*"):
        table.add_column(name, justify="right")
    for row in document["after"]:
        table.add_row(str(row["rounds"]), *_figures(row))
    table.add_section()
    table.add_row("[dim]one example at a site[/dim]", *_figures(document["site"]))
    console.print(table)
    console.print(
        "* as if all parameters had been fixed beforehand. replace-one: neighbours differ in one unit's values."
        + (" Distributed noise is counted by Renyi accounting in every column." if shares else ""),
        style="dim",
    )
    if document["site"]["epsilon_against_coordinator"] is None:
        console.print("Against the coordinator, which adds the noise, there is no protection.", style="yellow")
    if "policy" in document:
        console.print()
        _show_verdict(document["policy"], console)
    if "what_if" in document:
        console.print()
        _show_what_if(document["what_if"], console)
    for warning in document["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {warning}")


def _figures(row: dict[str, Any]) -> list[str]:
    keys = ("epsilon", "renyi_best_order", "privacy_loss", "replace_one")
    return ["infinite" if row[key] is None else f"{row[key]:.3f}" for key in keys]


def _show_verdict(verdict: dict[str, Any], console: Console) -> None:
    if not verdict["within_limits"]:
        console.print("[red]This policy refuses the run:[/red] it asks for more than its limits allow.")
        return
    word = "[green]takes part[/green]" if verdict["joins"] else "[red]refuses[/red]"
    console.print(
        f"A site with this policy and an empty ledger {word}: the run costs epsilon {verdict['epsilon']:.4g} of "
        f"{verdict['budget_epsilon']:g} at delta {verdict['budget_delta']:g} (Renyi order {verdict['order']})."
    )


def _show_what_if(tables: dict[str, Any], console: Console) -> None:
    for key, name, cell, title in (
        ("epsilon", "noise_multiplier", "epsilon", "epsilon, by noise multiplier and rounds"),
        ("noise", "target_epsilon", "noise_multiplier", "noise multiplier, by target and rounds"),
    ):
        table = Table(
            title=title, title_justify="left", title_style="bold", header_style="dim", pad_edge=False, box=None
        )
        table.add_column(name.replace("_", " "), justify="right", style="dim")
        for rounds in tables["rounds"]:
            table.add_column(f"{rounds} rounds", justify="right")
        for row in tables[key]:
            table.add_row(f"{row[name]:.3g}", *("-" if value is None else f"{value:.3g}" for value in row[cell]))
        console.print(table)
        console.print()
