"""Updates as vectors of whole numbers in a ring of 2^bits, in which any admissible sum is exact.

With n clients at most in a sum, a client may send numbers of a size up to L = floor((2^(bits-1) - 1) / n). Whatever n
clients send within that, their sum lies strictly between -2^(bits-1) and 2^(bits-1): read as a signed number it is the
sum itself, never that plus a multiple of 2^bits. Each client holds its numbers to L *in integers*, after all floating
point is done, so no rounding error can break this.

A vector holds the update (clipped to norm C, times the weight w <= W), each metric (clipped to MOST_METRIC, times the
weight) and the weight. A value x times w becomes x w / s, rounded up or down at random so that it is right on average,
with the step s = W * most / (L - 1): |x w / s| <= L - 1, and rounding adds less than one, so that holding to L changes
nothing but the last bits of what floating point got wrong. Weights travel as whole numbers, exactly: W <= L.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, NonFiniteError
from common.secagg.masks import mask_words
from common.secagg.packing import RINGS
from common.secagg.refusal import SecAggError

Vector = NDArray[np.uint32]
Update = NDArray[np.floating[Any]]

MOST_METRIC: Final = 64.0
_BLOCK: Final = 1 << 15
_SLACK: Final = 1 + 2.0**-20
"""For rounding in float64: over 2^30 values a norm is off by a relative 2^-22 at most."""


class Decoded(Protocol):
    """What a sum says.

    Attributes:
        update: float64[d]: the mean update by weight.
        weight: All weights together.
        metrics: Mean of each metric by weight.
    """

    @property
    def update(self) -> NDArray[np.float64]: ...  # noqa: D102 - above
    @property
    def weight(self) -> float: ...  # noqa: D102 - above
    @property
    def metrics(self) -> dict[str, float]: ...  # noqa: D102 - above


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Mean:
    """A mean by weight; see `Decoded`."""

    update: NDArray[np.float64]
    weight: float
    metrics: dict[str, float]


class Codec(Protocol):
    """How updates become vectors that can be masked and added up, and their sum a mean update.

    Attributes:
        bits: Size of the ring.
        size: Length of a vector.
        digest: 32 bytes that name the codec and all its parameters.
    """

    @property
    def bits(self) -> int: ...  # noqa: D102 - above
    @property
    def size(self) -> int: ...  # noqa: D102 - above
    @property
    def digest(self) -> bytes: ...  # noqa: D102 - above

    def encode(self, update: Update, *, weight: float, metrics: Mapping[str, float], seed: bytes) -> Vector:
        """A client's vector.

        Args:
            update: float32[d] or float64[d].
            weight: How much it counts, zero or more; larger ones than the codec's most count as that.
            metrics: All that the codec carries; others are left out.
            seed: 32 bytes that no other vector's rounding came from.

        Returns:
            uint32[size], of which the lowest `bits` count.

        Raises:
            NonFiniteError: Something is not finite.
            ValueError: The update has another length, a metric is missing, or the weight is negative.
        """

    def decode(self, total: Vector, survivors: int) -> Decoded:
        """The mean update from the sum of all vectors, uint32[size] modulo 2^bits.

        Raises:
            SecAggError: `range`: no admissible vectors of so many clients have this sum.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class FixedPoint:
    """The codec without distributed noise.

    Guarantee:
        No sum of at most `clients` vectors of `encode` wraps. `decode` of it is within `bound` of the exact mean by
        weight of the clipped updates, on every coordinate, and equal to it on average over the seeds (but for 2^-20
        steps). What `decode` accepts is a sum that clients who follow the protocol could have sent, up to rounding.

    Attributes:
        bits: Size of the ring.
        dimensions: d, values of an update.
        clipping_norm: C, L2 bound on an update; longer ones are scaled down to it.
        most_weight: W; larger weights count as this.
        clients: n, most vectors in a sum.
        metrics: Names of the metrics that ride along, in this order.
    """

    bits: int
    dimensions: int
    clipping_norm: float
    most_weight: int
    clients: int
    metrics: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot fit.

        Raises:
            ConfigError: The ring is too small for so many clients and such weights.
        """
        if not (self.bits in RINGS and self.dimensions >= 0 and self.clients >= 1 and self.most_weight >= 1):
            raise ConfigError(
                "a codec has a ring of 16, 20, 24 or 32 bits, clients and weights", hint="report this as a bug"
            )
        if not 0 < self.clipping_norm < math.inf:
            raise ConfigError("an update's norm has no bound", hint="set secagg.clipping_norm")
        if self._limit < max(2, self.most_weight):
            raise ConfigError(
                f"a ring of {self.bits} bits has no room for {self.clients} clients with weights up to "
                f"{self.most_weight}",
                hint="take more secagg.bits, lower secagg.most_weight, or set strategy.weighting = 'equal'",
            )

    @property
    def size(self) -> int:
        """Length of a vector: update, metrics, weight."""
        return self.dimensions + len(self.metrics) + 1

    @property
    def step(self) -> float:
        """What one whole number stands for: of an update's value times its weight."""
        return self._step(self.clipping_norm)

    @property
    def digest(self) -> bytes:
        """32 bytes that name all parameters."""
        numbers = (self.bits, self.dimensions, self.most_weight, self.clients)
        fields = [*map(str, numbers), self.clipping_norm.hex(), *self.metrics]
        said = b"".join(len(field.encode()).to_bytes(4, "big") + field.encode() for field in fields)
        return hashlib.sha256(b"coterie secagg fixed point v1" + said).digest()

    def bound(self, survivors: int, weight: float) -> float:
        """How far a coordinate of the decoded mean can be from exact arithmetic.

        Args:
            survivors: Vectors in the sum.
            weight: All their weights together, each rounded to a whole number and held to `most_weight`.
        """
        return (survivors * self.step / weight + self.clipping_norm * 2.0**-40) * _SLACK

    def encode(self, update: Update, *, weight: float, metrics: Mapping[str, float], seed: bytes) -> Vector:
        """A client's vector; see `Codec`. The weight is rounded to a whole number."""
        if update.shape != (self.dimensions,):
            raise ValueError(f"an update of {self.dimensions} values has another shape: {update.shape}")
        factor, whole, values = self._clip(update), self._weight(weight), self._metrics(metrics)
        vector = np.empty(self.size, np.uint32)
        room = np.empty(_BLOCK)
        for number, (block, out) in enumerate(zip(_blocks(update), _blocks(vector[: self.dimensions]), strict=True)):
            self._round(block, whole * factor / self.step, _block_key(seed, number), out, room)
        rest = vector[self.dimensions :]
        self._round(values, whole / self._step(MOST_METRIC), _block_key(seed, -1), rest[:-1], room)
        rest[-1] = whole
        return vector

    def decode(self, total: Vector, survivors: int) -> Mean:
        """The mean update; see `Codec`. A sum whose weights are all zero is no update at all."""
        if not 1 <= survivors <= self.clients or total.shape != (self.size,):
            raise SecAggError("range")
        numbers = _signed(total, self.bits)
        weight = int(numbers[-1])
        if not 0 <= weight <= survivors * self.most_weight:
            raise SecAggError("range")
        update, metrics = numbers[: self.dimensions].astype(np.float64), numbers[self.dimensions : -1].tolist()
        most = survivors * math.sqrt(self.dimensions) + weight * self.clipping_norm / self.step
        if not float(np.linalg.norm(update)) <= most * _SLACK:
            raise SecAggError("range")
        step = self._step(MOST_METRIC)
        if any(abs(value) > (weight * MOST_METRIC / step + survivors) * _SLACK for value in metrics):
            raise SecAggError("range")
        share = 1 / weight if weight else 0.0
        update *= self.step * share
        return Mean(
            update=update,
            weight=float(weight),
            metrics={name: value * step * share for name, value in zip(self.metrics, metrics, strict=True)},
        )

    @property
    def _limit(self) -> int:
        """L: the largest number that a client may send."""
        return ((1 << self.bits - 1) - 1) // self.clients

    def _step(self, most: float) -> float:
        return self.most_weight * most / (self._limit - 1)

    def _clip(self, update: Update) -> float:
        """What the update is multiplied by so that its norm is within the bound."""
        norm = math.sqrt(sum(_square(block) for block in _blocks(update)))
        if not math.isfinite(norm):
            raise NonFiniteError("the update is not finite, or far too large")
        return min(1.0, self.clipping_norm / norm) if norm else 1.0

    def _weight(self, weight: float) -> int:
        if not math.isfinite(weight):
            raise NonFiniteError("the weight is not finite")
        if weight < 0:
            raise ValueError("a weight is negative")
        return min(round(weight), self.most_weight)

    def _metrics(self, metrics: Mapping[str, float]) -> NDArray[np.float64]:
        missing = [name for name in self.metrics if name not in metrics]
        if missing:
            raise ValueError(f"a reply lacks the metric {missing[0]!r}")
        values = np.array([metrics[name] for name in self.metrics], dtype=np.float64)
        if not np.isfinite(values).all():
            raise NonFiniteError("a metric is not finite")
        return values.clip(-MOST_METRIC, MOST_METRIC)

    def _round(self, values: NDArray[Any], scale: float, key: bytes, out: Vector, room: NDArray[np.float64]) -> None:
        """Set `out` to values * scale, each rounded up with a probability that is its fraction, held to the limit."""
        exact = room[: len(values)]
        uniform = mask_words(key, len(values)) * 2.0**-32
        np.multiply(values, scale, out=exact, dtype=np.float64)
        np.add(exact, uniform, out=exact)
        np.floor(exact, out=exact)
        np.clip(exact, -self._limit, self._limit, out=exact)
        out.view(np.int32)[:] = exact


def _blocks(values: NDArray[Any]) -> Iterator[NDArray[Any]]:
    return (values[start : start + _BLOCK] for start in range(0, len(values), _BLOCK))


def _square(block: NDArray[Any]) -> float:
    exact = block.astype(np.float64, copy=False)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is looked for in the norm
        return float(np.square(exact).sum())  # not a product: BLAS would start threads for every block


def _block_key(seed: bytes, number: int) -> bytes:
    return hashlib.sha256(b"coterie secagg rounding v1" + number.to_bytes(8, "big", signed=True) + seed).digest()


def _signed(total: Vector, bits: int) -> NDArray[np.int32]:
    """The lowest `bits` of each entry as signed numbers."""
    shift = 32 - bits
    return (total << np.uint32(shift)).view(np.int32) >> np.int32(shift)
