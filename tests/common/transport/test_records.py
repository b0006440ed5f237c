"""Records as bytes: what goes in comes out, and bytes from a peer can do no harm."""

import base64
import json
import math
import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import RefusedError
from common.flower import from_record, to_record
from common.transport.records import MAX_HEADER_BYTES, decode_records, encode_records

DTYPES = ["float16", "float32", "float64", "int8", "int16", "int32", "int64"]
DTYPES += ["uint8", "uint16", "uint32", "uint64", "bool"]
KEYS = st.text(max_size=8)
INT64 = st.integers(-(2**63), 2**63 - 1)
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
)
METRICS = INT64 | st.floats() | st.lists(INT64, max_size=3) | st.lists(st.floats(), max_size=3)
SCALARS = (st.booleans(), INT64, st.floats(), st.text(max_size=6), st.binary(max_size=6))
CONFIGS = st.one_of(*SCALARS, *(st.lists(kind, max_size=3) for kind in SCALARS))
RECORDS = st.one_of(
    st.dictionaries(KEYS, ARRAYS, max_size=3).map(to_record),
    st.dictionaries(KEYS, METRICS, max_size=3).map(MetricRecord),
    st.dictionaries(KEYS, CONFIGS, max_size=3).map(ConfigRecord),
)


def joined(records: RecordDict) -> bytes:
    return b"".join(bytes(part) for part in encode_records(records))


def with_header(header, body: bytes = b"") -> bytes:
    """Bytes as a peer could send them."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + body


def sample() -> RecordDict:
    """One record of every kind."""
    return RecordDict(
        {
            "arrays": to_record({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3), "e": np.ones(0)}),
            "config": ConfigRecord({"run": "x", "key": b"\x00\xff", "flags": [True, False]}),
            "metrics": MetricRecord({"loss": 0.5, "counts": [1, 2]}),
        }
    )


def plain(value):
    """A value with its type; NaN equals NaN and 0.0 is not -0.0."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return (float, struct.pack("<d", value))
    return (type(value), repr(value))


def assert_same(found: RecordDict, expected: RecordDict):
    """Kinds, names, order, types and values."""
    assert list(found) == list(expected)
    for name, record in expected.items():
        assert type(found[name]) is type(record)
        assert list(found[name]) == list(record)
        for key, value in record.items():
            if isinstance(record, ArrayRecord):
                there, here = found[name][key].numpy(), value.numpy()
                assert (there.dtype, there.shape, there.tobytes()) == (here.dtype, here.shape, here.tobytes())
            else:
                assert plain(found[name][key]) == plain(value)


class TestRoundTrip:
    """What goes in comes out."""

    @given(st.dictionaries(KEYS, RECORDS, max_size=3).map(RecordDict))
    @settings(deadline=None, max_examples=150)
    def test_every_record_survives(self, records):
        """All dtypes, no dimensions, no elements, NaN and infinity, bytes and text, flags that are not numbers."""
        assert_same(decode_records(joined(records)), records)

    @pytest.mark.parametrize("values", [np.arange(6.0).reshape(2, 3).T, np.arange(8.0)[::2], np.arange(3, dtype=">f4")])
    def test_arrays_in_any_layout_keep_their_values(self, values):
        """Transposed, strided, or in the other byte order."""
        found = from_record(decode_records(joined(RecordDict({"a": to_record({"x": values})})))["a"])
        np.testing.assert_array_equal(found["x"], values)

    def test_arrays_are_read_only_views_of_what_arrived(self):
        """Nothing is copied, and nobody can write into another's message."""
        data = bytearray(joined(sample()))
        values = from_record(decode_records(data)["arrays"])["w"]
        assert not values.flags.writeable
        assert not values.flags.owndata
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 1


class TestDamage:
    """Bytes from a peer are a record or a `RefusedError`; nothing else happens."""

    def test_every_truncation_is_refused(self):
        """At each of its bytes."""
        data = joined(sample())
        for length in range(len(data)):
            with pytest.raises(RefusedError):
                decode_records(data[:length])

    @pytest.mark.parametrize("extra", [b"\x00", b"\x00" * 100])
    def test_bytes_after_the_end_are_refused(self, extra):
        """Nothing rides along."""
        with pytest.raises(RefusedError):
            decode_records(joined(sample()) + extra)

    def test_no_bit_flip_crashes_the_parser(self):
        """Each bit of a record, one at a time."""
        data = joined(sample())
        refused = 0
        for i in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[i // 8] ^= 1 << i % 8
            try:
                decode_records(flipped)
            except RefusedError:
                refused += 1
        assert refused > len(data)  # all in the length, most in the header

    @given(st.binary(max_size=200))
    @example(b"")
    @example(struct.pack("<I", 0))
    @example(struct.pack("<I", 2**32 - 1))
    @example(with_header(b"[" * 100_000))
    @example(with_header(b"\xff\xfe"))
    @example(with_header(b'[["a","metrics",{"x":' + b"9" * 5000 + b"}]]"))
    @settings(deadline=None, max_examples=200)
    def test_no_byte_string_crashes_the_parser(self, data):
        """Whatever it is."""
        with suppress(RefusedError):
            decode_records(data)

    json_values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.sampled_from(["arrays", "config", "float32", "b64"]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["b64", "x"]), inner, max_size=2),
        max_leaves=8,
    )

    @given(st.lists(st.tuples(KEYS, st.sampled_from(["arrays", "metrics", "config"]), json_values), max_size=2))
    @settings(deadline=None, max_examples=200)
    def test_no_header_crashes_the_parser(self, header):
        """Well-formed JSON that means nothing."""
        with suppress(RefusedError):
            decode_records(with_header([list(entry) for entry in header], b"\x00" * 8))

    @pytest.mark.parametrize(
        "header",
        [
            [["a", "arrays", [["x", "float32", [-1]]]]],
            [["a", "arrays", [["x", "float32", [2.0]]]]],
            [["a", "arrays", [["x", "float32", [0] * 65]]]],
            [["a", "arrays", [["x", "float32", [0, 2**62]]]]],
            [["a", "arrays", [["x", "float32", "22"]]]],
            [["a", "pickle", "gASVAAAA"]],
            [["a", "metrics", {"x": "text"}]],
            [["a", "metrics", {"x": 2**63}]],
            [["a", "config", {"x": {"b64": "%%%"}}]],
            [["a", "config", {"x": {"code": "import os"}}]],
            [["a", "config", {"x": [1, "mixed"]}]],
            [["a", "config", {"x": None}]],
            [[1, "config", {}]],
            [["a", "config"]],
            {"a": 1},
            None,
        ],
        ids=str,
    )
    def test_a_header_that_means_nothing_is_refused(self, header):
        """Unknown kinds and shapes, and values that no record holds."""
        with pytest.raises(RefusedError):
            decode_records(with_header(header))

    @pytest.mark.parametrize("dtype", ["object", "O", "complex64", "S8", "U2", "V8", "M8[s]", ">f8", "f8", "f8,f8", ""])
    def test_only_plain_numbers_are_taken(self, dtype):
        """Under their plain names; above all nothing that could hold objects. The bytes are there in each case."""
        for size in (8, 16):
            with pytest.raises(RefusedError):
                decode_records(with_header([["a", "arrays", [["x", dtype, [1]]]]], b"\x00" * size))

    @pytest.mark.parametrize("shape", [[2**40], [2**20, 2**20], [2**62, 2], [10**30]])
    def test_a_huge_declared_shape_allocates_nothing(self, shape):
        """A few bytes cannot ask for more memory than they are."""
        data = with_header([["a", "arrays", [["x", "float64", shape]]]])
        decode_records(with_header([]))
        tracemalloc.start()
        try:
            with pytest.raises(RefusedError):
                decode_records(data)
            assert tracemalloc.get_traced_memory()[1] < 100_000
        finally:
            tracemalloc.stop()

    @pytest.mark.parametrize("dimension", [0, 1, 2**62])
    def test_a_shape_of_very_many_dimensions_is_not_multiplied_out(self, dimension):
        """Its product would be a number of millions of digits, which takes minutes; no array has more than 32."""
        data = with_header([["a", "arrays", [["x", "uint8", [dimension] * 33]]]], b"\x00")
        with pytest.raises(RefusedError):
            decode_records(data)

    def test_a_header_beyond_its_limit_is_not_read(self):
        """Its length alone refuses it."""
        length = MAX_HEADER_BYTES + 1
        with pytest.raises(RefusedError):
            decode_records(struct.pack("<I", length) + b"[]".ljust(length))

    def test_nothing_is_unpickled(self, tmp_path):
        """A pickle in any place stays bytes or is refused."""
        target = tmp_path / "touched"
        bomb = b"cbuiltins\nopen\n(V%s\nVw\ntR." % str(target).encode()
        packed = {"b64": base64.b64encode(bomb).decode()}
        records = decode_records(with_header([["c", "config", {"x": packed}]]))
        assert records["c"]["x"] == bomb
        for data in (bomb, with_header(bomb), with_header([["a", "arrays", [["x", "object", [len(bomb)]]]]], bomb)):
            with pytest.raises(RefusedError):
                decode_records(data)
        assert not target.exists()

    def test_numbers_that_no_machine_word_holds_are_refused(self):
        """A receiver could not even ask whether such a number is finite."""
        with pytest.raises(RefusedError):
            decode_records(with_header([["m", "metrics", {"num-examples": 10**400}]]))
        top = decode_records(with_header([["m", "metrics", {"num-examples": 2**63 - 1}]]))
        assert math.isfinite(top["m"]["num-examples"])
