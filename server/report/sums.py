"""What the page says of secure aggregation: who could see which updates, and the sums that were made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from common.aggregation import rules_for
from common.secagg_plan import warnings_of
from server.report.record import Record, SumRow
from server.report.words import count, joined, number

_REASONS = {
    "participants": "too few clients were left to ask",
    "survivors": "too few updates came",
    "quorum": "too few clients signed who is in the sum",
    "shares": "too few shares came to open the sum",
    "range": "the sum was none that honest updates can give",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class SumsBox:
    """What the page says of a run under secure aggregation.

    Attributes:
        meaning: Who could see what, in sentences.
        facts: Label and figure, from top to bottom.
        warnings: What holds no longer, or not yet.
    """

    meaning: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    warnings: tuple[str, ...]


def sums_box(record: Record) -> SumsBox | None:
    """The sums of a run, also of one that has not finished; None for a run without secure aggregation."""
    config = record.config
    if not config.privacy.secure_aggregation:
        return None
    result = record.result
    cohort = max((len(row.cohort) for row in record.rounds), default=0)
    return SumsBox(
        meaning=tuple(_meaning(record, simulated=bool(result and result.simulated))),
        facts=tuple(_facts(record)),
        warnings=tuple(f"{text[0].upper()}{text[1:]}." for text in warnings_of(config, cohort or None)),
    )


def _meaning(record: Record, *, simulated: bool) -> Iterator[str]:
    settings = record.config.secagg
    yield (
        "Every client hid its update, its weight and its metrics behind masks that cancel only in a sum, and refused "
        f"any sum of fewer than {rules_for(record.config, bytes(16)).fewest} updates."
    )
    helpers = f", nor up to {count(settings.colluding, 'client')} that may help it" if settings.colluding else ""
    yield (
        f"Nobody but the client itself learns its update: not even a malicious coordinator{helpers}. That rests on "
        "sites having pinned one another's keys; without pins it holds if the coordinator keeps to the rules."
    )
    if settings.group_size:
        yield "The coordinator saw the mean of each group: an update hides among those of its own group."
    if simulated:
        yield "This was a simulation: one machine held every key, and could have read everything."


def _facts(record: Record) -> Iterator[tuple[str, str]]:
    settings = record.config.secagg
    rounds = [row.aggregation for row in record.rounds if row.aggregation is not None]
    groups = [group for row in rounds for group in row.groups]
    opened = [group.survivors for group in groups if not group.refused]
    if opened:
        honest = min(opened) - settings.colluding
        yield "Smallest sum", f"{count(min(opened), 'update')}, at least {number(honest)} of honest clients"
    if groups:
        yield "Sums opened", f"{number(len(opened))} of {number(len(groups))}"
    lost = [group for group in groups if group.refused]
    if lost:
        yield "Given up", _lost(lost)
    if settings.group_size:
        sizes = joined([number(size) for size in sorted({group.members for group in groups})])
        yield "Groups", f"of {sizes or number(settings.group_size)} clients, drawn anew each epoch"
    epochs = {row.epoch for row in rounds}
    if epochs:
        yield "Epochs", f"{number(len(epochs))}, each with keys of its own"
    yield "Ring", f"{settings.bits} bits a value"
    if not record.config.distributed:
        yield "Updates clipped to", f"L2 norm {number(settings.clipping_norm)}, by each client"


def _lost(groups: Sequence[SumRow]) -> str:
    reasons = Counter(_REASONS.get(group.refused, "the sum could not be opened") for group in groups)
    return "; ".join(f"{number(times)}: {reason}" for reason, times in sorted(reasons.items()))
