"""What the page says of privacy: the figures of the guarantee, and what they mean for people."""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.config import RunConfig
from common.config.participation import honest_in_sum
from common.guarantee import ADDED_OR_REMOVED, UPDATE_REPLACED, while_few
from server.report.record import PrivacyResult, Record, SharesResult
from server.report.words import NARROW, ceiling, count, percent, quantiles


@dataclass(frozen=True, kw_only=True, slots=True)
class Spending:
    """One client's line in the privacy box."""

    client: str
    epsilon: float
    replace_one: float | None
    share: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class PrivacyBox:
    """What the page says of a private run.

    Attributes:
        highest: Largest epsilon that any client spent; None where none is on record.
        kept: Whether every client stayed within the target; None without a target.
        meaning: Sentences for people who do not know what an epsilon is.
        spending: A line a client; empty beyond `most_clients`, where `spread` stands in.
        spread: Quantiles of epsilon over the clients, where these are many.
    """

    facts: PrivacyResult
    highest: float | None
    kept: bool | None
    meaning: tuple[str, ...]
    spending: tuple[Spending, ...]
    spread: tuple[tuple[str, float], ...]


def privacy_box(record: Record, most_clients: int) -> PrivacyBox | None:
    """The privacy of a run, also of one that has not finished; None for a run without privacy."""
    facts = _privacy_facts(record)
    if facts is None:
        return None
    spent = facts.epsilon
    highest = max(spent.values(), default=None)
    target = facts.target_epsilon
    few = len(spent) <= most_clients
    return PrivacyBox(
        facts=facts,
        highest=highest,
        kept=None if target is None or highest is None else highest <= target * (1 + 1e-9),
        meaning=_meaning(facts, highest),
        spending=tuple(
            Spending(
                client=name,
                epsilon=epsilon,
                replace_one=facts.epsilon_replace_one.get(name),
                share=min(1.0, epsilon / target) if target else None,
            )
            for name, epsilon in spent.items()
        ) if few else (),
        spread=() if few else tuple(quantiles(list(spent.values()))),
    )  # fmt: skip


def _privacy_facts(record: Record) -> PrivacyResult | None:
    if record.result is not None:
        return record.result.privacy
    if not record.config.private:
        return None
    settings = record.config.privacy
    return PrivacyResult(
        unit=settings.unit,
        trust=_trust(record.config),
        shares=_shares(record.config),
        relation=UPDATE_REPLACED if record.config.distributed else ADDED_OR_REMOVED,
        target_epsilon=settings.target_epsilon,
        target_delta=settings.target_delta,
        noise_multiplier=settings.noise_multiplier,
        epsilon=spent_so_far(record),
        epsilon_is="spent at each client up to the last round on record",
    )


def _trust(config: RunConfig) -> str:
    return "cohort" if config.distributed else "coordinator" if config.central else "nobody"


def _shares(config: RunConfig) -> SharesResult | None:
    """What is known of them before a result says it: noise is made for the fewest honest clients of the fewest."""
    if not config.distributed:
        return None
    return SharesResult(mechanism=config.secagg.noise, honest=honest_in_sum(config), colluding=config.secagg.colluding)


def spent_so_far(record: Record) -> dict[str, float]:
    """Each client's last epsilon on record, before a run has finished."""
    return {client: epsilon for row in record.rounds for client, epsilon in row.epsilon.items()}


def _meaning(facts: PrivacyResult, highest: float | None) -> tuple[str, ...]:
    """What epsilon and delta promise, as bounds on an attacker (Kairouz, Oh and Viswanath 2015, theorem 2.1)."""
    who = "one training example" if facts.unit == "example" else f"one {facts.unit}"
    related = {
        ADDED_OR_REMOVED: f"with and without {who}",
        "replace-one": f"that differ in {who}",
        UPDATE_REPLACED: f"with and without what {who} learnt, every client taking part in both",
    }.get(facts.relation, f"that are neighbours under the relation '{facts.relation}'")
    releases = {"client": "the coordinator releases"}.get(facts.unit, "a client releases")
    if facts.trust == "cohort":
        releases = "the coordinator gets to see"
    alike = f"whatever {releases} in them is so alike that nobody, whatever else they know, can tell well which"
    sentences = [f"The guarantee compares two trainings {related}: {alike} of the two took place."]
    delta = facts.target_delta
    if highest is not None and delta is not None and math.isfinite(highest) and highest < 500:
        odds = math.exp(highest)
        guess, found = (odds + delta) / (1 + odds), min(odds * 0.01 + delta, 1 - (1 - 0.01 - delta) / odds)
        sentences.append(
            f"At epsilon {ceiling(highest)}, somebody who guesses whether a given {facts.unit} was used is right at "
            f"most {_at_most(guess)} of the time, where tossing a coin gives 50{NARROW}%; somebody who may raise a "
            f"false alarm for 1 {facts.unit} in 100 detects at most {_at_most(found)} of the {facts.unit}s that were "
            "used. "
            "These are ceilings for the best possible attack, not forecasts."
        )
    sentences.append(
        "It protects single examples, not a person with several of them, and not general facts such as a link "
        "between age and disease, which the model is meant to learn."
        if facts.unit == "example"
        else f"{_whom(facts)} It does not hide general facts, which the model is meant to learn."
    )
    if facts.insecure_fixed_noise:
        sentences.insert(0, "THE NOISE OF THIS RUN CAME FROM A SEED AND PROTECTS NOBODY.")
    return tuple(sentences)


def _whom(facts: PrivacyResult) -> str:
    """Whom the guarantee of unit client holds against, and why."""
    if facts.trust != "cohort":
        return (
            "It holds against everybody but the coordinator, which sees each client's update before it adds the noise."
        )
    honest, colluding = (facts.shares.honest, facts.shares.colluding) if facts.shares else (None, None)
    enough = f"that of {count(honest, 'honest client')} is" if honest is not None else "theirs is"
    return (
        "It holds against everybody, the coordinator too, which sees nothing but sums: each client adds a share of the "
        f"noise before its update is masked, and {enough} enough. It holds {while_few(colluding)}. Who took part is "
        "not hidden."
    )


def _at_most(share: float) -> str:
    """A share that must not be understated."""
    return percent(math.ceil(share * 1000 - 1e-9) / 1000)
