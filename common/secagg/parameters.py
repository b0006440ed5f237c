"""Thresholds of secure aggregation, which every member computes from public numbers, in integers only.

Why one certified survivor set and a threshold above the colluders suffice. Fix a group of n members of whom c collude
with the coordinator, and one index r. An honest member masks once under r, for one header (which names the participants
P), and makes one statement on it.

1. *One header, one set.* A certificate takes more than (n+c)/2 of the group's members. Two certificates share more than
   c, so an honest member signed both: they name the same header and the same survivors U. The count is over the group,
   never over P: with quorums of P alone, two headers of one index with other participants could both be opened.
2. *One trapdoor.* Honest holders release only against that certificate, so for each j either its self mask's secret
   (j in U) or its vault's key (j in P but not in U), never both; t - 1 >= the colluding holders do not find the other.
3. *A vector outside of U* keeps its self mask. So does one of a member i to which another header was shown, unless U
   names it: then kappa_i stays closed, and i has an honest neighbour j in its own P that began the certified header and
   is in U. Their pair's key lies in two closed vaults, and j never masks under i's header: that mask stays. There is
   such a j among the signers in a complete graph, as P and they both are more than (n+c)/2. On a ring t holders gave
   away b_i, so at least t - 2s honest ones signed, and fewer than that are outside of P: k - least < t - 2s.
4. *Vectors in U* keep the masks of honest pairs within U. The honest members of U are connected by such pairs, so their
   vectors look like random ones with the same sum (Bonawitz et al. 2017, lemma 6.1; Bell et al. 2020), and |U| >= h + c
   leaves at least h of them.

*Connected on a ring* (k neighbours, k/2 on each side): but for a chance of 2^-40 over the beacon nobody has more than
`s` colluding neighbours on a side. A member with more than k/2 + s neighbours in U has more than s in U on each side,
hence an honest one on each side. Every signer checks that for every member of U. So along the ring from one honest
survivor to the next it is never more than k/2 steps: they are neighbours, and all are connected. With c' = 2s this is
the condition of more than (k+c')/2 neighbours in U.

The composition is argued here and was not proved elsewhere; `docs/secure-aggregation.md` says what was.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb

from common.secagg.keys import digest, number
from common.secagg.refusal import SecAggError

MOST_COMPLETE = 128
"""Largest group in which everybody shares masks with everybody."""
MOST_MEMBERS = 1 << 16
"""Ranks travel in 16 bits."""
_SECURITY_BITS, _LIVENESS_BITS = 40, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """What a run lays down for its secure aggregation; members take part only under rules equal to their own.

    Attributes:
        run_id: 16 bytes.
        config_digest: 32 bytes, of the run's configuration.
        epoch_rounds: Rounds that one set-up serves.
        honest: Fewest honest members of a sum.
        colluding: Members of a group that are assumed to help the coordinator.
        min_survivors: Fewest updates that make a round; a group of several needs only `honest` + `colluding`.
        smallest_cohort: Fewest members of a group.
        group_size: Fewest members of each group, 0 for one group of all.
        bits: Size of the ring.
    """

    run_id: bytes
    config_digest: bytes
    epoch_rounds: int
    honest: int
    colluding: int
    min_survivors: int
    smallest_cohort: int
    group_size: int
    bits: int

    @property
    def fewest(self) -> int:
        """Fewest members of a sum."""
        least = self.honest + self.colluding
        return least if self.group_size else max(least, self.min_survivors)

    @property
    def digest(self) -> bytes:
        """What members compare and sign, 32 bytes."""
        values = (
            self.epoch_rounds,
            self.honest,
            self.colluding,
            self.min_survivors,
            self.smallest_cohort,
            self.group_size,
            self.bits,
        )
        return digest("rules", self.run_id, self.config_digest, *map(number, values))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The numbers of one group.

    Attributes:
        members: n, how many it has.
        degree: k, how many neighbours each has; n - 1 in a complete graph.
        threshold: t, shares that open a secret; its k neighbours hold one each.
        quorum: Signers of a survivor set, counted over the group.
        fewest: Fewest participants, and fewest survivors, of a round; at least a quorum, and enough to open shares.
        least_neighbours: Fewest neighbours that every participant must have among the participants, and every survivor
            among the survivors; 0 in a complete graph, where `fewest` is enough.
    """

    members: int
    degree: int
    threshold: int
    quorum: int
    fewest: int
    least_neighbours: int

    @property
    def complete(self) -> bool:
        """Whether everybody shares masks with everybody."""
        return self.degree == self.members - 1


def needs_beacon(rules: Rules, members: int) -> bool:
    """Whether an epoch of so many members needs an order that nobody chose: for groups, or for a ring."""
    return rules.group_size > 0 or members > MOST_COMPLETE


def quorum(members: int, colluding: int) -> int:
    """The least number of signers, more than (members + colluding) / 2: two quorums share more than the colluders."""
    return (members + colluding) // 2 + 1


def shape_of(members: int, *, rules: Rules) -> Shape:
    """The numbers of a group of so many members.

    Guarantee:
        The threshold is more than the colluding neighbours that a member has (on a ring: but for a chance of 2^-40 that
        any member has more), and at most the neighbours that it has.

    Raises:
        SecAggError: `roster`: too few members, or too many; `threshold`: too few for so many that collude.
    """
    if not max(rules.fewest, rules.smallest_cohort) <= members <= MOST_MEMBERS:
        raise SecAggError("roster")
    signers = quorum(members, rules.colluding)
    degree, threshold, least = _ring(members, rules.colluding) or _complete(members, rules.colluding)
    if threshold > degree or signers > members:  # so that `fewest` is at most `members`
        raise SecAggError("threshold")
    return Shape(
        members=members,
        degree=degree,
        threshold=threshold,
        quorum=signers,
        fewest=max(rules.fewest, signers, threshold + 1),
        least_neighbours=least,
    )


def largest_group(clients: int, bad: int, *, strategy: str) -> int:
    """The largest admissible `group_size` for a strategy over the groups' means, against so many bad clients.

    A bad client spoils its whole group, so `clients // group_size` groups must be as many as the strategy needs when
    `bad` of them are bad: 2 * bad + 1 for medians and trimmed means (whose trimmed share must cover `bad` groups),
    2 * bad + 3 for Krum and MultiKrum, 4 * bad + 3 for Bulyan. 0 if even single clients are too few.

    Source:
        Velicheti, Xia, Koyejo, "Secure Byzantine-robust distributed learning via clustering" (arXiv 2110.02940);
        Blanchard et al., NeurIPS 2017 (Krum); El Mhamdi et al., ICML 2018 (Bulyan).
    """
    needed = {"krum": 2 * bad + 3, "multikrum": 2 * bad + 3, "bulyan": 4 * bad + 3}.get(strategy, 2 * bad + 1)
    return clients // needed


def _complete(members: int, colluding: int) -> tuple[int, int, int]:
    degree = members - 1
    return degree, max(2, colluding + 1, degree // 3 + 1), 0


@lru_cache(maxsize=256)
def _ring(members: int, colluding: int) -> tuple[int, int, int] | None:
    """Degree, threshold and least neighbours of a ring; None where a complete graph is smaller, or as small."""
    if members <= MOST_COMPLETE:
        return None
    for degree in range(2, members - 1, 2):
        side = _colluders_on_a_side(members, colluding, degree // 2)
        threshold = max(2, 2 * side + 1, degree // 2 + side)
        least = degree // 2 + side + 1
        need = max(threshold, least)
        if need <= degree and _rarely_too_few(members, degree, need):
            return degree, threshold, least
    return None


def _colluders_on_a_side(members: int, colluding: int, half: int) -> int:
    """The least x such that anybody has more than x colluders on one side with a chance below 2^-40, over the beacon.

    Colluders among the next `half` members are hypergeometric; the bound is over all members and both sides.
    """
    others, most = members - 1, min(colluding, half)
    limit = comb(others, half)
    tail, x = 0, most
    while x > 0:
        tail += comb(colluding, x) * comb(others - colluding, half - x)
        if (2 * members * tail) << _SECURITY_BITS >= limit:
            break
        x -= 1
    return x


def _rarely_too_few(members: int, degree: int, need: int) -> bool:
    """Whether, with a tenth of the members gone, anybody has fewer than `need` neighbours with a chance up to 2^-20."""
    others, gone = members - 1, members // 10
    limit = comb(others, degree)
    tail = sum(comb(gone, lost) * comb(others - gone, degree - lost) for lost in range(degree - need + 1, degree + 1))
    return (members * tail) << _LIVENESS_BITS <= limit
