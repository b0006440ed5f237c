"""Every committed vector opens, or is refused by the layer that it names."""

import io
import json

import pytest

from common.crypto import SealError, open_envelope
from common.crypto.header import Header
from common.crypto.refusal import LAYERS
from common.crypto.sealing import _seal
from tests.common.crypto import reference as ref
from tests.common.crypto import refused_blobs, refused_envelopes  # noqa: F401  (they register scenarios)
from tests.common.crypto.scenarios import SCENARIOS

VECTORS = {path.stem: json.loads(path.read_text()) for path in sorted(ref.VECTORS.glob("*.json"))}
PARTIES = ref.parties()
OPENS = [name for name, vector in VECTORS.items() if vector["refused"] is None]


def plaintext_of(vector) -> bytes:
    unit, count = vector["plaintext"]
    return bytes.fromhex(unit) * count


def blob_of(vector) -> bytes:
    """The ciphertext of a vector; a described one is made again and compared with its digest."""
    blob = vector["blob"]
    if "hex" in blob:
        return bytes.fromhex(blob["hex"])
    unit, count = vector["plaintext"]
    envelope, key = bytes.fromhex(vector["envelope"]), bytes.fromhex(vector["content_key"])
    made = ref.made_blob(envelope, key, (bytes.fromhex(unit), count), blob["slices"], blob["flips"])
    assert ref.sha256(made).hex() == blob["sha256"]
    return made


def opened(vector) -> tuple[str | None, str | None, bytes]:
    """Which half was refused by which layer, and what came out."""
    sender, recipient = PARTIES[vector["sender"]].record, PARTIES[vector["recipient"]]
    try:
        opening = open_envelope(
            bytes.fromhex(vector["envelope"]), sender=sender, recipient=recipient, most_bytes=vector["most_bytes"]
        )
    except SealError as e:
        return "envelope", e.layer, b""
    out = bytearray(b"\xaa" * opening.header.plaintext_bytes)
    try:
        opening.read(io.BytesIO(blob_of(vector)), out)
    except SealError as e:
        return "blob", e.layer, bytes(out)
    return None, None, bytes(out)


@pytest.mark.parametrize("name", VECTORS)
def test_vector(name):
    """It ends as the vector says, and what is refused leaves no plaintext behind."""
    vector = VECTORS[name]
    refused, layer, out = opened(vector)
    assert (refused, layer) == (vector["refused"], vector["layer"])
    if refused is None:
        assert out == plaintext_of(vector)
    else:
        assert not any(out)


@pytest.mark.parametrize("name", OPENS)
def test_sealing_again_gives_the_same_ciphertext(name):
    """All but the wrap and the signatures follows from header, content key and plaintext."""
    vector = VECTORS[name]
    envelope, sink = bytes.fromhex(vector["envelope"]), io.BytesIO()
    sealed = _seal(
        [plaintext_of(vector)],
        Header.from_bytes(envelope[: ref.HEADER]),
        sender=PARTIES[vector["sender"]],
        sink=sink,
        broadcast=envelope[ref.FIELDS["flag"][0]] == 1,
        content_key=bytes.fromhex(vector["content_key"]),
    )
    again = sealed.envelope_for(PARTIES[vector["recipient"]].record)
    assert sink.getvalue() == blob_of(vector)
    assert again[: ref.FIELDS["wrapped"][0]] == envelope[: ref.FIELDS["wrapped"][0]]


def test_there_is_one_vector_for_each_scenario():
    """Scenarios without a vector, or vectors without one, show nothing."""
    assert set(VECTORS) == set(SCENARIOS)
    assert len(VECTORS) >= 25


def test_every_layer_has_a_vector():
    """A layer that no vector reaches could be left out by another implementation."""
    assert {vector["layer"] for vector in VECTORS.values()} - {None} == set(LAYERS)


def test_vectors_are_small():
    """Long plaintexts are described, not stored."""
    assert max(path.stat().st_size for path in ref.VECTORS.glob("*.json")) < 12_000
