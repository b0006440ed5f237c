"""Shamir's secret sharing over GF(2^256+297): any `threshold` shares give the secrets, fewer tell nothing of them.

All secrets of one dealer are shared at once: the k-th coefficients of all polynomials stand side by side in lanes of
one integer, wide enough that no lane runs into the next, so that one step of Horner's rule serves all.

Python's integers take time that depends on their values. That is acceptable here and only here: a secret is dealt once,
its key is used once, and nobody can ask for the same computation twice to average what they measure.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Final

from common.secagg.refusal import SecAggError

PRIME: Final = (1 << 256) + 297
SECRET_BYTES: Final = 32
SHARE_BYTES: Final = 33
_RANDOM_BYTES: Final = 48
"""What a coefficient is reduced from: 384 bits mod a prime of 257 differ from uniform by less than 2^-126."""


def split(secrets: Sequence[bytes], *, threshold: int, holders: int) -> list[bytes]:
    """Share secrets of 32 bytes among holders at the places 1, 2, ... `holders`.

    Returns:
        For each holder, one share of 33 bytes (big-endian) of each secret, one after another.

    Guarantee:
        Any `threshold - 1` holders' shares are distributed alike whatever the secrets are (up to 2^-126 for each
        coefficient), and coefficients are new at every call.

    Raises:
        ValueError: There is no secret, one is not 32 bytes long, or not 1 <= threshold <= holders.

    Source:
        Shamir, "How to share a secret" (CACM 1979).
    """
    if not secrets or any(len(secret) != SECRET_BYTES for secret in secrets) or not 1 <= threshold <= holders:
        raise ValueError("shares are made of secrets of 32 bytes, for at least as many holders as the threshold")
    # At x <= holders < 2^b a polynomial, not reduced, is below 2^257 * (1 + x + ... + x^(t-1)) <= 2^257 * 2^(b t).
    lane = (PRIME.bit_length() + holders.bit_length() * threshold + 7) // 8
    constants = _lanes([int.from_bytes(secret, "big") for secret in secrets], lane)
    coefficients = [constants, *(_lanes(_random(len(secrets)), lane) for _ in range(threshold - 1))]
    coefficients.reverse()
    return [_shares(_horner(coefficients, place), lane, len(secrets)) for place in range(1, holders + 1)]


def combine(shares: Mapping[int, bytes], *, threshold: int) -> bytes:
    """The secret of 32 bytes that belongs to shares of 33 bytes by their holders' places.

    The first `threshold` of them, by place, are used. Wrong shares give a wrong secret: who needs to know compares it
    with a commitment.

    Raises:
        SecAggError: `shares`: too few, malformed, at an impossible place, or of no 32-byte secret.
    """
    places = tuple(sorted(shares)[:threshold])
    if threshold < 1 or len(places) < threshold or places[0] < 1:
        raise SecAggError("shares")
    total = 0
    for place, weight in zip(places, _weights(places), strict=True):
        share = shares[place]
        value = int.from_bytes(share, "big")
        if len(share) != SHARE_BYTES or value >= PRIME:
            raise SecAggError("shares")
        total += weight * value
    secret = total % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise SecAggError("shares")
    return secret.to_bytes(SECRET_BYTES, "big")


def _random(count: int) -> list[int]:
    """Coefficients that are uniform but for 2^-126."""
    raw = os.urandom(_RANDOM_BYTES * count)
    return [int.from_bytes(raw[i : i + _RANDOM_BYTES], "big") % PRIME for i in range(0, len(raw), _RANDOM_BYTES)]


def _lanes(values: Sequence[int], lane: int) -> int:
    """Numbers side by side in one integer, `lane` bytes each."""
    return int.from_bytes(b"".join(value.to_bytes(lane, "big") for value in values), "big")


def _horner(coefficients: Sequence[int], place: int) -> int:
    """The polynomials' values at a place, in their lanes; highest coefficients come first."""
    total = 0
    for coefficient in coefficients:
        total = total * place + coefficient
    return total


def _shares(values: int, lane: int, count: int) -> bytes:
    """Lanes reduced, 33 bytes each."""
    raw = values.to_bytes(lane * count, "big")
    lanes = (int.from_bytes(raw[i : i + lane], "big") % PRIME for i in range(0, len(raw), lane))
    return b"".join(value.to_bytes(SHARE_BYTES, "big") for value in lanes)


@lru_cache(maxsize=2048)
def _weights(places: tuple[int, ...]) -> tuple[int, ...]:
    """Lagrange's coefficients at 0: prod over j of x_j / (x_j - x_i), with one inversion for all."""
    product = prod(places)
    # x_i * prod (x_j - x_i): the i-th coefficient is `product` over this.
    below = [place * prod(other - place for other in places if other != place) % PRIME for place in places]
    ahead = list(accumulate(below, lambda a, b: a * b % PRIME, initial=1))
    inverse, weights = pow(ahead[-1], -1, PRIME), []
    for factor, before in zip(reversed(below), reversed(ahead[:-1]), strict=True):
        weights.append(product * inverse * before % PRIME)
        inverse = inverse * factor % PRIME
    return tuple(reversed(weights))
