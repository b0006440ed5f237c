"""A sealed message to Flower: an envelope, a blob of ciphertext, and nothing else; held in memory or as a file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.errors import RefusedError
from common.flower import COHORT, to_record
from common.transport.records import decode_records, encode_records
from common.transport.sealed import (
    LARGEST_ENVELOPE,
    Blob,
    cohort_digest,
    order_id,
    read_records,
    read_sealed,
    sealed_content,
)

DATA = bytes(range(256)) * 5


@pytest.fixture(params=["bytes", "bytearray", "memoryview", "file"])
def blob(request: pytest.FixtureRequest, tmp_path: Path) -> Blob:
    """The same blob, held in each way."""
    if request.param == "file":
        path = tmp_path / "blob"
        path.write_bytes(DATA)
        return Blob.of_file(path, len(DATA))
    return Blob.of_bytes({"bytes": bytes, "bytearray": bytearray, "memoryview": memoryview}[request.param](DATA))


class TestBlob:
    def test_is_read_as_often_as_it_is_opened(self, blob: Blob) -> None:
        """Each reader starts at the beginning, in pieces of any size."""
        for _ in range(2):
            with blob.open() as source:
                assert source.read(7) + source.read() == DATA
        with blob.open() as source:
            buffer = bytearray(2000)
            assert source.readinto(buffer) == len(DATA)  # type: ignore[attr-defined]
        assert blob.size == len(DATA)

    def test_is_an_array_to_flower(self, blob: Blob) -> None:
        """Another process, and Flower's own engines, get it as a plain array of bytes."""
        assert blob.numpy().tobytes() == DATA
        assert (blob.dtype, blob.shape) == ("uint8", (len(DATA),))
        copy = pickle.loads(pickle.dumps(blob))  # noqa: S301 - what Flower's simulation runtime does
        assert type(copy) is Array
        assert copy.numpy().tobytes() == DATA

    def test_does_not_show_its_bytes(self, blob: Blob) -> None:
        """A blob in a log is a size and a place."""
        assert len(repr(blob)) < 200

    @pytest.mark.parametrize("way", ["as it is", "over Flower's engine", "through a worker's pipe"])
    def test_arrives_as_it_was(self, blob: Blob, way: str) -> None:
        """Whatever carried the message, the receiver reads the same envelope and bytes."""
        content = sealed_content(b"envelope", blob)
        if way == "over Flower's engine":
            record = ArrayRecord()
            record["blob"] = pickle.loads(pickle.dumps(blob))  # noqa: S301
            content["blob"] = record
        elif way == "through a worker's pipe":
            content = decode_records(b"".join(bytes(part) for part in encode_records(content)))
        envelope, arrived = read_sealed(content)
        assert envelope == b"envelope"
        with arrived.open() as source:
            assert source.read() == DATA

    def test_a_blob_without_bytes_is_one(self, tmp_path: Path) -> None:
        """Nothing is as good a blob as anything else; only opening it fails."""
        (tmp_path / "empty").write_bytes(b"")
        for empty in (Blob.of_bytes(b""), Blob.of_file(tmp_path / "empty", 0)):
            assert empty.numpy().size == 0
            with empty.open() as source:
                assert source.read() == b""


def content(**changes: object) -> RecordDict:
    """A sealed message, in which a change replaces or (None) removes a record."""
    records = dict(sealed_content(b"e", Blob.of_bytes(DATA)).items()) | changes
    return RecordDict({name: record for name, record in records.items() if record is not None})  # type: ignore[misc]


def array(**fields: object) -> ArrayRecord:
    """A record with one array of Flower's own."""
    record = ArrayRecord()
    plain = Array(np.zeros(4, np.uint8))
    plain.__dict__.update(fields)
    record["blob"] = plain
    return record


def npy(header: str) -> bytes:
    """An array in npy format with any header."""
    text = header.encode().ljust(118) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(4)


@pytest.mark.parametrize(
    "unsound",
    [
        RecordDict(),
        content(sealed=None),
        content(blob=None),
        content(arrays=to_record({"w": np.zeros(3)})),
        content(sealed=ConfigRecord({"envelope": "text"})),
        content(sealed=ConfigRecord({"envelope": b"e", "more": 1})),
        content(sealed=ConfigRecord({"envelope": bytes(LARGEST_ENVELOPE + 1)})),
        content(sealed=MetricRecord({"envelope": 1})),
        content(blob=MetricRecord({"blob": 1})),
        content(blob=to_record({"other": np.zeros(3, np.uint8)})),
        content(blob=to_record({"blob": np.zeros(3, np.float32)})),
        content(blob=to_record({"blob": np.zeros((3, 3), np.uint8)})),
        content(blob=array(stype="pickle")),
        content(blob=array(data=b"")),
        content(blob=array(data=b"not npy")),
        content(blob=array(data=npy("{'descr': '|u1', 'fortran_order': False, 'shape': (1099511627776,), }"))),
        content(blob=array(data=npy("{'descr': '|O', 'fortran_order': False, 'shape': (4,), }"))),
        content(blob=array(data=npy("__import__('os')"))),
    ],
    ids=range(18),
)
def test_whatever_else_a_content_is_is_refused(unsound: RecordDict) -> None:
    """Something missing, something more, or an array that is not just bytes: nothing of it is read or allocated."""
    with pytest.raises(RefusedError, match="not sealed"):
        read_sealed(unsound)


class TestOrders:
    def test_every_envelope_names_another_order(self) -> None:
        """Two sites asked with one broadcast have orders of their own, named the same at both ends."""
        assert order_id(b"one") == order_id(b"one")
        assert order_id(b"one") != order_id(b"two")
        assert len(order_id(b"")) == 16

    @given(st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1), max_size=5))
    def test_a_cohort_is_named_whatever_its_order(self, names: list[str]) -> None:
        """The digest is of who takes part, not of the order in which they are told."""
        import json

        said = cohort_digest({COHORT: json.dumps(names)})
        assert said == cohort_digest({COHORT: json.dumps(names[::-1])})
        assert said != cohort_digest({})
        assert cohort_digest({}) == bytes(32)


def test_a_blob_that_does_not_fit_is_not_read() -> None:
    """The length is compared before memory is taken, and a message without a byte is none."""

    def read(*_: object) -> None:
        pytest.fail("read")

    blob = Blob.of_bytes(DATA)
    for blob_bytes, plaintext_bytes in ((len(DATA) + 1, 10**15), (len(DATA), 0)):
        with pytest.raises(RefusedError):
            read_records(read, blob, blob_bytes=blob_bytes, plaintext_bytes=plaintext_bytes, digest=b"")
