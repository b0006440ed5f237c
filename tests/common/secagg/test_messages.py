"""Messages as bytes: one form each, and nothing that a peer sends crashes a parser."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg import Member, SecAggError, kind_of
from common.secagg.codec import Packed
from common.secagg.member_state import Epoch, Saved
from common.secagg.messages import (
    _KINDS,
    Advertise,
    Agree,
    Certificate,
    Released,
    Statement,
    Train,
    offered,
)
from tests.helpers.secagg import MemoryJournal, names_of, rules, site

KINDS = (*_KINDS, Epoch, Saved)
_SIZES = {
    "epoch": 16,
    "id": 16,
    "ml_kem": 1184,
    "ciphertext": 1088,
}
RANKS = st.lists(st.integers(0, 0xFFFF), unique=True, max_size=5).map(sorted).map(tuple)
SOME = st.binary(max_size=20)


def by_rank(values: st.SearchStrategy[bytes]) -> st.SearchStrategy[dict[int, bytes]]:
    return st.dictionaries(st.integers(0, 0xFFFF), values, max_size=4)


def exactly(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def read_again(kind: type[Packed], data: bytes) -> bytes | None:
    """What bytes encode to once read; None if they are refused."""
    try:
        return kind.from_bytes(data).to_bytes()
    except SecAggError:
        return None


@st.composite
def messages(draw: st.DrawFn) -> Packed:
    """Any message, with any content that it can have."""
    kind = draw(st.sampled_from(_KINDS))
    special: dict[str, st.SearchStrategy[Any]] = {
        "name": st.text(min_size=1, max_size=12),
        "index": st.integers(0, 0xFFFF),
        "survivors": RANKS,
        "participants": RANKS,
        "signature": SOME,
        "bundles": st.lists(SOME, max_size=3).map(tuple),
        "vaults": st.lists(SOME, max_size=3).map(tuple),
        "certificates": st.lists(SOME, max_size=3).map(tuple),
        "commitments": st.lists(exactly(32), max_size=3).map(tuple),
        "ciphertexts": by_rank(exactly(1088)),
        "digests": by_rank(exactly(32)),
        "shares": by_rank(exactly(33) if kind is Released else SOME),
        "nonces": by_rank(SOME),
        "offers": by_rank(SOME),
        "signatures": (
            st.dictionaries(st.text(min_size=1, max_size=9), SOME, max_size=3) if kind is Certificate else by_rank(SOME)
        ),
    }
    values = {f.name: draw(special.get(f.name, exactly(_SIZES.get(f.name, 32)))) for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**values)


@settings(deadline=None, max_examples=200)
@given(messages())
def test_a_message_round_trips(message: Packed) -> None:
    """What was written is read back, under the name of its kind."""
    data = message.to_bytes()
    assert type(message).from_bytes(data) == message
    assert kind_of(data) == type(message).__name__.lower()


@settings(deadline=None, max_examples=200)
@given(messages(), st.data())
def test_a_damaged_message_is_refused_or_another_message(message: Packed, data: st.DataObject) -> None:
    """Cut, extended or changed bytes are refused, or encode to themselves again: no message has two forms."""
    whole = message.to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    for other in (whole[:at], whole + b"\0", flipped):
        assert read_again(type(message), other) in {None, other}


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(KINDS), st.binary(max_size=300))
def test_no_bytes_crash_a_parser(kind: type[Packed], data: bytes) -> None:
    """Whatever comes is a message or `format`."""
    for attempt in (data, bytes((kind.KIND, 1)) + data):
        assert read_again(kind, attempt) in {None, attempt}


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 20), st.binary(max_size=200))
def test_no_bytes_crash_a_member(kind: int, data: bytes) -> None:
    """A member answers whatever comes with a refusal."""
    records = {name: site(name).record for name in names_of(3)}
    member = Member(names_of(3)[0], signer=site(names_of(3)[0]), peers=records, rules=rules(), journal=MemoryJournal())
    message = bytes((kind, 1)) + data
    before = member.to_bytes()
    with pytest.raises(SecAggError):
        member.answer(message + bytes(3000))  # longer than any message that could be a whole one by chance
    with pytest.raises(SecAggError):
        member.begin(message, server_round=1, base=b"", codec=b"")
    assert member.to_bytes() == before


def test_ranks_strictly_increase() -> None:
    """A rank cannot come twice, nor out of order."""
    for ranks in ((1, 1), (2, 1)):
        with pytest.raises(SecAggError, match="malformed"):
            Agree(epoch=bytes(16), index=1, survivors=ranks).to_bytes()
    good = Agree(epoch=bytes(16), index=1, survivors=(1, 2)).to_bytes()
    with pytest.raises(SecAggError, match="malformed"):
        Agree.from_bytes(good[:-4] + good[-2:] + good[-4:-2])


@pytest.mark.parametrize("index", [-1, 1 << 16])
def test_numbers_stay_in_their_range(index: int) -> None:
    """What has no place in a field is refused when it is written."""
    with pytest.raises(SecAggError, match="malformed"):
        Train(epoch=bytes(16), index=index, participants=(), certificates=()).to_bytes()


def test_another_version_is_refused() -> None:
    """A message of a version that is not known has no kind, and is not read."""
    data = Advertise(epoch=bytes(16), rules=bytes(32)).to_bytes()
    later = data[:1] + b"\2" + data[2:]
    for read in (kind_of, Advertise.from_bytes):
        with pytest.raises(SecAggError, match="malformed"):
            read(later)


def test_a_signed_body_leaves_out_the_signature_alone() -> None:
    """What is signed names the kind and holds every other field."""
    said = Statement(header=b"h" * 32, survivors=(1, 2), signature=b"s")
    assert said.to_bytes().startswith(said.body())
    assert Statement(header=b"h" * 32, survivors=(1, 2), signature=b"other").body() == said.body()
    assert Statement(header=b"h" * 32, survivors=(1, 3), signature=b"s").body() != said.body()


def test_offers_bind_their_receivers() -> None:
    """The same ciphertexts for others, or by another, are something else to sign."""
    one, two = bytes(32), b"\1" * 32
    assert len({offered(b"g", "a", {1: one, 2: two}), offered(b"g", "a", {1: two, 2: one})}) == 2
    assert len({offered(b"g", "a", {1: one}), offered(b"g", "b", {1: one}), offered(b"G", "a", {1: one})}) == 3


def test_secrets_hide_from_repr() -> None:
    """A member's state does not print what it holds."""
    epoch = Epoch(id=bytes(16), step=1, x25519=b"SECRET" * 5, nonce=b"SECRET" * 5)
    assert "SECRET" not in repr(epoch)
    assert "SECRET" not in repr(Released(header=bytes(32), shares={1: b"SECRET" * 5 + b"123"}))
