"""A member during the set-up: every answer is made once, and what is refused changes nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.secagg import Member, SecAggError
from common.secagg.messages import (
    Advertise,
    Deposit,
    Exchange,
    Inbox,
    Nonce,
    Offer,
    Reveal,
)
from common.secagg.parties import signed
from tests.helpers.secagg import FIRST, Federation, epoch_of, refusal, rules, site, until, vectors_of

LEGS = ("advertise", "reveal", "exchange", "deposit", "inbox")


@pytest.fixture
def grouped() -> Federation:
    """Six members in two groups of three: a set-up with all five legs."""
    return Federation(6, group_size=3)


@pytest.fixture
def complete() -> Federation:
    """Six members in one group."""
    return Federation(6)


class TestSetUp:
    """Every leg is answered once."""

    @pytest.mark.parametrize("leg", LEGS)
    def test_the_same_request_has_the_same_answer(self, grouped: Federation, leg: str) -> None:
        """Byte for byte, also after a restart; a leg back too."""
        setup, request = until(grouped, leg)
        answer = grouped.members[FIRST].answer(request)
        grouped.restore(FIRST)
        assert grouped.members[FIRST].answer(request) == answer
        for name, reply in grouped.ask(setup.requests()).items():
            setup.receive(name, reply)
        setup.advance()
        grouped.ask(setup.requests())
        assert grouped.members[FIRST].answer(request) == answer

    @pytest.mark.parametrize("leg", LEGS[1:])
    def test_another_request_for_the_same_leg_is_refused(self, grouped: Federation, leg: str) -> None:
        """New shares or ciphertexts under the same keys would give secrets away."""
        _, request = until(grouped, leg)
        grouped.members[FIRST].answer(request)
        assert refusal(grouped, request + b"\0") in {"roster", "format"}
        changed = {
            "reveal": lambda: replace(Reveal.from_bytes(request), bundles=Reveal.from_bytes(request).bundles[:3]),
            "exchange": lambda: replace(Exchange.from_bytes(request), nonces={}),
            "deposit": lambda: replace(Deposit.from_bytes(request), offers={}),
            "inbox": lambda: replace(Inbox.from_bytes(request), shares={}),
        }[leg]()
        assert refusal(grouped, changed.to_bytes()) == "roster"

    @pytest.mark.parametrize("leg", LEGS[1:])
    def test_no_leg_comes_before_its_time(self, grouped: Federation, leg: str) -> None:
        """A member that missed the leg before refuses this one, and one that was never invited all of them."""
        setup, _ = until(grouped, LEGS[LEGS.index(leg) - 1])
        behind = grouped.members[FIRST].to_bytes()
        for name, reply in grouped.ask(setup.requests()).items():
            setup.receive(name, reply)
        setup.advance()
        request = setup.requests()[FIRST]
        grouped.members[FIRST] = Member.from_bytes(
            behind, signer=site(FIRST), peers=grouped.records, rules=grouped.rules, journal=grouped.journals[FIRST]
        )
        assert refusal(grouped, request) in {"epoch", "beacon"}
        grouped.members[FIRST] = grouped.member(FIRST)
        assert refusal(grouped, request) == "epoch"

    def test_only_its_own_rules(self, complete: Federation) -> None:
        """Whatever number the coordinator would rather have, the rules' digest is another."""
        for weaker in ({"colluding": 0}, {"honest": 1}, {"bits": 16}, {"smallest_cohort": 2}, {"group_size": 2}):
            request = Advertise(epoch=bytes(16), rules=rules(**weaker).digest).to_bytes()
            assert refusal(complete, request) == "rules"

    def test_an_epoch_that_the_journal_knows_is_not_set_up_again(self, complete: Federation) -> None:
        """A member that lost its state joins another epoch."""
        group = complete.set_up()[0]
        complete.round(group, vectors_of(complete.names, 3), base=b"b")
        complete.members[FIRST] = complete.member(FIRST)
        assert refusal(complete, Advertise(epoch=group.epoch, rules=complete.rules.digest).to_bytes()) == "epoch"

    def test_rosters_that_are_refused(self, complete: Federation) -> None:
        """Unsorted, repeated, too few, without this member, with a stranger or a changed key."""
        _, request = until(complete, "exchange")
        asked = Exchange.from_bytes(request)
        bundles = asked.bundles
        other = Federation(6)
        _, elsewhere = until(other, "exchange")  # the same sites, in another epoch
        for wrong, reasons in [
            (bundles[::-1], {"roster"}),
            ((bundles[0], *bundles), {"roster"}),
            (bundles[:2], {"roster"}),
            (bundles[1:], {"roster"}),
            ((bundles[0], *Exchange.from_bytes(elsewhere).bundles[1:]), {"epoch"}),
            ((*bundles[:-1], bundles[-1][:-1] + bytes([bundles[-1][-1] ^ 1])), {"signature"}),
            ((*bundles[:-1], b""), {"format"}),
        ]:
            assert refusal(complete, replace(asked, bundles=wrong).to_bytes()) in reasons
        del complete.records["site-0005"]
        assert refusal(complete, request) == "roster"

    def test_a_changed_bundle_of_its_own_is_refused(self, complete: Federation) -> None:
        """The roster must hold what this member sent, even if its signature would fit another."""
        _, request = until(complete, "exchange")
        asked = Exchange.from_bytes(request)
        complete.members[FIRST] = complete.member(FIRST)
        complete.members[FIRST].answer(Advertise(epoch=asked.epoch, rules=complete.rules.digest).to_bytes())
        assert refusal(complete, request) == "roster"

    def test_substituted_offers_are_refused(self, complete: Federation) -> None:
        """A ciphertext that its sender did not make for this member: refused, whoever makes it."""
        _, request = until(complete, "deposit")
        asked = Deposit.from_bytes(request)
        sender, raw = next(iter(asked.offers.items()))
        offer = Offer.from_bytes(raw)
        mine = replace(offer, ciphertext=bytes(1088))
        for wrong in (
            mine,
            replace(mine, digests=dict.fromkeys(offer.digests, bytes(32))),
            replace(offer, digests={99: bytes(32)}),
            replace(offer, signature=bytes(64)),
        ):
            offers = asked.offers | {sender: wrong.to_bytes()}
            assert refusal(complete, replace(asked, offers=offers).to_bytes()) == "signature"
        assert refusal(complete, replace(asked, offers=asked.offers | {99: raw}).to_bytes()) == "roster"

    def test_too_few_pairs_are_refused(self, complete: Federation) -> None:
        """A member that shares keys with hardly anybody deposits nothing."""
        _, request = until(complete, "deposit")
        alone = replace(Deposit.from_bytes(request), offers={}).to_bytes()
        assert refusal(complete, alone, name="site-0005") == "threshold"

    def test_shares_that_do_not_open_are_not_held(self, complete: Federation) -> None:
        """A damaged blob, or one of another round, costs its sender a holder and nothing else."""
        _, request = until(complete, "inbox")
        asked = Inbox.from_bytes(request)
        sender = min(asked.shares)
        damaged = asked.shares | {sender: bytes(len(asked.shares[sender]))}
        complete.members[FIRST].answer(replace(asked, shares=damaged).to_bytes())
        assert set(epoch_of(complete).held) == set(asked.shares) - {sender}
        assert refusal(complete, request) == "roster"


class TestBeacon:
    """What a member asks of the beacon, and how often it lets one be thrown away."""

    def test_a_wrong_beacon_is_refused(self, grouped: Federation) -> None:
        """Every nonce has to be there, fit its commitment, and be signed for this roster."""
        _, request = until(grouped, "exchange")
        asked = Exchange.from_bytes(request)
        last, keys = Nonce.from_bytes(asked.nonces[5]), site("site-0005")
        other_nonce = signed(replace(last, nonce=bytes(32)), "nonce", keys)
        other_roster = signed(replace(last, roster=bytes(32)), "nonce", keys)
        for wrong, reason in [
            ({}, "beacon"),
            ({rank: nonce for rank, nonce in asked.nonces.items() if rank < 5}, "beacon"),
            (
                asked.nonces | {5: other_nonce.to_bytes()},
                "beacon",
            ),
            (asked.nonces | {5: asked.nonces[4]}, "beacon"),
            (asked.nonces | {5: replace(last, signature=bytes(64)).to_bytes()}, "signature"),
            (
                asked.nonces | {5: other_roster.to_bytes()},
                "roster",
            ),
        ]:
            assert refusal(grouped, replace(asked, nonces=wrong).to_bytes()) == reason

    def test_another_roster_after_the_reveal_is_refused(self, grouped: Federation) -> None:
        """Who revealed a nonce for one roster exchanges keys in no other."""
        _, request = until(grouped, "exchange")
        asked = Exchange.from_bytes(request)
        fewer = replace(asked, bundles=asked.bundles[:5])
        assert refusal(grouped, fewer.to_bytes()) == "roster"

    def test_no_nonce_where_none_is_needed(self, complete: Federation) -> None:
        """A complete group has no beacon to draw."""
        _, request = until(complete, "exchange")
        asked = Exchange.from_bytes(request)
        assert refusal(complete, Reveal(epoch=asked.epoch, bundles=asked.bundles).to_bytes()) == "beacon"
        assert refusal(complete, replace(asked, nonces={0: b""}).to_bytes()) == "beacon"

    def test_thrown_away_beacons_are_counted_and_capped(self, grouped: Federation) -> None:
        """An epoch given up after the reveal is a draw again; a site allows few a day."""
        grouped.members = {
            name: Member(
                name,
                signer=site(name),
                peers=grouped.records,
                rules=grouped.rules,
                journal=grouped.journals[name],
                most_aborts=2,
            )
            for name in grouped.names
        }
        for aborts in range(2):
            until(grouped, "exchange")
            assert grouped.journals[FIRST].aborts == aborts
        with pytest.raises(SecAggError) as refused:
            until(grouped, "exchange")
        assert refused.value.reason == "beacon"
        assert grouped.journals[FIRST].aborts == 2

    def test_leaving_throws_away_too(self, grouped: Federation) -> None:
        """A member that makes room for one of another run; what was used, or never revealed, counts for nothing."""
        until(grouped, "reveal")
        grouped.members[FIRST].leave()
        assert grouped.journals[FIRST].aborts == 0
        until(grouped, "exchange")
        grouped.members[FIRST].leave()
        assert grouped.journals[FIRST].aborts == 1

    def test_epochs_that_were_used_are_not_counted(self, grouped: Federation) -> None:
        """Only what was thrown away is."""
        vectors = vectors_of(grouped.names, 3)
        for number in range(3):
            for group in grouped.set_up():
                grouped.round(group, {name: vectors[name] for name in group.names}, base=bytes([number]))
        assert grouped.journals[FIRST].aborts == 0
