"""One client with real examples: the scanned digits of scikit-learn, 64 pixels each."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, RecordDict
from sklearn.datasets import load_digits

from client.app import make_client_app
from common.config import RunConfig, load_config
from common.flower import ARRAYS, CONFIG, client_context, prepare_process, stamp, to_record
from common.models import initial_model
from common.models.weights import ModelWeights
from common.privacy import FileLedger, make_plan
from common.schema import ClientData, DataSchema, Examples
from common.site import Site, load_site

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
        plan = make_plan(config, participations=config.rounds)
        record |= {"noise-multiplier": plan.noise_multiplier, "participations": plan.participations}
    record |= {name.replace("_", "-"): value for name, value in fields.items()}
    weights = ModelWeights(initial(config)).copy() if arrays is None else arrays
    content = RecordDict(
        {
            ARRAYS: to_record(weights),
            CONFIG: ConfigRecord({name: value for name, value in record.items() if value is not None}),
        }
    )
    return stamp(Message(content, 2, kind), message_id="m1")


@dataclass
class Client:
    """A client's own machine, and its app as a coordinator reaches it."""

    examples: Examples
    folder: Path
    site: Site
    name: str = "ward-7"

    def __post_init__(self):
        self.ledger_path = self.folder / "ledger.jsonl"
        self.app = make_client_app(self)

    def data(self, request, context):
        return SCHEMA, ClientData(name=self.name, train=self.examples, test=self.examples.take(torch.tensor([0])))

    def ledger(self, request, context):
        return FileLedger(self.ledger_path)

    def answer(self, message: Message) -> Message:
        """The reply to a message."""
        return self.app(message, client_context(node_id=2, partition=0))

    @property
    def events(self):
        """What the ledger says."""
        return FileLedger(self.ledger_path).events()


@pytest.fixture
def client(digits, tmp_path):
    """Make a client of some digits; with the text of a module, its `build` is registered as the model `own`."""

    def make(count: int = 200, *, module: str = "") -> Client:
        site = Site()
        if module:
            (tmp_path / "own.py").write_text(module)
            (tmp_path / "site.toml").write_text('[models.own]\nsource = "own.py:build"\n')
            site = load_site(tmp_path / "site.toml")
        return Client(digits.take(torch.arange(count)), tmp_path, site)

    return make
