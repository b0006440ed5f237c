"""Any threshold of shares gives the secret; fewer fit every secret equally well."""

from __future__ import annotations

import os
from contextlib import suppress
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import shamir
from common.secagg.refusal import SecAggError
from common.secagg.shamir import PRIME, SHARE_BYTES, combine, split

secrets = st.binary(min_size=32, max_size=32)
EXTREMES = [bytes(32), b"\xff" * 32, (1).to_bytes(32, "big")]


def held(dealt: list[bytes], number: int) -> dict[int, bytes]:
    """Shares of the secret with that number, by place."""
    return {x + 1: share[number * SHARE_BYTES : (number + 1) * SHARE_BYTES] for x, share in enumerate(dealt)}


def through(points: dict[int, int], at: int) -> int:
    """Value at a place of the polynomial of least degree through points, by the textbook's formula."""
    total = 0
    for x, y in points.items():
        term = y
        for other in points:
            if other != x:
                term = term * (at - other) * pow(x - other, -1, PRIME) % PRIME
        total += term
    return total % PRIME


def test_the_field_is_prime() -> None:
    """2^256 + 297 passes Miller and Rabin's test with many bases (a composite passes with chance below 4^-40)."""
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        x = pow(int.from_bytes(os.urandom(32), "big") + 2, odd, PRIME)
        assert x == 1 or any(pow(x, 2**i, PRIME) == PRIME - 1 for i in range(twos))


@settings(deadline=None, max_examples=60)
@given(st.lists(secrets, min_size=1, max_size=4), st.data())
def test_any_threshold_of_shares_gives_the_secret(dealt: list[bytes], data: st.DataObject) -> None:
    """Whoever holds them, in whatever order they come, and more of them do no harm."""
    holders = data.draw(st.integers(1, 40))
    threshold = data.draw(st.integers(1, holders))
    shares = split(dealt, threshold=threshold, holders=holders)
    assert [len(share) for share in shares] == [SHARE_BYTES * len(dealt)] * holders
    places = data.draw(st.permutations(range(1, holders + 1)))[: data.draw(st.integers(threshold, holders))]
    for number, secret in enumerate(dealt):
        mine = held(shares, number)
        assert combine({place: mine[place] for place in places}, threshold=threshold) == secret


@pytest.mark.parametrize("secret", EXTREMES)
@pytest.mark.parametrize(("threshold", "holders"), [(1, 1), (1, 5), (2, 2), (34, 99), (67, 99), (5, 300), (128, 128)])
def test_extreme_secrets_and_sizes(secret: bytes, threshold: int, holders: int) -> None:
    """No lane runs into the next: many large secrets side by side, at the largest places."""
    shares = split([secret] * 8, threshold=threshold, holders=holders)
    for number in range(8):
        mine = held(shares, number)
        last = {place: mine[place] for place in range(holders - threshold + 1, holders + 1)}
        assert combine(last, threshold=threshold) == secret


def test_lanes_hold_the_largest_polynomials(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every coefficient as large as it can be, all shares are those of the textbook's polynomial."""
    monkeypatch.setattr(shamir, "_random", lambda count: [PRIME - 1] * count)
    for threshold, holders in [(1, 3), (2, 2), (3, 127), (40, 128), (20, 255), (4, 1000)]:
        shares = split([b"\xff" * 32] * 3, threshold=threshold, holders=holders)
        for place in {1, 2, holders - 1, holders}:
            value = (2**256 - 1 + sum((PRIME - 1) * place**k for k in range(1, threshold))) % PRIME
            assert shares[place - 1] == value.to_bytes(SHARE_BYTES, "big") * 3


@settings(deadline=None, max_examples=60)
@given(secrets, secrets, st.data())
def test_fewer_shares_fit_every_secret(secret: bytes, other: bytes, data: st.DataObject) -> None:
    """For any other secret there is a polynomial through the same shares: the missing share decides."""
    holders = data.draw(st.integers(2, 12))
    threshold = data.draw(st.integers(2, holders))
    mine = held(split([secret], threshold=threshold, holders=holders), 0)
    known = sorted(data.draw(st.permutations(range(1, holders + 1)))[: threshold - 1])
    missing = next(place for place in range(1, holders + 1) if place not in known)
    points = {place: int.from_bytes(mine[place], "big") for place in known}
    forged = through(points | {0: int.from_bytes(other, "big")}, missing)
    shares = {place: mine[place] for place in known} | {missing: forged.to_bytes(SHARE_BYTES, "big")}
    assert combine(shares, threshold=threshold) == other
    with pytest.raises(SecAggError):
        combine({place: mine[place] for place in known}, threshold=threshold)


def test_every_holder_below_the_threshold_sees_uniform_shares() -> None:
    """Halves of the field come equally often whatever the secret is (6 standard deviations: 2 in 10^9)."""
    for secret in EXTREMES:
        shares = split([secret] * 4096, threshold=2, holders=2)
        for place in (1, 2):
            high = sum(int.from_bytes(held(shares, number)[place], "big") * 2 > PRIME for number in range(4096))
            assert abs(high - 2048) < 6 * 32


def test_shares_are_new_every_time() -> None:
    """Coefficients come from the operating system at each call, and for each secret."""
    first, second = (split([bytes(32)] * 2, threshold=2, holders=2) for _ in range(2))
    assert len({held(dealt, number)[1] for dealt in (first, second) for number in range(2)}) == 4


def test_coefficients_are_drawn_wider_than_the_field() -> None:
    """384 bits mod a prime of 257: every value is as likely as another but for 2^-126."""
    assert 8 * shamir._RANDOM_BYTES - PRIME.bit_length() >= 127


def test_all_subsets_agree_with_the_textbook() -> None:
    """Lagrange's coefficients, computed with one inversion, are the textbook's for every set of holders."""
    secret = os.urandom(32)
    mine = held(split([secret], threshold=3, holders=6), 0)
    for places in combinations(mine, 3):
        points = {place: int.from_bytes(mine[place], "big") for place in places}
        assert through(points, 0).to_bytes(32, "big") == combine({p: mine[p] for p in places}, threshold=3) == secret


class TestMalformedShares:
    @pytest.mark.parametrize(
        "share",
        [b"", bytes(32), bytes(34), PRIME.to_bytes(33, "big"), b"\xff" * 33],
        ids=["empty", "short", "long", "prime", "above"],
    )
    def test_are_refused(self, share: bytes) -> None:
        """A share is one number of the field, in 33 bytes."""
        mine = held(split([bytes(32)], threshold=2, holders=3), 0)
        with pytest.raises(SecAggError) as refused:
            combine(mine | {1: share}, threshold=2)
        assert refused.value.reason == "shares"

    @pytest.mark.parametrize("place", [0, -1])
    def test_at_impossible_places_are_refused(self, place: int) -> None:
        """The share at 0 would be the secret itself."""
        mine = held(split([bytes(32)], threshold=2, holders=3), 0)
        with pytest.raises(SecAggError):
            combine({place: mine[1], 2: mine[2]}, threshold=2)

    def test_too_few_are_refused(self) -> None:
        """Also none, and also where nothing is asked for."""
        for shares, threshold in [({}, 1), ({1: bytes(33)}, 2), ({}, 0)]:
            with pytest.raises(SecAggError):
                combine(shares, threshold=threshold)

    def test_that_give_no_secret_are_refused(self) -> None:
        """Numbers of the field that no 32 bytes hold are nobody's secret."""
        with pytest.raises(SecAggError):
            combine({1: (2**256).to_bytes(33, "big")}, threshold=1)

    @settings(deadline=None)
    @given(st.dictionaries(st.integers(-3, 300), st.binary(max_size=40), max_size=6), st.integers(0, 6))
    def test_never_crash(self, shares: dict[int, bytes], threshold: int) -> None:
        """Whatever bytes come, they give a secret or a refusal."""
        with suppress(SecAggError):
            assert len(combine(shares, threshold=threshold)) == 32

    def test_a_changed_share_changes_the_secret(self) -> None:
        """Which is why secrets have commitments."""
        mine = held(split([b"\1" * 32], threshold=2, holders=2), 0)
        wrong = (int.from_bytes(mine[1], "big") ^ 1).to_bytes(33, "big")
        assert combine(mine | {1: wrong}, threshold=2) != b"\1" * 32


@pytest.mark.parametrize(
    ("some", "threshold", "holders"),
    [([], 1, 1), ([bytes(31)], 1, 1), ([bytes(33)], 1, 1), ([bytes(32)], 0, 3), ([bytes(32)], 4, 3)],
)
def test_impossible_sharings_are_refused(some: list[bytes], threshold: int, holders: int) -> None:
    """A threshold of 0 would hide nothing, one above the holders would lose the secret."""
    with pytest.raises(ValueError, match="32 bytes"):
        split(some, threshold=threshold, holders=holders)
