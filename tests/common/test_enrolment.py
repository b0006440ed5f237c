"""Requests, answers, tokens and fingerprints: what travels when a party joins."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from common.crypto import Authority, PartyKeys, SealError, Suite
from common.enrolment import (
    Answer,
    Request,
    Token,
    federation_fingerprint,
    record_fingerprint,
    same_fingerprint,
)
from common.errors import RefusedError
from common.pins import Pins
from tests.helpers.kits import request_of

TOKEN = Token(
    federation="study",
    server="localhost:1",
    name="west",
    role="site",
    suite="ed25519",
    coordinator="00" * 32,
    parties=["11" * 32],
    chain="chain",
    key=SecretStr("the key"),
    root="root",
)


@pytest.mark.parametrize("suite", list(Suite))
def test_a_request_proves_that_its_sender_has_the_keys(suite):
    """Signed by the record that it holds, also after it was a file."""
    keys = PartyKeys.generate("west", "site", suite=suite)
    assert Request.from_text(request_of(keys=keys).to_text()).check() == keys.record


@pytest.mark.parametrize("field", ["csr", "record", "federation", "signature"])
def test_nothing_in_a_request_can_be_exchanged(field):
    """The CSR of one request does not fit the record of another."""
    asked, other = request_of("west"), request_of("west")
    value = getattr(other, field) if field != "federation" else "elsewhere"
    with pytest.raises(SealError):
        asked.model_copy(update={field: value}).check()


@pytest.mark.parametrize("record", ["", "[]", "null", "{}", "[" * 60_000, "x" * 100_000], ids=len)
def test_a_record_that_is_none_is_refused(record):
    """Before anything is verified with it."""
    with pytest.raises(RefusedError):
        request_of().model_copy(update={"record": record}).check()


@pytest.mark.parametrize("kind", [Request, Answer, Token])
@given(text=st.text())
def test_no_text_crashes_a_parser(kind, text):
    """A request, an answer, a token: anything else is refused."""
    with pytest.raises(RefusedError):
        kind.from_text(text)
    with pytest.raises(RefusedError):
        Token.decode(text)


def test_a_token_is_one_line():
    """Base64, so that it survives being pasted; with spaces around it, too."""
    line = TOKEN.encode()
    assert len(line.split()) == 1
    assert Token.decode(f"  {line}\n") == TOKEN


def test_a_token_hides_its_key():
    """In its repr, and in what is said of a damaged one."""
    assert "the key" not in repr(TOKEN)
    line = TOKEN.encode()
    for damaged in (line[:-10], line[10:], line.replace("token-1", "token-2"), line[:60] + "!" + line[61:]):
        with pytest.raises(RefusedError) as caught:
            Token.decode(damaged)
        assert caught.value.__cause__ is None
        assert damaged[20:60] not in str(caught.value)


def test_fingerprints_can_be_read_aloud(tmp_path):
    """Spaces and capitals do not count; any other record or root has another one."""
    one, other = PartyKeys.generate("west", "site").record, PartyKeys.generate("west", "site").record
    assert same_fingerprint(record_fingerprint(one), record_fingerprint(one).replace(" ", "").upper())
    assert not same_fingerprint(record_fingerprint(one), record_fingerprint(other))
    with pytest.raises(RefusedError, match="no certificate"):
        federation_fingerprint(b"", Pins.of("study", [PartyKeys.generate("server", "coordinator").record]))


def test_a_federations_fingerprint_covers_everybody_who_is_pinned():
    """Whoever adds an operator, a site or another coordinator on the way changes what is read aloud."""
    root = Authority.create("study").root
    server, site = PartyKeys.generate("server", "coordinator").record, PartyKeys.generate("north", "site").record
    pins = Pins.of("study", [server, site])
    others = [
        pins.plus([PartyKeys.generate("eve", "operator").record]),
        pins.plus([PartyKeys.generate("east", "site").record]),
        Pins.of("study", [server]),
        Pins.of("study", [PartyKeys.generate("server", "coordinator").record, site]),
    ]
    shown = {federation_fingerprint(root, each) for each in [pins, *others]}
    assert len(shown) == 5
    assert federation_fingerprint(root, Pins.from_text(pins.to_text())) in shown
