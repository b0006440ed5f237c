"""From a client's update to its vector in a noised sum, and from the sum back to a noised mean."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from common.errors import NonFiniteError, PrivacyError
from common.privacy.distributed.mechanism import Mechanism
from common.privacy.distributed.rotation import rotate, unrotate
from common.privacy.distributed.sampler import ShareNoise
from common.privacy.noise.keystream import KEY_BYTES, Keystream

MOST_TRIES: Final = 16
_BLOCK: Final = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NoisedMean:
    """What a noised sum says.

    Attributes:
        update: float64[d]: the sum over the number of survivors.
        weight: That number.
        metrics: None: a private run releases no figures.
    """

    update: NDArray[np.float64]
    weight: float
    metrics: dict[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributedSum:
    """The codec of a round with distributed noise.

    Guarantee:
        The squares of what a client adds to the sum, noise apart, come to `mechanism.l2_squared` at most, checked in
        whole numbers; of the update zero they are zero. Fresh noise of `mechanism.share_variance` is on every
        coordinate. All clients count equally.

    Attributes:
        mechanism: Grid and noise, the same in all rounds.
        dimensions: d, values of an update; the mechanism's or fewer.
        rotation: 32 public bytes, other ones each round.
    """

    mechanism: Mechanism
    dimensions: int
    rotation: bytes

    def __post_init__(self) -> None:
        """Raise PrivacyError if the mechanism was chosen for fewer values."""
        if not 1 <= self.dimensions <= self.mechanism.dimensions:
            raise PrivacyError(f"noise for {self.mechanism.dimensions} values does not cover {self.dimensions}")

    @property
    def bits(self) -> int:
        """Size of the ring."""
        return self.mechanism.bits

    @property
    def size(self) -> int:
        """Length of a vector."""
        return self.mechanism.draws

    @property
    def digest(self) -> bytes:
        """32 bytes that name all parameters."""
        parts = self.mechanism.digest + self.dimensions.to_bytes(8, "big") + self.rotation
        return hashlib.sha256(b"coterie distributed sum v1/" + parts).digest()

    def encode(
        self,
        update: NDArray[np.floating[Any]],
        *,
        weight: float,  # noqa: ARG002 - the codec's protocol; here all count equally
        metrics: Mapping[str, float],  # noqa: ARG002 - none is released
        seed: bytes,
    ) -> NDArray[np.uint32]:
        """A client's vector: clipped, rotated, rounded, with its share of noise.

        Args:
            update: float32[d] or float64[d].
            weight: Not looked at.
            metrics: Not looked at.
            seed: 32 secret bytes of the operating system's, used for nothing else: who knows them knows the noise.

        Returns:
            uint32[size], modulo 2^32.

        Raises:
            NonFiniteError: The update is not finite.
            ValueError: It has another length, or the seed has.
        """
        if update.shape != (self.dimensions,) or len(seed) != KEY_BYTES:
            raise ValueError(f"an update of {self.dimensions} values and a seed of {KEY_BYTES} bytes are needed")
        shared, norm = self.mechanism, _norm(update)
        if not math.isfinite(norm):
            raise NonFiniteError("the update is not finite, or far too large")
        scale = min(1.0, shared.clipping_norm / norm if norm else 1.0) / shared.granularity
        rotated = rotate(update, seed=self.rotation, size=self.size, scale=scale)
        rounded = _rounded(rotated, shared.l2_squared, _stream(seed, b"rounding"))
        log2 = shared.share_stddev.bit_length() - 1
        rounded += ShareNoise(shared.noise, log2=log2, stream=_stream(seed, b"noise")).draw(self.size)
        return rounded.view(np.uint32)

    def decode(self, total: NDArray[np.uint32], survivors: int) -> NoisedMean:
        """The noised mean from the sum of all vectors, uint32[size] modulo 2^bits.

        Raises:
            PrivacyError: The sum has another length, or so many clients cannot be in it.
        """
        if total.shape != (self.size,) or not 1 <= survivors <= self.mechanism.clients:
            raise PrivacyError(f"this is not the sum of {survivors} updates")
        shift = 32 - self.bits
        signed = (total << np.uint32(shift)).view(np.int32) >> np.int32(shift)
        update = unrotate(signed.astype(np.float64), seed=self.rotation, dimensions=self.dimensions)
        update *= self.mechanism.granularity / survivors
        return NoisedMean(update=update, weight=float(survivors), metrics={})


def _rounded(values: NDArray[np.float64], bound: int, stream: Keystream) -> NDArray[np.int32]:
    """Whole numbers beside the values, whose squares come to the bound at most.

    Each is rounded up with a probability that is its fraction. If all together are too long, all are drawn anew; after
    MOST_TRIES they are rounded towards zero, so that nothing is seen from outside.

    Squares of whole numbers add up exactly in float64 below 2^53, in any order, and never come out below it once they
    exceed it; the bound is smaller.
    """
    whole = np.empty(len(values), dtype=np.int32)
    for _ in range(MOST_TRIES):
        if _round(values, whole, stream) <= bound:
            return whole
    if not _round(values, whole, None) <= bound:
        raise PrivacyError("an update is longer than its bound after clipping", hint="report this as a bug")
    return whole


def _round(values: NDArray[np.float64], whole: NDArray[np.int32], stream: Keystream | None) -> float:
    """Set `whole` to the values, rounded at random, or towards zero without a stream; the sum of squares."""
    squares = 0.0
    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK]
        if stream is None:
            exact = np.trunc(block)
        else:
            words = stream.words((len(block) + 1) // 2).view(np.uint32)[: len(block)]
            exact = np.floor(block + words * 2.0**-32)
        squares += float(exact @ exact)
        whole[start : start + _BLOCK] = exact
    return squares


def _norm(update: NDArray[np.floating[Any]]) -> float:
    """L2 norm in float64; infinity or NaN where it has none."""
    squares = 0.0
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(update), _BLOCK):
            exact = update[start : start + _BLOCK].astype(np.float64)
            squares += float(exact @ exact)
    return math.sqrt(squares)


def _stream(seed: bytes, purpose: bytes) -> Keystream:
    return Keystream(HKDF(SHA256(), KEY_BYTES, None, b"coterie distributed noise " + purpose + b" v1").derive(seed))
