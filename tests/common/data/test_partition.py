"""Dividing labels among clients."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config.settings import DataSettings
from common.data.partition import by_shares, by_size, class_shares, client_name, divide, divide_alike, iid, shards
from common.errors import DataError

CLASSES = 5


@st.composite
def cases(draw: st.DrawFn) -> tuple[DataSettings, np.ndarray, int]:
    """Any rule, with at least as many labels as clients."""
    clients = draw(st.integers(1, 12))
    labels = draw(st.lists(st.integers(0, CLASSES - 1), min_size=clients, max_size=80))
    settings = DataSettings(
        partition=draw(st.sampled_from(["iid", "dirichlet", "shards", "size"])),
        clients=clients,
        alpha=draw(st.sampled_from([1e-300, 1e-3, 0.5, 1e300])),
        shards_per_client=draw(st.integers(1, 20)),
        size_ratio=draw(st.sampled_from([1.0, 10.0, 1e6, 1e300])),
    )
    return settings, np.array(labels, np.int64), draw(st.integers(0, 2**32))


def cut(settings: DataSettings, labels: np.ndarray, seed: int) -> list[np.ndarray]:
    return divide(labels, settings, num_classes=CLASSES, rng=np.random.default_rng(seed))


@given(cases())
def test_every_example_goes_to_exactly_one_client(case: tuple[DataSettings, np.ndarray, int]) -> None:
    """Whatever the rule and its parameters, the parts are disjoint and together hold every index."""
    parts = cut(*case)
    assert len(parts) == case[0].clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(case[1])))


@given(cases())
def test_no_client_is_empty(case: tuple[DataSettings, np.ndarray, int]) -> None:
    """Even the most skewed rule leaves every client at least one example."""
    assert min(map(len, cut(*case))) >= 1


@given(cases())
def test_equal_seeds_give_equal_parts(case: tuple[DataSettings, np.ndarray, int]) -> None:
    """A division depends on labels, settings and generator only."""
    assert [part.tolist() for part in cut(*case)] == [part.tolist() for part in cut(*case)]


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "size"])
def test_another_seed_gives_other_parts(partition: str) -> None:
    """Every rule shuffles."""
    labels = np.arange(100) % CLASSES
    settings = DataSettings.model_validate({"partition": partition, "clients": 4})
    first, second = (cut(settings, labels, seed)[0].tolist() for seed in (1, 2))
    assert first != second


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "shards", "size"])
def test_fewer_examples_than_clients_are_refused(partition: str) -> None:
    """The error names the first client that would be empty and says what to lower."""
    settings = DataSettings.model_validate({"partition": partition, "clients": 4})
    with pytest.raises(DataError, match="client-003 would have no examples") as caught:
        cut(settings, np.zeros(3, np.int64), 1)
    assert "data.clients" in caught.value.hint


def test_iid_sizes_differ_by_at_most_one() -> None:
    """11 examples among 4 clients make 3, 3, 3 and 2."""
    parts = iid(np.zeros(11, np.int64), clients=4, rng=np.random.default_rng(0))
    assert [len(part) for part in parts] == [3, 3, 3, 2]


def test_sizes_fall_geometrically_by_the_ratio() -> None:
    """With ratio 4 over three clients each is half as large as the one before."""
    parts = by_size(np.zeros(700, np.int64), clients=3, ratio=4, rng=np.random.default_rng(0))
    assert [len(part) for part in parts] == [400, 200, 100]


def test_small_alpha_concentrates_a_class_and_large_alpha_spreads_it() -> None:
    """The largest share of a class tends to one as alpha falls, and to 1/clients as it rises."""
    rng = np.random.default_rng(0)
    skewed = class_shares(num_classes=200, clients=10, alpha=0.01, rng=rng).max(axis=1)
    even = class_shares(num_classes=200, clients=10, alpha=1e5, rng=rng).max(axis=1)
    assert skewed.mean() > 0.9
    assert even.max() < 0.11


def test_shares_cut_each_class_by_its_shares() -> None:
    """A class of 100 with shares .7 and .3 becomes 70 and 30."""
    shares = np.array([[0.7, 0.3], [0.1, 0.9]])
    labels = np.repeat([0, 1], 100)
    first, second = by_shares(labels, shares=shares, rng=np.random.default_rng(0))
    assert np.bincount(labels[first]).tolist() == [70, 10]
    assert np.bincount(labels[second]).tolist() == [30, 90]


def test_two_shards_a_client_leave_at_most_two_classes() -> None:
    """Where shards and classes end at the same places, a client sees as many classes as it has shards."""
    labels = np.repeat(np.arange(5), 20)
    parts = shards(labels, clients=5, shards_per_client=2, rng=np.random.default_rng(0))
    assert [len(part) for part in parts] == [20] * 5
    assert max(len(np.unique(labels[part])) for part in parts) <= 2


@pytest.mark.parametrize(("index", "clients", "name"), [(0, 10, "client-000"), (7, 2000, "client-0007")])
def test_names_sort_in_the_order_of_clients(index: int, clients: int, name: str) -> None:
    """Numbers are padded to the width of the last client's."""
    assert client_name(index, clients) == name


def test_natural_is_no_rule_on_labels() -> None:
    """Groups cannot be made from labels."""
    with pytest.raises(DataError, match="natural"):
        cut(DataSettings(partition="natural"), np.zeros(9, np.int64), 0)


@given(cases(), st.lists(st.integers(0, CLASSES - 1), max_size=60))
def test_held_out_examples_are_divided_alike(case: tuple[DataSettings, np.ndarray, int], held: list[int]) -> None:
    """The second division also uses every example once, and empties no client for which one is left."""
    settings, labels, seed = case
    parts = divide_alike(
        np.array(held, np.int64),
        settings,
        like=[labels[part] for part in cut(*case)],
        num_classes=CLASSES,
        rng=np.random.default_rng(seed),
    )
    assert len(parts) == settings.clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(held)))
    assert sum(len(part) > 0 for part in parts) == min(len(held), settings.clients)


def test_rounding_favours_no_client() -> None:
    """Small shares of many classes are rounded differently in each, so that sizes stay near their mean of 10."""
    labels = np.repeat(np.arange(100), 20)
    parts = by_shares(labels, shares=np.full((100, 200), 1 / 200), rng=np.random.default_rng(0))
    assert max(map(len, parts)) < 25
    assert min(map(len, parts)) >= 1
