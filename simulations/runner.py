"""A whole simulated run, from what can refuse it to a complete run folder: what commands are made of."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from os import cpu_count
from pathlib import Path
from time import perf_counter
from typing import Any, Final

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from common.config import RunConfig, load_config
from common.config.render import to_toml
from common.errors import RunError
from common.secagg_plan import warnings_of
from server.results import Observers
from server.store import RunFolder
from simulations.cluster.ledgers import use_partition_files
from simulations.comparison import check_comparable, compare
from simulations.how import How
from simulations.pool.worker import begin_importing
from simulations.progress import ProgressObserver
from simulations.results import FolderObserver, write_results
from simulations.run import check_carried_out, execute, prepare
from simulations.sites import SPOOL
from simulations.states import STATES

COMPARISON: Final = "comparison.jsonl"
PLAIN: Final = "plain.toml"
"""Names in a run's folder."""


def carry_out(  # noqa: PLR0917
    config: RunConfig,
    plain: RunConfig,
    folder: RunFolder | None,
    make_folder: Callable[[], RunFolder],
    how: How,
    progress: Progress,
    *,
    batching: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Path]:
    """Do a run, or go on with it, to its end; what it ended with, and its folder.

    Args:
        config: The run.
        plain: The same without privacy, for a comparison.
        folder: Of a run that was interrupted; None begins a new one.
        make_folder: Makes the folder of a new run, once it is known to be possible.
        how: Options.
        progress: Where bars are shown; its first task is taken away when training begins.
        batching: What another run's `batching.json` says, where that run is repeated.

    Raises:
        CoterieError: The run is not possible, or failed.
        KeyboardInterrupt: After a line that says how to go on.
    """
    if config.comparison.enabled:
        check_comparable(config)
    if how.engine == "inline" and how.processes(most=2) > 1:
        begin_importing()
    possible = prepare(config, folder=Path(), site_file=how.site_file, insecure_seed=how.insecure_seed, trace=how.trace)
    check_carried_out(possible, sealed=how.sealed, engine=how.engine, batching=how.batching)
    folder = folder or make_folder()
    progress.update(progress.task_ids[0], visible=False)
    begin = perf_counter()
    try:
        with folder:
            folder.write(PLAIN, to_toml(plain).encode())
            how.keep(folder)
            _warn(config, how, clients=len(possible.federation.clients))
            if how.cluster is not None and config.private:
                use_partition_files(folder.path)  # before anybody looks for its ledgers
            prepared = possible.in_folder(folder.path)
            keeper = FolderObserver(prepared, folder)
            shown = ProgressObserver(
                progress, keeper, rounds=config.rounds, target_epsilon=config.privacy.target_epsilon
            )
            outcome = execute(
                prepared,
                workers=how.processes(config.cohort.size or len(prepared.federation.clients)),
                engine=how.engine,
                cluster=how.cluster,
                sealed=how.sealed,
                batching=how.batching,
                record=batching,
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
                    workers=how.processes(most=cpu_count() or 1),
                    on_result=shown.comparison,
                )
            seconds = perf_counter() - begin
            result = write_results(prepared, outcome, folder, seconds=seconds, comparison=comparison)
            shutil.rmtree(folder.path / SPOOL, ignore_errors=True)  # nobody asks for these updates again,
            for kept in folder.path.glob(f"{STATES}*"):  # nor goes on with what clients kept
                kept.unlink()
    except KeyboardInterrupt:
        progress.stop()  # it would wipe the line
        typer.echo(f"interrupted; continue with: coterie simulate --resume {shlex.quote(str(folder.path))}", err=True)
        raise
    return result, folder.path


@contextmanager
def progress_display(*, quiet: bool) -> Iterator[Progress]:
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


def reopen(path: Path) -> tuple[RunConfig, RunConfig, RunFolder]:
    """An interrupted run's configuration, the same without privacy, and its folder, open for writing.

    Raises:
        RunError: It is no run, somebody else is writing it, it is complete, or something is missing.
    """
    folder = RunFolder.resume(path)
    try:
        if folder.read_result() is not None:
            raise RunError(f"{path} is complete", hint=f"see {path}/report.html, or start a new run")
        config, plain = configurations(folder)
    except BaseException:
        folder.close()
        raise
    return config, plain, folder


def configurations(folder: RunFolder) -> tuple[RunConfig, RunConfig]:
    """A run's configuration, and the same without privacy.

    Raises:
        RunError: One of them is missing or damaged.
    """
    config, plain = folder.config(), folder.path / PLAIN
    if config.comparison.enabled and not plain.is_file():
        raise RunError(f"{plain} is missing, which the comparison needs", hint="start a new run")
    return config, load_config(plain).config if plain.is_file() else config


def _warn(config: RunConfig, how: How, *, clients: int) -> None:
    """What a person should know before it starts."""
    if how.insecure_seed is not None and config.private:
        typer.echo("warning: the noise comes from a seed and protects nobody", err=True)
    for warning in () if how.quiet else warnings_of(config, clients):
        typer.echo(f"warning: {warning}", err=True)
