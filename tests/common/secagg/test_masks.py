"""Masks are the plain AES-256 counter-mode stream of their keys, added mod 2^32."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from common.secagg.masks import MaskKey, apply_masks, mask_words

BLOCK = 1 << 16
"""Words of one nonce; part of the protocol, as both ends must agree."""

keys = st.binary(min_size=32, max_size=32)
sizes = st.sampled_from([0, 1, 3, 1000, BLOCK - 1, BLOCK, BLOCK + 1, 2 * BLOCK + 5])


def plain_stream(key: bytes, count: int) -> np.ndarray:
    """The same words by another way: AES-CTR, as NIST SP 800-38D numbers the units of a GCM message."""
    words = []
    for number in range(-(-count // BLOCK)):
        counter = number.to_bytes(12, "big") + (2).to_bytes(4, "big")
        stream = Cipher(algorithms.AES256(key), modes.CTR(counter)).encryptor().update(bytes(4 * BLOCK))
        words.append(np.frombuffer(stream, "<u4"))
    return np.concatenate([*words, np.empty(0, np.uint32)])[:count].astype(np.uint32)


class TestStream:
    @pytest.mark.parametrize("count", [0, 1, 5, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
    def test_is_aes_in_counter_mode(self, count: int) -> None:
        """It equals AES-CTR from another interface of the library, across the borders of blocks."""
        key = bytes(range(32))
        np.testing.assert_array_equal(mask_words(key, count), plain_stream(key, count))

    def test_has_known_words(self) -> None:
        """The first unit is AES-256 of the counter block 0...02, computed in plain mode."""
        key = bytes(range(32))
        unit = Cipher(algorithms.AES256(key), modes.ECB()).encryptor().update(bytes(15) + b"\2")  # noqa: S305
        assert mask_words(key, 4).astype("<u4").tobytes() == unit

    @settings(deadline=None)
    @given(keys, st.integers(0, 3000), st.integers(0, 3000))
    def test_does_not_depend_on_how_much_is_asked(self, key: bytes, short: int, long: int) -> None:
        """A shorter stream is the beginning of a longer one."""
        short, long = sorted((short, long))
        np.testing.assert_array_equal(mask_words(key, short), mask_words(key, long)[:short])

    def test_of_blocks_and_of_keys_never_repeat(self) -> None:
        """Units of 16 bytes are all distinct, within a key and between keys."""
        streams = np.concatenate([mask_words(bytes([n]) + bytes(31), 2 * BLOCK) for n in range(2)]).reshape(-1, 4)
        assert len(np.unique(streams, axis=0)) == len(streams)

    def test_looks_uniform(self) -> None:
        """Each bit is set half of the time, within 6 standard deviations (false alarm: 2 in 10^9 a bit)."""
        words = mask_words(bytes(32), 1 << 20)
        for bit in range(32):
            ones = int(((words >> np.uint32(bit)) & np.uint32(1)).sum())
            assert abs(ones - (1 << 19)) < 6 * (1 << 9)


class TestApplying:
    @settings(deadline=None, max_examples=30)
    @given(st.lists(st.tuples(keys, st.sampled_from([1, -1])), max_size=5), sizes, st.integers(0, 2**32 - 1))
    def test_adds_and_subtracts_the_streams(self, pairs: list[tuple[bytes, int]], size: int, start: int) -> None:
        """The result is the plain sum with signs, mod 2^32."""
        vector = np.full(size, start, np.uint32)
        expected = vector.astype(object)
        for key, sign in pairs:
            expected = expected + sign * plain_stream(key, size).astype(object)
        apply_masks(vector, [MaskKey(*pair) for pair in pairs])
        np.testing.assert_array_equal(vector, np.array([int(v) % 2**32 for v in expected], np.uint32))

    @settings(deadline=None, max_examples=30)
    @given(st.lists(keys, max_size=5), sizes)
    def test_with_opposite_signs_cancels(self, some: list[bytes], size: int) -> None:
        """What one member adds another subtracts, in any order."""
        vector = np.arange(size, dtype=np.uint32)
        apply_masks(vector, [MaskKey(key, 1) for key in some])
        apply_masks(vector, [MaskKey(key, -1) for key in reversed(some)])
        np.testing.assert_array_equal(vector, np.arange(size, dtype=np.uint32))

    @pytest.mark.parametrize(
        "vector",
        [
            np.zeros(4, np.int64),
            np.zeros(4, np.int32),
            np.zeros((2, 2), np.uint32),
            np.zeros(8, np.uint32)[::2],
            np.frombuffer(bytes(16), np.uint32),
        ],
        ids=["wide", "signed", "table", "strided", "read-only"],
    )
    def test_takes_nothing_but_a_flat_vector_of_words(self, vector: np.ndarray) -> None:
        """Another array would be masked wrongly or not in place."""
        with pytest.raises(ValueError, match="contiguous"):
            apply_masks(vector, [MaskKey(bytes(32), 1)])

    @pytest.mark.parametrize(
        "bad", [MaskKey(bytes(16), 1), MaskKey(bytes(33), 1), MaskKey(b"", 1), MaskKey(bytes(32), 0)]
    )
    def test_refuses_weak_keys_before_it_changes_anything(self, bad: MaskKey) -> None:
        """A 16-byte key would be a working AES-128 key; sign 0 would be no mask."""
        vector = np.zeros(10, np.uint32)
        with pytest.raises(ValueError, match="32 bytes"):
            apply_masks(vector, [MaskKey(bytes(32), 1), bad])
        assert not vector.any()

    def test_changes_every_word(self) -> None:
        """After one mask no more zeros are left than chance allows (expected 2^-14 in 2^18 words; 4: below 10^-18)."""
        vector = np.zeros(1 << 18, np.uint32)
        apply_masks(vector, [MaskKey(bytes(32), 1)])
        assert int((vector == 0).sum()) < 4


def test_a_key_is_not_printed() -> None:
    """Secrets hide themselves."""
    assert "\\x07" not in repr(MaskKey(b"\7" * 32, 1))
    assert "\\x07" not in repr([MaskKey(b"\7" * 32, -1)])
