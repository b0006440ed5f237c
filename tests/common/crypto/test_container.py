"""Sealing and opening: what goes in comes out, for the one it is meant for, in bounded memory."""

import io
import os
import tracemalloc
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.crypto import (
    CHUNK_BYTES,
    ENVELOPE_BYTES,
    NO_ID,
    Direction,
    Header,
    PartyKeys,
    SealError,
    Suite,
    blob_size,
    open_envelope,
    peek,
    seal,
)
from common.crypto.header import HEADER_BYTES
from common.crypto.sealing import _seal
from tests.common.crypto import reference as ref

PARTIES = ref.parties()
COORDINATOR, SITE, OTHER = PARTIES["coordinator"], PARTIES["site-a"], PARTIES["site-b"]
AROUND_CHUNKS = [0, 1, 15, 16, 17] + [n * CHUNK_BYTES + more for n in (1, 2) for more in (-17, -1, 0, 1, 16)]

SIZES = st.sampled_from(AROUND_CHUNKS) | st.integers(0, 3 * CHUNK_BYTES)


def header(size: int, sender: PartyKeys = SITE, **changes) -> Header:
    return Header.from_bytes(ref.header(sender, size, **changes))


def order(size: int) -> Header:
    return header(size, COORDINATOR, direction=ref.DOWN)


def sealed(data: bytes = b"weights", *, recipient=COORDINATOR, **options):
    """An update from SITE: its envelope and its ciphertext."""
    sink = io.BytesIO()
    message = seal([data], header(len(data)), sender=SITE, sink=sink, broadcast=False, **options)
    return message.envelope_for(recipient.record), sink.getvalue()


def opened(envelope: bytes, source, *, sender=SITE, recipient=COORDINATOR, most_bytes: int = 1 << 30) -> bytes:
    opening = open_envelope(envelope, sender=sender.record, recipient=recipient, most_bytes=most_bytes)
    out = bytearray(opening.header.plaintext_bytes)
    opening.read(source, out)
    return bytes(out)


class Dribble(io.RawIOBase):
    """A source that gives less than is asked for, as sockets and pipes do."""

    def __init__(self, data: bytes, step: int) -> None:
        self.rest, self.step = memoryview(data), step

    def readinto(self, buffer) -> int:
        count = min(len(buffer), self.step, len(self.rest))
        buffer[:count], self.rest = self.rest[:count], self.rest[count:]
        return count


class OnlyRead:
    """A source without `readinto`."""

    def __init__(self, data: bytes) -> None:
        self.read = io.BytesIO(data).read


class TestRoundTrip:
    """What is sealed opens to the same bytes."""

    @settings(max_examples=60, deadline=None)
    @given(
        data=st.data(), size=st.sampled_from(AROUND_CHUNKS) | st.integers(0, 3 * CHUNK_BYTES), broadcast=st.booleans()
    )
    def test_any_split_into_parts_opens_to_the_same_bytes(self, data, size, broadcast):
        """Where one part ends and the next begins is not in the message."""
        plaintext = (data.draw(st.binary(min_size=1, max_size=40)) * size)[:size]
        cuts = sorted(data.draw(st.lists(st.integers(0, size) | st.sampled_from(AROUND_CHUNKS), max_size=6)))
        edges = [0, *(min(cut, size) for cut in cuts), size]
        parts = [plaintext[start:end] for start, end in pairwise(edges)]
        sink = io.BytesIO()
        message = seal(iter(parts), order(size), sender=COORDINATOR, sink=sink, broadcast=broadcast)
        blob = sink.getvalue()
        assert len(blob) == message.blob_bytes == blob_size(size)
        assert message.digest == (ref.sha256(blob) if broadcast else bytes(32))
        envelope = message.envelope_for(SITE.record)
        assert opened(envelope, io.BytesIO(blob), sender=COORDINATOR, recipient=SITE) == plaintext
        assert opened(envelope, blob, sender=COORDINATOR, recipient=SITE) == plaintext

    def test_parts_are_any_buffers(self):
        """Arrays of any type and shape are sealed where they lie, also empty ones."""
        parts = [
            np.arange(6, dtype=np.float32).reshape(2, 3),
            np.ones((0, 4)),
            np.array(2.5),
            np.array([True]),
            np.zeros(3, np.float16),
            bytearray(b"xy"),
            memoryview(b"z"),
            b"",
        ]
        data = b"".join(np.asarray(p).tobytes() if isinstance(p, np.ndarray) else bytes(p) for p in parts)
        sink = io.BytesIO()
        message = seal(parts, header(len(data)), sender=SITE, sink=sink, broadcast=False)
        assert opened(message.envelope_for(COORDINATOR.record), sink.getvalue()) == data

    @pytest.mark.parametrize("make", [lambda b: Dribble(b, 70_001), OnlyRead, bytes, bytearray, memoryview])
    def test_any_source_is_read(self, make):
        """Short reads, sources without `readinto`, and bytes in memory give the same."""
        data = os.urandom(CHUNK_BYTES + 3)
        envelope, blob = sealed(data)
        assert opened(envelope, make(blob)) == data

    def test_a_source_is_read_from_where_it_stands(self):
        """Something else may come before the ciphertext."""
        envelope, blob = sealed()
        source = io.BytesIO(b"before" + blob)
        source.seek(6)
        assert opened(envelope, source) == b"weights"

    def test_another_implementation_opens_it(self):
        """The plain description of the container makes the same ciphertext."""
        case = ref.encrypt(bytes(32), ref.header(SITE, CHUNK_BYTES + 1), b"w" * (CHUNK_BYTES + 1))
        envelope = ref.envelope(SITE, COORDINATOR.record, bytes(32), ref.header(SITE, CHUNK_BYTES + 1))
        assert opened(envelope, case) == b"w" * (CHUNK_BYTES + 1)

    def test_each_message_has_a_key_of_its_own(self):
        """The same bytes under the same header never give the same ciphertext: no nonce is used twice."""
        assert sealed()[1] != sealed()[1]

    def test_memory_is_bounded_by_chunks(self):
        """Neither end holds a second copy of the message."""
        size = 24 * CHUNK_BYTES
        data, out = bytes(size), bytearray(size)
        with open(os.devnull, "wb") as sink:
            tracemalloc.start()
            seal([data], header(size), sender=SITE, sink=sink, broadcast=False)
            sealing = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        envelope, blob = sealed(data)
        tracemalloc.start()
        opening = open_envelope(envelope, sender=SITE.record, recipient=COORDINATOR, most_bytes=size)
        opening.read(Dribble(blob, CHUNK_BYTES), out)
        reading = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert max(sealing, reading) < 4 * CHUNK_BYTES


class TestRecipients:
    """Who gets an envelope."""

    def test_a_broadcast_has_one_ciphertext_and_many_envelopes(self):
        """Each recipient opens it with its own."""
        sink = io.BytesIO()
        message = seal([b"model"], order(5), sender=COORDINATOR, sink=sink, broadcast=True)
        for site in (SITE, OTHER, PARTIES["site-pq"]):
            envelope = message.envelope_for(site.record)
            assert opened(envelope, sink.getvalue(), sender=COORDINATOR, recipient=site) == b"model"

    def test_a_direct_message_has_one_recipient(self):
        """A second one would know the key, and could forge the message for the first: no digest is signed."""
        message = seal([b"model"], order(5), sender=COORDINATOR, sink=io.BytesIO(), broadcast=False)
        first = message.envelope_for(SITE.record)
        assert message.envelope_for(SITE.record) != first  # the same one again is no second recipient
        with pytest.raises(SealError) as refused:
            message.envelope_for(OTHER.record)
        assert refused.value.layer == "recipient"

    def test_a_message_goes_to_the_role_it_is_for(self):
        """A model for sites is not sealed for an operator."""
        message = seal([b"model"], order(5), sender=COORDINATOR, sink=io.BytesIO(), broadcast=True)
        with pytest.raises(SealError) as refused:
            message.envelope_for(PARTIES["operator"].record)
        assert refused.value.layer == "context"

    def test_envelopes_have_one_length_for_each_suite(self):
        """Nothing can be read from it but the sender's suite, which is the one of its record."""
        for name, suite in (("site-a", Suite.ED25519), ("site-pq", Suite.ED25519_ML_DSA_65)):
            head = replace(header(1, PARTIES[name]), suite=Suite.ED25519)
            message = seal([b"x"], head, sender=PARTIES[name], sink=io.BytesIO(), broadcast=False)
            assert len(message.envelope_for(COORDINATOR.record)) == ENVELOPE_BYTES[suite]
            assert message.header.suite is suite


class TestSealingRefuses:
    """What cannot be sealed is refused before a recipient could be misled."""

    @pytest.mark.parametrize("parts", [[], [b"12"], [b"1234"], [b"123", b"4"], [b"", b"12"]])
    def test_parts_of_another_length(self, parts):
        """The header promised a length, and all keys depend on it."""
        with pytest.raises(SealError) as refused:
            seal(parts, header(3), sender=SITE, sink=io.BytesIO(), broadcast=False)
        assert refused.value.layer == "length"

    def test_bytes_where_none_were_promised(self):
        """An empty message is empty."""
        with pytest.raises(SealError) as refused:
            seal([b"", b"1"], header(0), sender=SITE, sink=io.BytesIO(), broadcast=False)
        assert refused.value.layer == "length"

    def test_a_sink_that_takes_less_than_it_is_given(self):
        """An unbuffered file on a full disk: nobody would notice before the other end."""

        class Short(io.RawIOBase):
            def write(self, data) -> int:
                return len(data) - 1

        with pytest.raises(OSError, match="whole chunk"):
            seal([b"x"], header(1), sender=SITE, sink=Short(), broadcast=False)

    def test_a_header_of_another_sender(self):
        """Nobody seals in another's name, not even by mistake."""
        sink = io.BytesIO()
        with pytest.raises(SealError) as refused:
            seal([b"x"], header(1), sender=OTHER, sink=sink, broadcast=False)
        assert (refused.value.layer, sink.getvalue()) == ("sender", b"")

    def test_an_order_by_a_site(self):
        """Roles belong to directions."""
        wrong = replace(header(1), direction=Direction.DOWN, reply_to=NO_ID)
        with pytest.raises(SealError) as refused:
            seal([b"x"], wrong, sender=SITE, sink=io.BytesIO(), broadcast=False)
        assert refused.value.layer == "context"

    @pytest.mark.parametrize(
        ("field", "value", "layer"),
        [
            ("run_id", b"short", "context"),
            ("manifest", bytes(31), "context"),
            ("sender", bytes(16), "context"),
            ("server_round", -1, "context"),
            ("server_round", 2**64, "context"),
            ("attempt", 2**32, "context"),
            ("kind", 0, "context"),
            ("kind", 4, "context"),
            ("plaintext_bytes", -1, "limits"),
            ("plaintext_bytes", 2**52 + 1, "limits"),
        ],
    )
    def test_a_header_that_cannot_be(self, field, value, layer):
        """Fields of a wrong length or range never reach a key."""
        with pytest.raises(SealError) as refused:
            replace(header(1), **{field: value})
        assert refused.value.layer == layer


class TestOpeningRefuses:
    """Checks come in an order, and nothing unverified is left behind."""

    @pytest.mark.parametrize(
        ("envelope", "most_bytes"),
        [
            pytest.param(ref.flip(sealed()[0], -1), 1 << 30, id="signature"),
            pytest.param(sealed()[0], 6, id="limits"),
            pytest.param(sealed(recipient=PARTIES["coordinator-pq"])[0], 1 << 30, id="recipient"),
        ],
    )
    def test_no_secret_key_is_used_before_the_signature_fits(self, envelope, most_bytes, monkeypatch):
        """Sender, size and recipient are known first, so nobody can probe the keys."""
        monkeypatch.setattr(PartyKeys, "unwrap", lambda *_: pytest.fail("a key was opened"))
        with pytest.raises(SealError):
            opened(envelope, b"", most_bytes=most_bytes)

    @pytest.mark.parametrize("size", [0, 1, 1565, 1567, 4874, 4876, 1 << 20])
    def test_lengths_come_first(self, size):
        """What is not as long as an envelope is not looked at, whatever its first bytes say."""
        for read in (peek, lambda envelope: opened(envelope, b"")):
            with pytest.raises(SealError) as refused:
                read(b"X" * size)
            assert refused.value.layer == "length"

    def test_sizes_are_checked_before_signatures(self, monkeypatch):
        """A claim of a petabyte costs the peer more than us."""
        monkeypatch.setattr(type(SITE.record), "verify", lambda *_: pytest.fail("a signature was verified"))
        envelope = ref.envelope(SITE, COORDINATOR.record, bytes(32), ref.header(SITE, 2**50))
        with pytest.raises(SealError) as refused:
            opened(envelope, b"")
        assert refused.value.layer == "limits"

    @pytest.mark.parametrize("size", [6, 8])
    def test_an_output_of_another_length(self, size):
        """The caller reserves exactly what the header says."""
        envelope, blob = sealed()
        opening = open_envelope(envelope, sender=SITE.record, recipient=COORDINATOR, most_bytes=99)
        with pytest.raises(SealError) as refused:
            opening.read(io.BytesIO(blob), bytearray(size))
        assert refused.value.layer == "length"

    def test_a_source_that_fails_leaves_no_plaintext(self):
        """A disk's error is the disk's, but what was decrypted so far is not verified as a whole."""

        class Breaks(Dribble):
            def readinto(self, buffer) -> int:
                if len(self.rest) < CHUNK_BYTES:
                    raise OSError("unplugged")
                return super().readinto(buffer)

        envelope, blob = sealed(b"w" * (2 * CHUNK_BYTES))
        opening = open_envelope(envelope, sender=SITE.record, recipient=COORDINATOR, most_bytes=4 * CHUNK_BYTES)
        out = bytearray(b"\xaa" * (2 * CHUNK_BYTES))
        with pytest.raises(OSError, match="unplugged"):
            opening.read(Breaks(blob, CHUNK_BYTES), out)
        assert not any(out)

    def test_peeking_verifies_nothing(self):
        """It tells where an envelope wants to go, also when it is forged."""
        envelope, _ = sealed()
        assert peek(ref.flip(envelope, -1)) == peek(envelope) == Header.from_bytes(envelope[:HEADER_BYTES])


class TestSecrets:
    """Keys stay where they are."""

    def test_no_key_is_in_a_repr(self):
        """Logs and tracebacks show reprs."""
        key = b"\xc3" * 32
        message = _seal([b"x"], header(1), sender=SITE, sink=io.BytesIO(), broadcast=False, content_key=key)
        opening = open_envelope(
            message.envelope_for(COORDINATOR.record), sender=SITE.record, recipient=COORDINATOR, most_bytes=1
        )
        payload_key, prefix, _ = ref.keys(key, message.header.to_bytes())
        for secret in (key, payload_key, prefix):
            for shown in (repr(message), repr(opening), repr(opening._schedule)):
                assert repr(secret)[2:-1] not in shown
                assert secret.hex() not in shown
