"""Entities: whom rows belong to, held out together and never divided between clients."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from common.config.settings import DataSettings
from common.data import load_federation
from common.data.collection import Collection, as_examples
from common.data.entities import NOBODY, check_entities, known_name, main_classes, members, number, units_of
from common.data.partition import divide
from common.errors import DataError
from common.schema import ClientData, DataSchema, Examples, Federation
from common.site import Site

CLASSES = 3
RULES = ["iid", "dirichlet", "shards", "size"]
SCHEMA = DataSchema(kind="tabular", input_shape=(1,), num_classes=CLASSES)


def collection(owners: list[int], labels: list[int], groups: list[int] | None = None) -> Collection:
    """Examples whose only input is their place."""
    n = len(owners)
    return Collection(
        schema=SCHEMA,
        examples=as_examples(np.arange(n, dtype=np.float32)[:, None], np.array(labels), np.array(owners, np.int64)),
        row_ids=[str(i) for i in range(n)],
        groups=("a", "b") if groups else (),
        group_of=np.array(groups) if groups else None,
        rows=n,
    )


def load(data: Collection, settings: DataSettings, seed: int = 0) -> Federation:
    """The data divided as settings say."""
    with mock.patch("common.data.federation.load_source", return_value=data):
        return load_federation(settings, seed=seed, site=Site())


def owners(examples: Examples) -> set[int]:
    assert examples.entities is not None
    return set(examples.entities.tolist())


def places(examples: Examples) -> list[int]:
    return examples.inputs[:, 0].long().tolist()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Collection, DataSettings, int]:
    """Any rule over entities of any sizes and classes, with enough of them for every client and fold."""
    clients, folds = draw(st.integers(1, 5)), draw(st.sampled_from([0, 2, 3]))
    entities = draw(st.integers(2 * clients + 2, 20))
    everyone = st.lists(st.integers(0, entities - 1), max_size=60).map(lambda more: [*range(entities), *more])
    whose = draw(everyone.flatmap(st.permutations))
    labels = draw(st.lists(st.integers(0, CLASSES - 1), min_size=len(whose), max_size=len(whose)))
    settings = DataSettings(
        partition=draw(st.sampled_from(RULES)),
        clients=clients,
        alpha=draw(st.sampled_from([1e-3, 0.5, 100.0])),
        shards_per_client=draw(st.integers(1, 4)),
        size_ratio=draw(st.sampled_from([1.0, 10.0, 1e6])),
        folds=folds,
        fold=draw(st.integers(0, max(folds - 1, 0))),
        test_fraction=draw(st.sampled_from([0.2, 0.5])),
        max_examples=draw(st.sampled_from([0, 3])),
    )
    return collection(whose, labels), settings, draw(st.integers(0, 2**32))


class TestNames:
    """From what a file says to numbers."""

    @pytest.mark.parametrize("name", [*sorted(NOBODY), "NA", " NaN ", "None", "-1", "-1.0", "-999", None])
    def test_names_that_say_nobody_are_not_known(self, name: str | None) -> None:
        """Whatever the letter case and the spaces; negative numbers are codes, too."""
        assert known_name(name) is None

    @pytest.mark.parametrize(
        ("name", "known"), [("p7", "p7"), (" p7 ", "p7"), ("7.0", "7"), ("007", "007"), ("7.5", "7.5"), ("-x", "-x")]
    )
    def test_other_names_are_kept(self, name: str, known: str) -> None:
        """Only spaces around them and a fraction of zeros are taken away."""
        assert known_name(name) == known

    @given(st.lists(st.text(st.characters(exclude_characters="\0")).filter(known_name)))
    def test_numbers_are_equal_where_names_are(self, names: list[str]) -> None:
        """Two examples have one entity exactly if their names are the same."""
        numbers = number(names).tolist()
        plain = [known_name(name) for name in names]
        pairs = set(zip(numbers, plain, strict=True))
        assert len(pairs) == len(set(numbers)) == len(set(plain))

    @given(st.text())
    def test_to_clean_a_name_twice_is_to_clean_it_once(self, name: str) -> None:
        """What is dropped and what is numbered agree."""
        assert (once := known_name(name)) is None or known_name(once) == once


class TestUnits:
    """Examples that belong together."""

    def test_units_count_from_zero_whatever_the_numbers(self) -> None:
        """The unit of each example, and where each unit begins."""
        units, first = units_of(np.array([70, 5, 70, 8]))
        assert (units.tolist(), first.tolist()) == ([2, 0, 2, 1], [1, 3, 0])

    def test_the_class_of_most_examples_is_an_entitys(self) -> None:
        """The lower one where two are equally frequent."""
        units, labels = np.array([0, 1, 0, 1, 0, 2, 1, 1]), np.array([2, 1, 2, 0, 0, 1, 0, 1])
        assert main_classes(units, labels).tolist() == [2, 0, 1]
        assert main_classes(units[:0], labels[:0]).tolist() == []

    def test_members_are_the_examples_of_a_parts_units(self) -> None:
        """Ascending; a part without units has none."""
        parts = [np.array([2]), np.array([], np.int64), np.array([0, 1])]
        found = members(parts, np.array([0, 2, 1, 2, 0]))
        assert [part.tolist() for part in found] == [[1, 3], [], [0, 2, 4]]


class TestDivision:
    """Clients, held-out parts, caps and pooling."""

    @given(cases())
    @hypothesis_settings(deadline=None)
    def test_no_entity_is_at_two_clients_or_both_trained_on_and_held_out(
        self, case: tuple[Collection, DataSettings, int]
    ) -> None:
        """Whatever the rule, folds and cap: what an entity's privacy costs is spent at one client."""
        found = load(*case)
        trained = [owners(client.train) for client in found.clients]
        tested = [owners(client.test) for client in found.clients if len(client.test)]
        assert sum(map(len, trained)) == len(set().union(*trained))
        assert not set().union(*trained) & owners(found.test)
        assert sum(map(len, tested)) == len(owners(found.test))
        assert min(len(client.train) for client in found.clients) >= 1

    @given(cases())
    @hypothesis_settings(deadline=None)
    def test_every_example_is_trained_on_once_or_held_out_once_and_keeps_its_entity(
        self, case: tuple[Collection, DataSettings, int]
    ) -> None:
        """Nothing is lost or doubled on the way, and no example changes hands."""
        data, settings, seed = case
        found = load(data, settings.model_copy(update={"max_examples": 0}), seed)
        parts = [*(client.train for client in found.clients), found.test]
        assert sorted(place for part in parts for place in places(part)) == list(range(len(data.examples)))
        for part in parts:
            assert part.entities.tolist() == data.examples.entities[places(part)].tolist()

    @given(cases())
    @hypothesis_settings(deadline=None)
    def test_pooled_entities_stay_distinct(self, case: tuple[Collection, DataSettings, int]) -> None:
        """One client holds what all held, and as many entities as all of them had."""
        data, settings, seed = case
        apart, pooled = (load(data, settings.model_copy(update={"pooled": on}), seed) for on in (False, True))
        train = pooled.clients[0].train
        assert len(owners(train)) == sum(len(owners(client.train)) for client in apart.clients)
        assert train.entities.tolist() == data.examples.entities[places(train)].tolist()

    @pytest.mark.parametrize("partition", RULES)
    @pytest.mark.parametrize("folds", [0, 4])
    def test_entities_of_one_example_are_divided_as_examples_are(self, partition: str, folds: int) -> None:
        """Where nobody has two rows, an entity column changes no client."""
        data = collection(list(range(60)), [i % CLASSES for i in range(60)])
        alone = replace(data, examples=replace(data.examples, entities=None))
        settings = DataSettings(partition=partition, clients=4, folds=folds)
        a, b = load(data, settings), load(alone, settings)
        assert [places(c.train) for c in a.clients] == [places(c.train) for c in b.clients]
        assert [places(c.test) for c in a.clients] == [places(c.test) for c in b.clients]

    def test_iid_clients_have_equally_many_entities(self) -> None:
        """Evenly means entities, however many rows each has."""
        data = collection([*range(15), *[0] * 40], [0] * 55)
        found = load(data, DataSettings(partition="iid", clients=4, test_fraction=0.2))
        assert [len(owners(client.train)) for client in found.clients] == [3, 3, 3, 3]

    def test_an_entity_counts_in_the_class_of_most_of_its_rows(self) -> None:
        """Shards sort entities by it, so a client with one shard sees one such class."""
        classes = [0, 0, 1] * 6 + [1, 1, 0] * 6
        data = collection([i // 3 for i in range(36)], classes)
        found = load(data, DataSettings(partition="shards", clients=2, shards_per_client=1, test_fraction=0.5))
        for client in found.clients:
            owner = client.train.entities // 6
            assert len(owner.unique()) == 1

    def test_folds_hold_out_every_entity_once(self) -> None:
        """The held-out parts together are the data, an entity in one of them."""
        data = collection([i // 4 for i in range(40)], [i % 2 for i in range(40)])
        folds = [load(data, DataSettings(partition="iid", clients=2, folds=5, fold=k)) for k in range(5)]
        assert sorted(owner for fold in folds for owner in owners(fold.test)) == list(range(10))

    def test_documents_are_not_looked_at_where_there_are_entities(self) -> None:
        """An entity is the larger unit: what a document joins, it does not divide."""
        data = replace(collection([0, 0, 1, 1, 2, 2], [0] * 6), documents=np.arange(6))
        assert len(load(data, DataSettings(partition="iid", clients=1, test_fraction=0.34)).test) == 2

    def test_natural_clients_keep_their_entities(self) -> None:
        """Each group's entities are divided between its own two parts."""
        data = collection([i // 3 for i in range(30)], [0] * 30, [i // 15 for i in range(30)])
        found = load(data, DataSettings(partition="natural", clients=0, test_fraction=0.2))
        assert [len(owners(client.train)) for client in found.clients] == [4, 4]
        assert [len(owners(client.test)) for client in found.clients] == [1, 1]

    @pytest.mark.parametrize("seed", range(4))
    def test_natural_refuses_an_entity_in_two_groups(self, seed: int) -> None:
        """Its epsilon would add up over the two; also where a fold happens to hold it out."""
        data = collection([0, 0, 1, 1, 2, 2], [0] * 6, [0, 1, 0, 0, 1, 1])
        with pytest.raises(DataError, match="1 entities have rows in more than one group") as caught:
            load(data, DataSettings(partition="natural", clients=0, folds=3), seed)
        assert "'iid'" in caught.value.hint
        assert load(data, DataSettings(partition="iid", clients=2, folds=3), seed).clients

    @pytest.mark.parametrize("partition", RULES)
    def test_fewer_entities_than_clients_are_refused(self, partition: str) -> None:
        """Rows would suffice; entities do not."""
        data = collection([i // 10 for i in range(30)], [0] * 30)
        with pytest.raises(DataError, match="2 entities to train on cannot be divided among 3 clients") as caught:
            load(data, DataSettings(partition=partition, clients=3, test_fraction=0.34))
        assert "data.clients" in caught.value.hint

    def test_fewer_entities_than_folds_are_refused(self) -> None:
        """A fold holds out whole entities."""
        with pytest.raises(DataError, match="3 entities cannot make 4 folds"):
            load(collection([0, 0, 1, 1, 2, 2], [0] * 6), DataSettings(partition="iid", clients=1, folds=4))

    def test_one_entity_cannot_be_held_out(self) -> None:
        """Nothing would be left to train on."""
        with pytest.raises(DataError, match="1 entities leave nothing"):
            load(collection([0] * 9, [0] * 9), DataSettings(partition="iid", clients=1))

    def test_a_held_out_part_of_its_own_that_divides_an_entity_is_refused(self) -> None:
        """What the data set holds out must be whole entities, too."""
        data = replace(collection([0, 0, 1, 1], [0] * 4), held_out=np.array([False, True, False, False]))
        with pytest.raises(DataError, match="1 entities are both trained on and held out"):
            load(data, DataSettings(partition="iid", clients=1))

    def test_a_rule_that_divides_rows_would_be_refused(self) -> None:
        """The last check does not trust the division: rows dealt out one by one do not pass it."""
        data = collection([i // 2 for i in range(40)], [0] * 40)
        parts = divide(np.zeros(40, np.int64), DataSettings(clients=2), num_classes=1, rng=np.random.default_rng(0))
        nothing = data.examples.take(torch.arange(0))
        clients = tuple(
            ClientData(name=str(i), train=data.examples.take(torch.from_numpy(part)), test=nothing)
            for i, part in enumerate(parts)
        )
        with pytest.raises(DataError, match="entities are trained on by more than one client"):
            check_entities(Federation(schema=SCHEMA, clients=clients, test=nothing), where="it")
