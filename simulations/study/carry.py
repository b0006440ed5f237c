"""Does a study's runs, one after the other, by the code of `coterie simulate`; those that are complete stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress, TaskID

from common.errors import CoterieError
from server.report.record import Record, read_record
from server.store import RunFolder
from simulations.how import How
from simulations.interrupt import check_interrupt
from simulations.run import check_carried_out, prepare
from simulations.runner import carry_out, reopen
from simulations.study.arms import PlannedArm, PlannedRun
from simulations.study.folder import Study


def check_possible(study: Study, progress: Progress) -> None:
    """Load the data, build the model and calibrate the noise of every arm: what can refuse an arm does so here.

    Raises:
        CoterieError: An arm is not possible; of the same kind as for the run alone, and it names the arm.
    """
    task = progress.add_task("arms", total=len(study.arms), detail="checking that each is possible")
    progress.update(progress.task_ids[0], visible=False)
    how = study.how
    for arm in study.arms:
        with _of_arm(arm):
            config = arm.runs[0].config
            possible = prepare(config, folder=Path(), site_file=how.site_file, trace=how.trace)
            check_carried_out(possible, sealed=how.sealed, engine=how.engine, batching=how.batching)
        progress.advance(task)
        check_interrupt()
    progress.remove_task(task)


def carry_out_study(study: Study, path: Path, progress: Progress, *, how: How) -> Mapping[str, Record]:
    """Do every run that is not complete; what all of them have written, by their folder as planned.

    Args:
        study: The plan.
        path: The study's folder.
        progress: Where bars are shown; its first task is the one that every run hides.
        how: Options; but for workers and quiet they are the study's own.

    Raises:
        CoterieError: A run failed; what others have done is kept.
    """
    bar = progress.add_task("study", total=study.runs, detail="")
    progress.update(progress.task_ids[0], visible=False)
    records: dict[str, Record] = {}
    for arm in study.arms:
        for run in arm.runs:
            detail = f"{arm.label}, repeat {run.repeat} of {study.repeats}"
            progress.update(bar, completed=len(records), detail=detail)
            with _of_arm(arm), _own_bars(progress, bar):
                _carry_out_run(run, path / run.folder, progress, how)
                records[run.folder] = read_record(path / run.folder)
            check_interrupt()
    progress.update(bar, completed=len(records), detail="")
    return records


def _carry_out_run(run: PlannedRun, path: Path, progress: Progress, how: How) -> None:
    """One run, from where it stands."""
    if not (path / "run.toml").is_file():
        carry_out(run.config, run.plain, None, lambda: RunFolder.create(run.config, path), how, progress)
    elif RunFolder.open(path).read_result() is None:
        config, plain, folder = reopen(path)
        carry_out(config, plain, folder, lambda: folder, how, progress)


@contextmanager
def _of_arm(arm: PlannedArm) -> Iterator[None]:
    """Say of which arm an error is."""
    try:
        yield
    except CoterieError as e:
        raise type(e)(f"arm `{arm.label}`: {e}", hint=e.hint) from e


@contextmanager
def _own_bars(progress: Progress, study: TaskID) -> Iterator[None]:
    """Take away the bars that a run adds to those of the study."""
    kept = set(progress.task_ids)
    progress.update(progress.task_ids[0], visible=True)
    try:
        yield
    finally:
        for task in set(progress.task_ids) - kept - {study}:
            progress.remove_task(task)


def resumed(study: Study, *, workers: str, quiet: bool) -> How:
    """The study's own options with those that change no result."""
    return replace(study.how, workers=workers, quiet=quiet)
