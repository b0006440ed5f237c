"""Workers share a GPU by turns: as many at a time as its memory is enough for, by what the first client needed."""

from __future__ import annotations

import fcntl
import multiprocessing
import threading
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from simulations.pool import device_share as module
from simulations.pool.device_share import DeviceShare, Measured, device_turns
from tests.helpers.processes import PATIENCE_SECONDS

GIB = 1 << 30


class Device:
    """A device of 10 GiB on which every process takes half a GiB, and every client 3 GiB of tensors."""

    def __init__(self, *, free: int = 10 * GIB, overhead: int = GIB // 2, needs: int = 3 * GIB) -> None:
        self._free, self._overhead, self.needs = free, overhead, needs
        self.released = 0

    def free(self) -> int:
        return self._free

    def overhead(self) -> int:
        return self._overhead

    def begin(self) -> None:
        pass

    def peak(self) -> int:
        return self.needs

    def release(self) -> None:
        self.released += 1


class Crowd:
    """Clients in threads, each with a share of its own, as in a process of its own."""

    def __init__(self, folder: Path, device: Device, *, workers: int) -> None:
        self._share: Callable[[], DeviceShare] = lambda: DeviceShare(folder, workers=workers, probe=device)
        self._change = threading.Condition()
        self._go = threading.Event()
        self.inside = self.most = 0
        self.done = 0
        self._threads: list[threading.Thread] = []

    def enter(self, count: int) -> None:
        """So many more want a turn."""
        for _ in range(count):
            self._threads.append(threading.Thread(target=self._train))
            self._threads[-1].start()

    def wait_for(self, inside: int) -> None:
        """Until exactly so many train."""
        with self._change:
            assert self._change.wait_for(lambda: self.inside == inside, PATIENCE_SECONDS)

    def leave(self) -> None:
        """All may end, and do."""
        self._go.set()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)
        self._go.clear()
        self._threads.clear()

    def _train(self) -> None:
        with self._share().turn():
            with self._change:
                self.inside += 1
                self.most = max(self.most, self.inside)
                self._change.notify_all()
            assert self._go.wait(PATIENCE_SECONDS)
            with self._change:
                self.inside -= 1
                self.done += 1
                self._change.notify_all()


def is_free(lock: Path) -> bool:
    """Whether a process that wants it would not have to wait."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


class TestPlaces:
    @pytest.mark.parametrize(
        ("free", "overhead", "need", "places"),
        [
            (10, 0, 3, 3),  # 9 of 10 are given out
            (10, 1, 3, 2),  # three more processes take one each
            (10, 0, 2, 4),  # no more than there are workers
            (10, 0, 9, 1),
            (10, 0, 20, 1),  # one always may try
            (10, 4, 1, 1),
        ],
    )
    def test_are_as_many_as_fit(self, free: int, overhead: int, need: int, places: int) -> None:
        """What every worker takes beside its tensors comes off first: all four stay on the device."""
        assert Measured(free=free * GIB, overhead=overhead * GIB, need=need * GIB).places(4) == places

    def test_of_clients_that_need_nothing_are_enough_for_all(self) -> None:
        """A model so small that torch asked for no memory."""
        assert Measured(free=GIB, overhead=0, need=0).places(4) == 4


class TestTurns:
    def test_the_first_client_trains_alone(self, tmp_path: Path) -> None:
        """What it needs is not known before it has trained."""
        crowd = Crowd(tmp_path, Device(needs=1), workers=4)
        crowd.enter(1)
        crowd.wait_for(1)
        assert not is_free(tmp_path / "gate.lock")
        crowd.enter(3)
        crowd.leave()
        assert crowd.done == 4

    def test_then_as_many_as_fit(self, tmp_path: Path) -> None:
        """Two of 3 GiB beside the overhead of four processes in 9 GiB."""
        device = Device()
        crowd = Crowd(tmp_path, device, workers=4)
        crowd.enter(1)
        crowd.wait_for(1)
        crowd.leave()
        crowd.most = 0
        crowd.enter(8)
        crowd.wait_for(2)
        crowd.leave()
        assert crowd.done == 9
        assert crowd.most == 2

    def test_who_leaves_gives_back_what_it_kept_for_later(self, tmp_path: Path) -> None:
        """Only where somebody has to wait for it: to ask for memory anew takes time."""
        for needs, released in ((3 * GIB, 3), (1, 1)):
            device, folder = Device(needs=needs), tmp_path / str(needs)
            folder.mkdir()
            for _ in range(3):
                with DeviceShare(folder, workers=4, probe=device).turn():
                    pass
            assert device.released == released

    def test_a_client_that_needs_more_makes_room_for_itself(self, tmp_path: Path) -> None:
        """Clients differ; after the first large one, fewer train at a time, also when small ones follow."""
        device = Device(needs=2 * GIB)
        for needs, places in ((2 * GIB, 3), (7 * GIB, 1), (2 * GIB, 1)):
            device.needs = needs
            share = DeviceShare(tmp_path, workers=4, probe=device)
            with share.turn():
                pass
            measured = share._measured()
            assert measured is not None
            assert measured.places(4) == places

    def test_a_client_that_fails_is_measured_all_the_same(self, tmp_path: Path) -> None:
        """What it had until then is known; its place is free again."""
        for _ in range(2):
            with pytest.raises(MemoryError), DeviceShare(tmp_path, workers=2, probe=Device()).turn():
                raise MemoryError
        with DeviceShare(tmp_path, workers=2, probe=Device()).turn():
            pass

    @pytest.mark.parametrize("measured", [False, True])
    def test_a_worker_that_is_killed_keeps_no_turn(self, measured: bool, tmp_path: Path) -> None:
        """Neither the first one, which is alone, nor one after it."""
        if measured:
            with DeviceShare(tmp_path, workers=2, probe=Device(needs=9 * GIB)).turn():
                pass
        context = multiprocessing.get_context("forkserver")
        ours, theirs = context.Pipe()
        process = context.Process(target=take_a_turn, args=(str(tmp_path), theirs))
        process.start()
        assert ours.recv_bytes() == b"inside"
        process.kill()
        process.join()
        with DeviceShare(tmp_path, workers=2, probe=Device(needs=9 * GIB)).turn():
            pass


def take_a_turn(folder: str, connection: Any) -> None:
    with DeviceShare(Path(folder), workers=2, probe=Device(needs=9 * GIB)).turn():
        connection.send_bytes(b"inside")
        threading.Event().wait()


class TestDevices:
    def test_a_processor_needs_no_turns(self, tmp_path: Path) -> None:
        """The system shares it."""
        assert device_turns("cpu", tmp_path, workers=2) is None

    @pytest.mark.parametrize(("device", "shared"), [("cuda", True), ("mps", False)])
    def test_clients_take_turns_with_real_sites(
        self, device: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A site trains alone on a device; so does a client where memory cannot be asked for."""
        locks: list[tuple[str, bool]] = []

        @contextmanager
        def lock(name: str, *, shared: bool = False) -> Any:
            locks.append((name, shared))
            yield

        monkeypatch.setattr(module, "device_lock", lock)
        monkeypatch.setattr(module, "device_name", lambda device: device.type)
        monkeypatch.setattr(module, "CudaProbe", lambda device: Device())
        turns = device_turns(device, tmp_path, workers=2)
        assert turns is not None
        with turns.turn():
            assert locks == [(device, shared)]
        assert (tmp_path / "device.json").exists() is shared

    def test_probe_asks_the_driver_and_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Memory that this process keeps for later is its tensors'; the rest is overhead, up to 1 GiB."""
        calls: list[str] = []
        free = 6 * GIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(3.5 * GIB))
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: 4 * GIB)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("begin"))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("release"))
        probe = module.CudaProbe(torch.device("cuda"))
        probe.begin()
        assert (probe.free(), probe.overhead(), probe.peak()) == (6 * GIB, GIB // 2, 4 * GIB)
        probe.release()
        assert calls == ["begin", "release"]
        free = 2 * GIB
        assert probe.overhead() == GIB


def test_folder_is_the_pools(tmp_path: Path) -> None:
    """What was measured ends with the pool: another run has another model."""
    with DeviceShare(tmp_path, workers=2, probe=Device()).turn():
        assert {path.name for path in tmp_path.iterdir()} == {"gate.lock"}
    assert (tmp_path / "device.json").exists()
