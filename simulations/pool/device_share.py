"""How many workers train on one GPU at a time: as many as fit in its memory, by what the first client needed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

import torch

from client.mods.device import device_lock, device_name
from client.trainer import resolve_device

_USED: Final = 0.9
"""Share of the free memory that is given out: what is measured for one client is not exact for the next."""

_MOST_OVERHEAD: Final = 1 << 30
"""A process needs less than this on a device beside its tensors."""


class Probe(Protocol):
    """What a process can learn of a device's memory, in bytes."""

    def free(self) -> int:
        """What nobody has."""

    def overhead(self) -> int:
        """What this process has beside its tensors, or more."""

    def begin(self) -> None:
        """Measure from here on."""

    def peak(self) -> int:
        """The most that this process had for tensors since `begin`, what it keeps for later ones included."""

    def release(self) -> None:
        """Give back what is kept for later."""


class CudaProbe:
    """A CUDA device, by the driver's own count and torch's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        """See `Probe`."""
        return torch.cuda.mem_get_info(self._device)[0]

    def overhead(self) -> int:
        """All that is not free and not this process's tensors: others' too, where the device has others."""
        free, total = torch.cuda.mem_get_info(self._device)
        return min(_MOST_OVERHEAD, total - free - torch.cuda.memory_reserved(self._device))

    def begin(self) -> None:
        """See `Probe`."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """See `Probe`."""
        return torch.cuda.max_memory_reserved(self._device)

    def release(self) -> None:
        """See `Probe`."""
        torch.cuda.empty_cache()


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What the first client has told of a device.

    Attributes:
        free: Bytes that were free before it trained.
        overhead: Bytes that each process takes beside its tensors.
        need: The most bytes of tensors that a client has needed.
    """

    free: int
    overhead: int
    need: int

    def places(self, workers: int) -> int:
        """How many clients can train at a time, one at least. All workers stay on the device while they wait."""
        room = int(self.free * _USED) - (workers - 1) * self.overhead
        return max(1, min(workers, room // max(1, self.need)))


class DeviceShare:
    """Turns on a device, over all workers of a pool.

    The first client trains alone, and what it needs says how many can train side by side; a client that needs more than
    all before changes that for those after it. A lock ends with its process: a worker that is killed keeps no turn.
    """

    def __init__(self, folder: Path, *, workers: int, probe: Probe) -> None:
        """Prepare.

        Args:
            folder: The pool's, where its workers find each other.
            workers: How many processes share the device.
            probe: Looks at it.
        """
        self._folder, self._workers, self._probe = folder, workers, probe

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a place on the device, and keep it for the block."""
        if (measured := self._measured()) is None:
            with self._lock("gate"):
                if (measured := self._measured()) is None:
                    yield from self._first()
                    return
        places = measured.places(self._workers)
        with self._place(places):
            self._probe.begin()
            try:
                yield
            finally:
                self._learn(self._probe.peak())
                if places < self._workers:
                    self._probe.release()

    def _first(self) -> Iterator[None]:
        free, overhead = self._probe.free(), self._probe.overhead()
        self._probe.begin()
        try:
            yield
        finally:
            self._write(Measured(free=free, overhead=overhead, need=self._probe.peak()))
            self._probe.release()

    def _learn(self, peak: int) -> None:
        measured = self._measured()
        if measured is None or peak <= measured.need:
            return
        with self._lock("gate"):
            measured = self._measured() or measured
            self._write(Measured(free=measured.free, overhead=measured.overhead, need=max(peak, measured.need)))

    @property
    def _path(self) -> Path:
        return self._folder / "device.json"

    def _measured(self) -> Measured | None:
        try:
            told: dict[str, Any] = json.loads(self._path.read_text())
        except FileNotFoundError:
            return None
        return Measured(**told)

    def _write(self, measured: Measured) -> None:
        told = {"free": measured.free, "overhead": measured.overhead, "need": measured.need}
        temporary = self._path.with_suffix(".tmp")  # under the gate: one writer
        temporary.write_text(json.dumps(told))
        temporary.replace(self._path)

    @contextmanager
    def _place(self, places: int) -> Iterator[None]:
        """One of the first places that is free; where none is, the one that this process always waits for."""
        if places >= self._workers:
            yield
            return
        own = os.getpid() % places
        for place in [*range(own, places), *range(own)]:
            lock = self._open(f"place-{place}")
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            try:
                yield
            finally:
                os.close(lock)
            return
        with self._lock(f"place-{own}"):
            yield

    @contextmanager
    def _lock(self, name: str) -> Iterator[None]:
        lock = self._open(name)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _open(self, name: str) -> int:
        return os.open(self._folder / f"{name}.lock", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


class Turns:
    """Turns on the device that a run trains on. It is not looked at before a client trains: that takes memory of it."""

    def __init__(self, device: torch.device, folder: Path, *, workers: int) -> None:
        self._device, self._folder, self._workers = device, folder, workers

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn: a real site on this machine trains alone, as does a client on a device other than CUDA."""
        if self._device.type != "cuda":
            with device_lock(device_name(self._device)):
                yield
            return
        share = DeviceShare(self._folder, workers=self._workers, probe=CudaProbe(self._device))
        with device_lock(device_name(self._device), shared=True), share.turn():
            yield


def device_turns(device: str, folder: Path, *, workers: int) -> Turns | None:
    """Turns on a device, named as `training.device` names it; None on a CPU, which is shared anyhow."""
    resolved = resolve_device(device)
    return None if resolved.type == "cpu" else Turns(resolved, folder, workers=workers)
