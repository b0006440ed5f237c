"""Flower's `RecordDict` as bytes and back.

Layout: 4 bytes (little-endian) length of a JSON header, the header, then the arrays' raw bytes one after the other.
The header lists the records with their kinds; an array is its dtype, shape and place. Unlike Flower's own encoding,
nothing is compressed or chunked and decoded arrays are views of the given buffer.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from common.errors import RefusedError
from common.flower import from_record, to_record

_LENGTH = struct.Struct("<I")
_ALIGNMENT = 64
MAX_HEADER_BYTES = 1 << 20
"""Of thousands of arrays: what a peer sends must not take long to read."""
_MOST_DIMENSIONS = 32
_DTYPES = frozenset(
    {"float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool"}
)
Buffer = bytes | bytearray | memoryview


def encode_records(records: RecordDict) -> list[Buffer]:
    """The parts of an encoded record: join them, or write them one after the other.

    Arrays are not copied where they are contiguous, so write the parts before the arrays change.
    """
    header: list[list[Any]] = []
    bodies: list[Buffer] = []
    for name, record in records.items():
        if isinstance(record, ArrayRecord):
            entries = []
            for key, values in from_record(record).items():
                contiguous = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
                entries.append([key, contiguous.dtype.name, list(values.shape)])
                bodies.append(contiguous.reshape(-1).view(np.uint8).data if contiguous.size else b"")
            header.append([name, "arrays", entries])
        elif isinstance(record, MetricRecord):
            header.append([name, "metrics", dict(record)])
        else:
            header.append([name, "config", {key: _pack(value) for key, value in record.items()}])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % _ALIGNMENT)  # arrays begin where memory is aligned
    return [_LENGTH.pack(len(text)), text, *bodies]


def decode_records(data: Buffer) -> RecordDict:
    """The records that `encode_records` wrote; arrays are read-only views of `data`.

    Raises:
        RefusedError: The bytes are not an encoded record. Nothing is allocated beyond what arrived.
    """
    view = memoryview(data).cast("B").toreadonly()
    try:
        (length,) = _LENGTH.unpack_from(view)
        if length > MAX_HEADER_BYTES:
            raise ValueError(length)
        header = json.loads(bytes(view[_LENGTH.size : _LENGTH.size + length]), parse_int=_integer)
        records = RecordDict()
        offset = _LENGTH.size + length
        for name, kind, content in header:
            if kind == "arrays":
                arrays = {}
                for key, dtype, shape in content:
                    arrays[key], offset = _view(view, offset, dtype, shape)
                records[name] = to_record(arrays)
            elif kind == "metrics":
                records[name] = MetricRecord(content)
            elif kind == "config":
                records[name] = ConfigRecord({key: _unpack(value) for key, value in content.items()})
            else:
                raise ValueError(kind)
        if offset != len(view):
            raise ValueError(offset)
    except (
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        IndexError,
        OverflowError,
        RecursionError,
        struct.error,
    ) as e:
        raise RefusedError("received bytes are not a record", hint="both sides must run the same version") from e
    return records


def manifest(records: RecordDict) -> bytes:
    """SHA-256 over what is public of a record: names and kinds, and of arrays their dtypes and shapes. No value."""
    listed = [
        [name, [[key, array.dtype, list(array.shape)] for key, array in record.items()]]
        if isinstance(record, ArrayRecord)
        else [name, type(record).__name__, sorted(record)]
        for name, record in records.items()
    ]
    return hashlib.sha256(json.dumps(listed, separators=(",", ":")).encode()).digest()


def _integer(text: str) -> int:
    """Flower's own records hold 64 bits; a longer number could not even be compared with a float."""
    value = int(text)
    if not -(2**63) <= value < 2**63:
        raise ValueError(text)
    return value


def _view(view: memoryview, offset: int, dtype: str, shape: Sequence[int]) -> tuple[Any, int]:
    if dtype not in _DTYPES or len(shape) > _MOST_DIMENSIONS or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(dtype)
    count = math.prod(shape)
    end = offset + count * np.dtype(dtype).itemsize
    if end > len(view):
        raise ValueError(end)
    return np.frombuffer(view[offset:end], dtype=dtype).reshape(shape), end


def _pack(value: Any) -> Any:
    """JSON has no bytes: wrap them."""
    if isinstance(value, bytes):
        return {"b64": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return [_pack(item) for item in value]
    return value


def _unpack(value: Any) -> Any:
    if isinstance(value, dict):
        return base64.b64decode(value["b64"], validate=True)
    if isinstance(value, list):
        return [_unpack(item) for item in value]
    return value
