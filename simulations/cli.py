"""`coterie simulate`: many clients on one machine, from a scenario or a configuration file to a run folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from common.config import load_config
from common.config.cli import Overrides
from common.config.load import scenario_names
from common.errors import ConfigError
from simulations.logs import log_to_stderr

if TYPE_CHECKING:
    from simulations.rerun import Original

Engine = Literal["inline", "ray"]
Batching = Literal["auto", "on", "off"]


def simulate(  # noqa: PLR0917 - typer reads options from the signature
    source: Annotated[str | None, typer.Argument(help="A scenario's name or a TOML file.")] = None,
    overrides: Overrides = None,
    dp: Annotated[
        bool, typer.Option("--dp", help="Switch on example-level privacy: --set privacy.unit=example.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder to write; default: a new one in --root.")
    ] = None,
    root: Annotated[Path, typer.Option("--root", help="Folder that holds run folders.")] = Path("runs"),
    resume: Annotated[
        str | None,
        typer.Option("--resume", metavar="RUN", help="Continue an interrupted run: its folder, its name, or latest."),
    ] = None,
    rerun: Annotated[
        str | None,
        typer.Option(
            "--rerun", metavar="RUN", help="Do a finished run again, and check that it is the same to the byte."
        ),
    ] = None,
    workers: Annotated[
        str, typer.Option("--workers", help="Processes that train clients: a number, or auto.")
    ] = "auto",
    engine: Annotated[
        Engine, typer.Option("--engine", help="inline, or Flower's simulation runtime on Ray.")
    ] = "inline",
    ray_address: Annotated[
        str | None,
        typer.Option("--ray-address", metavar="ADDRESS", help="A Ray cluster for --engine ray: host:port, or auto."),
    ] = None,
    ray_gpus: Annotated[
        float,
        typer.Option("--ray-gpus", min=0, help="GPUs, or a share of one, for each client of the cluster."),
    ] = 0.0,
    batching: Annotated[
        Batching | None,
        typer.Option(
            "--batching",
            help="Whether small clients train stacked, as one computation: auto (default) finds out what is quicker.",
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FILE", help="Devices of the simulated clients, a JSON document a line."),
    ] = None,
    sealed: Annotated[
        bool, typer.Option("--sealed", help="Seal all messages as between machines; the result is the same to the bit.")
    ] = False,
    site: Annotated[Path | None, typer.Option("--site", help="Your own models and data: a site.toml.")] = None,
    insecure_fixed_noise: Annotated[
        int | None,
        typer.Option(
            "--insecure-fixed-noise",
            metavar="SEED",
            min=0,
            help="Draw noise from a seed, so that a private run repeats to the bit. Protects nobody.",
        ),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Train across simulated clients; leaves a run folder with model, result and report."""
    log_to_stderr(quiet=quiet or as_json)
    changes = [*(overrides or ()), *(["privacy.unit=example"] if dp else [])]
    if resume is not None and rerun is not None:
        raise ConfigError("--resume continues a run, --rerun does a finished one again", hint="choose one of them")
    fixed = [source, *changes, insecure_fixed_noise, batching, trace]
    for option, run in (("--resume", resume), ("--rerun", rerun)):
        if run is not None and (any(given is not None for given in fixed) or (resume is not None and out is not None)):
            raise ConfigError(
                f"{option} takes a run as it was",
                hint="leave out the scenario, --set, --dp, --insecure-fixed-noise, --batching, --trace"
                + (" and --out" if resume is not None else ""),
            )
    if ray_address is not None and engine != "ray":
        raise ConfigError("--ray-address is for --engine ray", hint="add --engine ray")
    from client.memory import keep_freed_memory
    from server.cli import find_run
    from server.store import RunFolder
    from simulations.clock import trace_digest
    from simulations.how import How
    from simulations.interrupt import interruptible
    from simulations.runner import carry_out, progress_display, reopen

    how = How(
        site_file=site, sealed=sealed, batching=batching or "auto", insecure_seed=insecure_fixed_noise, trace=trace
    )
    folder, first, record = None, None, None
    if resume is not None:
        config, plain, folder = reopen(find_run(resume, root).path)
        how = How.kept(folder.path)
    elif rerun is not None:
        from simulations.rerun import original

        first = original(find_run(rerun, root).path)
        config, plain, how, record = first.config, first.plain, first.how, first.batching
    else:
        if source is None:
            raise ConfigError("nothing to simulate", hint=f"name a file or a scenario: {', '.join(scenario_names())}")
        devices = [f"simulation.devices.trace={trace_digest(trace)}"] if trace else []
        loaded = load_config(source, [*changes, *devices])
        config, plain = loaded.config, loaded.plain
    how = replace(
        how,
        site_file=site or how.site_file,
        sealed=sealed or how.sealed,
        workers=workers,
        engine=engine,
        ray_address=ray_address,
        ray_gpus=ray_gpus,
        quiet=quiet or as_json,
    )
    how.processes(most=1)
    keep_freed_memory()
    with interruptible(), progress_display(quiet=how.quiet) as progress:
        result, path = carry_out(
            config,
            plain,
            folder,
            lambda: RunFolder.create(config, out, root=root),
            how,
            progress,
            batching=record,
        )
    same = None if first is None else _same(first, path)
    if as_json:
        arms = (result["comparison"] or {}).get("arms", {})
        repeated = {} if same is None else {"same_as": same}
        typer.echo(json.dumps({**result, **arms, "folder": str(path), **repeated}, allow_nan=False))
    else:
        from simulations.tables import print_result

        print_result(result, Console(), folder=str(path))
        if same is not None:
            typer.echo(f"the same bytes as {same}", err=True)


def _same(first: Original, path: Path) -> str:
    """The first run's folder, of which `path` is the same again."""
    from simulations.rerun import compare_with

    compare_with(first, path)
    return str(first.path)
