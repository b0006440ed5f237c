"""`coterie policy`: write a site's rules, and check them against its data, locally."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import SiteError

app = typer.Typer(
    name="policy", help="A site's own rules: policy.toml.", no_args_is_help=True, pretty_exceptions_enable=False
)

_EXAMPLE_HEAD = """\
# What this site takes part in, and what it may spend. Nothing that arrives can change it.

[budget]
# Over all runs, for each data set; neighbouring data sets differ by one example (or entity) added or removed.
# A ledger opens with it; change the budget of one that exists with `coterie ledger budget`.
epsilon = {epsilon}
# Below one over the number of rows: `coterie policy check` compares them here, once; nothing is sent.
delta = {delta}
"""


@app.command()
def init(
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("policy.toml"),
    epsilon: Annotated[float, typer.Option("--epsilon", help="Ceiling over all runs.")] = 10.0,
    delta: Annotated[float, typer.Option("--delta", help="Delta of the ceiling.")] = 1e-6,
) -> None:
    """Write a policy with every rule and its default."""
    from client.policy import load_policy

    text = _example(epsilon, delta)
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as e:
        raise SiteError(f"{out} is there already", hint="choose another name with --out") from e
    except OSError as e:
        raise SiteError(f"{out} cannot be written: {e.strerror}", hint="check the folder and its permissions") from e
    try:
        load_policy(out)
    except SiteError:
        out.unlink()
        raise
    typer.echo(f"wrote {out}")


@app.command()
def check(
    policy: Annotated[Path, typer.Argument(help="The policy to check.")],
    site: Annotated[Path | None, typer.Option("--site", help="The site's registry: a site.toml.")] = None,
    data: Annotated[str | None, typer.Option("--data", help="Data set to compare delta with.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Check a policy, and its delta against one over the number of rows. Nothing is sent."""
    from client.policy import load_policy

    rules = load_policy(policy)
    document: dict[str, Any] = {
        "format": 1,
        "policy": rules.model_dump(mode="json"),
        "units": None,
        "delta_is_small": None,
    }
    if data is not None:
        from common.data import check_data
        from common.site import load_site

        report = check_data(data, site=load_site(site))
        units = report.entities or report.rows
        largest = max(rules.limits.largest_delta, rules.budget.delta if rules.budget else 0.0)
        document |= {"units": units, "delta_is_small": largest * units < 1}
        if largest * units >= 1:
            raise SiteError(
                f"{policy}: delta {largest:g} is not below one over the {units} rows or entities of {data}",
                hint=f"set budget.delta and limits.largest_delta to {0.1 / units:.0e} or less",
            )
    if as_json:
        typer.echo(json.dumps(document))
        return
    budget = f"epsilon {rules.budget.epsilon:g} at delta {rules.budget.delta:g}" if rules.budget else "none"
    typer.echo(f"{policy} is valid; budget over all runs: {budget}; units: {', '.join(rules.limits.units) or 'none'}")
    sums = rules.secure_aggregation
    when = "needed for every run" if rules.privacy.require_secure_aggregation else "where a run has it"
    typer.echo(
        f"secure aggregation: {when}; sums of {sums.smallest_cohort} sites or more, {sums.colluding} of them colluding"
    )
    if data is not None:
        typer.echo(f"delta is below one over the {document['units']} rows or entities of {data}")


def _example(epsilon: float, delta: float) -> str:
    """A policy with every rule, its default and what it is for; a rule that is not set stands in a comment."""
    from textwrap import fill

    import tomli_w

    from client.policy import Policy

    lines = [_EXAMPLE_HEAD.format(epsilon=epsilon, delta=delta)]
    for table, rules in Policy().tables():
        lines.append(f"\n[{table}]\n")
        for name, field in type(rules).model_fields.items():
            value = getattr(rules, name)
            line = f"# {name} =\n" if value is None else tomli_w.dumps({name: value}, multiline_strings=False)
            lines.append(f"{fill(field.description or '', 110, initial_indent='# ', subsequent_indent='# ')}\n{line}")
    return "".join(lines)
