"""`coterie study`: one question, several arms, several repeats; a run folder for each, and one page for all."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from common.config.cli import Overrides
from common.config.load import scenario_names
from common.errors import ConfigError
from simulations.logs import log_to_stderr

if TYPE_CHECKING:
    from simulations.study.folder import Study

Batching = Literal["auto", "on", "off"]


def study(  # noqa: PLR0917 - typer reads options from the signature
    source: Annotated[str | None, typer.Argument(help="A scenario's name or a TOML file.")] = None,
    vary: Annotated[
        list[str] | None,
        typer.Option(
            "--vary",
            metavar="KEY=A,B",
            help="A setting and its values, as --vary strategy.name=fedavg,fedprox. Repeatable: all combinations.",
        ),
    ] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Runs of every combination, each with other seeds.")
    ] = 1,
    overrides: Overrides = None,
    target: Annotated[
        list[float] | None,
        typer.Option(
            "--target",
            metavar="ACCURACY",
            help="Time the way to this accuracy, as 0.8; default: 90, 95 and 99 % of the best arm's. Repeatable.",
        ),
    ] = None,
    reseed_data: Annotated[
        bool, typer.Option("--reseed-data", help="Divide the data anew in every repeat, too.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Study folder to write; default: a new one in --root.")
    ] = None,
    root: Annotated[Path, typer.Option("--root", help="Folder that holds study folders.")] = Path("studies"),
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="STUDY", help="Go on with an interrupted study: its folder.")
    ] = None,
    workers: Annotated[
        str, typer.Option("--workers", help="Processes that train clients: a number, or auto.")
    ] = "auto",
    batching: Annotated[
        Batching | None, typer.Option("--batching", help="As for simulate: whether clients train stacked.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="FILE", help="As for simulate: devices of the simulated clients.")
    ] = None,
    site: Annotated[Path | None, typer.Option("--site", help="Your own models and data: a site.toml.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress, only the result.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Set varied settings side by side; leaves a study folder with every run and one report."""
    log_to_stderr(quiet=quiet or as_json)
    given = [source, vary, overrides, target, out, batching, trace, site]
    if resume is not None and (any(option is not None for option in given) or repeats > 1 or reseed_data):
        raise ConfigError(
            "--resume takes a study as it was",
            hint="of the other options only --workers, --quiet and --json go with it",
        )
    from client.memory import keep_freed_memory
    from simulations.interrupt import interruptible
    from simulations.runner import progress_display
    from simulations.study import folder
    from simulations.study.carry import carry_out_study, check_possible, resumed
    from simulations.study.document import describe_study
    from simulations.study.page import write_study_report
    from simulations.study.summary import summarise
    from simulations.study.table import print_study

    if resume is not None:
        planned = folder.read(resume)
    else:
        planned = _plan(
            source, vary or [], repeats=repeats, overrides=overrides or [], targets=target or [],
            reseed_data=reseed_data, site=site, batching=batching or "auto", trace=trace,
        )  # fmt: skip
    how = resumed(planned, workers=workers, quiet=quiet or as_json)
    how.processes(most=1)
    keep_freed_memory()
    with interruptible(), progress_display(quiet=how.quiet) as progress:
        if resume is None:
            check_possible(planned, progress)
        path = resume or folder.create(planned, out, root=root)
        try:
            with folder.locked(path):
                records = carry_out_study(planned, path, progress, how=how)
                summary = summarise(planned, records)
                document = describe_study(planned, summary)
                folder.write_result(path, document)
                write_study_report(path, planned, summary)
        except KeyboardInterrupt:
            typer.echo(f"the whole study: coterie study --resume {shlex.quote(str(path))}", err=True)
            raise
    if as_json:
        typer.echo(json.dumps({**document, "folder": str(path)}, allow_nan=False))
    else:
        print_study(planned, summary, Console(), folder=str(path))


def _plan(source: str | None, vary: list[str], **options: Any) -> Study:
    """What the options ask for.

    Raises:
        ConfigError: It makes no study.
    """
    from simulations.clock import trace_digest
    from simulations.how import How
    from simulations.study.arms import parse_vary, plan_arms
    from simulations.study.folder import Study

    if source is None:
        raise ConfigError("nothing to study", hint=f"name a file or a scenario: {', '.join(scenario_names())}")
    targets, trace = options["targets"], options["trace"]
    wrong = next((t for t in targets if not 0 < t < 1), None)
    if wrong is not None:
        raise ConfigError(f"--target {wrong:g}: expected a share between 0 and 1", hint="for example --target 0.8")
    varied = parse_vary(vary)
    devices = [f"simulation.devices.trace={trace_digest(trace)}"] if trace else []
    arms = plan_arms(
        source, varied, repeats=options["repeats"], overrides=[*options["overrides"], *devices],
        reseed_data=options["reseed_data"],
    )  # fmt: skip
    return Study(
        name=arms[0].runs[0].config.name,
        source=source,
        command=_command(source, vary, options),
        overrides=tuple(options["overrides"]),
        varied=varied,
        arms=arms,
        targets=tuple(sorted(targets)),
        how=How(site_file=options["site"], batching=options["batching"], trace=trace),
    )


def _command(source: str, vary: list[str], options: dict[str, Any]) -> str:
    """What to type for the same study."""
    words = ["coterie", "study", source, *(word for item in vary for word in ("--vary", item))]
    words += ["--repeats", str(options["repeats"])] if options["repeats"] > 1 else []
    words += [word for item in options["overrides"] for word in ("--set", item)]
    words += [word for item in options["targets"] for word in ("--target", f"{item:g}")]
    words += ["--reseed-data"] if options["reseed_data"] else []
    words += ["--batching", options["batching"]] if options["batching"] != "auto" else []
    for name in ("trace", "site"):
        words += [f"--{name}", str(options[name])] if options[name] else []
    return shlex.join(words)
