"""How evenly a model serves clients, and how evenly they took part in making it."""

from __future__ import annotations

from server.report.measures import accuracies, fairness, participation, population
from server.report.record import Record
from server.report.svg import Figure
from server.report.virtual import counted
from server.report.words import count, number, percent

MAX_COUNTS = 60
"""Beyond so many updates of one client no bar a number is drawn."""


def even(record: Record) -> list[tuple[str, str]]:
    """Facts and their labels; empty where there are fewer than two clients, or none was measured or took part."""
    facts = []
    served = fairness(accuracies(record.result))
    if served is not None and served.clients > 1:
        facts += [
            ("Accuracy, worst tenth of clients", percent(served.worst_tenth)),
            ("Accuracy, median client", percent(served.median)),
            ("Accuracy, best tenth of clients", percent(served.best_tenth)),
            ("Standard deviation over clients", f"{number(100 * served.deviation)} points"),
        ]
    taken = participation(record.rounds, clients=population(record))
    if taken is not None and taken.clients > 1:
        facts += [
            ("Took part", f"{number(taken.took_part)} of {count(taken.clients, 'client')}"),
            ("Updates of one client", f"{number(taken.fewest)} to {number(taken.most)}, median {number(taken.median)}"),
            ("Gini coefficient of updates", f"{number(taken.gini, 2)} (0: all gave equally many)"),
        ]
    return facts


def participation_figure(record: Record) -> Figure | None:
    """How many clients gave how many updates; None where all gave the same, or a client gave very many."""
    taken = participation(record.rounds, clients=population(record))
    if taken is None or len(taken.counts) < 2 or taken.most > MAX_COUNTS:
        return None
    silent = taken.clients - taken.took_part
    none = f"{number(silent)} of {count(taken.clients, 'client')} gave no update; " if silent else ""
    summary = f"{none}the others between {number(min(k for k in taken.counts if k))} and {number(taken.most)}."
    summary = (
        summary[0].upper() + summary[1:] if silent else f"Between {number(taken.fewest)} and {number(taken.most)}."
    )
    title = "Updates by client"
    plot = counted(taken.counts, x_label="updates that were used", y_label="clients")
    return Figure(title=title, summary=summary, drawing=plot.draw(f"{title}. {summary}"))
