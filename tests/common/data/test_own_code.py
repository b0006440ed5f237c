"""A site's own function that builds its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.settings import DataSettings
from common.data import load_examples, load_federation
from common.errors import DataError
from common.schema import Federation
from tests.common.data.test_own_data import Register, error, write

FUNCTION = """
import torch
from dataclasses import dataclass
from common.schema import ClientData, DataSchema, Examples, Federation

@dataclass
class Needs:  # looks its own module up in sys.modules
    seed: int

def build(settings, seed):
    part = Examples(inputs=torch.full((4, 2), float(Needs(seed).seed)), targets=torch.tensor([0, 1, 0, 1]))
    clients = tuple(ClientData(name=name, train=part, test=part) for name in ("one", "two"))
    return Federation(schema=DataSchema(kind="tabular", input_shape=(2,), num_classes=2), clients=clients, test=part)
"""


MANY = """
import torch
from common.data.population import Population
from common.names import NumberedNames
from common.schema import ClientData, DataSchema, Examples, Federation

SCHEMA = DataSchema(kind="tabular", input_shape=(2,), num_classes=2)
MADE = []

def part(index, count=4, entities=None):
    inputs = torch.full((count, 2), float(index))
    return Examples(inputs=inputs, targets=torch.arange(count) % 2, entities=entities)

def client(index):
    MADE.append(index)
    count = 0 if index == 7 else 4
    entities = torch.arange(4) if index == 8 else None
    wrong = part(index).inputs[:, :1] if index == 9 else part(index, count).inputs
    train = Examples(inputs=wrong, targets=part(index, count).targets, entities=entities)
    return ClientData(name=f"client-{index:07d}", train=train, test=part(index))

def build(settings, seed):
    return Federation(schema=SCHEMA, clients=Population(NumberedNames(5_000_000), client), test=part(1))

def with_entities(settings, seed):
    return Federation(schema=SCHEMA, clients=Population(["client-0000008"], lambda i: client(8)), test=part(1))

def renamed(settings, seed):
    return Federation(schema=SCHEMA, clients=Population(["a", "b"], lambda i: client(1)), test=part(1))

def twice(settings, seed):
    return Federation(schema=SCHEMA, clients=Population(["a", "a"], client), test=part(1))
"""


class TestPopulation:
    """A function that returns clients which are made as they are asked for."""

    @pytest.fixture
    def found(self, tmp_path: Path, register: Register) -> Federation:
        write(tmp_path, "many.py", MANY)
        return load_federation(
            DataSettings(name="own", partition="natural", clients=0), seed=7, site=register("python:many.py:build")
        )

    def test_it_stays_so(self, found: Federation) -> None:
        """Nobody but those asked for is made: the first one, to see that it fits, and who is looked at."""
        assert (len(found.clients), found.names[4_999_999]) == (5_000_000, "client-4999999")
        assert found.clients[4_999_999].train.inputs[0, 0] == 4_999_999
        assert not isinstance(found.clients, tuple)

    def test_settings_apply_to_it(self, tmp_path: Path, register: Register) -> None:
        """How many, who, and how many examples of each."""
        write(tmp_path, "many.py", MANY)
        site = register("python:many.py:build")

        def load(**settings: object) -> Federation:
            return load_federation(
                DataSettings.model_validate({"name": "own", "partition": "natural", **settings}), seed=7, site=site
            )

        fewer = load(clients=3, max_examples=2)
        assert [(client.name, len(client.train)) for client in fewer.clients] == [
            (f"client-000000{i}", 2) for i in range(3)
        ]
        assert len(load(clients=3, pooled=True).clients[0].train) == 12

    @pytest.mark.parametrize(
        ("index", "message"), [(7, "client-0000007 has no training examples"), (8, "has entities"), (9, "inputs are")]
    )
    def test_a_client_that_does_not_fit_is_refused_when_it_is_made(
        self, found: Federation, index: int, message: str
    ) -> None:
        """The others are not troubled."""
        assert len(found.clients[index + 100].train) == 4
        with pytest.raises(DataError, match=message):
            found.clients[index]

    @pytest.mark.parametrize(
        ("function", "message"), [("with_entities", "has entities"), ("twice", "same name"), ("renamed", "is called")]
    )
    def test_what_can_be_seen_at_once_is_refused_at_once(
        self, tmp_path: Path, register: Register, function: str, message: str
    ) -> None:
        """Whether an entity is at two clients could be told only by making them all."""
        write(tmp_path, "many.py", MANY)
        with pytest.raises(DataError, match=message):
            load_federation(DataSettings(name="own"), seed=7, site=register(f"python:many.py:{function}"))


class TestCode:
    """A site's own function."""

    def test_function_gets_settings_and_seed(self, tmp_path: Path, register: Register) -> None:
        """What it returns is the federation; `sites` and `pooled` apply to it."""
        write(tmp_path, "mine.py", FUNCTION)
        site = register("python:mine.py:build")
        found = load_federation(DataSettings(name="own"), seed=7, site=site)
        assert [client.name for client in found.clients] == ["one", "two"]
        assert found.test.inputs.unique().tolist() == [7]
        settings = DataSettings(name="own", partition="natural", sites=["two"], pooled=True)
        assert len(load_federation(settings, seed=7, site=site).clients[0].train) == 4
        assert len(load_examples("own", settings=DataSettings(name="own"), site=site).row_ids) == 12

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("python:mine.py", "names no function"),
            ("python:nowhere.py:build", "does not exist"),
            ("python:mine.py:other", "has no function `other`"),
            ("python:bad.py:fails", "failed with ValueError"),
            ("python:bad.py:wrong", "returned a int"),
            ("python:bad.py:empty", "there are no clients"),
            ("python:bad.py:shape", "inputs are torch.float32[4, 2]"),
            ("python:bad.py:labels", "targets lie outside 0..0"),
            ("python:broken.py:build", "failed with SyntaxError"),
        ],
    )
    def test_refusals(self, tmp_path: Path, register: Register, source: str, message: str) -> None:
        """What fails is named; the text of the function's own exception is withheld."""
        write(tmp_path, "mine.py", FUNCTION)
        write(tmp_path, "broken.py", "def build(:")
        write(
            tmp_path,
            "bad.py",
            FUNCTION
            + "from dataclasses import replace\n"
            + "def fails(settings, seed): raise ValueError('SECRET')\n"
            + "def wrong(settings, seed): return 3\n"
            + "def empty(settings, seed): return replace(build(settings, seed), clients=())\n"
            + "def other(settings, seed, **new):\n"
            + "    found = build(settings, seed)\n"
            + "    return replace(found, schema=replace(found.schema, **new))\n"
            + "def shape(settings, seed): return other(settings, seed, input_shape=(3,))\n"
            + "def labels(settings, seed): return other(settings, seed, num_classes=1)\n",
        )
        assert message in str(error(register(source)))
