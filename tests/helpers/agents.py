"""Real agents of real sites on the heart data, and a coordinator that asks them over a real plane."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from client.agent import SEALING, SEEN, Agent, make_agent
from client.connection import Patience
from client.policy import Policy
from client.replays import Replays
from client.resources import SiteResources
from client.site_app import make_site_app
from common.config import RunConfig, load_config
from common.crypto import KINDS, NO_ID, Direction, Header, authorize, seal
from common.data import schema_of
from common.flower import ARRAYS, CONFIG, METRICS, arrays_of, prepare_process, to_record
from common.kit import load_kit
from common.models import initial_model
from common.models.weights import ModelWeights
from common.privacy import PrivacyPlan, make_plan
from common.site import Site
from common.transport.records import encode_records, manifest
from common.transport.sealed import cohort_digest, order_id
from server.grids.plane import PlaneGrid
from server.grids.sealed import SealedGrid
from server.provisioning import provision
from server.provisioning.settings import Federation
from tests.helpers.plane import BOUND, Plane

FEDERATION = "heart-study"
HOSPITALS = ("cleveland", "hungary")
RUN_ID = bytes(range(16))
QUICK = Patience(first_pause=0.01, longest_pause=0.05, elsewhere_seconds=60.0)
PRIVATE = (
    "privacy.unit=example", "privacy.target_epsilon=3", "training.local_steps=1", "privacy.sampling_rate=1.0",
    "privacy.expected_batch_size=240", "training.learning_rate=3",
)  # fmt: skip

POLICY = """\
[budget]
epsilon = 10.0
delta = 1e-5
[allow]
data = ["heart"]
[limits]
units = ["none", "example"]
"""


def make_kits(folder: Path, sites: Sequence[str] = HOSPITALS) -> Path:
    """Kits of a federation of hospitals; each site allows the built-in heart data, with and without privacy."""
    parties: dict[str, Any] = {"sites": {s: {} for s in sites}, "operators": {"alice": {}, "mallory": {}}}
    provision(Federation(name=FEDERATION, server="127.0.0.1:8471", **parties), folder)
    for site in sites:
        (folder / site / "policy.toml").write_text(POLICY)
    return folder


def configuration(*overrides: str) -> RunConfig:
    """A run of a linear model on the heart data, its hospitals being the clients."""
    base = (
        "rounds=3", "model.name=linear", "data.name=heart", "data.partition=natural", "data.clients=0",
        "training.batch_size=16", "training.device=cpu", "strategy.weighting=equal",
    )  # fmt: skip
    return load_config(None, [*base, *overrides]).config


def start_of(config: RunConfig, site: Site) -> dict[str, Any]:
    """The starting model of a run on the heart data, whatever data the run names."""
    schema = schema_of(configuration().data, site=Site())
    return ModelWeights(initial_model(config.model, schema, seed=config.seeds.model, site=site)).copy()


def plan_of(config: RunConfig, site: Site) -> PrivacyPlan:
    """The plan that a coordinator makes for two sites."""
    dimensions = sum(values.size for values in start_of(config, site).values())
    return make_plan(config, dimensions=dimensions, participations=config.rounds, min_separation=1, clients=2)


@dataclass
class Asker:
    """A coordinator that asks what a test makes up, over a plane that is there."""

    plane: Plane
    run_id: bytes = RUN_ID
    sites: Sequence[str] = ("cleveland",)
    operator: str = "alice"
    site: Site = field(default_factory=Site)

    def request(
        self, config: RunConfig, *, server_round: int = 1, arrays: Any = None, authorized: RunConfig | None = None,
        **changes: Any,
    ) -> RecordDict:  # fmt: skip
        """The content of a request as the service makes it; `changes` replace fields, or (None) remove them."""
        prepare_process()
        keys = load_kit(self.plane.kits / self.operator, role="operator").keys
        signed = authorize(
            keys, federation=FEDERATION, run_id=self.run_id.hex(), config_digest=(authorized or config).digest()
        )
        record: dict[str, Any] = {
            "run": config.canonical_json(),
            "server-round": server_round,
            "run-id": self.run_id.hex(),
            "authorization": signed,
            "cohort": json.dumps(sorted(HOSPITALS)),
        }
        if config.private:
            plan = plan_of(config, self.site)
            record |= {"noise-multiplier": plan.noise_multiplier, "renyi-order": plan.budget.order}
            record |= {"participations": plan.participations, "min-separation": plan.min_separation}
            record["clients"] = plan.clients
        record |= {name.replace("_", "-"): value for name, value in changes.items()}
        config_record = ConfigRecord({name: value for name, value in record.items() if value is not None})
        return RecordDict({ARRAYS: to_record(arrays or start_of(config, self.site)), CONFIG: config_record})

    def grid(self, content: RecordDict) -> SealedGrid:
        """What the service reaches sites by, for requests with this content's configuration."""
        digest = hashlib.sha256(str(content[CONFIG]["run"]).encode()).digest()
        kit = load_kit(self.plane.kits / "server", role="coordinator")
        return SealedGrid(
            PlaneGrid(self.plane.hub, run_id=self.run_id, sites=self.sites),
            keys=kit.keys,
            records=kit.sites,
            run_id=self.run_id,
            config_digest=digest,
            folder=self.plane.hub.blobs,
        )

    def ask(
        self, config: RunConfig, content: RecordDict | None = None, *, kind: str = "train", **fields: Any
    ) -> Message:
        """Ask the first site, and wait for its answer."""
        (reply,) = self.all(content or self.request(config, **fields), kind=kind)
        return reply

    def all(self, content: RecordDict, *, kind: str = "train") -> list[Message]:
        """Ask every site the same; answers in the order of their names."""
        grid = self.grid(content)
        messages = [Message(content, node, kind) for node in grid.get_node_ids()]
        return list(grid.stream(messages, timeout=BOUND))

    def sealed(self, content: RecordDict, *, plaintext: bytes | None = None) -> tuple[bytes, bytes]:
        """Envelope and ciphertext of a request for the first site, or of other plaintext in its place."""
        kit = load_kit(self.plane.kits / "server", role="coordinator")
        parts = encode_records(content) if plaintext is None else [plaintext]
        record = content[CONFIG]
        header = Header(
            direction=Direction.DOWN,
            kind=KINDS["train"],
            run_id=self.run_id,
            server_round=record["server-round"],
            attempt=0,
            sender=kit.keys.record.key_id,
            message_id=os.urandom(16),
            reply_to=NO_ID,
            plaintext_bytes=sum(memoryview(part).nbytes for part in parts),
            manifest=manifest(content),
            config_digest=hashlib.sha256(str(record["run"]).encode()).digest(),
            cohort_digest=cohort_digest(record),
            base_digest=bytes(32),
        )
        blob = io.BytesIO()
        done = seal(parts, header, sender=kit.keys, sink=blob, broadcast=True)
        return done.envelope_for(kit.sites[self.sites[0]]), blob.getvalue()

    def order(self, sealed: tuple[bytes, bytes]) -> None:
        """Order what was sealed; the result comes by `plane.result()`."""
        envelope, blob = sealed
        self.plane.order(self.sites[0], blob, envelope=envelope, message_id=order_id(envelope))

    def begin(self, config: RunConfig, **fields: Any) -> Asking:
        """Ask in the background."""
        asking = Asking(self, config, fields)
        asking.start()
        return asking


class Asking(threading.Thread):
    """A question under way."""

    def __init__(self, asker: Asker, config: RunConfig, fields: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._asker, self._config, self._fields = asker, config, fields
        self._reply: Message | None = None
        self._error: BaseException | None = None

    def run(self) -> None:
        """See `Thread`."""
        try:
            self._reply = self._asker.ask(self._config, **self._fields)
        except BaseException as e:  # noqa: BLE001 - raised again in `reply`
            self._error = e

    def reply(self) -> Message:
        """The answer, once it is there."""
        self.join(BOUND)
        assert not self.is_alive(), "no answer"
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply


def bytes_of(reply: Message) -> bytes:
    """What a reply holds, to compare by the byte."""
    content = RecordDict({ARRAYS: to_record(arrays_of(reply.content)), METRICS: reply.content[METRICS]})
    return b"".join(map(bytes, encode_records(content)))


def resources_of(plane: Plane, site: str = "cleveland", *, policy: Policy | None = None) -> SiteResources:
    """A site's resources; its kit leads to the plane's port."""
    from client.resources import site_resources

    kit = replace(load_kit(plane.kits / site, role="site"), address=plane.address)
    resources = site_resources(kit)
    return resources if policy is None else replace(resources, policy=policy)


@contextmanager
def running_agent(resources: SiteResources, *, patience: Patience = QUICK, app: Any = None) -> Iterator[Agent]:
    """An agent in threads of this process; it is drained without grace when the block ends."""
    agent = make_agent(resources, patience=patience) if app is None else Agent(resources.kit, app, patience=patience)
    faults: list[BaseException] = []

    def run() -> None:
        try:
            agent.run()
        except BaseException as e:  # noqa: BLE001 - raised again below
            faults.append(e)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield agent
    finally:
        agent.drain(0)
        thread.join(BOUND)
    assert not thread.is_alive()
    if faults:
        raise faults[0]


class Gate:
    """An app that waits, once it has been called, until a test lets it go on."""

    def __init__(self, app: ClientAppCallable) -> None:
        self.calls = 0
        self.entered, self.open = threading.Event(), threading.Event()
        self._app = app

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as the app does, later."""
        self.calls += 1
        self.entered.set()
        assert self.open.wait(BOUND)
        return self._app(message, context)


def gated(resources: SiteResources) -> Gate:
    """The site's own app behind a gate."""
    state = resources.kit.state
    return Gate(make_site_app(resources, seen=Replays(state / SEEN), folder=state / SEALING))


def copied(kits: Path, to: Path) -> Path:
    """Kits that a test may change."""
    return shutil.copytree(kits, to)
