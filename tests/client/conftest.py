"""One client with real examples: the scanned digits of scikit-learn, 64 pixels each."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from sklearn.datasets import load_digits

from client.app import make_client_app
from client.policy import PERMISSIVE, Policy
from client.secagg import FileJournal, Members, MemoryMembers, Seat
from client.spool import Spool
from common.aggregation import rules_for
from common.config import RunConfig, load_config
from common.crypto import PartyKeys, PartyRecord
from common.flower import ARRAYS, CONFIG, client_context, prepare_process, stamp, to_record
from common.models import initial_model
from common.models.weights import ModelWeights
from common.privacy import Budget, FileLedger, NoiseSource, PrivacyPlan, SecureNoise, make_plan
from common.schema import ClientData, DataSchema, Examples
from common.site import Site, load_site

BUDGET = Budget.opened(9.0, 1e-5)
SCHEMA = DataSchema(kind="tabular", input_shape=(64,), num_classes=10)
PRIVATE = (
    "privacy.unit=example", "privacy.target_epsilon=8", "training.local_steps=2", "privacy.sampling_rate=1.0",
    "privacy.expected_batch_size=100",
)  # fmt: skip


@pytest.fixture(scope="session")
def digits():
    """1797 examples: float32[1797, 64] in 0..1, ten classes."""
    inputs, targets = load_digits(return_X_y=True)
    return Examples(inputs=torch.tensor(inputs / 16, dtype=torch.float32), targets=torch.tensor(targets))


def run(*overrides: str) -> RunConfig:
    """A run of five rounds on digits."""
    base = ("rounds=5", "model.name=linear", "data.name=digits", "training.batch_size=50", "training.device=cpu")
    return load_config(None, [*base, *overrides]).config


def initial(config: RunConfig, site: Site | None = None):
    """The starting model of a run."""
    return initial_model(config.model, SCHEMA, seed=config.seeds.model, site=site or Site())


def train_message(config: RunConfig, *, server_round=1, arrays=None, kind="train", **fields) -> Message:
    """What a coordinator sends; `fields` change or (None) remove what stands beside the weights."""
    prepare_process()
    record = {"run": config.canonical_json(), "server-round": server_round}
    if config.private:
        plan = plan_of(config)
        record |= {"noise-multiplier": plan.noise_multiplier, "renyi-order": plan.budget.order}
        record |= {"participations": plan.participations, "min-separation": plan.min_separation}
        record["clients"] = plan.clients
    if config.privacy.unit == "client":
        record["clipping-norm"] = plan.clipping_norm
    record |= {name.replace("_", "-"): value for name, value in fields.items()}
    weights = ModelWeights(initial(config)).copy() if arrays is None else arrays
    content = RecordDict(
        {
            ARRAYS: to_record(weights),
            CONFIG: ConfigRecord({name: value for name, value in record.items() if value is not None}),
        }
    )
    return stamp(Message(content, 2, kind), message_id="m1")


def plan_of(config: RunConfig, **changes) -> PrivacyPlan:
    """The plan of a run on digits whose clients take part in every round."""
    size = sum(p.numel() for p in initial(config).parameters()) if config.model.name != "own" else 650
    clients = 5 if config.distributed else 1
    return make_plan(config, **{"participations": config.rounds, "dimensions": size, "clients": clients} | changes)


@dataclass
class Client:
    """A client's own machine, and its app as a coordinator reaches it."""

    examples: Examples
    folder: Path
    site: Site
    name: str = "ward-7"
    policy: Policy = PERMISSIVE
    budget: Budget = BUDGET
    spools: bool = False
    counts_plain_runs: bool = False
    time_for: int | None = None
    source: NoiseSource = field(default_factory=SecureNoise)
    signer: PartyKeys | None = None
    peers: Mapping[str, PartyRecord] = field(default_factory=dict)
    members: Members = field(default_factory=MemoryMembers)

    def __post_init__(self):
        self.ledger_path = self.folder / "ledger.jsonl"
        self.app = make_client_app(self)

    def data(self, request, context):
        return SCHEMA, ClientData(name=self.name, train=self.examples, test=self.examples.take(torch.arange(0)))

    @property
    def site_ledger(self):
        """As an administrator opens it."""
        return FileLedger(
            self.ledger_path, counter=self.folder / "identity" / f"{self.ledger_path.stem}.counter", budget=self.budget
        )

    def ledger(self, request, context):
        return self.site_ledger if request.plan is not None or self.counts_plain_runs else None

    def spool(self, request, context):
        return Spool(self.folder / "spool", owner=self.name) if self.spools else None

    def noise(self, request, context):
        return self.source

    def most_steps(self, request, context):
        return self.time_for

    def rounding(self, request, context):
        return hashlib.sha256(f"{request.server_round}/{self.name}".encode()).digest()

    def member(self, request, context):
        return self.members.open(request.run_id, lambda: self.seat(request.config, request.run_id), context)

    def seat(self, config, run_id):
        """Its place in a run under secure aggregation; its journal is on the disk."""
        return Seat(
            name=self.name,
            signer=self.signer,
            peers=self.peers,
            rules=rules_for(config, run_id),
            journal=self.journal(run_id),
            most_aborts=20,
        )

    def journal(self, run_id):
        """As the client's next process finds it."""
        return FileJournal(self.folder / self.name / "secagg", run_id)

    def answer(self, message: Message) -> Message:
        """The reply to a message."""
        return self.app(message, client_context(node_id=2, partition=0))

    @property
    def events(self):
        """What the ledger says."""
        return self.site_ledger.events()


@pytest.fixture
def client(digits, tmp_path):
    """Make a client of some digits; with the text of a module, its `build` is registered as the model `own`."""

    def make(count: int = 200, *, module: str = "", **fields) -> Client:
        site = Site()
        if module:
            (tmp_path / "own.py").write_text(module)
            (tmp_path / "site.toml").write_text('[models.own]\nsource = "own.py:build"\n')
            site = load_site(tmp_path / "site.toml")
        return Client(digits.take(torch.arange(count)), tmp_path, site, **fields)

    return make
