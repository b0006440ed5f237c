"""Vectors of a ring of 2^16, 2^20, 2^24 or 2^32 as bytes, with no bit between the entries.

Little-endian. 20 bits: two entries share five bytes, the first in the lower bits; after an odd number of entries the
last four bits are zero.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from common.secagg.refusal import SecAggError

Words = npt.NDArray[np.uint32]
Packed = npt.NDArray[np.uint8]

RINGS: Final = (16, 20, 24, 32)
_BLOCK: Final = 1 << 16
"""Entries worked on at a time (even, so that blocks of 20-bit entries begin at whole bytes)."""


def packed_bytes(size: int, bits: int) -> int:
    """How many bytes a vector takes.

    Raises:
        ValueError: There is no ring of so many bits.
    """
    if bits not in RINGS:
        raise ValueError(f"entries have 16, 20, 24 or 32 bits, not {bits}")
    return (size * bits + 7) // 8


def pack(vector: Words, bits: int) -> Packed:
    """The lowest `bits` of each entry of uint32[n], as uint8[packed_bytes(n, bits)]."""
    packed = np.empty(packed_bytes(len(vector), bits), np.uint8)
    for start in range(0, len(vector), _BLOCK):
        block = vector[start : start + _BLOCK]
        at = start * bits // 8
        _pack_block(block, bits, packed[at : at + packed_bytes(len(block), bits)])
    return packed


def unpack(data: Packed, size: int, bits: int) -> Words:
    """What `pack` packed, uint32[size].

    Raises:
        SecAggError: `format`: it has another length, or bits set behind its last entry.
    """
    total = np.zeros(size, np.uint32)
    add_packed(total, data, bits)
    return total


def add_packed(total: Words, data: Packed, bits: int) -> None:
    """Add a packed vector to uint32[n] in place, mod 2^32 (and so mod 2^bits in the lowest `bits`).

    Raises:
        SecAggError: `format`, as `unpack`; the total is unchanged.
    """
    size = len(total)
    flat = data.dtype == np.uint8 and data.ndim == 1 and data.flags.c_contiguous
    if not flat or len(data) != packed_bytes(size, bits):
        raise SecAggError("format")
    if bits == 20 and size % 2 and data[-1] >> 4:  # one vector, one form
        raise SecAggError("format")
    for start in range(0, size, _BLOCK):
        block = total[start : start + _BLOCK]
        at = start * bits // 8
        _add_block(block, bits, data[at : at + packed_bytes(len(block), bits)])


def _pack_block(block: Words, bits: int, out: Packed) -> None:
    if bits == 20:
        pairs = np.zeros(((len(block) + 1) // 2, 8), np.uint8)
        wide = pairs.view("<u8")[:, 0]
        wide += block[::2] & np.uint32(0xFFFFF)
        wide[: len(block) // 2] |= block[1::2].astype("<u8") << np.uint64(20)  # what is above 40 bits stays behind
        out[:] = pairs[:, :5].reshape(-1)[: len(out)]
    elif bits == 24:
        octets = np.ascontiguousarray(block, "<u4").view(np.uint8)
        for place in range(3):
            out[place::3] = octets[place::4]
    else:
        out.view(f"<u{bits // 8}")[:] = block  # 16 of 32 bits: the lower ones


def _add_block(block: Words, bits: int, data: Packed) -> None:
    if bits == 20:
        pairs = np.zeros(((len(block) + 1) // 2, 8), np.uint8)
        padded = np.zeros(len(pairs) * 5, np.uint8)
        padded[: len(data)] = data
        pairs[:, :5] = padded.reshape(-1, 5)
        wide = pairs.view("<u8")[:, 0]
        block[::2] += (wide & np.uint64(0xFFFFF)).astype(np.uint32)
        block[1::2] += (wide[: len(block) // 2] >> np.uint64(20)).astype(np.uint32)
    elif bits == 24:
        octets = np.zeros(len(block) * 4, np.uint8)
        for place in range(3):
            octets[place::4] = data[place::3]
        block += octets.view("<u4")
    else:
        block += data.view(f"<u{bits // 8}")
