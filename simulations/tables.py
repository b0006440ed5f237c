"""Results as tables that answer a person's question."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

_ARMS = (("federated", "federated"), ("federated_dp", "federated with privacy"), ("pooled", "all data pooled"))


def print_result(result: dict[str, Any], console: Console, *, folder: str) -> None:
    """Print a run's result; with a comparison, what each site gains and what privacy costs."""
    comparison = result.get("comparison")
    parts = [_comparison(comparison)] if comparison else [_single(result)]
    console.print(Group(*parts, Text(f"\nrun folder: {folder}\nreport:     {folder}/report.html", style="dim")))


def _single(result: dict[str, Any]) -> RenderableType:
    table = Table(title=_title(result), title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    if result["accuracy"] is not None:
        baseline = f"(always the most common class: {result['majority_accuracy']:.3f})"
        table.add_row("accuracy", f"{result['accuracy']:.3f} on held-out examples {baseline}")
        table.add_row("loss", f"{result['loss']:.3f}")
    accuracies = [c["accuracy"] for c in result["clients"].values() if c["accuracy"] is not None]
    if accuracies:
        table.add_row("per client", f"worst {min(accuracies):.3f}, best {max(accuracies):.3f}")
    stopped = " (stopped early)" if result["status"] == "stopped-early" else ""
    table.add_row("rounds", f"{result['rounds']}{stopped}, model of round {result['selected_round']}")
    privacy = result["privacy"]
    if privacy is None:
        table.add_row("privacy", "none: updates may reveal training examples")
    else:
        worst = max(privacy["epsilon"].values(), default=0.0)
        table.add_row(
            "privacy",
            f"epsilon {worst:.2f}, delta {privacy['target_delta']:g} at the client that spent most; "
            f"unit: one {privacy['unit']}, neighbouring by {privacy['relation']}",
        )
        table.add_row("", "accuracy was computed inside the simulation and is not released")
    table.add_row("time", f"{result['seconds']['total']:.1f} s")
    return table


def _comparison(comparison: dict[str, Any]) -> RenderableType:
    arms = comparison["arms"]
    private = arms.get("federated_dp")
    return Group(
        _overall(comparison),
        Text(""),
        _per_site(comparison),
        Text(""),
        *_sentences(comparison, private),
    )


def _overall(comparison: dict[str, Any]) -> Table:
    arms = comparison["arms"]
    table = _table(f"On all sites' held-out examples (mean ± sd over {comparison['folds']} identical folds)")
    for title in ("trained", "accuracy", "AUC"):
        table.add_column(title, justify="left" if title == "trained" else "right")
    rows = [(f"{site} alone", arm) for site, arm in arms["alone"].items()]
    rows += [(label, arms[name]) for name, label in _ARMS if name in arms]
    for label, arm in rows:
        style = "bold" if "alone" not in label else None
        accuracy = _spread(arm["accuracy_mean"], arm["accuracy_sd"])
        table.add_row(label, accuracy, _spread(arm["auc_mean"], arm["auc_sd"]), style=style)
    table.add_row("always the most common class", f"{comparison['test_majority']:.3f}        ", "", style="dim")
    return table


def _per_site(comparison: dict[str, Any]) -> Table:
    arms = comparison["arms"]
    table = _table("On each site's own held-out examples: accuracy / AUC")
    table.add_column("site")
    shown = [(name, label) for name, label in _ARMS if name in arms]
    for title in (
        "majority",
        "alone",
        *(label.replace("federated with privacy", "with privacy") for _, label in shown),
    ):
        table.add_column(title, justify="right")
    if "federated_dp" in arms:
        table.add_column("epsilon", justify="right")
    for site, alone in arms["alone"].items():
        own = alone["sites"][site]
        cells = [f"{own['majority']:.3f}", _pair(own), *(_pair(arms[name]["sites"][site]) for name, _ in shown)]
        if "federated_dp" in arms:
            cells.append(f"{arms['federated_dp']['epsilon'][site]:.2f}")
        table.add_row(site, *cells)
    return table


def _sentences(comparison: dict[str, Any], private: dict[str, Any] | None) -> list[Text]:
    arms = comparison["arms"]
    lines = []
    for site, gain in comparison["gains"].items():
        federated = gain["federated"]
        own = arms["alone"][site]["sites"][site]
        text = f"{site}: {_VERDICTS[federated['verdict']]} on its own patients by taking part"
        text += f" ({federated['accuracy_gain']:+.3f} ± {2 * federated['standard_error']:.3f} against training alone)"
        if arms["federated"]["sites"][site]["accuracy_mean"] <= own["majority"]:
            text += f"; always answering its most common class would do as well ({own['majority']:.3f})"
        lines.append(Text(text.replace("patients", "held-out examples") + "."))
    lines.append(Text(f"Not pooling costs {comparison['pooled_minus_federated']:+.3f} accuracy."))
    if private is not None:
        cost = arms["federated"]["accuracy_mean"] - private["accuracy_mean"]
        worst = max(private["epsilon"].values())
        lines.append(
            Text(
                f"Privacy costs {cost:+.3f} accuracy: epsilon {worst:.2f} and delta {private['delta']:g} spent at each "
                f"site over the whole run; unit: one {private['unit']}, neighbouring by {private['relation']}."
            )
        )
        lines.append(Text("Accuracies were computed inside the simulation; a private run releases none of them."))
    return lines


_VERDICTS = {"gains": "gains", "loses": "loses", "no clear gain": "gains nothing clear"}


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)


def _title(result: dict[str, Any]) -> str:
    model, data = result["model"], result["data"]
    clients = len(result["clients"])
    return (
        f"{result['name']}: {model['name']} ({model['parameters']:,} parameters) on {data['name']}, {clients} clients"
    )


def _spread(mean: float | None, sd: float | None) -> str:
    return "" if mean is None else f"{mean:.3f} ± {sd:.3f}"


def _pair(site: dict[str, Any]) -> str:
    auc = site["auc_mean"]
    return f"{site['accuracy_mean']:.3f} / " + ("  -  " if auc is None else f"{auc:.3f}")
