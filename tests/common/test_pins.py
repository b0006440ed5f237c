"""Pinned records: who is known, and that nobody is ever exchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.crypto import PartyKeys
from common.errors import RefusedError
from common.pins import Pins, secagg_claim

SERVER = PartyKeys.generate("server", "coordinator").record
NORTH = PartyKeys.generate("north", "site").record
ALICE = PartyKeys.generate("alice", "operator").record
PINS = Pins.of("study", [ALICE, NORTH, SERVER])


def test_pins_survive_their_file():
    """What is written is read again, field by field."""
    assert Pins.from_text(PINS.to_text()) == PINS
    assert (PINS.coordinator, dict(PINS.sites), dict(PINS.operators)) == (SERVER, {"north": NORTH}, {"alice": ALICE})


def test_a_pinned_record_is_never_replaced():
    """New parties are added; other keys under a known name are refused, the same keys change nothing."""
    south = PartyKeys.generate("south", "site").record
    grown = PINS.plus([south, NORTH])
    assert grown.find("south") == south
    assert grown.plus([south]) == grown
    for other in (PartyKeys.generate("north", "site").record, PartyKeys.generate("alice", "site").record):
        with pytest.raises(RefusedError, match="never replaced"):
            PINS.plus([other])


def test_names_that_differ_in_capitals_are_the_same_name():
    """Nobody can pass for another by writing its name otherwise."""
    assert PINS.taken("NORTH")
    with pytest.raises(RefusedError, match="one name"):
        PINS.plus([PartyKeys.generate("North", "site").record])


@pytest.mark.parametrize("records", [[NORTH], [SERVER, PartyKeys.generate("second", "coordinator").record]], ids=len)
def test_there_is_one_coordinator(records):
    """None, or two, is damage."""
    with pytest.raises(RefusedError, match="coordinators"):
        Pins.of("study", records)


@given(st.text() | st.binary().map(lambda raw: raw.decode("latin1")))
def test_no_text_crashes_the_parser(text):
    """Whatever is not a document of records is refused."""
    with pytest.raises(RefusedError):
        Pins.from_text(text)


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"extra": 1}, {"parties": [{}]}, {"parties": {}}, {"federation": None}], ids=str
)
def test_a_changed_document_is_refused(change):
    """Other formats, unknown keys and damaged records."""
    with pytest.raises(RefusedError):
        Pins.from_text(json.dumps(json.loads(PINS.to_text()) | change))


def test_what_secure_aggregation_claims_depends_on_how_keys_were_agreed():
    """A coordinator that hands out keys can hand out its own."""
    assert secagg_claim(agreed=True) == "malicious coordinator"
    assert secagg_claim(agreed=False) == "curious coordinator"
