"""What is not exactly what was sealed or signed is refused with the typed error, and never with another."""

import io
import json

from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from common.crypto import (
    CHUNK_BYTES,
    ENVELOPE_BYTES,
    Header,
    PartyRecord,
    SealError,
    authorize,
    open_envelope,
    peek,
    peer_identity,
    read_authorization,
    read_csr,
    seal,
)
from common.crypto.header import HEADER_BYTES
from common.errors import RefusedError
from tests.common.crypto import reference as ref

PARTIES = ref.parties()
OPERATOR = PARTIES["operator"]
MANY = settings(max_examples=300, deadline=None)
TAILS = st.binary(max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def message(sender: str, recipient: str, size: int, *, broadcast: bool, **changes):
    sink = io.BytesIO()
    head = Header.from_bytes(ref.header(PARTIES[sender], size, **changes))
    done = seal([b"w" * size], head, sender=PARTIES[sender], sink=sink, broadcast=broadcast)
    return PARTIES[sender].record, PARTIES[recipient], done.envelope_for(PARTIES[recipient].record), sink.getvalue()


MESSAGES = [
    message("site-a", "coordinator", 50, broadcast=False),
    message("site-pq", "coordinator", CHUNK_BYTES + 9, broadcast=False),
    message("coordinator", "site-a", CHUNK_BYTES + 9, broadcast=True, direction=ref.DOWN),
]


KINDS_OF_EDIT = st.sampled_from(["flip", "cut", "double", "move", "put", "overwrite"])
EDITS = st.lists(st.tuples(KINDS_OF_EDIT, st.floats(0, 1), st.floats(0, 1), st.integers(1, 255), TAILS), max_size=3)


def edited(original: bytes, edits) -> bytes:
    """Another byte string near an original: bits flipped, a piece cut out, doubled, moved or put in."""
    data = original
    for kind, one, other, mask, new in edits:
        start, stop = sorted((round(one * len(data)), round(other * len(data))))
        if kind == "flip" and data:
            data = ref.flip(data, min(start, len(data) - 1), mask)
        elif kind == "cut":
            data = data[:start] + data[stop:]
        elif kind == "double":
            data = data[:stop] + data[start:]
        elif kind == "move":
            data = data[:start] + data[stop:] + data[start:stop]
        else:
            data = data[:start] + new + data[start + (len(new) if kind == "overwrite" else 0) :]
    assume(data != original)
    return data


@MANY
@given(edits=EDITS, which=st.integers(0, len(MESSAGES) - 1))
def test_a_changed_envelope_is_refused(edits, which):
    """Every byte of it is signed."""
    sender, recipient, envelope, _ = MESSAGES[which]
    changed = edited(envelope, edits)
    try:
        open_envelope(changed, sender=sender, recipient=recipient, most_bytes=1 << 30)
    except SealError:
        return
    raise AssertionError


@settings(max_examples=150, deadline=None)
@given(edits=EDITS, which=st.integers(0, len(MESSAGES) - 1), in_memory=st.booleans())
def test_a_changed_ciphertext_is_refused(edits, which, in_memory):
    """And leaves zeros."""
    sender, recipient, envelope, blob = MESSAGES[which]
    changed = edited(blob, edits)
    opening = open_envelope(envelope, sender=sender, recipient=recipient, most_bytes=1 << 30)
    out = bytearray(b"\xaa" * opening.header.plaintext_bytes)
    try:
        opening.read(changed if in_memory else io.BytesIO(changed), out)
    except SealError:
        assert out == bytes(len(out))
        return
    raise AssertionError


@MANY
@given(data=TAILS | st.sampled_from(list(ENVELOPE_BYTES.values())).flatmap(lambda n: st.binary(min_size=n, max_size=n)))
def test_no_bytes_crash_an_envelope(data):
    """Bytes of the right and of wrong lengths."""
    for read in (
        peek,
        lambda e: open_envelope(e, sender=MESSAGES[0][0], recipient=MESSAGES[0][1], most_bytes=1 << 60),
    ):
        try:
            read(data)
        except SealError:
            continue
        raise AssertionError


@MANY
@given(tail=st.binary(min_size=HEADER_BYTES - 9, max_size=HEADER_BYTES - 9), start=st.binary(min_size=3, max_size=3))
def test_a_header_that_is_read_is_written_the_same(tail, start):
    """There is one spelling of every header."""
    data = b"COTS\1" + bytes([1, 20]) + start[:2] + tail
    for first in (data, data[:7] + b"\2\1" + tail):
        try:
            header = Header.from_bytes(first)
        except SealError:
            continue
        assert header.to_bytes() == first


@MANY
@given(document=st.dictionaries(st.text(max_size=8), JSON, max_size=4), changes=st.data())
def test_no_document_crashes_a_record(document, changes):
    """Foreign documents, and ours with fields changed, are refused or are records."""
    ours = OPERATOR.record.to_document()
    name = changes.draw(st.sampled_from(sorted(ours)))
    value = changes.draw(JSON | st.text(alphabet="AB+/=w", max_size=60) | st.just("A" * 1580))
    for candidate in (document, ours | {name: value}, {key: ours[key] for key in ours if key != name}, ours | document):
        try:
            record = PartyRecord.from_document(candidate)
        except RefusedError:
            continue
        assert PartyRecord.from_document(record.to_document()) == record


@MANY
@given(edits=EDITS, text=st.text(max_size=60) | JSON.map(json.dumps))
@example(edits=[("put", 0.0, 0.0, 1, b"\xff")], text="[" * 9000)
def test_no_text_crashes_an_authorization(edits, text):
    """Foreign texts, and ours with anything changed, are refused or say the very same."""
    ours = authorize(OPERATOR, federation="clinics", run_id="0" * 32, config_digest="1" * 64)
    known = {"operator": OPERATOR.record}
    said = read_authorization(ours, federation="clinics", operators=known)
    changed = edited(ours.encode(), edits).decode(errors="surrogateescape")
    for candidate in (text, changed):
        try:
            found = read_authorization(candidate, federation="clinics", operators=known)
        except SealError:
            continue
        assert found == said


@MANY
@given(edits=EDITS, raw=st.binary(max_size=80))
def test_no_bytes_crash_a_certificate_or_a_request(edits, raw, certificate_pem, csr_pem):
    """Foreign bytes, and ours with anything changed."""
    for read, ours in ((peer_identity, certificate_pem), (read_csr, csr_pem)):
        for candidate in (raw, edited(ours, edits)):
            try:
                read(candidate)
            except RefusedError:
                continue
