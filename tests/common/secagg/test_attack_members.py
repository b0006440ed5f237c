"""Members that do not keep to the protocol: the sum is exact without them, or the round is given up with a reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.secagg import Group, Round, Setup
from common.secagg.fixed_point import FixedPoint
from common.secagg.messages import Agree, Deposited, Released, Unmask
from common.secagg.packing import pack
from common.secagg.parties import signed
from common.secagg.shamir import SHARE_BYTES
from tests.helpers.secagg import CODEC, Federation, Words, site, total, vectors_of
from tests.helpers.secagg_malice import base_of, refused

SIZE = 64


class Wayward:
    """Ten members, one of them wayward, and a coordinator that follows the protocol."""

    def __init__(self, *, bad: int = 0) -> None:
        self.federation = Federation(10, epoch_rounds=3)
        self.bad = self.federation.names[bad]
        self.vectors = vectors_of(self.federation.names, SIZE)
        self.setup = Setup(self.federation.rules, records=self.federation.records, names=self.federation.names)

    def set_up(self, change=lambda leg, reply: reply) -> Group:
        """An epoch; `change` is what the wayward member does to its replies."""
        while self.setup.leg is not None:
            for name, request in self.setup.requests().items():
                reply = self.federation.members[name].answer(request)
                if name == self.bad:
                    reply = change(self.setup.leg, reply)
                    self.outcome = refused(lambda r=reply: self.setup.receive(self.bad, r))
                else:
                    self.setup.receive(name, reply)
            self.setup.advance()
        (group,) = self.setup.groups()
        return group

    def masked(self, group: Group, *, without: set[str] | None = None, model: str = "model") -> Round:
        """A round whose vectors are in, but for those of `without`, which were masked all the same."""
        base = base_of(model)
        opened = self.federation.begin(group, base=base, size=SIZE)
        masks = self.federation.masks(opened, base=base)
        kept = {name: mask for name, mask in masks.items() if name not in (without or set())}
        for name in set(masks) - set(kept):
            masks[name].apply(self.vectors[name].copy())
        self.federation.upload(opened, kept, self.vectors)
        return opened


def exact(wayward: Wayward, opened: Round) -> bool:
    """Whether the sum is that of the survivors' vectors."""
    return bool((opened.result() == total(wayward.vectors, opened.survivors)).all())


class TestShares:
    @pytest.mark.parametrize("kind", ["random", "another member's", "short"])
    def test_wrong_ones_are_found_out(self, kind: str) -> None:
        """Commitments show that a share is wrong; the sum comes from the others, survivors' and dropped alike."""
        wayward = Wayward()
        group = wayward.set_up()
        opened = wayward.masked(group, without={wayward.federation.names[9]})
        wayward.federation.state(opened)
        for name in opened.signers:
            reply = Released.from_bytes(wayward.federation.members[name].answer(opened.unmask()))
            if name == wayward.bad:
                shares = dict(reply.shares)
                wrong = {
                    "random": {j: b"\0" + bytes([j]) * (SHARE_BYTES - 1) for j in shares},
                    "another member's": dict(
                        zip(shares, [*list(shares.values())[1:], shares[min(shares)]], strict=True)
                    ),
                    "short": {1: shares[1]},
                }[kind]
                reply = replace(reply, shares=wrong)
            opened.shares(name, reply.to_bytes())
        assert exact(wayward, opened)

    def test_missing_ones(self) -> None:
        """Enough others are; with fewer than the threshold the round waits, and opens when more come."""
        wayward = Wayward()
        group = wayward.set_up()
        opened = wayward.masked(group)
        wayward.federation.state(opened)
        first = list(opened.signers)[: group.shape.threshold]
        for name in first:
            opened.shares(name, wayward.federation.members[name].answer(opened.unmask()))
        assert not opened.ready  # a member's own share of itself does not exist
        assert refused(opened.result) == "shares"
        last = list(opened.signers)[group.shape.threshold]
        opened.shares(last, wayward.federation.members[last].answer(opened.unmask()))
        assert exact(wayward, opened)

    def test_of_another_round(self) -> None:
        """Shares carry their round's header; those of an earlier one are refused."""
        wayward = Wayward()
        group = wayward.set_up()
        first = wayward.masked(group)
        wayward.federation.state(first)
        old = wayward.federation.members[wayward.bad].answer(first.unmask())
        second = wayward.masked(group, model="next")
        wayward.federation.state(second)
        assert refused(lambda: second.shares(wayward.bad, old)) == "shares"
        relabelled = replace(Released.from_bytes(old), header=second.header).to_bytes()
        second.shares(wayward.bad, relabelled)  # wrong ones, then: found out as above
        wayward.federation.release(second, absent=[wayward.bad])
        assert exact(wayward, second)

    def test_too_many_wrong_ones_end_the_round(self) -> None:
        """Where fewer right shares than the threshold are left, there is no sum, and never a wrong one."""
        wayward = Wayward()
        group = wayward.set_up()
        opened = wayward.masked(group)
        wayward.federation.state(opened)
        for place, name in enumerate(opened.signers):
            reply = Released.from_bytes(wayward.federation.members[name].answer(opened.unmask()))
            if place >= group.shape.threshold - 1:
                reply = replace(reply, shares={j: bytes(SHARE_BYTES) for j in reply.shares})
            opened.shares(name, reply.to_bytes())
        assert refused(opened.result) == "shares"


class TestDeposits:
    def test_garbage_in_place_of_sealed_shares(self) -> None:
        """Nobody holds shares of such a member: if it survives the round is lost, without it all is well."""

        def garbage(leg: str, reply: bytes) -> bytes:
            if leg != "deposit":
                return reply
            said = Deposited.from_bytes(reply)
            wrong = {j: bytes(len(sealed)) for j, sealed in said.shares.items()}
            return signed(replace(said, shares=wrong, signature=b""), "deposited", site("site-0000")).to_bytes()

        wayward = Wayward()
        group = wayward.set_up(garbage)
        opened = wayward.masked(group)
        wayward.federation.state(opened)
        wayward.federation.release(opened)
        assert not opened.ready
        group.live.discard(wayward.bad)
        again = wayward.masked(group, model="next")
        wayward.federation.state(again)
        wayward.federation.release(again)
        assert exact(wayward, again)

    def test_a_vault_that_does_not_open(self) -> None:
        """It matters only if its owner drops; then the round is lost with a reason."""

        def closed(leg: str, reply: bytes) -> bytes:
            if leg != "deposit":
                return reply
            said = Deposited.from_bytes(reply)
            wrong = tuple(bytes(len(vault)) for vault in said.vaults)
            return signed(replace(said, vaults=wrong, signature=b""), "deposited", site("site-0000")).to_bytes()

        wayward = Wayward()
        group = wayward.set_up(closed)
        opened = wayward.masked(group)
        wayward.federation.state(opened)
        wayward.federation.release(opened)
        assert exact(wayward, opened)
        lost = wayward.masked(group, without={wayward.bad}, model="next")
        wayward.federation.state(lost)
        wayward.federation.release(lost)
        assert refused(lost.result) == "shares"

    @pytest.mark.parametrize("what", ["vaults", "commitments", "shares"])
    def test_a_deposit_of_the_wrong_size(self, what: str) -> None:
        """Its member is out of the epoch, nobody else."""

        def fewer(leg: str, reply: bytes) -> bytes:
            if leg != "deposit":
                return reply
            said = Deposited.from_bytes(reply)
            value = getattr(said, what)
            less = dict(list(value.items())[1:]) if isinstance(value, dict) else value[1:]
            return signed(replace(said, **{what: less}, signature=b""), "deposited", site("site-0000")).to_bytes()

        wayward = Wayward()
        group = wayward.set_up(fewer)
        assert wayward.bad not in group.live
        opened = wayward.masked(group)
        wayward.federation.state(opened)
        wayward.federation.release(opened)
        assert len(opened.survivors) == 9
        assert exact(wayward, opened)


class TestVectors:
    def test_noise_in_place_of_a_vector(self) -> None:
        """It spoils the sum, which the range check finds: the round is refused, not taken for a model."""
        wayward = Wayward()
        codec = FixedPoint(bits=32, dimensions=SIZE, clipping_norm=1.0, most_weight=1, clients=10, metrics=())
        rng = np.random.default_rng(5)
        wayward.vectors = {
            name: codec.encode(rng.normal(size=SIZE) / 8, weight=1.0, metrics={}, seed=name.encode())
            for name in wayward.federation.names
        }
        opened = self._round(wayward, codec.size)
        assert codec.decode(opened.result().copy(), 10).weight == pytest.approx(10)
        wayward.vectors[wayward.bad] = rng.integers(0, 1 << 32, codec.size, dtype=np.uint32)
        spoilt = self._round(wayward, codec.size, model="next")
        assert refused(lambda: codec.decode(spoilt.result(), 10)) == "range"

    def test_a_vector_of_another_length_or_twice(self) -> None:
        """Its member is as one that dropped; a second one, and one that comes late, is never added."""
        wayward = Wayward()
        group = wayward.set_up()
        opened = wayward.masked(group, without={wayward.bad})
        short = pack(np.zeros(SIZE - 1, np.uint32), 32)
        assert refused(lambda: opened.add(wayward.bad, short)) == "format"
        other = opened.survivors[0]
        assert refused(lambda: opened.add(other, pack(wayward.vectors[other], 32))) == "participants"
        agree = opened.agree()
        assert refused(lambda: opened.add(wayward.bad, pack(wayward.vectors[wayward.bad], 32))) == "survivors"
        assert wayward.bad not in opened.survivors
        assert Agree.from_bytes(agree).survivors == tuple(range(1, 10))
        wayward.federation.state(opened)
        wayward.federation.release(opened)
        assert exact(wayward, opened)

    @staticmethod
    def _round(wayward: Wayward, size: int, model: str = "model") -> Round:
        group = wayward.set_up() if wayward.setup.leg else wayward.group
        wayward.group = group
        opened = wayward.federation.begin(group, base=base_of(model), size=size)
        wayward.federation.upload(opened, wayward.federation.masks(opened, base=base_of(model)), wayward.vectors)
        wayward.federation.state(opened)
        wayward.federation.release(opened)
        return opened


class TestStatements:
    def test_others_statements_and_others_sets_do_not_count(self) -> None:
        """The coordinator takes a statement from who signed it, on this set."""
        wayward = Wayward()
        group = wayward.set_up()
        opened = wayward.masked(group)
        request = opened.agree()
        one, two = wayward.federation.names[:2]
        said = wayward.federation.members[one].answer(request)
        assert refused(lambda: opened.stated(two, said)) == "signature"
        asked = Agree.from_bytes(request)
        fewer = replace(asked, survivors=asked.survivors[:-1]).to_bytes()
        assert refused(lambda: opened.stated(two, wayward.federation.members[two].answer(fewer))) == "statement"

    def test_a_quorum_without_the_wayward(self) -> None:
        """One that says nothing, or burnt, does not keep the others from their sum."""
        wayward = Wayward()
        group = wayward.set_up()
        opened = wayward.masked(group)
        burning = opened.burning()
        burning.stated(wayward.bad, wayward.federation.members[wayward.bad].answer(burning.request()))
        assert refused(burning.certificate) == "quorum"
        wayward.federation.state(opened)
        assert wayward.bad not in opened.signers
        wayward.federation.release(opened)
        assert Unmask.from_bytes(opened.unmask()).survivors == tuple(range(10))
        assert exact(wayward, opened)


def test_codecs_are_told_apart() -> None:
    """A member with other ideas of the codec has another header: it is not in the sum's way, as it cannot state it."""
    federation = Federation(5, epoch_rounds=1)
    (group,) = federation.set_up()
    vectors: dict[str, Words] = vectors_of(federation.names, SIZE)
    opened = federation.begin(group, base=base_of("model"), size=SIZE)
    odd = federation.names[0]
    masks = federation.masks(opened, base=base_of("model"), absent=[odd])
    masks[odd] = federation.members[odd].begin(
        opened.requests()[odd], server_round=federation.server_round, base=base_of("model"), codec=CODEC + b"!"
    )
    federation.upload(opened, masks, vectors)
    agree = opened.agree()
    assert refused(lambda: opened.stated(odd, federation.members[odd].answer(agree))) == "statement"
