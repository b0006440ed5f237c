"""`coterie simulate`: many clients on one machine, from a scenario or a configuration file to a run folder."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.config import RunConfig, load_config
from common.config.cli import Overrides
from common.config.load import scenario_names
from common.config.render import to_toml
from common.errors import ConfigError, RunError
from simulations.logs import log_to_stderr

if TYPE_CHECKING:
    from server.store import RunFolder

Engine = Literal["inline", "ray"]
COMPARISON, PLAIN, INSECURE = "comparison.jsonl", "plain.toml", "insecure-fixed-noise"


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
    workers: Annotated[
        str, typer.Option("--workers", help="Processes that train clients: a number, or auto.")
    ] = "auto",
    engine: Annotated[
        Engine, typer.Option("--engine", help="inline, or Flower's simulation runtime on Ray.")
    ] = "inline",
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
    if resume is not None:
        if source is not None or changes or out is not None or insecure_fixed_noise is not None:
            raise ConfigError(
                "--resume continues a run as it was",
                hint="leave out the scenario, --set, --dp, --out and --insecure-fixed-noise",
            )
        config, plain, folder = _reopen(resume, root)
    else:
        if source is None:
            raise ConfigError("nothing to simulate", hint=f"name a file or a scenario: {', '.join(scenario_names())}")
        loaded = load_config(source, changes)
        config, plain, folder = loaded.config, loaded.plain, None
    seed = insecure_fixed_noise if folder is None else _kept_seed(folder)
    how = _Options(
        site_file=site, workers=workers, engine=engine, sealed=sealed, quiet=quiet or as_json, insecure_seed=seed
    )
    how.processes(most=1)
    from client.memory import keep_freed_memory
    from simulations.interrupt import interruptible

    keep_freed_memory()
    with interruptible(), _progress_display(quiet=how.quiet) as progress:
        from server.store import RunFolder

        result, path = _run(config, plain, folder, lambda: RunFolder.create(config, out, root=root), how, progress)
    if as_json:
        arms = (result["comparison"] or {}).get("arms", {})
        typer.echo(json.dumps({**result, **arms, "folder": str(path)}, allow_nan=False))
    else:
        from simulations.tables import print_result

        print_result(result, Console(), folder=str(path))


@contextmanager
def _progress_display(*, quiet: bool) -> Iterator[Progress]:
    """A progress display on stderr, from the first moment: loading takes seconds. Silent off a terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:>10}"),
        BarColumn(bar_width=24),
        TextColumn("{task.completed:.0f}/{task.total}"),
        TextColumn("{task.fields[detail]}", style="bold"),
        TimeElapsedColumn(),
        TimeRemainingColumn(compact=True),
    )
    silent = quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=silent) as progress:
        progress.add_task("preparing", total=1, detail="loading data, building the model, calibrating noise")
        yield progress


@dataclass(frozen=True, kw_only=True, slots=True)
class _Options:
    """How a run is carried out; but for the insecure seed none of it changes its result."""

    site_file: Path | None
    workers: str
    engine: Engine
    sealed: bool
    quiet: bool
    insecure_seed: int | None

    def processes(self, most: int) -> int:
        """Worker processes to use, at most `most`."""
        if self.workers == "auto":
            return max(1, min(os.cpu_count() or 1, most))
        if not self.workers.isdecimal() or int(self.workers) < 1:
            raise ConfigError(f"--workers {self.workers}: expected a number from 1, or auto", hint="try --workers 2")
        return int(self.workers)


def _run(  # noqa: PLR0917
    config: RunConfig,
    plain: RunConfig,
    folder: RunFolder | None,
    make_folder: Callable[[], RunFolder],
    how: _Options,
    progress: Progress,
) -> tuple[dict[str, Any], Path]:
    from server.results import Observers
    from simulations.comparison import check_comparable, compare
    from simulations.progress import ProgressObserver
    from simulations.results import FolderObserver, write_results
    from simulations.run import execute, prepare
    from simulations.sites import SPOOL

    # Everything that can refuse a run does so before its folder is made.
    if config.comparison.enabled:
        check_comparable(config)
    possible = prepare(config, folder=Path(), site_file=how.site_file, insecure_seed=how.insecure_seed)
    folder = folder or make_folder()
    progress.update(progress.task_ids[0], visible=False)
    begin = perf_counter()
    try:
        with folder:
            folder.write(PLAIN, to_toml(plain).encode())
            if how.insecure_seed is not None and config.private:
                folder.write(INSECURE, str(how.insecure_seed).encode())
                typer.echo("warning: the noise comes from a seed and protects nobody", err=True)
            _warn(config, clients=len(possible.federation.clients), quiet=how.quiet)
            prepared = possible.in_folder(folder.path)
            keeper = FolderObserver(prepared, folder)
            shown = ProgressObserver(
                progress, keeper, rounds=config.rounds, target_epsilon=config.privacy.target_epsilon
            )
            outcome = execute(
                prepared,
                workers=how.processes(config.cohort.size or len(prepared.federation.clients)),
                engine=how.engine,
                sealed=how.sealed,
                folder=folder,
                observer=Observers([keeper, shown]),
            )
            keeper.close()
            comparison = None
            if config.comparison.enabled:
                comparison = compare(
                    prepared,
                    outcome,
                    plain,
                    results_file=folder.path / COMPARISON,
                    workers=how.processes(most=os.cpu_count() or 1),
                    on_result=shown.comparison,
                )
            seconds = perf_counter() - begin
            result = write_results(prepared, outcome, folder, seconds=seconds, comparison=comparison)
            shutil.rmtree(folder.path / SPOOL, ignore_errors=True)  # nobody asks for these updates again
    except KeyboardInterrupt:
        words = ["--resume", str(folder.path), *(["--site", str(how.site_file)] if how.site_file else [])]
        typer.echo(f"interrupted; continue with: coterie simulate {shlex.join(words)}", err=True)
        raise
    return result, folder.path


def _warn(config: RunConfig, *, clients: int, quiet: bool) -> None:
    """What a person should know of secure aggregation before it starts."""
    from common.secagg_plan import warnings_of

    for warning in () if quiet else warnings_of(config, clients):
        typer.echo(f"warning: {warning}", err=True)


def _reopen(run: str, root: Path) -> tuple[RunConfig, RunConfig, RunFolder]:
    from server.cli import find_run
    from server.store import RunFolder

    path = find_run(run, root).path
    folder = RunFolder.resume(path)
    if folder.read_result() is not None:
        folder.close()
        raise RunError(f"{path} is complete", hint=f"see {path}/report.html, or start a new run")
    config, plain = folder.config(), path / PLAIN
    if config.comparison.enabled and not plain.is_file():
        folder.close()
        raise RunError(f"{plain} is missing, which the comparison needs", hint="start a new run")
    return config, load_config(plain).config if plain.is_file() else config, folder


def _kept_seed(folder: RunFolder) -> int | None:
    """The seed of a run that was started with fixed noise."""
    path = folder.path / INSECURE
    try:
        return int(path.read_text()) if path.is_file() else None
    except ValueError as e:
        raise RunError(f"{path} is damaged", hint="start a new run") from e
