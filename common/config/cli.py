"""`coterie config`: write a complete example, or show what a run would use and where each value comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from common.config.load import flatten, load_config, setting_fields
from common.config.render import describe, documented_toml
from common.errors import ConfigError

app = typer.Typer(no_args_is_help=True, help="Write, explain and check a run's configuration.")

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, as --set rounds=5. Repeatable."),
]
Source = Annotated[str | None, typer.Argument(help="A TOML file or a scenario's name; defaults if left out.")]


@app.command()
def init(
    source: Source = None,
    out: Annotated[Path, typer.Option("--out", help="File to write.")] = Path("run.toml"),
    overrides: Overrides = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file if it is there.")] = False,
) -> None:
    """Write a configuration file with every setting explained."""
    config = load_config(source, overrides or ()).config
    if out.exists() and not force:
        raise ConfigError(f"{out} exists already", hint="name another file with --out, or add --force")
    try:
        out.write_text(documented_toml(config), encoding="utf-8")
    except OSError as e:
        raise ConfigError(f"{out} cannot be written: {e.strerror}", hint="name another file with --out") from e
    typer.echo(f"wrote {out}; run it with: coterie simulate {out}", err=True)


@app.command()
def show(
    source: Source = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Print every setting, its value, and where the value came from."""
    loaded = load_config(source, overrides or ())
    values = dict(flatten(loaded.config.model_dump(mode="json")))
    if as_json:
        settings = {key: {"value": value, "from": loaded.origins.get(key, "default")} for key, value in values.items()}
        typer.echo(json.dumps({"digest": loaded.config.digest(), "settings": settings}, indent=2))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title, width in (("setting", None), ("value", None), ("from", None), ("meaning", None)):
        table.add_column(title, width=width, overflow="fold", no_wrap=title != "meaning")
    fields = dict(setting_fields())
    for key, field in fields.items():
        shown = {k: v for k, v in values.items() if k == key or k.startswith(f"{key}.")} or {key: None}
        for name, value in shown.items():
            origin = loaded.origins.get(name, "default")
            style = None if origin == "default" else "green"
            text = "not set" if value in (None, {}) else json.dumps(value)
            table.add_row(name, text, origin, describe(field), style=style)
    Console().print(table)
