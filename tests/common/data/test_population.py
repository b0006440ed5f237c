"""Clients that exist only while somebody looks at them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.data.population import DividedPopulation, Population, Rows, StoredPopulation, train_size
from common.names import NumberedNames
from common.schema import ClientData, DataSchema, Examples, Federation
from tests.common.data.test_federation import Federate

SCHEMA = DataSchema(kind="tabular", input_shape=(1,), num_classes=2)


def numbered(count: int) -> Examples:
    """Examples whose input is their own index."""
    values = torch.arange(count)
    return Examples(inputs=values[:, None].float(), targets=values % 2, entities=values)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, list[np.ndarray]]:
    """A number of examples, and pieces of their indices: any, also empty ones."""
    count = draw(st.integers(0, 30))
    owners = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count))
    return count, [np.flatnonzero(np.array(owners, np.int64) == i) for i in range(6)]


class TestRows:
    """Examples in consecutive pieces."""

    @given(divisions())
    def test_a_piece_holds_the_examples_that_it_was_given(self, division: tuple[int, list[np.ndarray]]) -> None:
        """Lazy equals eager, and all pieces together hold every example once."""
        count, pieces = division
        rows, everything = Rows.taken(numbered(count), pieces), numbered(count)
        assert len(rows) == len(pieces)
        found = [rows.piece(i).inputs.flatten().tolist() for i in range(len(rows))]
        assert found == [everything.take(torch.from_numpy(piece)).inputs.flatten().tolist() for piece in pieces]
        assert [rows.size(i) for i in range(len(rows))] == [len(piece) for piece in pieces]
        assert sorted(value for part in found for value in part) == list(range(count))

    def test_a_piece_is_not_copied(self) -> None:
        """It costs the same however large it is."""
        rows = Rows.taken(numbered(9), [np.arange(4), np.arange(4, 9)])
        assert rows.piece(1).inputs.data_ptr() == rows.examples.inputs[4:].data_ptr()

    @given(divisions(), st.integers(0, 2**32))
    def test_what_is_drawn_comes_from_its_piece(self, division: tuple[int, list[np.ndarray]], seed: int) -> None:
        """With replacement, as many as were asked for, none of another piece."""
        count, pieces = division
        rows = Rows.taken(numbered(count), pieces)
        full = np.array([i for i, piece in enumerate(pieces) if len(piece)], np.int64)
        drawn = rows.drawn(full, np.full(len(full), 7), np.random.default_rng(seed))
        assert len(drawn) == 7 * len(full)
        for i in full.tolist():
            own = set(pieces[i].tolist())
            assert sum(value in own for value in drawn.inputs.flatten().tolist()) == 7


class TestPopulation:
    """A sequence of clients that are made from their index."""

    def test_only_clients_that_are_asked_for_are_made(self) -> None:
        """Neither names nor length nor membership of others costs anything."""
        made: list[int] = []

        def client(index: int) -> ClientData:
            made.append(index)
            return ClientData(name=f"client-{index:06d}", train=numbered(index % 5 + 1), test=numbered(0))

        population = Population(NumberedNames(1_000_000), client)
        federation = Federation(schema=SCHEMA, clients=population, test=numbered(1))
        assert (len(population), len(federation.names), federation.names[999_999]) == (10**6, 10**6, "client-999999")
        assert made == []
        assert population[-1].name == "client-999999"
        assert [one.name for one in population[2:4]] == ["client-000002", "client-000003"]
        assert train_size(federation, 7) == 3
        assert made == [999_999, 2, 3, 7]

    def test_beyond_its_end_there_is_nobody(self) -> None:
        """As of any sequence; so it can be gone through."""
        population = Population(["a"], lambda i: ClientData(name="a", train=numbered(1), test=numbered(0)))
        assert len(list(population)) == 1
        for place in (1, -2):
            with pytest.raises(IndexError):
                population[place]

    def test_names_of_a_tuple_are_those_of_its_clients(self) -> None:
        """Whoever lists clients need not list names."""
        clients = tuple(ClientData(name=name, train=numbered(2), test=numbered(0)) for name in ("b", "a"))
        federation = Federation(schema=SCHEMA, clients=clients, test=numbered(0))
        assert federation.names == ("b", "a")
        assert train_size(federation, 1) == 2


class TestStored:
    """Built-in data and files: all examples once, in arrays that processes can share."""

    @pytest.mark.parametrize("partition", ["natural", "iid", "dirichlet", "shards", "size", "bootstrap"])
    def test_a_population_over_other_memory_is_the_same(self, federate: Federate, partition: str) -> None:
        """Four arrays are all that another process needs."""
        found = federate(name="heart", partition=partition, clients=4).clients
        assert isinstance(found, StoredPopulation)

        def moved(rows: Rows) -> Rows:
            examples = Examples(inputs=rows.examples.inputs.clone(), targets=rows.examples.targets.clone())
            return Rows(examples=examples, offsets=rows.offsets.copy())

        again = found.over(moved(found.train), moved(found.test))
        assert list(again.names) == list(found.names)
        for one, other in zip(again, found, strict=True):
            assert one.name == other.name
            assert torch.equal(one.train.inputs, other.train.inputs)
            assert torch.equal(one.test.targets, other.test.targets)
            assert found.train_size(list(found.names).index(one.name)) == len(one.train)

    @pytest.mark.parametrize("partition", ["natural", "iid", "dirichlet", "shards", "size"])
    def test_a_divided_one_holds_every_example_once(self, federate: Federate, partition: str) -> None:
        """Training and held-out examples, nothing twice."""
        found = federate(name="heart", partition=partition, clients=4)
        assert isinstance(found.clients, DividedPopulation)
        stored = len(found.clients.train.examples) + len(found.clients.test.examples)
        assert stored == sum(len(c.train) + len(c.test) for c in found.clients) == 918
