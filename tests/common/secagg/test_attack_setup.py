"""A coordinator that meddles with an epoch's set-up: keys, names, nonces, and the order that nobody may choose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.crypto import PartyKeys
from common.secagg.messages import Advertise, Bundle, Deposit, Exchange, Nonce, Offer, Reveal
from common.secagg.parties import signed
from common.secagg.setup import Setup
from tests.helpers.secagg import names_of, rules, site
from tests.helpers.secagg_malice import Malice, Remembering, refused

EPOCH = b"e" * 16


def exchange(malice: Malice, bundles: list[bytes], rank: int = 0, nonces: dict[int, bytes] | None = None) -> str:
    """Why a member refuses a roster; empty if it does not."""
    asked = Exchange(epoch=malice.epoch, bundles=tuple(bundles), nonces=nonces or {}).to_bytes()
    return refused(lambda: malice.at(rank).answer(asked))


def signed_by(malice: Malice, rank: int, bundle: Bundle) -> bytes:
    """A bundle with its owner's own signature."""
    return signed(bundle, "bundle", site(malice.names[rank])).to_bytes()


CHANGES: dict[str, Callable[[], dict[str, bytes]]] = {
    "X25519 key": lambda: {"x25519": X25519PrivateKey.generate().public_key().public_bytes_raw()},
    "ML-KEM key": lambda: {"ml_kem": MLKEM768PrivateKey.generate().public_key().public_bytes_raw()},
    "commitment": lambda: {"nonce": bytes(32)},
    "signature": lambda: {"signature": bytes(64)},
}


class TestKeys:
    """What a member put forward is signed by the identity that the others have pinned."""

    @pytest.mark.parametrize("change", CHANGES)
    def test_a_substituted_key(self, change: str) -> None:
        """A coordinator that puts its own key into somebody's bundle cannot sign it."""
        malice = Malice(5)
        bundles = malice.advertise(EPOCH)
        bundles[3] = replace(Bundle.from_bytes(bundles[3]), **CHANGES[change]()).to_bytes()
        assert exchange(malice, bundles) == "signature"

    def test_ones_own_bundle_is_looked_at(self) -> None:
        """A member finds itself in the roster exactly as it spoke, not with keys it made another time."""
        malice = Malice(5)
        bundles = malice.advertise(EPOCH)
        asked = Advertise(epoch=EPOCH, rules=malice.rules.digest).to_bytes()
        bundles[0] = malice.member(malice.names[0]).answer(asked)
        assert exchange(malice, bundles) == "roster"
        assert exchange(malice, bundles[1:]) == "roster"

    def test_a_name_that_is_not_pinned(self) -> None:
        """Members that the coordinator made up are not let in, whatever they sign."""
        malice = Malice(5)
        bundles = malice.advertise(EPOCH)
        sybil = PartyKeys.generate("site-9999", "site")
        own = Bundle.from_bytes(bundles[4])
        made = signed(replace(own, name="site-9999", key_id=sybil.record.key_id, signature=b""), "bundle", sybil)
        assert exchange(malice, [*bundles, made.to_bytes()]) == "roster"

    def test_a_pinned_name_with_another_identity(self) -> None:
        """The record is pinned, not the name."""
        malice = Malice(5)
        bundles = malice.advertise(EPOCH)
        impostor = PartyKeys.generate(malice.names[4], "site")
        other = replace(Bundle.from_bytes(bundles[4]), key_id=impostor.record.key_id, signature=b"")
        assert exchange(malice, [*bundles[:4], signed(other, "bundle", impostor).to_bytes()]) == "roster"

    def test_one_member_twice(self) -> None:
        """Names are distinct and sorted: nobody counts as two, and ranks are not the coordinator's to choose."""
        malice = Malice(5)
        bundles = malice.advertise(EPOCH)
        assert exchange(malice, [*bundles[:4], bundles[3], bundles[4]]) == "roster"
        assert exchange(malice, [bundles[1], bundles[0], *bundles[2:]]) == "roster"

    def test_a_bundle_of_another_epoch_or_run(self) -> None:
        """What was signed once is not used again."""
        malice = Malice(5)
        old = malice.advertise(b"o" * 16)
        bundles = malice.advertise(EPOCH)
        assert exchange(malice, [*bundles[:4], old[4]]) == "epoch"
        elsewhere = replace(Bundle.from_bytes(bundles[4]), rules=rules(run_id=b"r" * 16).digest, signature=b"")
        assert exchange(malice, [*bundles[:4], signed_by(malice, 4, elsewhere)]) == "rules"

    @pytest.mark.parametrize("count", [2, 1])
    def test_a_roster_that_is_too_small(self, count: int) -> None:
        """Fewer members than a sum needs."""
        malice = Malice(5)
        assert exchange(malice, malice.advertise(EPOCH)[:count]) == "roster"

    def test_a_key_that_agrees_on_nothing(self) -> None:
        """A member that offers a point of small order makes no known secret: the roster with it is refused."""
        malice = Malice(5, colluders=[4])
        bundles = malice.advertise(EPOCH)
        weak = replace(Bundle.from_bytes(bundles[4]), x25519=bytes(32), signature=b"")
        assert exchange(malice, [*bundles[:4], signed_by(malice, 4, weak)]) == "roster"


class TestOffers:
    """Encapsulated keys pass through the coordinator; they are signed, one by one."""

    def _offered(self) -> tuple[Malice, dict[int, bytes]]:
        malice = Malice(5)
        bundles = malice.advertise(EPOCH)
        return malice, malice.offers_for(0, malice.exchange(bundles, {}))

    def _deposit(self, malice: Malice, offers: dict[int, bytes]) -> str:
        asked = Deposit(epoch=EPOCH, offers=offers).to_bytes()
        return refused(lambda: malice.at(0).answer(asked))

    def test_a_substituted_ciphertext(self) -> None:
        """The coordinator's own encapsulation in the place of a member's is refused, with old and new digests."""
        malice, offers = self._offered()
        sender = min(offers)
        offer = Offer.from_bytes(offers[sender])
        own = bytes(len(offer.ciphertext))
        digests = dict(offer.digests) | {0: b"\x01" * 32}
        for changed in (replace(offer, ciphertext=own), replace(offer, ciphertext=own, digests=digests)):
            assert self._deposit(malice, offers | {sender: changed.to_bytes()}) == "signature"

    def test_offers_that_change_places(self) -> None:
        """One member's offer under another's name."""
        malice, offers = self._offered()
        one, other = sorted(offers)[:2]
        assert self._deposit(malice, offers | {one: offers[other], other: offers[one]}) == "signature"

    def test_offers_of_strangers(self) -> None:
        """Only those encapsulate to a member who are to."""
        malice, offers = self._offered()
        stranger = next(rank for rank in range(1, 5) if rank not in offers)
        assert self._deposit(malice, offers | {stranger: offers[min(offers)]}) == "roster"

    def test_too_few_offers(self) -> None:
        """Without keys to enough neighbours there is no round to take part in."""
        malice, _ = self._offered()
        assert malice.shape.fewest == 4
        assert self._deposit(malice, {}) == "threshold"


class TestBeacon:
    """Eight members in groups: the order is drawn by all, after the roster stands."""

    @pytest.fixture
    def malice(self) -> Malice:
        return Malice(8, group_size=4, most_aborts=3)

    def test_a_missing_reveal(self, malice: Malice) -> None:
        """Whoever leaves its nonce out ends the attempt: leaving out is choosing between two orders."""
        bundles = malice.advertise(EPOCH)
        nonces = malice.reveal(bundles)
        del nonces[5]
        assert exchange(malice, bundles, nonces=nonces) == "beacon"
        setup = Setup(malice.rules, records=malice.peers, names=malice.names)
        for leg in ("advertise", "reveal"):
            assert setup.leg == leg
            for name, request in setup.requests().items():
                if (leg, name) != ("reveal", malice.names[5]):
                    setup.receive(name, malice.members[name].answer(request))
            if leg == "reveal":
                assert refused(setup.advance) == "beacon"
                assert setup.leg is None
            else:
                setup.advance()

    def test_a_nonce_that_was_not_committed_to(self, malice: Malice) -> None:
        """A colluder that waits for the others' nonces cannot change its own any more."""
        bundles = malice.advertise(EPOCH)
        nonces = malice.reveal(bundles)
        other = replace(Nonce.from_bytes(nonces[5]), nonce=bytes(32), signature=b"")
        nonces[5] = signed(other, "nonce", site(malice.names[5])).to_bytes()
        assert exchange(malice, bundles, nonces=nonces) == "beacon"

    def test_nonces_under_other_names(self, malice: Malice) -> None:
        """Each is signed and committed to by its owner."""
        bundles = malice.advertise(EPOCH)
        nonces = malice.reveal(bundles)
        nonces[4], nonces[5] = nonces[5], nonces[4]
        assert exchange(malice, bundles, nonces=nonces) == "beacon"

    def test_a_nonce_that_was_revealed_for_another_roster(self, malice: Malice) -> None:
        """A member reveals for one roster; what it said there is worth nothing for another."""
        bundles = malice.advertise(EPOCH)
        nonces = malice.reveal(bundles)
        assert exchange(malice, bundles[:7], nonces={rank: nonces[rank] for rank in range(7)}) == "roster"
        fewer = Reveal(epoch=EPOCH, bundles=tuple(bundles[:7])).to_bytes()
        assert refused(lambda: malice.at(0).answer(fewer)) == "roster"

    def test_an_order_without_a_beacon(self, malice: Malice) -> None:
        """Groups cannot be had without everybody's nonces, nor a beacon where none is due."""
        bundles = malice.advertise(EPOCH)
        assert exchange(malice, bundles) == "beacon"
        whole = Malice(5)
        plain = whole.advertise(EPOCH)
        asked = Reveal(epoch=EPOCH, bundles=tuple(plain)).to_bytes()
        assert refused(lambda: whole.at(0).answer(asked)) == "beacon"

    def test_attempts_are_capped(self, malice: Malice) -> None:
        """A coordinator that gives up orders until it likes one gets as many a day as a member's policy says."""
        for attempt in range(3):
            malice.reveal(malice.advertise(bytes([attempt]) * 16))
        bundles = malice.advertise(b"l" * 16)
        asked = Reveal(epoch=malice.epoch, bundles=tuple(bundles)).to_bytes()
        assert refused(lambda: malice.at(0).answer(asked)) == "beacon"
        malice.members[malice.names[0]] = malice.member(malice.names[0], 3)  # and a new process remembers
        bundles[0] = malice.members[malice.names[0]].answer(
            Advertise(epoch=malice.epoch, rules=malice.rules.digest).to_bytes()
        )
        again = Reveal(epoch=malice.epoch, bundles=tuple(bundles)).to_bytes()
        assert refused(lambda: malice.at(0).answer(again)) == "beacon"

    def test_an_epoch_that_was_set_up_and_given_up_counts_as_well(self, malice: Malice) -> None:
        """An order that was seen to the end and not used is an order that was not liked."""
        for attempt in range(3):
            malice.set_up(bytes([attempt]) * 16)
        journal = malice.journals[malice.names[0]]
        assert journal.aborts >= 1


class TestOnce:
    """A leg is answered once; the same request has the same bytes as its answer, and no other has any."""

    def test_every_leg(self) -> None:
        """Other bytes for a leg that was answered are refused, and so is a leg that was left behind."""
        malice = Malice(5)
        advertise = Advertise(epoch=EPOCH, rules=malice.rules.digest).to_bytes()
        bundles = malice.advertise(EPOCH)
        assert malice.at(0).answer(advertise) == bundles[0]
        offers = malice.exchange(bundles, {})
        first = Exchange(epoch=EPOCH, bundles=tuple(bundles), nonces={}).to_bytes()
        assert malice.at(0).answer(first) == offers[0].to_bytes()
        assert exchange(malice, bundles[:4]) == "roster"
        malice.deposit(offers)
        whole = malice.offers_for(0, offers)
        asked = Deposit(epoch=EPOCH, offers=whole).to_bytes()
        assert malice.at(0).answer(asked) == malice.deposits[0].to_bytes()
        fewer = Deposit(epoch=EPOCH, offers=dict(list(whole.items())[:1])).to_bytes()
        assert refused(lambda: malice.at(0).answer(fewer)) == "roster"

    def test_an_epoch_id_is_used_once(self) -> None:
        """With other rules, while it is known, and after its rounds, also in a new process."""
        malice = Malice(5).set_up(EPOCH)
        other = Advertise(epoch=EPOCH, rules=rules(epoch_rounds=8).digest).to_bytes()
        assert refused(lambda: malice.at(0).answer(other)) != ""
        malice.train(0, 1)
        again = Advertise(epoch=EPOCH, rules=malice.rules.digest).to_bytes()
        assert refused(lambda: malice.at(0).answer(again)) == "epoch"
        assert refused(lambda: malice.member(malice.names[0]).answer(again)) == "epoch"


def test_a_member_needs_its_own_record_pinned() -> None:
    """Who it is follows from what is pinned, not from what it is called."""
    others = {name: Remembering(site(name).record) for name in names_of(5)}
    malice = Malice(5)
    malice.peers = others | {malice.names[0]: Remembering(PartyKeys.generate(malice.names[0], "site").record)}
    assert refused(lambda: malice.member(malice.names[0])) == "roster"
