"""The coordinator's end of a set-up: it passes on only what is sound, and a bad member costs only itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import pytest

from common.secagg import SecAggError, Setup
from common.secagg.keys import label
from common.secagg.messages import Bundle, Deposited, Nonce, Offers, Ready, kind_of, offered
from common.secagg.parties import signed
from tests.helpers.secagg import Federation, site, total, until, vectors_of

LEGS = ("advertise", "exchange", "deposit", "inbox")


def finish(federation: Federation, setup: Setup) -> tuple[str, ...]:
    """Go on with whoever is left; who is in the group at the end, after a round with an exact sum."""
    while setup.leg is not None:
        for name, reply in federation.ask(setup.requests()).items():
            setup.receive(name, reply)
        setup.advance()
    group = setup.groups()[0]
    vectors = vectors_of(federation.names, 4)
    result, names = federation.round(group, vectors, base=b"b")
    assert names == group.names
    assert (result == total(vectors, names)).all()
    return names


def spoilt_bundle(reply: bytes, by: str, **changes: object) -> bytes:
    return signed(replace(Bundle.from_bytes(reply), **changes), "bundle", site(by)).to_bytes()  # type: ignore[arg-type]


def spoilt_offers(reply: bytes, name: str, ciphertexts: dict[int, bytes]) -> bytes:
    said = Offers.from_bytes(reply)
    digests = {rank: hashlib.sha256(ciphertext).digest() for rank, ciphertext in ciphertexts.items()}
    signature = site(name).sign(label("offers"), offered(said.group, name, digests))
    return replace(said, ciphertexts=ciphertexts, signature=signature).to_bytes()


def spoilt_deposit(reply: bytes, name: str, change: Callable[[Deposited], Deposited]) -> bytes:
    return signed(change(Deposited.from_bytes(reply)), "deposited", site(name)).to_bytes()


WRONG: dict[str, tuple[str, Callable[[bytes, str], bytes], str]] = {
    "nonsense": ("advertise", lambda reply, name: b"\x02\x01nonsense", "format"),
    "another's name": ("advertise", lambda reply, name: spoilt_bundle(reply, name, name="site-0000"), "roster"),
    "another key": ("advertise", lambda reply, name: spoilt_bundle(reply, name, key_id=bytes(32)), "roster"),
    "other rules": ("advertise", lambda reply, name: spoilt_bundle(reply, name, rules=bytes(32)), "rules"),
    "another epoch": ("advertise", lambda reply, name: spoilt_bundle(reply, name, epoch=bytes(16)), "epoch"),
    "no X25519 key": ("advertise", lambda reply, name: spoilt_bundle(reply, name, x25519=bytes(32)), "roster"),
    "no ML-KEM key": ("advertise", lambda reply, name: spoilt_bundle(reply, name, ml_kem=b"\xff" * 1184), "roster"),
    "an unsigned bundle": (
        "advertise",
        lambda reply, name: replace(Bundle.from_bytes(reply), nonce=bytes(32)).to_bytes(),
        "signature",
    ),
    "no offers": ("exchange", lambda reply, name: spoilt_offers(reply, name, {}), "format"),
    "offers to others": ("exchange", lambda reply, name: spoilt_offers(reply, name, {9: bytes(1088)}), "format"),
    "unsigned offers": (
        "exchange",
        lambda reply, name: replace(Offers.from_bytes(reply), signature=bytes(64)).to_bytes(),
        "signature",
    ),
    "offers for another group": (
        "exchange",
        lambda reply, name: replace(Offers.from_bytes(reply), group=bytes(32)).to_bytes(),
        "roster",
    ),
    "a vault too few": (
        "deposit",
        lambda reply, name: spoilt_deposit(reply, name, lambda said: replace(said, vaults=said.vaults[1:])),
        "format",
    ),
    "a short vault": (
        "deposit",
        lambda reply, name: spoilt_deposit(
            reply, name, lambda said: replace(said, vaults=(said.vaults[0][1:], *said.vaults[1:]))
        ),
        "format",
    ),
    "no shares": (
        "deposit",
        lambda reply, name: spoilt_deposit(reply, name, lambda said: replace(said, shares={})),
        "format",
    ),
    "an unsigned deposit": (
        "deposit",
        lambda reply, name: replace(Deposited.from_bytes(reply), signature=bytes(64)).to_bytes(),
        "signature",
    ),
    "ready for another epoch": ("inbox", lambda reply, name: Ready(epoch=bytes(16)).to_bytes(), "epoch"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_costs_its_sender_alone(what: str) -> None:
    """Whoever answers so is out; the others set up the epoch and have a round."""
    leg, spoil, reason = WRONG[what]
    federation = Federation(6)
    (setup, _), bad = until(federation, leg), "site-0003"
    for name, reply in federation.ask(setup.requests()).items():
        if name != bad:
            setup.receive(name, reply)
            continue
        with pytest.raises(SecAggError) as refused:
            setup.receive(name, spoil(reply, name))
        assert refused.value.reason == reason
        with pytest.raises(SecAggError):
            setup.receive(name, reply)  # it had its chance
    setup.advance()
    assert finish(federation, setup) == tuple(name for name in federation.names if name != bad)


def test_another_members_bundle_is_refused() -> None:
    """Keys that another member signed are not taken from anybody else."""
    federation = Federation(4)
    setup, _ = until(federation, "advertise")
    replies = federation.ask(setup.requests())
    with pytest.raises(SecAggError) as refused:
        setup.receive("site-0003", replies["site-0000"])
    assert refused.value.reason == "roster"


@pytest.mark.parametrize("leg", LEGS)
def test_who_does_not_answer_is_out(leg: str) -> None:
    """A member that misses a leg is in no group of the epoch."""
    federation = Federation(6)
    groups = federation.set_up(absent={leg: ["site-0002"]})
    assert groups[0].names == tuple(name for name in federation.names if name != "site-0002")


@pytest.mark.parametrize("leg", LEGS)
def test_an_answer_may_come_twice(leg: str) -> None:
    """The same answer again is nothing new; another one is refused, and its sender out."""
    federation = Federation(6)
    setup, _ = until(federation, leg)
    replies = federation.ask(setup.requests())
    for name, reply in replies.items():
        setup.receive(name, reply)
        setup.receive(name, reply)
    assert not setup.requests()
    with pytest.raises(SecAggError):
        setup.receive("site-0001", replies["site-0000"] + b"\0")
    with pytest.raises(SecAggError):
        setup.receive("site-0099", replies["site-0000"])


def test_too_few_make_no_epoch() -> None:
    """Below the smallest cohort the set-up ends."""
    federation = Federation(4)
    with pytest.raises(SecAggError) as refused:
        federation.set_up(absent={"advertise": federation.names[2:]})
    assert refused.value.reason == "roster"
    assert federation.set_up(absent={"deposit": federation.names[2:]}) == []


def test_nobody_left_ends_the_epoch() -> None:
    """If a leg has no answer at all there is nothing to go on with."""
    for leg in LEGS[:-1]:
        federation = Federation(4)
        with pytest.raises(SecAggError):
            federation.set_up(absent={leg: federation.names})


def test_groups_come_at_the_end() -> None:
    """Before the last leg there are none."""
    federation = Federation(4)
    setup, _ = until(federation, "deposit")
    with pytest.raises(SecAggError):
        setup.groups()


class TestBeacon:
    """Groups need an order that nobody chose."""

    @pytest.fixture
    def federation(self) -> Federation:
        return Federation(6, group_size=3)

    def test_groups_follow_the_beacon(self, federation: Federation) -> None:
        """Two set-ups of the same members rarely give the same groups."""
        drawn = {tuple(group.names for group in federation.set_up()) for _ in range(6)}
        assert len(drawn) > 1  # false alarm: 10 ways to split six in two threes (20 in order): 20^-5
        assert all(sorted(len(names) for names in groups) == [3, 3] for groups in drawn)

    def test_a_nonce_must_fit_its_commitment(self, federation: Federation) -> None:
        """Whoever reveals another one is out, and with it the epoch."""
        setup, _ = until(federation, "reveal")
        replies = federation.ask(setup.requests())
        first, keys = Nonce.from_bytes(replies["site-0000"]), site("site-0000")
        with pytest.raises(SecAggError) as refused:
            setup.receive("site-0000", signed(replace(first, nonce=bytes(32)), "nonce", keys).to_bytes())
        assert refused.value.reason == "beacon"
        for name in federation.names[1:]:
            setup.receive(name, replies[name])
        with pytest.raises(SecAggError) as refused:
            setup.advance()
        assert refused.value.reason == "beacon"
        assert setup.leg is None


def test_requests_are_messages_of_their_leg() -> None:
    """What is asked in a leg has the leg's name, and is the same bytes as long as it is asked."""
    federation = Federation(4, group_size=3)
    for leg in ("advertise", "reveal", "exchange", "deposit", "inbox"):
        setup, _ = until(federation, leg)
        assert {kind_of(request) for request in setup.requests().values()} == {leg}
        assert setup.requests() == setup.requests()
