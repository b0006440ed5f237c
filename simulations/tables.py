"""Results as tables that answer a person's question."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from common.guarantee import against
from server.report.record import BatchingFacts
from server.report.words import NARROW, ceiling, duration, how_trained, percent

_ARMS = (
    ("federated", "all sites, federated"),
    ("federated_dp", "all sites, federated with privacy"),
    ("pooled", "all sites, data pooled"),
)
_ALMOST_ALL = 0.99
"""A Gini coefficient from here on says only that there were more clients than places."""

_SHORT = (("federated", "federated"), ("federated_dp", "private"), ("pooled", "pooled"))


def print_result(result: dict[str, Any], console: Console, *, folder: str) -> None:
    """Print a run's result; with a comparison, what each site gains and what privacy costs."""
    comparison = result.get("comparison")
    parts: list[RenderableType] = (
        [_comparison(comparison)] if comparison else [Text(_title(result), "bold"), _single(result)]
    )
    if comparison and (sums := result.get("secure_aggregation")):
        parts.append(Text(f"In the run itself {_sums(sums)}."))
    console.print(Group(*parts, Text(f"\nrun folder: {folder}\nreport:     {folder}/report.html", style="dim")))


def _single(result: dict[str, Any]) -> RenderableType:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    if result["accuracy"] is not None:
        baseline = f"(always the most common class: {result['majority_accuracy']:.3f})"
        table.add_row("accuracy", f"{result['accuracy']:.3f} on held-out examples {baseline}")
        if result["loss"] is not None:  # a model can overflow on examples that it was not trained on
            table.add_row("loss", f"{result['loss']:.3f}")
    course = result.get("course") or {}
    accuracies = [c["accuracy"] for c in result["clients"].values() if c["accuracy"] is not None]
    if accuracies:
        table.add_row("per client", _per_client(accuracies, course.get("fairness")))
    stopped = " (stopped early)" if result["status"] == "stopped-early" else ""
    table.add_row("rounds", f"{result['rounds']}{stopped}, model of round {result['selected_round']}")
    for label, text in _virtual(course):
        table.add_row(label, text)
    if trained := how_trained(BatchingFacts.model_validate(result.get("batching") or {})):
        table.add_row("training", _plain(trained))
    for label, text in _privacy(result["privacy"]):
        table.add_row(label, text)
    if sums := result.get("secure_aggregation"):
        table.add_row("sums", _sums(sums))
    if missing := result.get("missing"):
        told = ", ".join(f"{count} {reason}" for reason, count in missing.items())
        table.add_row("missing", f"replies that did not come: {told}")
    table.add_row("time", f"{result['seconds']['total']:.1f} s")
    return table


def _privacy(privacy: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What was spent, by whom, and against whom it holds."""
    if privacy is None:
        return [("privacy", "none: updates may reveal training examples")]
    worst = max(privacy["epsilon"].values(), default=0.0)
    lines = [
        (
            f"epsilon {ceiling(worst)}, delta {privacy['target_delta']:g} at the client that spent most; "
            f"unit: one {privacy['unit']}, neighbouring by {privacy['relation']}"
        )
    ]
    if privacy["unit"] == "client":
        examples = max(privacy["examples_epsilon"].values(), default=0.0)
        held = against(privacy["trust"], (privacy["shares"] or {}).get("colluding"))
        lines.append(f"{held}; one example at a site: epsilon {ceiling(examples)}")
    if privacy.get("insecure_fixed_noise"):
        lines.append("[red]the noise came from a seed and protects nobody[/red]")
    lines.append("accuracy was computed inside the simulation and is not released")
    return [("" if number else "privacy", line) for number, line in enumerate(lines)]


def _per_client(accuracies: list[float], fairness: dict[str, Any] | None) -> str:
    """How evenly the model serves clients: of few the extremes, of many tenths."""
    if fairness is None or fairness["clients"] < 10:
        return f"worst {min(accuracies):.3f}, best {max(accuracies):.3f}"
    return (
        f"worst tenth {fairness['worst_tenth']:.3f}, median {fairness['median']:.3f}, "
        f"best tenth {fairness['best_tenth']:.3f}"
    )


def _virtual(course: dict[str, Any]) -> list[tuple[str, str]]:
    """Virtual time, staleness and participation, as far as the run has them."""
    lines = []
    if clock := course.get("virtual"):
        times = [f"{percent(r['share'], 0)} of the accuracy after {duration(r['seconds'])}" for r in _timed(course)]
        lines.append(("virtual time", "; ".join([duration(clock["seconds"]), *times])))
        work = f"{duration(clock['work_seconds'])} of devices, {percent(clock['wasted_share'])} of it wasted"
        lines.append(("work", work))
    if stale := course.get("staleness"):
        lines.append(("staleness", f"mean {stale['mean']:.2f}, at most {stale['most']}"))
    taken = course.get("participation")
    if taken and taken["gini"] > 0:
        gini = "" if taken["gini"] >= _ALMOST_ALL else f", Gini {taken['gini']:.2f}"
        lines.append(("took part", f"{taken['took_part']:,} of {taken['clients']:,} clients{gini}"))
    return [(label, _plain(text)) for label, text in lines]


def _timed(course: dict[str, Any]) -> list[dict[str, Any]]:
    """When shares of the final accuracy were reached, without the first of them: a line has little room."""
    return [found for found in course.get("reached") or [] if found["seconds"] is not None][1:]


def _plain(text: str) -> str:
    """Narrow spaces are not narrow on a terminal."""
    return text.replace(NARROW, " ")


def _sums(sums: dict[str, Any]) -> str:
    """What the coordinator saw under secure aggregation."""
    if not sums["opened"]:
        return "none could be opened"
    given_up = sums["sums"] - sums["opened"]
    lost = f", {given_up} given up" if given_up else ""
    return (
        f"the coordinator saw {sums['opened']} sums of {sums['smallest_sum']} or more updates{lost} "
        f"(secure aggregation, experimental)"
    )


def _comparison(comparison: dict[str, Any]) -> RenderableType:
    private = comparison["arms"].get("federated_dp")
    folds = comparison["folds"]
    return Group(
        Text(f"One model for everybody, on held-out examples of all sites (mean ± sd over {folds} folds)", "bold"),
        _overall(comparison),
        Text("\nEach site's own held-out examples: accuracy and AUC", "bold"),
        _per_site(comparison),
        Text("\nWhat taking part changes on a site's own examples and on everybody's (± 2 standard errors)", "bold"),
        _gains(comparison),
        Text(f"\nPooling the data instead would change accuracy by {comparison['pooled_minus_federated']:+.3f}."),
        *(_cost_of_privacy(comparison, private) if private else []),
    )


def _overall(comparison: dict[str, Any]) -> Table:
    arms = comparison["arms"]
    table = _table("trained on", "accuracy", "AUC")
    for site, arm in arms["alone"].items():
        table.add_row(f"{site} alone", *_spreads(arm))
    for name, label in _ARMS:
        if name in arms:
            table.add_row(label, *_spreads(arms[name]), style="bold")
    table.add_row(
        "nothing: always the most common class", f"{comparison['test_majority']:.3f}{' ' * 8}", "", style="dim"
    )
    return table


def _per_site(comparison: dict[str, Any]) -> Table:
    arms = comparison["arms"]
    private = arms.get("federated_dp")
    shown = [(name, label) for name, label in _SHORT if name in arms]
    table = _table("site", "majority", "alone", *(label for _, label in shown), *(["epsilon"] if private else []))
    for site, alone in arms["alone"].items():
        own = alone["sites"][site]
        cells = [f"{own['majority']:.3f}", _pair(own), *(_pair(arms[name]["sites"][site]) for name, _ in shown)]
        table.add_row(site, *cells, *([ceiling(private["epsilon"][site])] if private else []))
    return table


def _gains(comparison: dict[str, Any]) -> Table:
    arms = comparison["arms"]
    shown = [(name, label) for name, label in _SHORT if name in arms and name != "pooled"]
    table = _table("site", *(label for _, label in shown), "everybody's")
    table.add_column("on its own examples")
    for site, gain in comparison["gains"].items():
        alone = arms["alone"][site]
        own = [f"{gain[name]['accuracy_gain']:+.3f} ± {2 * gain[name]['standard_error']:.3f}" for name, _ in shown]
        final = shown[-1][0]  # the run as it was asked for: with privacy, if it is on
        words = gain[final]["verdict"]
        if arms[final]["sites"][site]["accuracy_mean"] <= alone["sites"][site]["majority"]:
            words += ", its majority does as well"
        everybody = arms[final]["accuracy_mean"] - alone["accuracy_mean"]
        table.add_row(site, *own, f"{everybody:+.3f}", words)
    return table


def _cost_of_privacy(comparison: dict[str, Any], private: dict[str, Any]) -> list[Text]:
    cost = comparison["arms"]["federated"]["accuracy_mean"] - private["accuracy_mean"]
    worst = ceiling(max(private["epsilon"].values()))
    return [
        Text(f"Privacy costs {cost:.3f} accuracy: each site spent epsilon {worst} at delta {private['delta']:g}"),
        Text(f"over the whole run; unit: one {private['unit']}, neighbouring by {private['relation']};"),
        Text(f"{private['against']}."),
        Text("Accuracies were computed inside the simulation; a private run releases none of them."),
    ]


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column(first)
    for title in others:
        table.add_column(title, justify="right")
    return table


def _title(result: dict[str, Any]) -> str:
    model, data = result["model"], result["data"]
    clients = (result.get("population") or {}).get("clients") or len(result["clients"])
    return (
        f"{result['name']}: {model['name']} ({model['parameters']:,} parameters) on {data['name']}, {clients:,} clients"
    )


def _spreads(arm: dict[str, Any]) -> tuple[str, str]:
    auc = "" if arm["auc_mean"] is None else f"{arm['auc_mean']:.3f} ± {arm['auc_sd']:.3f}"
    return f"{arm['accuracy_mean']:.3f} ± {arm['accuracy_sd']:.3f}", auc


def _pair(site: dict[str, Any]) -> str:
    """Accuracy and AUC in one short cell, as `.798 .871`."""
    auc = "    " if site["auc_mean"] is None else f"{site['auc_mean']:.3f}"[1:].rjust(4)
    return f"{site['accuracy_mean']:.3f}"[1:].rjust(4) + f" {auc}" if site["accuracy_mean"] < 1 else f"1.00 {auc}"
