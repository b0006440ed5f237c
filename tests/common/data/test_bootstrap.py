"""A population without an end: clients draw their examples with replacement."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config.settings import DataSettings
from common.data.bootstrap import BootstrapPopulation, Sizes, bootstrap
from common.data.collection import Collection
from common.errors import DataError
from common.schema import DataSchema, Examples, Federation
from tests.common.data.test_federation import Federate, rows

MANY = 1_000_000


def collection(groups: list[int], labels: list[int], *, classes: int = 3) -> Collection:
    """Examples whose input is their own index."""
    names = tuple(f"group-{i}" for i in range(max(groups, default=0) + 1))
    examples = Examples(inputs=torch.arange(len(labels)).float()[:, None], targets=torch.tensor(labels))
    return Collection(
        schema=DataSchema(kind="tabular", input_shape=(1,), num_classes=classes),
        examples=examples,
        row_ids=[str(i) for i in range(len(labels))],
        groups=names,
        group_of=np.array(groups, np.int64),
        rows=len(labels),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Collection, np.ndarray, DataSettings, int]:
    """Data of one to four groups, with some of it held out and something to train on."""
    count = draw(st.integers(2, 40))
    groups = draw(st.lists(st.integers(0, draw(st.integers(0, 3))), min_size=count, max_size=count))
    labels = draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    held = np.array(draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    held[0] = False
    settings = DataSettings(
        partition="bootstrap",
        clients=MANY,
        client_examples=draw(st.sampled_from([1, 5, 20])),
        size_ratio=draw(st.sampled_from([1.0, 10.0, 1e300])),
        alpha=draw(st.sampled_from([1e-300, 0.5, 1e300])),
        max_examples=draw(st.sampled_from([0, 3])),
    )
    return collection(groups, labels), held, settings, draw(st.integers(0, 2**32))


class TestDraws:
    """What one client holds."""

    @given(cases(), st.integers(0, MANY - 1))
    def test_held_out_examples_are_never_trained_on(
        self, case: tuple[Collection, np.ndarray, DataSettings, int], index: int
    ) -> None:
        """A client trains on what is not held out, and is measured on what is; it never is without the former."""
        data, held, settings, seed = case
        client = bootstrap(data, settings, held, seed=seed)[index]
        trained, tested = (part.inputs.flatten().long().numpy() for part in (client.train, client.test))
        assert not held[trained].any()
        assert held[tested].all()
        assert 1 <= len(trained) <= (settings.max_examples or 10**6)

    @given(cases(), st.integers(0, MANY - 1))
    def test_a_client_belongs_to_one_group(
        self, case: tuple[Collection, np.ndarray, DataSettings, int], index: int
    ) -> None:
        """And has held-out examples of it wherever there are any."""
        data, held, settings, seed = case
        if len(data.groups) == 1:
            return
        assert data.group_of is not None
        client = bootstrap(data, settings, held, seed=seed)[index]
        own = data.group_of[client.train.inputs.flatten().long().numpy()]
        assert len(set(own.tolist())) == 1
        tested = data.group_of[client.test.inputs.flatten().long().numpy()]
        assert set(tested.tolist()) <= {own[0]}
        assert (len(tested) > 0) == bool((held & (data.group_of == own[0])).any())

    @given(cases(), st.integers(0, MANY - 1))
    def test_seed_and_index_decide_everything(
        self, case: tuple[Collection, np.ndarray, DataSettings, int], index: int
    ) -> None:
        """Whoever else there is, and in whatever order clients are made."""
        data, held, settings, seed = case
        population = bootstrap(data, settings, held, seed=seed)
        first = population[index]
        fewer = settings.model_copy(update={"clients": index + 1})
        again = bootstrap(data, fewer, held, seed=seed)
        _ = again[0]
        assert torch.equal(again[index].train.inputs, first.train.inputs)
        assert torch.equal(again[index].test.inputs, first.test.inputs)
        assert population.train_size(index) == len(first.train)

    def test_groups_have_clients_in_proportion_to_their_examples(self) -> None:
        """A group of three quarters: within 6 standard deviations over 2,000 clients, a false alarm in 10^8 runs."""
        data = collection([0] * 30 + [1] * 10, [0] * 40)
        population = bootstrap(data, DataSettings(partition="bootstrap", clients=2000), np.zeros(40, bool), seed=1)
        first = sum(bool(client.train.inputs[0] < 30) for client in population)
        assert abs(first - 1500) < 6 * (2000 * 0.75 * 0.25) ** 0.5

    @pytest.mark.parametrize(("alpha", "classes"), [(1e-3, 1), (1e6, 3)])
    def test_without_groups_alpha_says_how_mixed_classes_are(self, alpha: float, classes: int) -> None:
        """A tiny one leaves a client with one class, a large one gives every client all of them."""
        data = collection([0] * 60, [0, 1, 2] * 20)
        settings = DataSettings(partition="bootstrap", clients=50, alpha=alpha, client_examples=60, size_ratio=1)
        population = bootstrap(data, settings, np.arange(60) % 4 == 0, seed=3)
        found = Counter(len(set(client.train.targets.tolist())) for client in population)
        assert found.most_common(1)[0][0] == classes

    def test_classes_that_nobody_trains_on_are_left_out(self) -> None:
        """A class of which all examples are held out has no share."""
        data = collection([0] * 20, [0] * 10 + [1] * 10)
        held = np.array([False] * 10 + [True] * 10)
        settings = DataSettings(partition="bootstrap", clients=20, alpha=0.01)
        assert {int(label) for client in bootstrap(data, settings, held, seed=2) for label in client.train.targets} == {
            0
        }

    def test_nothing_to_train_on_is_refused(self) -> None:
        """There would be nothing to draw from."""
        data = collection([0] * 4, [0] * 4)
        with pytest.raises(DataError, match="no examples to draw from"):
            bootstrap(data, DataSettings(partition="bootstrap"), np.ones(4, bool), seed=0)


class TestSizes:
    """How many training examples clients have."""

    @given(st.integers(1, 500), st.floats(1, 1e300), st.floats(0, 1, exclude_max=True))
    def test_nobody_has_none(self, mean: int, ratio: float, place: float) -> None:
        """However skewed sizes are."""
        assert Sizes(mean=mean, ratio=ratio).at(place) >= 1
        assert 1 <= Sizes(mean=mean, ratio=ratio, most=3).at(place) <= 3

    @pytest.mark.parametrize("ratio", [1.0, 10.0, 100.0])
    def test_the_mean_and_the_ratio_are_those_that_were_asked_for(self, ratio: float) -> None:
        """Over all places of the scale, to within what rounding to whole examples does."""
        sizes = [Sizes(mean=200, ratio=ratio).at(i / 1000) for i in range(1000)]
        assert np.mean(sizes) == pytest.approx(200, rel=0.01)
        assert max(sizes) / min(sizes) == pytest.approx(ratio, rel=0.05)


class TestFederation:
    """As a run loads it."""

    @pytest.mark.parametrize("name", ["heart", "shakespeare", "fashion-mnist-10k"])
    def test_there_can_be_more_clients_than_examples(self, federate: Federate, name: str) -> None:
        """Hospitals, roles of plays, and images by classes."""
        found = federate(name=name, partition="bootstrap", clients=10_000_000)
        assert isinstance(found.clients, BootstrapPopulation)
        assert (len(found.clients), found.names[-1]) == (10_000_000, "client-9999999")
        client = found.clients[9_999_999]
        assert client.name == "client-9999999"
        assert 1 <= len(client.train) <= 60
        assert len(client.test) >= 1
        assert client.train.inputs.shape[1:] == found.schema.input_shape

    def test_the_held_out_part_is_that_of_every_other_partition(self, federate: Federate) -> None:
        """Runs that divide the data differently are measured on the same examples."""

        def held(partition: str) -> Federation:
            return federate(name="heart", partition=partition, clients=3, folds=5, fold=2)

        assert rows(held("bootstrap").test) == rows(held("iid").test)

    def test_pooled_is_all_that_clients_draw_from_each_example_once(self, federate: Federate) -> None:
        """Copies teach nothing."""
        pooled, divided = (
            federate(name="heart", partition=partition, clients=3, pooled=True) for partition in ("bootstrap", "iid")
        )
        assert [client.name for client in pooled.clients] == ["pooled"]
        assert rows(pooled.clients[0].train) == rows(divided.clients[0].train)

    def test_another_seed_gives_other_clients(self, federate: Federate) -> None:
        """As of any partition."""
        one, other = (federate(seed=seed, name="heart", partition="bootstrap", clients=3) for seed in (1, 2))
        assert rows(one.clients[0].train) != rows(other.clients[0].train)
