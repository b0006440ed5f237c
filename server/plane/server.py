"""The coordinator's port: a gRPC server in a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Final, Self

import structlog
from grpc import aio

from common.errors import CoterieError, RunError
from common.kit import CHAIN, Kit, Tls
from common.transport.channel import SERVER_OPTIONS, server_credentials
from common.transport.wire import Refusal
from server.plane.admission import Admission
from server.plane.attaching import Attaching
from server.plane.bulk import Bulk
from server.plane.desk import OperatorDesk
from server.plane.enrolling import Enrolling
from server.plane.faults import log_fault
from server.plane.files import Files, signature
from server.plane.guard import Guard
from server.plane.hub import Hub
from server.plane.limits import Limits
from server.plane.questions import Questions
from server.plane.service import operator_handlers, plane_handlers
from server.provisioning import renew_own

log = structlog.get_logger()

_RENEWAL_SECONDS: Final = 3600.0


class PlaneServer:
    """Listens from `start` to `stop`; a context manager does both.

    Guarantee: every call is authenticated and admitted, none gets a thread of its own while it idles, and whoever is
    denied loses open streams within `Limits.watch_seconds`. The coordinator's own certificate renews itself.
    """

    def __init__(
        self,
        kit: Kit,
        *,
        host: str = "0.0.0.0",  # noqa: S104 - sites come from elsewhere; TLS decides who enters
        port: int,
        hub: Hub,
        desk: OperatorDesk | None = None,
        limits: Limits | None = None,
    ) -> None:
        """Prepare; nothing listens yet.

        Args:
            kit: The coordinator's.
            host: Address to listen at.
            port: 0 takes a free one.
            hub: Where orders and results go; the caller closes it.
            desk: Answers operators; without it, their methods do not exist.
            limits: Bounds on peers.
        """
        self.port = port
        self._kit, self._host, self._hub, self._desk = kit, host, hub, desk
        self._limits = limits or Limits()
        self._thread: threading.Thread | None = None
        self._ending: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._grace = 0.0

    def __enter__(self) -> Self:
        """Start."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop."""
        self.stop()

    def start(self) -> None:
        """Listen; returns when calls are answered.

        Raises:
            RunError: The port is taken.
            KitError: The kit's certificate or pins cannot be read.
        """
        started: Future[int] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve(started)), name="plane", daemon=True)
        self._thread.start()
        try:
            self.port = started.result()
        except BaseException:
            self._thread.join()
            self._thread = None
            raise

    def stop(self, grace: float = 5.0) -> None:
        """Close every stream with `stopping`, and return when the port is free. Does nothing if it is not running.

        Args:
            grace: Seconds that calls get to end by themselves after they were told.
        """
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._grace = grace
        if self._loop is not None and self._ending is not None:
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._ending.set)
        thread.join()

    async def _serve(self, started: Future[int]) -> None:
        try:
            with ExitStack() as stack:
                self._loop, self._ending = asyncio.get_running_loop(), asyncio.Event()
                server, guard = self._make(stack)
                await server.start()
                watching = asyncio.create_task(self._watch(guard))
                started.set_result(self.port)
                await self._ending.wait()
                watching.cancel()
                guard.close_all(Refusal.STOPPING)
                await server.stop(self._grace)
        except Exception as e:  # noqa: BLE001 - handed to the thread that starts
            if started.done():
                log_fault("plane_ended", e)
            else:
                started.set_exception(e)

    def _make(self, stack: ExitStack) -> tuple[aio.Server, Guard]:
        limits = self._limits

        def threads(count: int, name: str) -> Files:
            pool = ThreadPoolExecutor(count, thread_name_prefix=f"plane-{name}")
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            return Files(pool)

        files = threads(limits.threads, "files")
        guard = Guard(admission=Admission(self._kit), hub=self._hub, calls_each=limits.calls_each)
        handlers = [
            plane_handlers(
                guard,
                Attaching(self._hub, limits),
                Bulk(self._hub, limits, files),
                Enrolling(self._kit, self._hub, files),
            )
        ]
        if self._desk is not None:
            asking, following = threads(limits.desk_threads, "desk"), threads(limits.followers, "follow")
            questions = Questions(
                self._desk, files=files, asking=asking, following=following, followers=limits.followers
            )
            handlers.append(operator_handlers(guard, questions))
        server = aio.server(options=SERVER_OPTIONS)
        server.add_generic_rpc_handlers(tuple(handlers))
        credentials = server_credentials(_Certificate(self._kit).read)
        host = f"[{self._host}]" if ":" in self._host else self._host
        try:
            self.port = server.add_secure_port(f"{host}:{self.port}", credentials)
        except RuntimeError as e:
            raise RunError(
                f"{host}:{self.port} cannot be listened at", hint="is another server running? choose another port"
            ) from e
        return server, guard

    async def _watch(self, guard: Guard) -> None:
        """Look at the deny list, and now and then at our own certificate."""
        loop = asyncio.get_running_loop()
        renewal = loop.time()
        while True:
            try:
                guard.review()
                if loop.time() >= renewal:
                    renewal = loop.time() + _RENEWAL_SECONDS
                    if await asyncio.to_thread(renew_own, self._kit):
                        self._hub.note("renewed", self._kit.name, detail=f"{self._kit.certificate().serial:x}")
            except CoterieError as e:
                log.error("plane_watch_failed", reason=str(e), hint=e.hint)  # noqa: TRY400 - for a person to mend
            except Exception as e:  # noqa: BLE001 - the deny list must be looked at as long as the port is open
                log_fault("plane_watch_failed", e)
            await asyncio.sleep(self._limits.watch_seconds)


class _Certificate:
    """The kit's TLS files, parsed only after they changed: every new connection asks."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._seen = signature(kit.folder / CHAIN)
        self._tls = kit.tls()

    def read(self) -> Tls:
        now = signature(self._kit.folder / CHAIN)
        if now != self._seen:
            self._tls, self._seen = self._kit.tls(), now
        return self._tls
