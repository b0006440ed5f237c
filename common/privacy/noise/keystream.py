"""Random bits that privacy may rest on: a stream cipher under a key of 256 bits."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.errors import PrivacyError

KEY_BYTES = 32
SPARE_WORDS = 2  # the cipher wants room for one block more than it writes
_BLOCK_WORDS = 1 << 15
_ZEROS = memoryview(bytes(8 * _BLOCK_WORDS))


class Keystream:
    """AES-256 in counter mode: as many bits as needed, none of them twice.

    Guarantee: Bits are independent and uniform to everyone who does not hold the key (as far as AES is a pseudorandom
    permutation; over 2^40 bytes the counter mode itself costs below 2^-56). The key stays in the cipher and cannot be
    copied or pickled. After a fork the stream refuses to work: two processes would draw the same noise, and the
    difference of their updates would be free of it. Not for use by two threads at a time.

    Limits: Python cannot wipe the key from memory.

    Args:
        key: 32 bytes, used for nothing else.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise PrivacyError(f"a keystream's key has {len(key)} bytes instead of {KEY_BYTES}")
        self._process = os.getpid()
        self._cipher = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        """Without the key."""
        return "Keystream()"

    def words(self, count: int) -> NDArray[np.uint64]:
        """uint64[count] of fresh random bits."""
        return self.fill(np.empty(count + SPARE_WORDS, dtype=np.uint64), count)

    def fill(self, room: NDArray[np.uint64], count: int) -> NDArray[np.uint64]:
        """uint64[count] of fresh random bits, written to the start of `room`.

        Args:
            room: Contiguous uint64[count + SPARE_WORDS or more]; what follows the first `count` may be overwritten.
            count: How many words.

        Raises:
            PrivacyError: This is not the process that made the stream.
        """
        self.check_process()
        view = room.data.cast("B")
        for start in range(0, 8 * count, len(_ZEROS)):
            size = min(len(_ZEROS), 8 * count - start)
            self._cipher.update_into(_ZEROS[:size], view[start : start + size + 15])
        return room[:count]

    def check_process(self) -> None:
        """Raise PrivacyError in any process but that which made the stream."""
        if os.getpid() != self._process:
            raise PrivacyError("a noise source was used after a fork", hint="make a new source in each process")
