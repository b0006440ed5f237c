"""Shorter updates: 16 bits a value (bf16), 8 bits (int8, rounded stochastically), or the largest values only (top-k).

What is encoded is the update, in float32; other arrays of a model, such as counters, travel as they are. Every encoded
array is uint8[n] with n given by the model and the settings: it tells nothing of the data, and a receiver knows it
before it reads. Compression comes after clipping and privacy noise, and costs no privacy.

    bf16    uint16[size], the upper half of each float32, rounded to nearest even
    int8    float32 scale, then int8[size]; value = scale * integer
    top-k   uint32[k] rising places, then float32[k] values

All little-endian.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.config.settings import TransportSettings
from common.errors import RefusedError

Arrays = Mapping[str, NDArray[Any]]
Encoded = NDArray[np.uint8]
Values = NDArray[np.float32]

_LARGEST_STEP: Final = 127
_BLOCK: Final = 1 << 18
"""Values that are rounded at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compression:
    """How the updates of a run are encoded."""

    codec: Literal["none", "bf16", "int8", "top-k"]
    top_k_fraction: float = 0.01

    @classmethod
    def of(cls, settings: TransportSettings) -> Self:
        """As a run says."""
        return cls(codec=settings.compression, top_k_fraction=settings.top_k_fraction)

    def kept(self, size: int) -> int:
        """How many values of a tensor top-k sends: at least one, if there is one."""
        return min(size, max(1, math.ceil(round(self.top_k_fraction * size, 6))))

    def encoded_bytes(self, template: NDArray[Any]) -> int:
        """Exact length of an encoded array."""
        if template.dtype.kind != "f" or not template.size:
            return template.nbytes
        match self.codec:
            case "bf16":
                return 2 * template.size
            case "int8":
                return 4 + template.size
            case "top-k":
                return 8 * self.kept(template.size)
            case "none":
                return template.nbytes


def update_of(start: Arrays, trained: Arrays) -> dict[str, Values]:
    """What training changed in the floating-point arrays of a model: float32[size] each."""
    with np.errstate(over="ignore", invalid="ignore"):  # infinities are for the caller to find
        return {
            name: np.subtract(trained[name].reshape(-1), values.reshape(-1)).astype(np.float32, copy=False)
            for name, values in start.items()
            if values.dtype.kind == "f"
        }


def encode_update(
    update: Mapping[str, Values], trained: Arrays, how: Compression, *, seed: bytes
) -> dict[str, Encoded]:
    """All arrays of a model encoded, in the model's order.

    Args:
        update: Finite; what `update_of` returned, with anything added.
        trained: The model after training, for the arrays that have no update.
        how: The run's compression, not `none`.
        seed: Decides how int8 rounds: the same seed gives the same bytes. It protects nothing.
    """
    encoded: dict[str, Encoded] = {}
    for name, values in trained.items():
        change = update.get(name)
        if change is None or not change.size:
            encoded[name] = _bytes_of(values, values.dtype.newbyteorder("<"))
        elif how.codec == "bf16":
            encoded[name] = _to_bf16(change)
        elif how.codec == "int8":
            encoded[name] = _to_int8(change, hashlib.sha256(seed + name.encode()).digest())
        else:
            encoded[name] = _to_top_k(change, how.kept(change.size))
    return encoded


def decode_update(start: Arrays, encoded: Arrays, how: Compression) -> dict[str, NDArray[Any]]:
    """The model after an update, in the dtypes and shapes of the model it started from.

    Guarantee: every length is checked before anything is allocated, and what is allocated is one model.

    Raises:
        RefusedError: The arrays are not an encoded update of this model. Values that are not finite are not looked for.
    """
    if list(encoded) != list(start):
        raise _misfit()
    for name, template in start.items():
        data = encoded[name]
        if data.dtype != np.uint8 or data.shape != (how.encoded_bytes(template),):
            raise _misfit()
    return {name: _decoded(template, np.ascontiguousarray(encoded[name]), how) for name, template in start.items()}


def left_out(change: Values, encoded: Encoded) -> Values:
    """What top-k did not send of an update: it is added to the next one (error feedback)."""
    rest = change.copy()
    if change.size:
        rest[encoded[: len(encoded) // 2].view("<u4")] = 0
    return rest


def _decoded(template: NDArray[Any], data: Encoded, how: Compression) -> NDArray[Any]:
    if template.dtype.kind != "f" or not template.size:
        values = data.view(template.dtype.newbyteorder("<")).astype(template.dtype)
        return values.reshape(template.shape)
    with np.errstate(over="ignore", invalid="ignore"):  # whoever checks replies finds infinities and NaN
        match how.codec:
            case "bf16":
                bits = data.view("<u2").astype(np.uint32)
                change = np.left_shift(bits, 16, out=bits).view(np.float32)
            case "int8":
                change = np.multiply(data[4:].view(np.int8), data[:4].view("<f4")[0], dtype=np.float32)
            case _:
                change = _from_top_k(template.size, data)
        flat = template.reshape(-1)
        exact = template.dtype == np.float32
        total = np.asarray(np.add(flat, change, out=change if exact else None), dtype=template.dtype)
        return total.reshape(template.shape)


def _to_bf16(change: Values) -> Encoded:
    bits = change.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return _bytes_of(rounded, np.dtype("<u2"))


def _to_int8(change: Values, key: bytes) -> Encoded:
    """Each value is rounded up with the probability of its fraction: the mean of many updates is not biased.

    Source: QSGD (Alistarh et al. 2017), section 3.1, with the largest magnitude in place of the norm.
    """
    scale = np.float32(max(float(change.max()), -float(change.min())) / _LARGEST_STEP)
    encoded = np.zeros(4 + change.size, np.uint8)
    encoded[:4] = np.array([scale], "<f4").view(np.uint8)
    if scale == 0:  # all are zero, or too small for any scale
        return encoded
    steps = encoded[4:].view(np.int8)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    with np.errstate(over="ignore"):
        for start in range(0, change.size, _BLOCK):
            part = change[start : start + _BLOCK] / scale
            words = np.frombuffer(stream.update(bytes(4 * part.size)), "<u4")
            np.floor(part + (words >> np.uint32(8)).astype(np.float32) * np.float32(2**-24), out=part)
            steps[start : start + _BLOCK] = np.clip(part, -_LARGEST_STEP, _LARGEST_STEP, out=part).astype(np.int8)
    return encoded


def _to_top_k(change: Values, count: int) -> Encoded:
    """The values of largest magnitude; of equal ones the first."""
    sizes = np.abs(change)
    least = np.partition(sizes, change.size - count)[change.size - count]
    places = np.flatnonzero(sizes > least)
    equal = np.flatnonzero(sizes == least)[: count - places.size]
    places = np.sort(np.concatenate([places, equal]))
    return np.concatenate([_bytes_of(places, np.dtype("<u4")), _bytes_of(change[places], np.dtype("<f4"))])


def _from_top_k(size: int, data: Encoded) -> Values:
    half = len(data) // 2
    places, values = data[:half].view("<u4"), data[half:].view("<f4")
    if (places[1:] <= places[:-1]).any() or places[-1] >= size:
        raise _misfit()
    change = np.zeros(size, np.float32)
    change[places] = values
    return change


def _bytes_of(values: NDArray[Any], dtype: np.dtype[Any]) -> Encoded:
    return np.ascontiguousarray(values, dtype=dtype).reshape(-1).view(np.uint8)


def _misfit() -> RefusedError:
    return RefusedError("an encoded update does not fit the model", hint="both sides must run the same version")
