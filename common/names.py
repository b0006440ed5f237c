"""Names of clients in ascending order: of a few that are listed, or of millions that only have numbers."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import overload


class SortedNames(Sequence[str]):
    """Distinct names in ascending order, known to be so without looking at each of them.

    Guarantee: `names[i] < names[i + 1]`. To ask for a name, its place or whether it is there takes at most time
    logarithmic in their number; nothing but `__iter__` and slices looks at all of them.
    """

    @abstractmethod
    def place(self, name: object) -> int | None:
        """The place of a name, or None where it is not there."""

    def __contains__(self, name: object) -> bool:
        """Whether a name is there."""
        return self.place(name) is not None

    def index(self, value: str, start: int = 0, stop: int | None = None) -> int:
        """See `Sequence.index`."""
        place = self.place(value)
        if place is None or place not in range(len(self))[start:stop]:
            raise ValueError(f"{value!r} is not a name")
        return place

    def count(self, value: str) -> int:
        """See `Sequence.count`."""
        return int(value in self)


class ListedNames(SortedNames):
    """Names that are all in memory.

    Raises:
        ValueError: A name occurs twice.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted(names))
        if any(map(str.__eq__, self._names, self._names[1:])):
            raise ValueError("a name occurs twice")

    def place(self, name: object) -> int | None:
        """See `SortedNames`."""
        if not isinstance(name, str):
            return None
        place = bisect_left(self._names, name)
        return place if place < len(self._names) and self._names[place] == name else None

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """See `Sequence`."""
        return self._names[index]

    def __len__(self) -> int:
        """How many names there are."""
        return len(self._names)

    def __iter__(self) -> Iterator[str]:
        """The names in their order."""
        return iter(self._names)


class NumberedNames(SortedNames):
    """A word and a number, as wide as the last one's: "client-000" up to a thousand clients, wider beyond.

    None of them is in memory.
    """

    def __init__(self, count: int, *, word: str = "client") -> None:
        self._count, self._word = count, word
        self._width = max(3, len(str(count - 1)))

    def place(self, name: object) -> int | None:
        """See `SortedNames`."""
        if not isinstance(name, str):
            return None
        word, _, number = name.rpartition("-")
        if word != self._word or len(number) != self._width or not (number.isascii() and number.isdecimal()):
            return None
        return int(number) if int(number) < self._count else None

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        """See `Sequence`."""
        places = range(self._count)
        if isinstance(index, slice):
            return tuple(map(self._name, places[index]))
        return self._name(places[index])

    def __len__(self) -> int:
        """How many names there are."""
        return self._count

    def __iter__(self) -> Iterator[str]:
        """The names in their order, made one by one."""
        return map(self._name, range(self._count))

    def _name(self, place: int) -> str:
        return f"{self._word}-{place:0{self._width}d}"


def sorted_names(names: Iterable[str]) -> SortedNames:
    """The names in ascending order; the same object where they are known to be.

    Raises:
        ValueError: A name occurs twice.
    """
    return names if isinstance(names, SortedNames) else ListedNames(names)
