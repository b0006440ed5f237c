"""Records of typed fields as bytes, one form for each record.

Whatever is accepted encodes to the same bytes again: lengths are exact, ranks and names strictly increase, nothing may
follow. A record's fields carry their layout in their types: `Annotated[bytes, Fixed(32)]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Protocol, Self, get_args, get_origin, get_type_hints

from common.secagg.refusal import SecAggError

MOST_BYTES = 1 << 31
"""No record is longer: the transports carry no more in one piece."""
_NAME_BYTES = 64


class Reader:
    """Takes a record apart from its front."""

    __slots__ = ("_at", "_data")

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, size: int) -> bytes:
        """The next bytes."""
        end = self._at + size
        if end > len(self._data):
            raise SecAggError("format")
        taken, self._at = self._data[self._at : end], end
        return taken

    def number(self, size: int) -> int:
        """The next big-endian number."""
        return int.from_bytes(self.take(size), "big")

    def end(self) -> None:
        """Nothing may be left."""
        if self._at != len(self._data):
            raise SecAggError("format")


class Layout(Protocol):
    """How one field is laid out."""

    def write(self, value: Any, out: list[bytes]) -> None:
        """Append a value; what does not fit is refused with `format`."""

    def read(self, source: Reader) -> Any:
        """Take a value."""


class Number:
    """An unsigned integer of `size` bytes, at most `most`."""

    def __init__(self, size: int, *, most: int | None = None) -> None:
        self._size, self._most = size, (1 << 8 * size) - 1 if most is None else most

    def write(self, value: int, out: list[bytes]) -> None:
        """Append it."""
        if not 0 <= value <= self._most:
            raise SecAggError("format")
        out.append(value.to_bytes(self._size, "big"))

    def read(self, source: Reader) -> int:
        """Take it."""
        value = source.number(self._size)
        if value > self._most:
            raise SecAggError("format")
        return value


class Fixed:
    """Exactly `size` bytes."""

    def __init__(self, size: int) -> None:
        self._size = size

    def write(self, value: bytes, out: list[bytes]) -> None:
        """Append them."""
        if len(value) != self._size:
            raise SecAggError("format")
        out.append(value)

    def read(self, source: Reader) -> bytes:
        """Take them."""
        return source.take(self._size)


class Varied:
    """Up to `most` bytes, behind their number."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most

    def write(self, value: bytes, out: list[bytes]) -> None:
        """Append them."""
        if len(value) > self._most:
            raise SecAggError("format")
        out += (len(value).to_bytes(4, "big"), value)

    def read(self, source: Reader) -> bytes:
        """Take them."""
        size = source.number(4)
        if size > self._most:
            raise SecAggError("format")
        return source.take(size)


class Text:
    """A name: 1 to 64 bytes of UTF-8."""

    def write(self, value: str, out: list[bytes]) -> None:
        """Append it."""
        data = value.encode()
        if not 1 <= len(data) <= _NAME_BYTES:
            raise SecAggError("format")
        out += (bytes([len(data)]), data)

    def read(self, source: Reader) -> str:
        """Take it."""
        size = source.number(1)
        if not 1 <= size <= _NAME_BYTES:
            raise SecAggError("format")
        try:
            return source.take(size).decode()
        except UnicodeDecodeError as e:
            raise SecAggError("format") from e


class Many:
    """A tuple of values of one layout."""

    def __init__(self, item: Layout, *, increasing: bool = False) -> None:
        self._item, self._increasing = item, increasing

    def write(self, value: tuple[Any, ...], out: list[bytes]) -> None:
        """Append it."""
        self._check(value)
        out.append(len(value).to_bytes(2, "big"))
        for item in value:
            self._item.write(item, out)

    def read(self, source: Reader) -> tuple[Any, ...]:
        """Take it."""
        value = tuple(self._item.read(source) for _ in range(source.number(2)))
        self._check(value)
        return value

    def _check(self, value: tuple[Any, ...]) -> None:
        ordered = not self._increasing or all(a < b for a, b in pairwise(value))
        if len(value) > 0xFFFF or not ordered:
            raise SecAggError("format")


class By:
    """A mapping; its keys, of one layout, strictly increase."""

    def __init__(self, key: Layout, value: Layout) -> None:
        self._keys, self._value = Many(key, increasing=True), value

    def write(self, value: Mapping[Any, Any], out: list[bytes]) -> None:
        """Append it."""
        keys = tuple(sorted(value))
        self._keys.write(keys, out)
        for key in keys:
            self._value.write(value[key], out)

    def read(self, source: Reader) -> dict[Any, Any]:
        """Take it."""
        return {key: self._value.read(source) for key in self._keys.read(source)}


RANK = Number(2)
Id = Annotated[bytes, Fixed(16)]
Digest = Annotated[bytes, Fixed(32)]
Signature = Annotated[bytes, Varied(1 << 13)]
"""Ed25519 with ML-DSA-65 takes 3,373 bytes."""
Index = Annotated[int, Number(2)]
Name = Annotated[str, Text()]
Names = Annotated[tuple[str, ...], Many(Text(), increasing=True)]
Ranks = Annotated[tuple[int, ...], Many(RANK, increasing=True)]
ByRank = Annotated[dict[int, bytes], By(RANK, Varied())]


_KNOWN: dict[Any, tuple[tuple[str, Layout], ...]] = {}


class Packed:
    """A dataclass with layouts on its fields, and its form in bytes: kind, version, then the fields in order."""

    __slots__ = ()

    KIND: ClassVar[int]
    VERSION: ClassVar[int] = 1

    def to_bytes(self) -> bytes:
        """The record as it travels.

        Raises:
            SecAggError: `format`: a field's value has no place in it.
        """
        return self._encode(len(_layouts(type(self))))

    def body(self) -> bytes:
        """Everything but the last field: what the last, a signature, is made over."""
        return self._encode(len(_layouts(type(self))) - 1)

    def _encode(self, count: int) -> bytes:
        out = [bytes((self.KIND, self.VERSION))]
        for name, layout in _layouts(type(self))[:count]:
            layout.write(getattr(self, name), out)
        return b"".join(out)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Read `to_bytes`.

        Raises:
            SecAggError: `format`.
        """
        source = Reader(bytes(data))
        if source.take(2) != bytes((cls.KIND, cls.VERSION)):
            raise SecAggError("format")
        value = cls(**{name: layout.read(source) for name, layout in _layouts(cls)})
        source.end()
        return value


def _layouts(kind: Any) -> tuple[tuple[str, Layout], ...]:
    """Names and layouts of a record's fields, in order; worked out once for each kind."""
    if kind not in _KNOWN:
        hints = get_type_hints(kind, include_extras=True)
        _KNOWN[kind] = tuple((f.name, _layout(hints[f.name])) for f in fields(kind))
    return _KNOWN[kind]


def _layout(hint: Any) -> Layout:
    if get_origin(hint) is not Annotated:
        raise TypeError(f"{hint} says nothing of its layout")
    layout: Layout = get_args(hint)[1]
    return layout
