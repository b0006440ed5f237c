"""Secrets from shares of which some may be wrong; commitments show which secret is right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations
from math import comb
from typing import Final

from common.secagg.keys import digest, number
from common.secagg.refusal import SecAggError
from common.secagg.shamir import combine

MOST_ATTEMPTS: Final = 256
"""Sets of holders tried for one secret. Among 99 holders and a threshold of 34, with 10 wrong ones, 94 of 100 searches
succeed; after the first that did, the wrong holders are suspected and asked last."""


class Recovery:
    """Opens many secrets that the same holders have shares of, and learns whose are likely to be wrong."""

    def __init__(self, threshold: int) -> None:
        self._threshold = threshold
        self.suspects: set[int] = set()

    def secret(self, shares: Mapping[int, bytes], *, places: Mapping[int, int], fits: Callable[[bytes], bool]) -> bytes:
        """One secret.

        Args:
            shares: By holder.
            places: By holder, where its share was dealt for.
            fits: Whether a secret is the one that was committed to.

        Raises:
            SecAggError: `shares`: too few, or too many wrong ones among them.
        """
        holders = sorted(shares, key=lambda holder: (holder in self.suspects, places[holder]))
        if len(holders) < self._threshold:
            raise SecAggError("shares")
        for attempt, chosen in enumerate(_subsets(holders, self._threshold)):
            secret = self._combine(chosen, shares, places)
            if secret is not None and fits(secret):
                if attempt:
                    self._learn(holders, chosen, shares, places, secret)
                return secret
        raise SecAggError("shares")

    def _combine(self, chosen: Sequence[int], shares: Mapping[int, bytes], places: Mapping[int, int]) -> bytes | None:
        try:
            return combine({places[holder]: shares[holder] for holder in chosen}, threshold=self._threshold)
        except SecAggError:
            return None

    def _learn(
        self,
        holders: Sequence[int],
        right: Sequence[int],
        shares: Mapping[int, bytes],
        places: Mapping[int, int],
        secret: bytes,
    ) -> None:
        """Put every other holder into the place of one of the right ones: the secret changes if its share is wrong.

        Holders that plan it together can cast suspicion on others. Suspects are asked last, no more.
        """
        for holder in set(holders) - set(right):
            if self._combine((*right[1:], holder), shares, places) != secret:
                self.suspects.add(holder)


def _subsets(holders: Sequence[int], threshold: int) -> Iterator[Sequence[int]]:
    """The first ones, then others: all there are, or a fixed choice of them."""
    if comb(len(holders), threshold) <= MOST_ATTEMPTS:
        yield from combinations(holders, threshold)
        return
    yield holders[:threshold]
    for attempt in range(1, MOST_ATTEMPTS):
        drawn = sorted(holders, key=lambda holder: digest("subset", number(attempt), number(holder)))
        yield drawn[:threshold]
