"""A coordinator's service and real agents of hospitals in this process, over real ports with real certificates."""

from __future__ import annotations

import atexit
import re
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from client.agent import SEEN
from client.replays import Replays
from client.site_app import make_site_app
from common.config import RunConfig
from common.kit import Kit, load_kit
from server.plane.limits import Limits
from server.remote import Coordinator
from server.service.process import Service
from tests.helpers.agents import make_kits, resources_of, running_agent

SITES = ("cleveland", "hungary", "switzerland")
POLICY = """\
[budget]
epsilon = 20.0
delta = 1e-5
[allow]
data = ["heart", "patients"]
[limits]
units = ["none", "example", "client"]
smallest_cohort = 1
"""
QUICK = Limits(watch_seconds=0.2)


@cache
def _made() -> Path:
    """One set of kits for the process."""
    out = Path(mkdtemp(prefix="coterie-clinic-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    make_kits(out, SITES)
    for site in SITES:
        (out / site / "policy.toml").write_text(POLICY)
    return out


@dataclass
class Clinic:
    """Kits in a folder, a service that can be started again at the same port, and what talks to it.

    `kits` and `address` are what `tests.helpers.agents` asks of a plane.
    """

    folder: Path
    port: int = 0
    service: Service | None = None
    kits: Path = field(init=False)

    def __post_init__(self) -> None:
        self.kits = shutil.copytree(_made(), self.folder / "kits")

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def state(self) -> Path:
        return self.kits / "server" / "state"

    @contextmanager
    def serving(self) -> Iterator[Service]:
        """The service, until the block ends; every kit leads to its port."""
        kit = load_kit(self.kits / "server", role="coordinator")
        with Service(kit, host="127.0.0.1", port=self.port, heartbeat_seconds=5.0, limits=QUICK) as service:
            self.lead_to(service.listening.port)
            self.service = service
            yield service
        self.service = None

    def lead_to(self, port: int) -> None:
        """Write the port into every kit."""
        self.port = port
        for path in self.kits.glob("*/kit.toml"):
            path.write_text(re.sub(r"127\.0\.0\.1:\d+", self.address, path.read_text()))

    def kit(self, name: str) -> Kit:
        return replace(load_kit(self.kits / name, role=None), address=self.address)

    @contextmanager
    def operator(self, name: str = "alice") -> Iterator[Coordinator]:
        with Coordinator(self.kit(name)) as coordinator:
            yield coordinator

    @contextmanager
    def agents(self, *sites: str, gates: dict[str, Gate] | None = None) -> Iterator[None]:
        """Agents of these sites (of all, if none is named); a gate stands before a site's training."""
        with ExitStack() as stack:
            for site in sites or SITES:
                resources = resources_of(self, site)  # type: ignore[arg-type]
                app = _in_turn(make_site_app(resources, seen=Replays(resources.kit.state / SEEN)))
                gate = (gates or {}).get(site)
                stack.enter_context(running_agent(resources, app=app if gate is None else gate.before(app)))
            if gates:
                stack.callback(lambda: [gate.open() for gate in gates.values()])
            yield


_TURN = threading.Lock()


def _in_turn(app: Callable[..., Any]) -> Callable[..., Any]:
    """Sites of one process share torch's generator, from which their order of examples comes: they train in turn."""

    def answer(message: Any, context: Any) -> Any:
        with _TURN:
            return app(message, context)

    return answer


class Gate:
    """Holds a site's answers back until a test lets them go."""

    def __init__(self) -> None:
        self.arrived, self._open = threading.Event(), threading.Event()

    def open(self) -> None:
        self._open.set()

    def before(self, app: Callable[..., Any]) -> Callable[..., Any]:
        def answer(message: Any, context: Any) -> Any:
            self.arrived.set()
            assert self._open.wait(120)
            return app(message, context)

        return answer


def end_of(coordinator: Coordinator, run: str) -> dict[str, Any]:
    """Where a run stands once it has ended."""
    *_, last = coordinator.follow("status", run)
    return last


def seen(coordinator: Coordinator, run: str, condition: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    """The first status that fulfils a condition."""
    stream = coordinator.follow("status", run)
    for status in stream:
        if condition(status):
            return status
    raise AssertionError("the run ended first")


def simulated(config: RunConfig, folder: Path, sites: Sequence[str] = SITES) -> bytes:
    """The model of a simulation of the same run over these sites."""
    from simulations.federation import simulated_model

    data = config.data.model_copy(update={"sites": list(sites)})
    return simulated_model(config.model_copy(update={"data": data}), folder)
