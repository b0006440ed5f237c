"""How many rows a site has shows in nothing that it answers, whatever settings a coordinator sweeps: not in a refusal
either, which nobody pays for.
"""

import pytest
from flwr.app import RecordDict

from client.app import make_client_app
from client.resources import load_own, site_resources
from common.data import load_federation
from common.errors import DataError
from common.flower import client_context, failure_of
from common.kit import load_kit
from common.site import load_site
from common.transport.records import encode_records
from tests.client.conftest import PRIVATE, run, train_message
from tests.client.test_leaks import beside_the_weights
from tests.helpers.agents import POLICY, copied, make_kits

PIXELS = [f"p{i}" for i in range(64)]
OWN = f"""
[data.digits]
source = "csv:own.csv"
label = "digit"
features = {PIXELS}
classes = {[str(i) for i in range(10)]}
entity = "patient"

[data.notes]
source = "text:notes.txt"
"""
COUNTS = (1, 2, 9, 10, 11)
SPLITS = [
    ("data.folds=2",), ("data.folds=2", "data.fold=1"), ("data.folds=10",), ("data.folds=10", "data.fold=9"),
    ("data.folds=11", "data.fold=10"), ("data.folds=1000", "data.fold=999"),
    ("data.test_fraction=1e-9",), ("data.test_fraction=0.1",), ("data.test_fraction=0.5",),
    ("data.test_fraction=0.999999999",),
    ("data.max_examples=10", "privacy.expected_batch_size=10"),
    ("data.max_examples=1", "privacy.expected_batch_size=1", "data.folds=10"),
    ('data.sites=["cleveland","hungary"]', "data.partition=natural", "data.max_examples=100"),
]  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_kits(tmp_path_factory.mktemp("made") / "kits")


@pytest.fixture
def site(made, tmp_path):
    """Make the resources of a real site that holds so many rows, and as many characters of text."""

    def make(count: int, *, entities: bool = False, name: str = ""):
        folder = copied(made, tmp_path / f"{name}{count}") / "cleveland"
        (folder / "site.toml").write_text(OWN if entities else OWN.replace('entity = "patient"', ""))
        (folder / "policy.toml").write_text(POLICY.replace('"heart"', '"digits", "notes"'))
        rows = (",".join([*("0.5" for _ in PIXELS), str(i % 10), f"patient {i}"]) for i in range(count))
        (folder / "own.csv").write_text("\n".join([",".join([*PIXELS, "digit", "patient"]), *rows, ""]))
        (folder / "notes.txt").write_text("a" * count)
        return site_resources(load_kit(folder, role="site"))

    return make


def told(resources, message) -> str:
    """What a coordinator sees of the answer to a question or a request, and what it cost."""
    reply = make_client_app(resources)(message, client_context(node_id=2, partition=0))
    assert failure_of(reply) is None
    answer = beside_the_weights(reply) if message.metadata.message_type == "train" else _bytes(reply.content)
    return str((answer, [ledger_events(resources, name) for name in resources.ledgers.names()]))


def ledger_events(resources, name):
    return resources.ledgers.named(name).events()


def _bytes(content: RecordDict) -> bytes:
    return b"".join(map(bytes, encode_records(content)))


@pytest.mark.parametrize("entities", [False, True], ids=["rows", "entities"])
@pytest.mark.parametrize("kind", ["query", "train"])
def test_no_division_of_the_data_tells_how_many_rows_there_are(site, kind, entities):
    """Folds, fractions and caps above, at and below the number of rows: a few rows answer as neighbours of them do."""
    sites = [site(count, entities=entities) for count in COUNTS]
    for i, split in enumerate(SPLITS):
        config = run(*PRIVATE, *split, f"name=run-{i}", "rounds=1", "privacy.target_epsilon=0.4")
        message = train_message(config, kind=kind)
        assert len({told(resources, message) for resources in sites}) == 1, split


@pytest.mark.parametrize("length", [1, 2, 5, 9, 10, 1000])
def test_no_length_of_examples_tells_how_long_a_text_is(site, length):
    """A text that is too short for one example is data without examples."""
    config = run(*PRIVATE, "data.name=notes", f"data.sequence_length={length}")
    message = train_message(config, kind="query")
    assert len({told(site(count, name=f"{length}-"), message) for count in (0, *COUNTS)}) == 1


def test_a_site_s_own_function_may_leave_it_without_examples(tmp_path):
    """Its held-out part can be all there is, at the fraction that a run asks for."""
    (tmp_path / "mine.py").write_text(
        "import torch\n"
        "from common.schema import ClientData, DataSchema, Examples, Federation\n"
        "def load(settings, seed):\n"
        "    part = lambda n: Examples(inputs=torch.zeros(n, 2), targets=torch.zeros(n, dtype=torch.int64))\n"
        "    schema = DataSchema(kind='tabular', input_shape=(2,), num_classes=2)\n"
        "    own = ClientData(name='cleveland', train=part(0), test=part(3))\n"
        "    return Federation(schema=schema, clients=(own,), test=part(3))\n"
    )
    (tmp_path / "site.toml").write_text('[data.own]\nsource = "python:mine.py:load"\n')
    registry, settings = load_site(tmp_path / "site.toml"), run("data.name=own").data
    _, own = load_own(settings, seed=0, site=registry, name="cleveland")
    assert (len(own.train), len(own.test)) == (0, 3)
    with pytest.raises(DataError, match="no training examples"):
        load_federation(settings, seed=0, site=registry)
