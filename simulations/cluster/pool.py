"""Processes of a Ray cluster that train clients. One that ends, or whose machine does, loses its client; others go on.

Flower's own pool takes a dead process back and gives it the next client: one lost machine would fail all that follow.
"""

from __future__ import annotations

import itertools
import operator
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import structlog
from flwr.app import Array, ArrayRecord, RecordDict

from common.errors import FailureCode, RunError
from common.flower import ARRAYS
from common.transport.records import encode_records
from common.transport.sealed import BLOB
from simulations.cluster.actor import Answer, ClientActor

if TYPE_CHECKING:
    from simulations.inline import AppFactory

log = structlog.get_logger()

START_SECONDS: Final = 300.0
"""Longest wait for the first process: each imports everything and loads the data."""
_LOOK_SECONDS: Final = 0.2
_SHARED: Final = (ARRAYS, BLOB)
"""Records of a message that are the same for all clients of a round, and large."""


class ActorPool:
    """Answers for clients over the processes of a cluster; several threads may ask at a time.

    Args:
        factory: Makes the clients' app, in each process.
        cpus: Processors that a client takes.
        gpus: Accelerators, or a share of one, that a client takes.
        most: Most processes; None: as many as there is room for.
        set_up: What each process does before it makes its app.

    Guarantee: `answer` always answers. A client whose process ends is told as CLIENT_LOST and not asked again: its
    ledger may have been written. A new process takes the dead one's place where there is room.
    """

    def __init__(
        self,
        factory: AppFactory,
        *,
        cpus: float = 1.0,
        gpus: float = 0.0,
        most: int | None = None,
        set_up: Callable[[], None] | None = None,
    ) -> None:
        import ray

        self._needs = {"num_cpus": cpus, "num_gpus": gpus}
        self._make = ray.remote(ClientActor).options(**self._needs, max_restarts=0).remote
        self._arguments = (factory, set_up)
        self._most = most
        self._changed = threading.Condition()
        self._idle: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._busy: list[Any] = []
        self._refusals: list[Exception] = []
        self._since = monotonic()
        self._shared = _Shared()
        self.closed = False

    @property
    def size(self) -> int:
        """Processes that there are or will be."""
        with self._changed:
            return len(self._idle) + len(self._starting) + len(self._busy)

    def start(self) -> None:
        """Start all processes and wait for the first of them.

        Raises:
            RunError: None can start.
        """
        with self._changed:
            self._grow()
            if not self._starting:
                needs = f"{self._needs['num_cpus']:g} CPUs" + (
                    f" and {self._needs['num_gpus']:g} GPUs" if self._needs["num_gpus"] else ""
                )
                raise RunError(
                    f"no node of the Ray cluster has room for a client, which takes {needs}",
                    hint="see `ray status`; give a client less, or the cluster more",
                )
        actor = self._take()
        self._give_back(actor)

    def answer(  # noqa: PLR0917
        self, node: int, message_id: str, message_type: str, content: RecordDict, state: bytes, timeout: float | None
    ) -> Answer:
        """One client's answer; waits for a process that is free.

        Args:
            node: The client's node id.
            message_id: The message's.
            message_type: What is asked for.
            content: The message's records.
            state: What the client kept, encoded.
            timeout: Wall seconds that the client may take, or None.

        Raises:
            RunError: The cluster has no process left and no room for one.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        if self.closed:
            raise _ended()
        own = RecordDict({key: record for key, record in content.items() if key not in _SHARED})
        large = {key: record for key, record in content.items() if key in _SHARED and isinstance(record, ArrayRecord)}
        shared_id, shared = self._shared.put(large) if large else ("", None)
        sent = b"".join(encode_records(own))
        actor = self._take()
        try:
            future = actor.answer.remote(node, message_id, message_type, sent, state, shared_id, shared)
            ready, _ = ray.wait([future], timeout=timeout)
            if not ready:
                ray.kill(actor)
                self._lose(actor)
                return _failed(FailureCode.DEADLINE_EXCEEDED)
            answer: Answer = ray.get(future)
        except RayTaskError as e:  # the process lives: what it was given it could not read, or could not send
            log.warning("client_failed_on_ray", error=type(e.cause).__name__)
            self._give_back(actor)
            return _failed(FailureCode.CLIENT_FAILED)
        except RayError as e:
            if not self.closed:
                log.warning("ray_process_lost", error=type(e).__name__)
            self._lose(actor)
            return _failed(FailureCode.CLIENT_LOST)
        self._give_back(actor)
        return answer

    def close(self) -> None:
        """End all processes."""
        import ray

        with self._changed:
            self.closed = True
            for actor in [*self._idle, *self._busy, *self._starting.values()]:
                ray.kill(actor)
            self._idle.clear()
            self._starting.clear()
            self._changed.notify_all()

    def _take(self) -> Any:
        """A process that is free, waiting for one."""
        with self._changed:
            while True:
                if self.closed:
                    raise _ended()
                self._promote()
                if self._idle:
                    self._busy.append(self._idle.pop())
                    return self._busy[-1]
                if not self._busy:
                    self._check_alive()
                self._changed.wait(_LOOK_SECONDS)

    def _check_alive(self) -> None:
        """Raise RunError where nothing that could answer is left or will come."""
        import ray

        if not self._starting:
            self._grow()
        late = monotonic() - self._since > START_SECONDS
        if late:
            for actor in self._starting.values():
                ray.kill(actor)
            self._starting.clear()
        if self._starting:
            return
        if self._refusals:
            raise RunError(
                f"no process of the Ray cluster can train a client: {self._refusals[0]}",
                hint="every node needs the same Coterie, the run's data and, if the run is private, its folder",
            )
        raise RunError(
            "the Ray cluster has no process left that could train a client",
            hint="see `ray status`; `coterie simulate --resume` goes on when it has nodes again",
        )

    def _promote(self) -> None:
        """Take in the processes that have started; drop those that could not."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        if not self._starting:
            return
        ready, _ = ray.wait(list(self._starting), num_returns=len(self._starting), timeout=0)
        for future in ready:
            actor = self._starting.pop(future)
            try:
                ray.get(future)
            except RayTaskError as e:  # it would fail again: nothing takes its place
                self._refusals.append(e.cause)
                ray.kill(actor)
                log.warning("ray_process_refused", error=type(e.cause).__name__)
            except RayError as e:
                log.warning("ray_process_lost", error=type(e).__name__)
            else:
                self._idle.append(actor)
                self._changed.notify()

    def _give_back(self, actor: Any) -> None:
        with self._changed:
            self._busy.remove(actor)
            self._idle.append(actor)
            self._changed.notify()

    def _lose(self, actor: Any) -> None:
        with self._changed:
            self._busy.remove(actor)
            if not self.closed:
                self._grow()
            self._changed.notify_all()

    def _grow(self) -> None:
        """Start as many processes as there is room for now."""
        missing = room(self._needs) - self.size - len(self._refusals)
        if self._most is not None:
            missing = min(missing, self._most - self.size)
        for _ in range(missing):
            actor = self._make(*self._arguments)
            self._starting[actor.start.remote()] = actor
            self._since = monotonic()


def room(needs: Mapping[str, float]) -> int:
    """How many processes fit on the nodes that live, each taking `num_cpus` and `num_gpus`."""
    import ray

    total = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        resources = node["Resources"]
        fit = int(resources.get("CPU", 0) / needs["num_cpus"])
        if needs["num_gpus"]:
            fit = min(fit, int(resources.get("GPU", 0) / needs["num_gpus"]))
        total += fit
    return total


class _Shared:
    """What every message of a round carries: encoded once, and sent once to each machine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._arrays: list[Array] = []
        self._put: tuple[str, Any] = ("", None)

    def put(self, records: Mapping[str, ArrayRecord]) -> tuple[str, Any]:
        """A name and a reference for these records; the same for the same arrays."""
        import ray

        arrays = [array for record in records.values() for array in record.values()]
        with self._lock:
            same = len(arrays) == len(self._arrays) and all(map(operator.is_, arrays, self._arrays))
            if not same or self._put[1] is None:
                data = np.frombuffer(b"".join(encode_records(RecordDict(dict(records)))), np.uint8)
                self._put = (str(next(self._numbers)), ray.put(data))
                self._arrays = arrays
            return self._put


def _ended() -> RunError:
    return RunError("the run was ended", hint="`coterie simulate --resume` goes on with it")


def _failed(failure: FailureCode) -> Answer:
    return Answer(error=(int(failure), failure.sentence), content=b"", state=b"")
