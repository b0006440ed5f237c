"""Masks: pseudo-random words that a key stretches to, added to or subtracted from a vector mod 2^32.

The stream of a key is the ciphertext of zeros under AES-256-GCM, whose tag is dropped: AES in counter mode. Nonce =
number of the block. A key makes one stream, once (it is derived from one round's secret and that round's header), so
no (key, nonce) comes twice; keys of a round are distinct because they are derived for distinct pairs of members. GCM
counts 16-byte units within a nonce in 32 bits (a block takes 2^14 of them), so streams of distinct nonces never meet.

Assumption: AES-256 is a pseudo-random permutation. The first 2^b words of a stream then pass for random but for a
chance of 2^(2b-133) (a permutation never repeats a unit): 2^-69 for 2^32 words. Longer vectors are refused.

Blocks of 256 KiB stay in the cache while all keys pass over them. GCM's tag costs less than leaving the fast path: with
`cryptography` 50, AES-256-CTR is half as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

Words = npt.NDArray[np.uint32]

KEY_BYTES: Final = 32
MOST_WORDS: Final = 1 << 32
_BLOCK_WORDS: Final = 1 << 16
_NONCE_BYTES, _TAG_BYTES, _WORD_BYTES = 12, 16, 4
_ZEROS: Final = memoryview(bytes(_BLOCK_WORDS * _WORD_BYTES))


class MaskKey(NamedTuple):
    """A key and whether its mask is added (+1) or subtracted (-1)."""

    key: bytes
    sign: int

    def __repr__(self) -> str:
        """Without the key."""
        return f"MaskKey(sign={self.sign})"


def apply_masks(vector: Words, keys: Sequence[MaskKey]) -> None:
    """Add to a vector the masks of all keys, in place and mod 2^32; applied with opposite signs they cancel.

    Args:
        vector: uint32[n], C-contiguous and writable.
        keys: 32 bytes each, used for this vector and never again.

    Raises:
        ValueError: A key, a sign or the vector is not as said; the vector is unchanged.
    """
    if vector.dtype != np.uint32 or vector.ndim != 1 or not vector.flags.c_contiguous or not vector.flags.writeable:
        raise ValueError("masks are added to a contiguous, writable vector of uint32")
    if len(vector) > MOST_WORDS:
        raise ValueError("a vector is too long for one stream of a key")
    if any(len(key) != KEY_BYTES or sign not in {1, -1} for key, sign in keys):
        raise ValueError("a mask has a key of 32 bytes and the sign 1 or -1")
    operations = [(AESGCM(key).encrypt_into, np.add if sign > 0 else np.subtract) for key, sign in keys]
    room = min(len(vector), _BLOCK_WORDS)
    buffer = bytearray(room * _WORD_BYTES + _TAG_BYTES)
    view, words = memoryview(buffer), np.frombuffer(buffer, "<u4", room)
    for number, start in enumerate(range(0, len(vector), _BLOCK_WORDS)):
        block = vector[start : start + _BLOCK_WORDS]
        size = len(block) * _WORD_BYTES
        nonce, zeros = number.to_bytes(_NONCE_BYTES, "big"), _ZEROS[:size]
        stream, mask = view[: size + _TAG_BYTES], words[: len(block)]
        for encrypt_into, operation in operations:
            encrypt_into(nonce, zeros, None, stream)
            operation(block, mask, out=block)
    view[:] = bytes(len(view))  # the last mask; copies inside the library cannot be wiped from Python


def mask_words(key: bytes, count: int) -> Words:
    """The first words of a key's stream: uint32[count]."""
    words = np.zeros(count, np.uint32)
    apply_masks(words, [MaskKey(key, 1)])
    return words
