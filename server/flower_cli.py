"""`coterie flower`: the same training under Flower's own runtime, and what does not hold there."""

from __future__ import annotations

import secrets
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from common.config.cli import Overrides
from common.errors import SiteError

app = typer.Typer(help="Run Coterie under Flower's own runtime (SuperLink, SuperNode, `flwr run`).")

WARNING = (
    "under Flower's own runtime a site is not sovereign: its SuperNode executes whatever code a bundle brings, and "
    "whoever reaches the SuperLink's control API can start one, without a password. Weights stay sealed, and a site's "
    "policy and ledger hold as long as the code that arrives is Coterie's. Only a site that runs an executor of its "
    "own is safe from other code: `coterie flower executor`"
)
EXECUTOR = "flwr-clientapp"
"""What a site's flower-superexec starts for every message."""


@app.callback(invoke_without_command=True)
def flower(context: typer.Context) -> None:
    """Run Coterie under Flower's own runtime (SuperLink, SuperNode, `flwr run`)."""
    typer.secho("warning: ", fg="yellow", bold=True, nl=False, err=True)
    typer.echo(WARNING, err=True)
    if context.invoked_subcommand is None:
        typer.echo(
            "hint: docs/flower-runtime.md takes you through it; `coterie flower --help` lists commands", err=True
        )


@app.command()
def bundle(
    run: Annotated[str, typer.Option("--run", metavar="RUN", help="A TOML file, or a scenario's name.")],
    *,
    kit: Annotated[Path, typer.Option("--kit", help="The kit of the operator who orders the run and signs it.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; new or empty.")],
    overrides: Overrides = None,
) -> None:
    """Write a bundle for one run, signed by an operator; `flwr run` starts it."""
    from common.config import load_config
    from common.crypto import authorize
    from common.kit import load_kit
    from server.flower_bundle import write_bundle
    from server.flower_run import read_order

    config = load_config(run, overrides or ()).config
    operator = load_kit(kit, role="operator")
    run_id = secrets.token_hex(16)
    authorization = authorize(
        operator.keys, federation=operator.federation, run_id=run_id, config_digest=config.digest()
    )
    read_order(operator, text=config.canonical_json(), authorization=authorization)  # what the coordinator would refuse
    write_bundle(out, config, federation=operator.federation, authorization=authorization)
    typer.echo(run_id)
    typer.echo(f"wrote {out}; start it with: flwr run {shlex.quote(str(out))} YOUR_SUPERLINK --stream", err=True)


@app.command()
def executor(
    out: Annotated[Path, typer.Option("--out", help="Folder to write, which is then put first on PATH.")],
) -> None:
    """Write a site's own executor: it runs the installed Coterie, whatever code a bundle brings."""
    script = out / EXECUTOR
    try:
        out.mkdir(parents=True, exist_ok=True)
        # -I: neither the folder that it is started in nor the environment can bring other modules
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -m client.flower_executor "$@"\n')
        script.chmod(0o755)
    except OSError as e:
        raise SiteError(f"{script} cannot be written: {e.strerror}", hint="name another folder with --out") from e
    folder = shlex.quote(str(out.absolute()))
    typer.echo(f"wrote {script}; start the site's executor with: PATH={folder}:$PATH flower-superexec ...", err=True)
