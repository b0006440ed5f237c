"""`report.html`: one page without scripts, fonts or images from elsewhere, opened from disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from common.config import RunConfig
from common.config.load import setting_fields
from common.disk import atomic_file
from server.report import words
from server.report.clients import MAX_ROWS, accuracy_by_client_figure, partition_figures
from server.report.comparison import LABELS, compared
from server.report.fairness import even, participation_figure
from server.report.measures import work
from server.report.privacy import PrivacyBox, privacy_box
from server.report.record import Record, RoundRow, read_record
from server.report.rounds import accuracy_figure, epsilon_figure, failures_figure, loss_figure, time_figure, time_spent
from server.report.sums import sums_box
from server.report.svg import Figure, thin
from server.report.template import filled
from server.report.virtual import virtual_box

REPORT = "report.html"

COURSE = (accuracy_figure, loss_figure, epsilon_figure, failures_figure, time_figure)

STATES = {"completed": "completed", "stopped-early": "stopped early"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One of the figures at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """A line of the configuration."""

    key: str
    value: str
    unit: str
    help: str
    changed: bool


def write_report(folder: Path) -> Path:
    """Write `report.html` into a run folder from what the folder holds, and return its path.

    **Guarantee**: equal folders give equal pages; the page asks nothing of a network and runs no script (a content
    security policy forbids both); every name in it is escaped. A run that has not finished has a page too.

    Raises:
        RunError: The folder holds no run, or a file in it is damaged or cannot be written.
    """
    page = render(read_record(folder))
    with atomic_file(folder / REPORT) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / REPORT


def render(record: Record) -> str:
    """The page of a run."""
    result, privacy = record.result, privacy_box(record, MAX_ROWS)
    evaluation = result.evaluation if result else None
    values = {
        "name": (result and result.name) or record.config.name,
        "state": STATES.get(result.status, result.status or "completed") if result else "not finished",
        "finished": result is not None,
        "simulated": bool(result and result.simulated),
        "outcome": words.outcome(record),
        "tiles": _tiles(record, privacy),
        "private": privacy,
        "sums": sums_box(record),
        "unreleased": evaluation is not None and not evaluation.released,
        "compared": compared(result.comparison if result else None),
        "arm_labels": LABELS,
        "course": _present(*(figure(record) for figure in COURSE)),
        "all_answered": bool(record.rounds) and not any(row.failures for row in record.rounds),
        "how_trained": words.how_trained(record.batching),
        "virtual": virtual_box(record),
        "clients": _present(
            accuracy_by_client_figure(record), *partition_figures(record), participation_figure(record)
        ),
        "even": even(record),
        "sample": words.sample(result),
        "spread": _spread(record),
        "rounds": _round_rows(record.rounds),
        "rounds_on_record": len(record.rounds),
        "settings": settings_of(record.config),
    }
    return filled("page.html", values)


def _present(*figures: Figure | None) -> list[Figure]:
    return [figure for figure in figures if figure is not None]


def _tiles(record: Record, privacy: PrivacyBox | None) -> list[Tile]:
    result, config = record.result, record.config
    tiles = []
    if result and result.accuracy is not None:
        base = result.majority_accuracy
        note = f"commonest class: {words.percent(base)}" if base is not None else "held-out examples"
        tiles.append(Tile(label="Accuracy", value=words.percent(result.accuracy), note=note))
    if privacy is None:
        tiles.append(Tile(label="Privacy", value="none", note="no differential privacy"))
    else:
        target, value = privacy.facts.target_epsilon, words.ceiling(privacy.highest)
        note = f"target {words.number(target)}, " if target is not None else ""
        note += f"delta {words.number(privacy.facts.target_delta)}, per {privacy.facts.unit}"
        tiles.append(Tile(label="Highest epsilon", value=value, note=note))
    if result and result.clients:
        examples = sum(client.train_examples or 0 for client in result.clients.values())
        note = words.count(examples, "training example") if examples else ""
        everybody = (result.population and result.population.clients) or len(result.clients)
        note = note if everybody == len(result.clients) else f"{words.number(len(result.clients))} of them measured"
        tiles.append(Tile(label="Clients", value=words.number(everybody), note=note))
    done = result.rounds if result and result.rounds is not None else len(record.rounds)
    selected = result.selected_round if result else None
    note = f"of {config.rounds}" + (f"; the result is round {selected}" if selected is not None else "")
    tiles.append(Tile(label="Rounds", value=words.number(done), note=note))
    parameters = result.model.parameters if result else None
    note = words.count(parameters, "parameter") if parameters is not None else ""
    tiles.append(Tile(label="Model", value=(result and result.model.name) or config.model.name, note=note))
    virtual = work(record.rounds)
    if virtual is not None:
        note = f"{words.percent(virtual.wasted_share)} of the work wasted"
        tiles.append(Tile(label="Virtual time", value=words.duration(virtual.seconds), note=note))
    spent = time_spent(record)
    if spent:
        per_round = f"{words.duration(sum(spent.values()) / done)} a round" if done else ""
        tiles.append(Tile(label="Time", value=words.duration(sum(spent.values())), note=per_round))
    return tiles


def _spread(record: Record) -> list[tuple[str, list[str]]]:
    """Quantiles over the clients, where these are too many for a row each; the first row names the columns."""
    clients = list(record.result.clients.values()) if record.result else []
    if len(clients) <= MAX_ROWS:
        return []
    columns = {
        "Accuracy": ([c.accuracy for c in clients if c.accuracy is not None], words.percent),
        "Training examples": ([float(c.train_examples) for c in clients if c.train_examples is not None], words.number),
    }
    columns = {name: column for name, column in columns.items() if column[0]}
    if not columns:
        return []
    ranked = [[(name, write(value)) for name, value in words.quantiles(values)] for values, write in columns.values()]
    rows = [(cells[0][0], [text for _, text in cells]) for cells in zip(*ranked, strict=True)]
    return [("Client", list(columns)), *rows]


def _round_rows(rounds: tuple[RoundRow, ...]) -> list[dict[str, Any]]:
    """The rounds as a table, evenly thinned where they are very many."""
    kept = [int(index) for index, _ in thin([(i, 0.0) for i in range(len(rounds))])]
    return [
        {
            "server_round": row.server_round,
            "asked": len(row.cohort),
            "answered": len(row.survivors),
            "train_loss": row.train_loss,
            "loss": row.loss,
            "accuracy": row.accuracy,
            "epsilon": max(row.epsilon.values(), default=None),
            "seconds": sum(value or 0.0 for value in row.seconds.values()) if row.seconds else None,
        }
        for row in (rounds[i] for i in kept)
    ]


def settings_of(config: RunConfig) -> list[Setting]:
    """Every setting of a run with its help, in the order of declaration."""
    rows = []
    for key, field in setting_fields():
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        changed = value != field.get_default(call_default_factory=True)
        unit, explanation = str(extra.get("unit", "")), field.description or ""
        rows.append(Setting(key=key, value=_written(value), unit=unit, help=explanation, changed=changed))
    return rows


def _written(value: Any) -> str:
    """A value as TOML writes it, so far as that is readable."""
    if isinstance(value, BaseModel):
        return value.model_dump_json()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ", ".join(f"{key} = {_written(item)}" for key, item in value.items()) or words.MISSING
    if isinstance(value, list | tuple):
        return ", ".join(map(_written, value)) or words.MISSING
    return words.MISSING if value is None else str(value)
