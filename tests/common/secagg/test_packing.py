"""Packed vectors hold the lowest bits of every entry, in one form only."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.packing import RINGS, add_packed, pack, packed_bytes, unpack
from common.secagg.refusal import SecAggError

rings = st.sampled_from(RINGS)
vectors = st.lists(st.integers(0, 2**32 - 1), max_size=50).map(lambda v: np.array(v, np.uint32))
BLOCK = 1 << 16


def by_hand(vector: np.ndarray, bits: int) -> bytes:
    """All entries in one long number, lowest first."""
    number = sum((int(value) % 2**bits) << (bits * i) for i, value in enumerate(vector))
    return number.to_bytes((len(vector) * bits + 7) // 8, "little")


@settings(deadline=None)
@given(vectors, rings)
def test_entries_stand_one_after_another(vector: np.ndarray, bits: int) -> None:
    """The bytes are one little-endian number of n * bits bits."""
    assert pack(vector, bits).tobytes() == by_hand(vector, bits)


@settings(deadline=None)
@given(vectors, rings)
def test_what_is_packed_comes_back_mod_the_ring(vector: np.ndarray, bits: int) -> None:
    """Bits above the ring are gone, the rest is as it was."""
    packed = pack(vector, bits)
    assert len(packed) == packed_bytes(len(vector), bits)
    np.testing.assert_array_equal(unpack(packed, len(vector), bits), vector.astype(np.uint64) % 2**bits)


@pytest.mark.parametrize("bits", RINGS)
@pytest.mark.parametrize("size", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_blocks_join_without_a_seam(size: int, bits: int) -> None:
    """Vectors longer than a block are packed as one."""
    vector = np.random.default_rng(size).integers(0, 2**32, size, dtype=np.uint32)
    packed = pack(vector, bits)
    np.testing.assert_array_equal(unpack(packed, size, bits), vector.astype(np.uint64) % 2**bits)
    assert pack(vector[: 2 * (size // 2)], bits).tobytes() == packed.tobytes()[: packed_bytes(2 * (size // 2), bits)]


@settings(deadline=None)
@given(st.integers(0, 40), rings, st.integers(1, 5), st.randoms(use_true_random=False))
def test_sums_are_sums_of_the_ring(size: int, bits: int, count: int, random: object) -> None:
    """Adding packed vectors and reducing is adding in the ring."""
    rng = np.random.default_rng(random.getrandbits(32))  # type: ignore[attr-defined]
    several = rng.integers(0, 2**32, (count, size), dtype=np.uint32)
    total = np.zeros(size, np.uint32)
    for vector in several:
        add_packed(total, pack(vector, bits), bits)
    np.testing.assert_array_equal(total.astype(np.uint64) % 2**bits, several.sum(axis=0, dtype=np.uint64) % 2**bits)


def test_bytes_may_lie_anywhere_in_a_message() -> None:
    """Data that is not aligned and read-only is read as well."""
    vector = np.arange(7, dtype=np.uint32)
    for bits in RINGS:
        message = b"x" + pack(vector, bits).tobytes()
        data = np.frombuffer(message, np.uint8, offset=1)
        np.testing.assert_array_equal(unpack(data, 7, bits), vector)


@settings(deadline=None)
@given(st.binary(max_size=40), st.integers(0, 12), rings)
def test_other_lengths_are_refused(data: bytes, size: int, bits: int) -> None:
    """Bytes are either the one form of a vector, or refused with the total as it was."""
    total = np.full(size, 7, np.uint32)
    packed = np.frombuffer(data, np.uint8)
    if len(data) != packed_bytes(size, bits) or (bits == 20 and size % 2 and data[-1] >> 4):
        with pytest.raises(SecAggError) as refused:
            add_packed(total, packed, bits)
        assert refused.value.reason == "format"
        assert (total == 7).all()
    else:
        add_packed(total, packed, bits)
        assert pack(total - np.uint32(7), bits).tobytes() == data


def test_bits_behind_the_last_entry_are_refused() -> None:
    """Two forms of one vector would have two digests."""
    packed = pack(np.array([1, 2, 3], np.uint32), 20)
    packed[-1] |= 0x10
    with pytest.raises(SecAggError):
        unpack(packed, 3, 20)


@pytest.mark.parametrize(
    "data", [np.zeros(4, np.int8), np.zeros((4, 1), np.uint8), np.zeros(8, np.uint8)[::2], np.zeros(1, np.uint32)]
)
def test_other_arrays_are_refused(data: np.ndarray) -> None:
    """Only flat bytes are read."""
    with pytest.raises(SecAggError):
        unpack(data, 1, 32)


@pytest.mark.parametrize("bits", [0, 1, 8, 12, 31, 33, 64])
def test_other_rings_do_not_exist(bits: int) -> None:
    """A ring that is too small for any sum cannot be asked for."""
    with pytest.raises(ValueError, match="bits"):
        packed_bytes(10, bits)
