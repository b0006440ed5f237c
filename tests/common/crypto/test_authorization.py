"""An operator's signature under one run and its configuration: what it says, and for whom it holds."""

import base64
import json
from dataclasses import asdict
from datetime import UTC, datetime

import pytest

from common.crypto import PartyKeys, RunAuthorization, SealError, Suite, authorize, read_authorization
from common.crypto.authorization import SIGNATURE_LABEL, _signed
from tests.common.crypto import reference as ref

PARTIES = ref.parties()
OPERATOR = PARTIES["operator"]
KNOWN = {"operator": OPERATOR.record}
RUN = {"federation": "clinics", "run_id": "0123456789abcdef" * 2, "config_digest": "ab" * 32}


def read(text: str, *, federation: str = "clinics", operators=None) -> RunAuthorization:
    return read_authorization(text, federation=federation, operators=KNOWN if operators is None else operators)


def layer_of(text: str, **options) -> str:
    with pytest.raises(SealError) as refused:
        read(text, **options)
    return refused.value.layer


def changed(text: str, **changes) -> str:
    return json.dumps(json.loads(text) | changes)


def test_it_says_what_was_signed():
    """Run, configuration, federation, operator, and when."""
    before = datetime.now(UTC).replace(microsecond=0)
    run = read(authorize(OPERATOR, **RUN))
    assert {name: getattr(run, name) for name in RUN} == RUN
    assert run.operator == "operator"
    assert before <= datetime.fromisoformat(run.issued_at) <= datetime.now(UTC)


def test_only_its_meaning_is_signed():
    """Spaces and the order of keys are nobody's business."""
    text = authorize(OPERATOR, **RUN)
    document = json.loads(text)
    assert read(json.dumps(dict(reversed(document.items())), indent=3)) == read(text)


@pytest.mark.parametrize(
    "change",
    [
        {"run_id": "f" * 32},
        {"config_digest": "cd" * 32},
        {"issued_at": "2020-01-01T00:00:00Z"},
        {"signature": ""},
        {"signature": "AAAA"},
    ],
    ids=str,
)
def test_a_changed_one_does_not_verify(change):
    """Another run, another configuration or another time."""
    assert layer_of(changed(authorize(OPERATOR, **RUN), **change)) == "signature"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"federation": "banks"},
        {"run_id": "F" * 32},
        {"run_id": "f" * 31},
        {"config_digest": ""},
        {"operator": "../operator"},
        {"issued_at": "2020-13-01T00:00:00Z"},
        {"issued_at": "yesterday"},
        {"signature": "%"},
        {"signature": None},
        {"more": 1},
    ],
    ids=str,
)
def test_a_malformed_one_is_refused(change):
    """Before any signature is looked at."""
    assert layer_of(changed(authorize(OPERATOR, **RUN), **change)) == "context"


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "\ud800", "[" * 9000], ids=lambda t: repr(t)[:12])
def test_what_is_none_is_refused(text):
    """JSON of any shape, and none."""
    assert layer_of(text) == "context"


def test_a_long_one_is_not_even_parsed():
    """A peer does not decide how much is read."""
    assert layer_of(authorize(OPERATOR, **RUN) + " " * 20_000) == "length"


def test_it_holds_in_its_federation_only():
    """The same operator may work in two federations."""
    assert layer_of(authorize(OPERATOR, **RUN), federation="banks") == "context"


def signed_by(keys: PartyKeys) -> str:
    """An authorization that says `operator`, with the signature of whoever's keys these are."""
    run = read(authorize(OPERATOR, **RUN))
    signature = base64.b64encode(keys.sign(SIGNATURE_LABEL, _signed(run))).decode()
    return json.dumps({"version": 1, **asdict(run), "signature": signature})


@pytest.mark.parametrize(
    ("name", "role", "pinned_as"),
    [("operator", "operator", "someone"), ("operator", "site", "operator"), ("second", "operator", "operator")],
    ids=["not pinned", "a site of that name", "another operator"],
)
def test_only_a_pinned_operator_counts(name, role, pinned_as):
    """Name, role and keys must all be the pinned ones; a good signature of somebody else is none."""
    keys = PartyKeys.generate(name, role)
    assert layer_of(signed_by(keys), operators={pinned_as: keys.record}) == "sender"
    own = PartyKeys.generate("operator", "operator")
    assert read(signed_by(own), operators={"operator": own.record}).operator == "operator"


def test_an_operator_with_other_keys_is_another():
    """A pin is the keys, not the name."""
    other = PartyKeys.generate("operator", "operator")
    assert layer_of(authorize(other, **RUN)) == "signature"


def test_both_signatures_of_an_operator_are_required():
    """The suite is the pinned record's."""
    keys = PartyKeys.generate("operator", "operator", suite=Suite.ED25519_ML_DSA_65)
    text = authorize(keys, **RUN)
    assert read(text, operators={"operator": keys.record}).operator == "operator"
    short = json.loads(text)["signature"][:86] + "=="  # Ed25519's alone
    assert layer_of(changed(text, signature=short), operators={"operator": keys.record}) == "signature"


@pytest.mark.parametrize("name", ["coordinator", "site-a"])
def test_only_an_operator_authorizes(name):
    """A coordinator cannot ask itself."""
    with pytest.raises(SealError) as refused:
        authorize(PARTIES[name], **RUN)
    assert refused.value.layer == "sender"


@pytest.mark.parametrize(
    "change", [{"run_id": "latest"}, {"config_digest": "x"}, {"federation": "a/b"}, {"federation": "\ud800"}], ids=ascii
)
def test_what_nobody_would_accept_is_not_signed(change):
    """It fails where it is written, not at every site."""
    with pytest.raises(SealError) as refused:
        authorize(OPERATOR, **RUN | change)
    assert refused.value.layer == "context"
