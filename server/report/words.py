"""Numbers and sentences for people who did not make the run."""

from __future__ import annotations

import math
from collections.abc import Sequence

from common.errors import FailureCode
from server.report.record import BatchingFacts, Record, Result

NARROW = "\u202f"
"""A narrow space that does not break: between a number and its unit."""

MINUS, TIMES, MISSING = "\u2212", "\u00d7", "\u2013"


def percent(value: float | None, digits: int = 1) -> str:
    """A share as per cent, or a dash."""
    return MISSING if value is None else f"{100 * value:.{digits}f}{NARROW}%"


def points(value: float) -> str:
    """A difference of two shares, with its sign, in percentage points."""
    sign = "+" if value >= 0 else MINUS
    return f"{sign}{abs(100 * value):.1f}"


def number(value: float | None, digits: int = 3) -> str:
    """A number as short as it can be read: counts with thin spaces, the rest with so many digits."""
    if value is None:
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    if math.isnan(value):
        return MISSING
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", NARROW)
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"


def ceiling(value: float | None) -> str:
    """As `number`, rounded up: what is spent is never shown as less than it is."""
    if value is None or not math.isfinite(value) or value <= 0:
        return number(value)
    value = max(value, 1e-9)  # no less is ever shown, and its step does not vanish
    digits = 2 if value < 1e-3 else 3  # as many as `number` shows
    step = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return number(math.ceil(value / step - 1e-9) * step)


def duration(seconds: float | None) -> str:
    """Seconds, minutes or hours."""
    if seconds is None:
        return MISSING
    if seconds < 0.1:
        return f"{seconds * 1000:.0f}{NARROW}ms"
    if seconds < 90:
        return f"{seconds:.{1 if seconds < 10 else 0}f}{NARROW}s"
    if seconds >= 72 * 3600:
        return f"{number(seconds / 86400)}{NARROW}days"
    if seconds < 600:
        return f"{seconds / 60:.1f}{NARROW}min"
    minutes = round(seconds / 60)
    return f"{minutes}{NARROW}min" if minutes < 90 else f"{minutes // 60}{NARROW}h {minutes % 60:02d}{NARROW}min"


def count(n: int, noun: str) -> str:
    """`1 round`, `20 rounds`."""
    return f"{number(n)} {noun}{'' if n == 1 else 's'}"


def joined(parts: Sequence[str], most: int = 8) -> str:
    """`a, b and c`; beyond `most` the rest is counted."""
    if len(parts) > most:
        parts = [*parts[:most], f"{len(parts) - most} more"]
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}" if parts else ""


def failure_sentence(slug: str) -> str:
    """What a failure's code means."""
    return next((code.sentence for code in FailureCode if code.slug == slug), "the client had no update")


def quantiles(values: Sequence[float]) -> list[tuple[str, float]]:
    """Smallest, 5 %, 25 %, median, 75 %, 95 %, largest (nearest rank). `values` must not be empty."""
    ranked = sorted(values)
    named = (("smallest", 0.0), ("5 %", 0.05), ("25 %", 0.25), ("median", 0.5), ("75 %", 0.75), ("95 %", 0.95))
    last = len(ranked) - 1
    return [*((name, ranked[round(share * last)]) for name, share in named), ("largest", ranked[-1])]


def how_trained(facts: BatchingFacts | None) -> str:
    """Whether clients trained stacked, and why; empty where that is not on record."""
    if facts is None or not facts.batching:
        return ""
    if facts.why:
        return f"Clients trained one by one: {facts.why}."
    if facts.batching != "auto" and facts.stacked is not None:
        return f"Clients trained {'stacked, as one computation' if facts.stacked else 'one by one'}, as asked for."
    if facts.stacked is None:
        return "Which way of training clients is quicker, stacked or one by one, was being measured."
    cost = {
        way: min((p.cpu_seconds / p.weight for p in facts.probes if p.stacked is way and p.weight > 0), default=0.0)
        for way in (True, False)
    }
    measured = ""
    if cost[True] > 0 and cost[False] > 0:
        slower, quicker = max(cost.values()), min(cost.values())
        measured = f": {number(slower / quicker, 2)} times as quick as the other way, in processor time"
    chosen = "stacked, as one computation" if facts.stacked else "one by one"
    return f"After {count(len(facts.probes), 'round')} of trying both ways, clients trained {chosen}{measured}."


def sample(result: Result | None) -> str:
    """Says so where the clients that were measured are only some of all; empty where they are all."""
    facts = result.population if result else None
    if result is None or facts is None or facts.clients is None or facts.clients <= len(result.clients):
        return ""
    part = f"; {number(facts.participated)} of them took part" if facts.participated is not None else ""
    return f"{number(facts.clients)} clients{part}. What follows of single clients is of {number(len(result.clients))}."


def outcome(record: Record) -> list[str]:
    """What was trained and how it went: the sentences below the page's title."""
    result, config, done = record.result, record.config, len(record.rounds)
    model = (result and result.model.name) or config.model.name
    data = (result and result.data.name) or config.data.name
    if result is None:
        progress = f"{count(done, 'round')} of {number(config.rounds)} {'is' if done == 1 else 'are'} on record"
        return [f"Training {model} on {data} has not finished: {progress}."]
    everybody = (result.population and result.population.clients) or len(result.clients)
    who = count(everybody, "client") if everybody else "The clients"
    together = "together, without pooling their data, " if everybody != 1 else ""
    sentences = [f"{who} trained {model} on {data} {together}in {count(result.rounds or done, 'round')}."]
    if result.status == "stopped-early":
        sentences.append(f"Training stopped early, after {result.rounds or done} of {config.rounds} rounds.")
    elif result.status not in {"", "completed"}:
        sentences.append(f"The run's status is '{result.status}': take what follows as unfinished.")
    if result.accuracy is not None:
        examples = result.evaluation and result.evaluation.examples
        held_out = count(examples, "held-out example") if examples else "the held-out examples"
        base = ""
        if result.majority_accuracy is not None:
            base = f"; always naming the commonest class would be right for {percent(result.majority_accuracy)}"
        sentences.append(f"The model is right for {percent(result.accuracy)} of {held_out}{base}.")
    elif result.comparison is None:
        sentences.append("No accuracy was measured.")
    return sentences
