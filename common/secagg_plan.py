"""Secure aggregation in figures, before anything runs: how small a sum may be, who may be missing, what it costs.

The figures follow from public numbers alone and are those that every member works out by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from common.aggregation import check_codec, codec_for, rules_for
from common.config import RunConfig
from common.errors import ConfigError
from common.secagg.fixed_point import FixedPoint
from common.secagg.messages import CIPHERTEXT_BYTES, Bundle, Deposited, Nonce, Offer, Offers
from common.secagg.packing import packed_bytes
from common.secagg.parameters import Rules, Shape, largest_group, needs_beacon, shape_of
from common.secagg.refusal import SecAggError
from common.secagg.shamir import SHARE_BYTES

ROBUST = ("fedmedian", "fedtrimmedavg", "krum", "multikrum", "bulyan")
"""Strategies that hold against some bad updates, and under secure aggregation against some bad groups."""

REVIEW = "secure aggregation is experimental: nobody from outside has reviewed it yet"
DIFFERENCES = (
    "without differential privacy sums still tell something: two rounds' sums that differ in one client come close to "
    "that client's update, and an epoch's sums add up; privacy.unit = 'client' puts noise into every sum"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Missing:
    """How many members of a sum may be lost by each step of a round, all losses before it counted.

    Attributes:
        update: Have sent no masked update.
        statement: Have not signed who is in the sum.
        share: Have released no shares.
    """

    update: int
    statement: int
    share: int


def asked(config: RunConfig, sites: int) -> int:
    """How many of `sites` a round asks."""
    return min(config.cohort.size or sites, sites)


def group_sizes(config: RunConfig, sites: int) -> list[int]:
    """Members of each sum of a round, largest first: one sum of all, or groups that differ by one at most."""
    members, size = asked(config, sites), config.secagg.group_size
    count = max(1, members // size) if size else 1
    return [members // count + (i < members % count) for i in range(count)]


def missing(shape: Shape) -> Missing:
    """What a sum of this shape still comes to its end with.

    A share of each survivor's own mask has to come from `threshold` others, so one more than that must answer. Where
    not everybody shares masks with everybody it is a tenth, missing at random: the degree is chosen for that.
    """
    members = shape.members
    most = members if shape.complete else members // 10
    return Missing(
        update=min(most, members - max(shape.fewest, shape.threshold + 1)),
        statement=min(most, members - shape.quorum),
        share=min(most, members - shape.threshold - 1),
    )


def setup_bytes(members: int, shape: Shape, *, epoch_rounds: int, beacon: bool) -> tuple[int, int]:
    """The most that a member sends and receives to set up an epoch, with names of 16 letters and Ed25519 signatures."""
    mark, signature, half = bytes(32), bytes(64), range((shape.degree + 1) // 2)
    bundle = Bundle(
        epoch=bytes(16), name="n" * 16, key_id=mark, x25519=mark, ml_kem=bytes(1184), nonce=mark, rules=mark,
        signature=signature,
    ).to_bytes()  # fmt: skip
    nonce = Nonce(epoch=bytes(16), roster=mark, nonce=mark, signature=signature).to_bytes()
    ciphertext = bytes(CIPHERTEXT_BYTES)
    offers = Offers(epoch=bytes(16), group=mark, ciphertexts=dict.fromkeys(half, ciphertext), signature=signature)
    offer = Offer(digests=dict.fromkeys(half, mark), ciphertext=ciphertext, signature=signature).to_bytes()
    sealed = bytes(2 * epoch_rounds * SHARE_BYTES + 16)
    shares = dict.fromkeys(range(shape.degree), sealed)
    vault = bytes(32 * shape.degree + 16)
    deposited = Deposited(
        epoch=bytes(16), group=mark, vaults=(vault,) * epoch_rounds, commitments=(mark,) * (2 * epoch_rounds),
        shares=shares, signature=signature,
    )  # fmt: skip
    roster = members * (len(bundle) + 4)
    sent = len(bundle) + len(offers.to_bytes()) + len(deposited.to_bytes())
    received = roster + len(half) * (len(offer) + 6) + shape.degree * (len(sealed) + 6)
    if beacon:
        sent, received = sent + len(nonce), received + roster + members * (len(nonce) + 6)
    return sent, received


def sums_plan(config: RunConfig, sites: int, *, bad: int = 0, entries: int = 0) -> dict[str, Any]:
    """A run's sums as JSON values.

    Args:
        config: The run, with secure aggregation on.
        sites: How many there are.
        bad: Sites that may send any update at all, for choosing groups.
        entries: Values of one update, weights and whole numbers; 0 leaves the round's sizes out.

    Raises:
        ConfigError: No sum is possible with so few sites, or with so many in such a ring.
    """
    rules, sizes, members = rules_for(config, bytes(16)), group_sizes(config, sites), asked(config, sites)
    smallest, largest = (_shape(pick(sizes), rules) for pick in (min, max))
    check_codec(config, max(sizes))
    beacon = needs_beacon(rules, members)
    epoch = config.secagg.epoch_rounds if members == sites else 1
    sent, received = setup_bytes(members, largest, epoch_rounds=epoch, beacon=beacon)
    lost = missing(smallest)
    return {
        "format": 1,
        "experimental": True,
        "sites": sites,
        "asked": members,
        "groups": sizes if config.secagg.group_size else [],
        "sum": {
            "members": smallest.members,
            "fewest": smallest.fewest,
            "neighbours": smallest.degree,
            "least_neighbours": smallest.least_neighbours,
            "complete": smallest.complete,
            "threshold": smallest.threshold,
            "quorum": smallest.quorum,
            "colluding": rules.colluding,
        },
        "missing": {"update": lost.update, "statement": lost.statement, "share": lost.share},
        "setup": {
            "legs": 5 if beacon else 4,
            "beacon": beacon,
            "epoch_rounds": epoch,
            "sent_bytes": sent,
            "received_bytes": received,
        },
        "round": {
            "trips": 3,
            "bits": config.secagg.bits,
            "rounding": _rounding(config, max(sizes)),
            "weighted": config.strategy.weighting == "examples" and not config.private,
            "entries": entries or None,
            "update_bytes": packed_bytes(entries, config.secagg.bits) if entries else None,
        },
        "groups_for": _advice(config, sites, bad) if bad else [],
        "bad": bad,
        "warnings": warnings_of(config, sites),
    }


def warnings_of(config: RunConfig, sites: int | None = None) -> list[str]:
    """What a person should know before they start a run under secure aggregation; empty without it.

    Args:
        config: The run.
        sites: How many there are, if that is known.
    """
    if not config.privacy.secure_aggregation:
        return []
    found = [REVIEW]
    if not config.private:
        found.append(DIFFERENCES)
    size = config.secagg.group_size
    if size and sites is not None:
        members, bad = asked(config, sites), config.strategy.malicious_clients
        sizes = group_sizes(config, sites)
        found.append(
            f"an update hides among those of its group, {min(sizes)} at most, not among all {members}"
            if len(sizes) > 1
            else f"{members} clients make one group of {size} or more: the strategy sees one mean"
        )
        most = largest_group(members, bad, strategy=config.strategy.name) if bad else 0
        if bad and config.strategy.name in ROBUST and size > most:
            found.append(_too_large(config.strategy.name, bad, members, most))
    return found


def _rounding(config: RunConfig, members: int) -> float | None:
    """How far each value of a mean of members with weight 1 can be off; None where their noise is far more."""
    if config.distributed:
        return None
    codec = codec_for(config, {}, participants=members, plan=None, server_round=1)
    return codec.bound(members, members) if isinstance(codec, FixedPoint) else None


def _shape(members: int, rules: Rules) -> Shape:
    """The numbers of one sum, or ConfigError."""
    try:
        return shape_of(members, rules=rules)
    except SecAggError as e:
        raise ConfigError(
            f"{members} {'site is' if members == 1 else 'sites are'} too few for a sum with secagg.honest = "
            f"{rules.honest}, secagg.colluding = {rules.colluding} and cohort.min_survivors = {rules.min_survivors}",
            hint=f"a sum takes {rules.fewest} sites or more",
        ) from e


def _too_large(strategy: str, bad: int, members: int, most: int) -> str:
    mend = f"set secagg.group_size to {most} or less" if most else "ask more clients, or assume fewer bad ones"
    return (
        f"groups are too large for {strategy} to hold against {bad} bad clients of {members}, each in another: {mend}"
    )


def _advice(config: RunConfig, sites: int, bad: int) -> list[dict[str, Any]]:
    """For each robust strategy the largest groups that hold against so many bad sites."""
    rows = []
    for strategy in ROBUST:
        size = largest_group(asked(config, sites), bad, strategy=strategy)
        row: dict[str, Any] = {"strategy": strategy, "group_size": None, "groups": None, "missing": None}
        if size >= config.secagg.honest + config.secagg.colluding:
            grouped = config.model_copy(update={"secagg": config.secagg.model_copy(update={"group_size": size})})
            sizes = group_sizes(grouped, sites)
            lost = missing(_shape(min(sizes), rules_for(grouped, bytes(16))))
            row |= {"group_size": min(sizes), "groups": len(sizes), "missing": lost.update}
        rows.append(row)
    return rows
