"""`coterie models`: which models can be named in a configuration, and what they can be told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.site import load_site


def models(
    site_file: Annotated[Path | None, typer.Option("--site", help="Also list the models of this site.toml.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """List the models that a configuration can name, with their options."""
    from common.models import describe, model_names
    from common.models.options import limits

    built_in = describe()
    names = {model.name for model in built_in}
    own = [name for name in model_names(load_site(site_file)) if name not in names]
    if as_json:
        document: dict[str, Any] = {
            model.name: {
                "summary": model.summary,
                "data": list(model.families),
                "options": {o.name: {"default": o.default, "help": o.help} for o in model.options},
            }
            for model in built_in
        }
        typer.echo(json.dumps(document | {name: {"summary": "from site.toml"} for name in own}))
        return
    table = Table(box=None, header_style="dim", pad_edge=False)
    for title in ("model", "data", "option", "default", "meaning"):
        table.add_column(title)
    for model in built_in:
        table.add_row(model.name, ", ".join(model.families), "", "", model.summary, style="bold")
        for option in model.options:
            meaning = f"{option.help} Allowed: {limits(option)}." if option.type in (int, float) else option.help
            table.add_row("", "", option.name, json.dumps(option.default), meaning)
    for name in own:
        table.add_row(name, "", "", "", "from site.toml", style="bold")
    Console().print(table)
