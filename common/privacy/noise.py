"""Gaussian noise and coin flips that privacy may rest on: from a stream cipher keyed by the operating system.

Opacus draws its noise from a seeded Mersenne Twister; whoever learns the seed subtracts the noise exactly. Here a fresh
256-bit key is taken for every source and AES-256-CTR turns it into as many bits as needed.

Limits: normal variates are computed in float64 and rounded to float32, so the known attacks on floating-point noise
(Mironov 2012) are made harder, not excluded. Python cannot wipe the key from memory.
"""

from __future__ import annotations

import math
import os
from typing import Protocol

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from common.errors import PrivacyError

_BLOCK_BYTES = 1 << 18
_ZEROS = bytes(_BLOCK_BYTES)
_UNIT = 2.0**-52


class NoiseSource(Protocol):
    """Where noise and sampling masks come from."""

    def normal(self, count: int) -> NDArray[np.float64]:
        """float64[count] independent standard normal variates."""

    def uniform(self, count: int) -> NDArray[np.float64]:
        """float64[count] independent uniform variates in (0, 1)."""


class SecureNoise:
    """Noise from AES-256-CTR under a key from the operating system.

    Guarantee: Two sources never share a key, and a source refuses to work after a fork: two processes would draw the
    same noise, and the difference of their updates would be free of it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def __repr__(self) -> str:
        """Without the key."""
        return "SecureNoise()"

    def uniform(self, count: int) -> NDArray[np.float64]:
        """float64[count] in (0, 1): 52 random bits each, centred so that 0 and 1 never occur.

        With 53 bits the half that centres would be rounded away, and the largest would be 1.
        """
        words = np.frombuffer(self._bytes(8 * count), dtype=np.uint64) >> np.uint64(12)
        return (words.astype(np.float64) + 0.5) * _UNIT

    def normal(self, count: int) -> NDArray[np.float64]:
        """float64[count] standard normal variates (Box and Muller 1958, in float64)."""
        half = (count + 1) // 2
        uniforms = self.uniform(2 * half)
        radius = np.sqrt(-2.0 * np.log(uniforms[:half]))
        angle = uniforms[half:] * (2.0 * math.pi)
        return np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))[:count]

    def _bytes(self, count: int) -> bytearray:
        if os.getpid() != self._process:
            raise PrivacyError("a noise source was used after a fork", hint="make a new source in each process")
        out = bytearray(count + 15)  # the cipher's buffer rule: one block of room, less a byte
        view = memoryview(out)
        for start in range(0, count, _BLOCK_BYTES):
            size = min(_BLOCK_BYTES, count - start)
            self._stream.update_into(memoryview(_ZEROS)[:size], view[start : start + size + 15])
        view.release()
        del out[count:]
        return out


def normal_like(reference: Tensor, *, stddev: float, source: NoiseSource) -> Tensor:
    """Noise of `reference`'s shape, dtype and device with standard deviation `stddev` (absolute)."""
    values = source.normal(reference.numel())
    values *= stddev
    return torch.from_numpy(values).view(reference.shape).to(dtype=reference.dtype, device=reference.device)


def poisson_sample(count: int, *, rate: float, source: NoiseSource) -> Tensor:
    """int64[k]: the indices below `count` that a Poisson sample takes, each independently with probability `rate`.

    Edge cases: may be empty, and then the step still takes place: noise is added and the step is counted.
    """
    return torch.from_numpy(np.flatnonzero(source.uniform(count) < rate))
