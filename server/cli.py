"""`coterie runs`, `coterie predict` and `coterie export`: what is done with runs once they are trained.

Results go to stdout, everything else to stderr. The functions are mounted by `common.cli`.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import RunError
from common.site import Site, load_site

if TYPE_CHECKING:
    from torch import nn

    from common.data import LoadedExamples
    from common.schema import DataSchema
    from server.store import RunFolder, RunSummary

LATEST = "latest"
MODEL = "model.safetensors"
WIDE = 240
"""Columns of a table that is not shown on a terminal, so that nothing in it is cut off."""

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder, its name below --root, or `latest`.", show_default=False)
]
RootOption = Annotated[Path, typer.Option("--root", help="Folder that holds the runs.")]
SiteOption = Annotated[Path | None, typer.Option("--site", help="Your site.toml, where the run uses your own models.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Format = Literal["onnx", "torch", "safetensors"]
FILES: dict[Format, str] = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model-with-schema.safetensors"}
"""What `coterie export` writes in a run's folder, unless told otherwise."""

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def runs(
    root: RootOption = Path("runs"),
    kit: Annotated[
        Path | None, typer.Option("--kit", help="An operator's kit: list the coordinator's runs instead.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs of a folder, newest first; with --kit those of a federation's coordinator."""
    from server.store import list_runs

    if kit is not None:
        from server.operator_cli import list_remote_runs

        list_remote_runs(kit, as_json=as_json)
        return
    found = [_facts(run) for run in list_runs(root)]
    if as_json:
        _print_json({"root": str(root), "runs": found})
        return
    if not found:
        typer.echo(f"there are no runs in {root}", err=True)
        typer.echo("hint: `coterie simulate heart` makes one, --root names another folder", err=True)
        return
    columns = ("name", "folder", "status", "model", "data", "rounds", "accuracy", "epsilon", "started (UTC)")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column in {"rounds", "accuracy", "epsilon"}
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for facts in found:
        table.add_row(*(Text(cell) for cell in _cells(facts)))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=WIDE).print(table)
    for facts in found:
        if facts["problem"]:
            typer.echo(f"warning: {facts['problem']}", err=True)


def predict(
    run: RunArgument,
    *,
    data: Annotated[
        str,
        typer.Option("--data", help="A registered data set, or KIND:PATH such as csv:new_patients.csv; see `--site`."),
    ],
    site: SiteOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write a CSV file instead of stdout.")] = None,
    force: ForceOption = False,
    root: RootOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Predict with a run's model: class, its name and its probability, a line for each row of the data.

    Where the data has labels, the share of right predictions is told, too.
    """
    from common.data import load_examples

    _check_free(out, force=force)
    folder = find_run(run, root)
    registry = load_site(site)
    config = folder.config()
    loaded = load_examples(data, settings=config.data, site=registry)
    rows = _predict(load_model(folder, loaded.schema, site=registry), loaded, config.evaluation.batch_size)
    hits = [row["label"] == row["class"] for row in rows if row["label"] is not None]
    accuracy = sum(hits) / len(hits) if hits else None
    text = "" if as_json and out is None else _csv(rows, per_position=loaded.schema.per_position)
    if out is not None:
        _write(out, text)
    if as_json:
        facts = {"run": str(folder.path), "data": data, "rows": len(loaded.row_ids), "labelled": len(hits)}
        rest = {"predictions": rows} if out is None else {"out": str(out)}
        _print_json({**facts, "accuracy": accuracy, **rest})
        return
    typer.echo(text if out is None else f"{len(rows)} predictions are in {out}\n", nl=False)
    if accuracy is not None:
        typer.echo(f"accuracy: {100 * accuracy:.1f} % of {len(hits)} labelled predictions", err=out is None)


def export(
    run: RunArgument,
    *,
    to: Annotated[Format, typer.Option("--to", help="onnx; torch (.pt2); or safetensors, with the data's schema.")],
    out: Annotated[Path | None, typer.Option("--out", help="File to write; by default in the run's folder.")] = None,
    site: SiteOption = None,
    force: ForceOption = False,
    root: RootOption = Path("runs"),
    as_json: JsonOption = False,
) -> None:
    """Write a run's model as a file that other software reads without Coterie."""
    from common.data import schema_of
    from common.models import export_model

    folder = find_run(run, root)
    path = out or folder.path / FILES[to]
    if path.absolute() == (folder.path / MODEL).absolute():
        raise RunError(f"{path} is the run's own model", hint="choose another path with --out")
    _check_free(path, force=force)
    registry = load_site(site)
    schema = schema_of(folder.config().data, site=registry)
    written = export_model(load_model(folder, schema, site=registry), schema, path, to=to)
    if as_json:
        _print_json({"run": str(folder.path), "to": to, "out": str(written), "bytes": written.stat().st_size})
    else:
        typer.echo(f"the model is in {written}")


def find_run(name: str, root: Path) -> RunFolder:
    """The run that a user means: a folder, the name of one below `root`, or `latest` for the one started last.

    Raises:
        RunError: There is no such run.
    """
    from server.store import RunFolder, list_runs

    found = list_runs(root)
    if name == LATEST:
        if not found:
            raise RunError(f"there are no runs in {root}", hint="`coterie simulate heart` makes one")
        return RunFolder.open(found[0].path)
    for path in (Path(name), root / name):
        if (path / "run.toml").is_file():
            return RunFolder.open(path)
    near = difflib.get_close_matches(name, [run.path.name for run in found], n=1, cutoff=0.4)
    hint = f"did you mean `{near[0]}`?" if near else f"`coterie runs --root {root}` lists the runs"
    raise RunError(f"there is no run `{name}`, as a folder or in {root}", hint=hint)


def load_model(folder: RunFolder, schema: DataSchema, *, site: Site) -> nn.Module:
    """The model that a run ended with.

    Raises:
        RunError: The run has no model yet, or its file is damaged.
        ModelError: The weights are not of the model that run.toml describes, or that cannot be built here.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from common.models import build_model
    from common.models.weights import ModelWeights

    path = folder.path / MODEL
    if not path.is_file():
        raise RunError(f"{folder.path} has no model: the run is {folder.status}", hint="a run leaves one when it ends")
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError, TypeError) as e:  # numpy has no bfloat16
        raise RunError(f"{path} cannot be read: {e}", hint="restore it from a copy, or run again") from e
    model = build_model(folder.config().model, schema, site=site)
    ModelWeights(model).load(arrays)
    return model


def _predict(model: nn.Module, loaded: LoadedExamples, batch_size: int) -> list[dict[str, Any]]:
    """A row for each prediction, as a user reads it; next-token data has one for each position."""
    from server.evaluation import probabilities

    if not len(loaded.examples):
        return []
    likeliest = probabilities(model, loaded.examples, batch_size=batch_size).max(dim=1)
    places: list[dict[str, Any]] = [{"row": row} for row in loaded.row_ids]
    if loaded.schema.per_position:
        positions = range(loaded.examples.targets.shape[1])
        places = [{**place, "position": position} for place in places for position in positions]
    labels, names = loaded.examples.targets.flatten().tolist(), loaded.schema.class_names
    return [
        {
            **place,
            "class": index,
            "class_name": names[index] if names else "",
            "probability": round(probability, 6),
            "label": label if label >= 0 else None,
        }
        for place, index, probability, label in zip(
            places, likeliest.indices.tolist(), likeliest.values.tolist(), labels, strict=True
        )
    ]


def _csv(rows: list[dict[str, Any]], *, per_position: bool) -> str:
    text = io.StringIO()
    columns = ["row", *(["position"] if per_position else []), "class", "class_name", "probability", "label"]
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check_free(path: Path | None, *, force: bool) -> None:
    if path is not None and path.exists() and not force:
        raise RunError(f"{path} exists already", hint="choose another path, or replace it with --force")


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise RunError(f"{path} cannot be written: {e.strerror}", hint="choose another path with --out") from e


def _facts(run: RunSummary) -> dict[str, Any]:
    """What a list says of a run, as JSON values; None where it is not known."""
    from server.report.record import parse_result

    config, result, problem = run.config, None, run.problem
    try:
        result = None if run.result is None else parse_result(run.result, run.path)
    except RunError as e:
        problem = str(e)
    spent = list(result.privacy.epsilon.values()) if result and result.privacy else []
    return {
        "name": config.name if config else None,
        "folder": str(run.path),
        "status": run.status,
        "model": config.model.name if config else None,
        "data": config.data.name if config else None,
        "rounds": run.last_round,
        "accuracy": result.accuracy if result else None,
        "epsilon": max(spent) if spent and math.isfinite(max(spent)) else None,
        "private": config.private if config else None,
        "started": run.created.isoformat(timespec="seconds"),
        "problem": problem,
    }


def _cells(facts: dict[str, Any]) -> tuple[str, ...]:
    from server.report.words import ceiling

    accuracy, epsilon = facts["accuracy"], facts["epsilon"]
    unprotected = "none" if facts["private"] is False else "-"
    return (
        facts["name"] or "-",
        facts["folder"],
        facts["status"],
        facts["model"] or "-",
        facts["data"] or "-",
        str(facts["rounds"]),
        f"{100 * accuracy:.1f} %" if accuracy is not None else "-",
        ceiling(epsilon) if epsilon is not None else unprotected,
        facts["started"].replace("T", " ").removesuffix("+00:00"),
    )


def _print_json(document: object) -> None:
    typer.echo(json.dumps(document, indent=2))
