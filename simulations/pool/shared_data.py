"""A federation's examples, once in memory for all processes that train on them.

The process that drives a run writes all tensors one after the other into a file that has no name; worker processes map
it. The file lies in memory where the system offers that (Linux), and ends with the last process that holds it, however
that ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from multiprocessing.reduction import DupFd
from typing import Any, Final

import numpy as np
import structlog
import torch
from torch import Tensor

from common.data.collection import Integers
from common.data.population import DividedPopulation, Rows, StoredPopulation
from common.schema import DataSchema, Examples, Federation

log = structlog.get_logger()

_ALIGNMENT: Final = 64
_MOST: Final = 3
"""Columns of examples that have entities."""

_NOTHING: Final = Examples(inputs=torch.empty(0), targets=torch.empty(0, dtype=torch.int64))
_NO_ROWS: Final = Rows(examples=_NOTHING, offsets=np.zeros(1, np.int64))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """Where a tensor lies in the file."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Pieces:
    """Examples as they lie in this process's memory: whole, or client by client."""

    parts: Sequence[Examples]
    offsets: Integers

    def columns(self) -> list[list[Tensor]]:
        """Each tensor of the examples, in its pieces."""
        columns = [[t for t in column if t is not None] for column in zip(*map(_tensors, self.parts), strict=True)]
        return [column for column in columns if column]


class SharedData:
    """A federation in a file, to be given to worker processes.

    Guarantee: what a process changes in the examples that it has mapped reaches neither the file nor another process;
    where the file lies in memory it is sealed, so that nobody can write to it at all.

    It can be sent to a process that is being started, and nowhere else: it goes as one open file.
    """

    def __init__(
        self, schema: DataSchema, clients: StoredPopulation, *, train: _Pieces, test: _Pieces, held_out: _Pieces
    ) -> None:
        """Write a federation; `clients` is its population without examples.

        Raises:
            OSError: There is no room.
        """
        self._schema, self._clients = schema, clients
        pieces = (train, test, held_out)
        self._columns = [len(part.columns()) for part in pieces]
        written = [column for part in pieces for column in part.columns()]
        self._descriptor = _new_file()
        try:
            offsets = [[torch.from_numpy(part.offsets)] for part in (train, test)]
            self._places, self._size = _write(self._descriptor, [*written, *offsets])
        except BaseException:
            os.close(self._descriptor)
            raise

    def federation(self) -> Federation:
        """The federation over the mapped file."""
        (train, test, held_out), offsets = self.mapped()
        rows = [Rows(examples=examples, offsets=o) for examples, o in zip((train, test), offsets, strict=True)]
        return Federation(schema=self._schema, clients=self._clients.over(*rows), test=held_out)

    def mapped(self) -> tuple[list[Examples], list[Integers]]:
        """The examples to train on, those of the clients' tests, those held out from all; where clients begin."""
        tensors = iter(_map(self._descriptor, self._places, self._size))
        examples = [
            Examples(inputs=next(tensors), targets=next(tensors), entities=next(tensors) if columns == _MOST else None)
            for columns in self._columns
        ]
        return examples, [offsets.numpy() for offsets in tensors]

    def close(self) -> None:
        """Let go of the file; what is mapped stays."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __getstate__(self) -> dict[str, Any]:
        """The open file travels beside the rest."""
        return {**self.__dict__, "_descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """See `__getstate__`."""
        self.__dict__.update(state, _descriptor=state["_descriptor"].detach())


@contextmanager
def shared_data(federation: Federation) -> Iterator[SharedData | None]:
    """A federation's examples in a file for worker processes, and for this one, as long as the block runs.

    What is in this process's memory already moves into the file, so that it is there once: the tensors stay the same
    objects, with the same values. A population that makes its clients one by one has nothing to share, and tensors of a
    user's own may not fit together: then it is None, and each process makes its own.
    """
    pieces = _pieces(federation)
    shared = None
    if pieces is not None:
        train, test, clients = pieces
        held_out = _Pieces(parts=[federation.test], offsets=_NO_ROWS.offsets)
        try:
            shared = SharedData(federation.schema, clients, train=train, test=test, held_out=held_out)
        except OSError as e:
            log.warning("data_not_shared", reason=e.strerror)
        else:
            _move([train, test, held_out], shared.mapped()[0])
    try:
        yield shared
    finally:
        if shared is not None:
            shared.close()


def _pieces(federation: Federation) -> tuple[_Pieces, _Pieces, StoredPopulation] | None:
    """What clients train on, what is held out for them, and the population without both; None if it has no pieces."""
    clients = federation.clients
    if isinstance(clients, StoredPopulation):
        train, test = (_Pieces(parts=[rows.examples], offsets=rows.offsets) for rows in (clients.train, clients.test))
        population = clients.over(_NO_ROWS, _NO_ROWS)
    elif isinstance(clients, tuple) and clients:
        parts = [client.train for client in clients], [client.test for client in clients]
        train, test = (_Pieces(parts=part, offsets=np.cumsum([0, *map(len, part)], dtype=np.int64)) for part in parts)
        population = DividedPopulation(federation.names, _NO_ROWS, _NO_ROWS)
    else:
        return None
    fits = all(map(_fit_together, (train.parts, test.parts, [federation.test])))
    return (train, test, population) if fits else None


def _fit_together(parts: Sequence[Examples]) -> bool:
    """Whether they can lie one after the other: plain tensors of this memory, alike but for how many examples."""
    kinds = {tuple(None if t is None else (t.dtype, t.shape[1:]) for t in _tensors(part)) for part in parts}
    plain = all(
        t is None or (t.device.type == "cpu" and t.layout == torch.strided and type(t) is Tensor)
        for part in parts
        for t in _tensors(part)
    )
    return len(kinds) == 1 and plain


def _tensors(examples: Examples) -> tuple[Tensor, Tensor, Tensor | None]:
    return examples.inputs, examples.targets, examples.entities


def _move(pieces: Sequence[_Pieces], mapped: Sequence[Examples]) -> None:
    """Let this process's own tensors lie in the file too; what they hold stays the same."""
    for own, examples in zip(pieces, mapped, strict=True):
        whole = [tensor for tensor in _tensors(examples) if tensor is not None]
        for column, tensor in zip(own.columns(), whole, strict=True):
            end = 0
            for part in column:
                begin, end = end, end + len(part)
                place = tensor[begin:end]
                part.set_(place.untyped_storage(), place.storage_offset(), place.shape, place.stride())


def _new_file() -> int:
    """A file without a name; in memory where that can be."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("coterie-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write(descriptor: int, columns: Sequence[Sequence[Tensor]]) -> tuple[list[_Place], int]:
    """Write columns one after the other, then close the file to writers for good; where they lie, and its size.

    A column that was written already is not written again: a client can be tested on what it trains on.
    """
    places: dict[tuple[int, ...], _Place] = {}
    names = [tuple(map(id, column)) for column in columns]
    with os.fdopen(os.dup(descriptor), "wb") as file:
        for name, column in zip(names, columns, strict=True):
            if name in places:
                continue
            file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
            shape = (sum(map(len, column)), *column[0].shape[1:])
            places[name] = _Place(offset=file.tell(), dtype=column[0].dtype, shape=shape)
            for tensor in column:
                if tensor.numel():
                    file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        size = max(file.tell(), 1)
        file.truncate(size)
    if hasattr(os, "memfd_create"):
        import fcntl

        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return [places[name] for name in names], size


def _map(descriptor: int, places: Sequence[_Place], size: int) -> list[Tensor]:
    """Tensors over the mapped file; the pages of one that is written to are copied first."""
    view = mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return [
        torch.frombuffer(view, dtype=place.dtype, count=prod(place.shape), offset=place.offset).view(place.shape)
        if prod(place.shape)
        else torch.empty(place.shape, dtype=place.dtype)
        for place in places
    ]
