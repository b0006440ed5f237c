"""Dividing real data among clients, and what is held out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from common.errors import DataError
from common.schema import ClientData, Examples, Federation

HOSPITALS = ["cleveland", "hungary", "switzerland", "va-long-beach"]
Federate = Callable[..., Federation]


def rows(*parts: Examples) -> list[tuple[float, ...]]:
    """Examples as sortable tuples."""
    return sorted(
        (*x.flatten().tolist(), float(y)) for part in parts for x, y in zip(part.inputs, part.targets, strict=True)
    )


def same(a: Federation, b: Federation) -> bool:
    """Whether two federations hold the same tensors under the same names."""

    def parts(f: Federation) -> list[Examples]:
        return [f.test, *(part for client in f.clients for part in (client.train, client.test))]

    return [c.name for c in a.clients] == [c.name for c in b.clients] and all(
        torch.equal(x.inputs, y.inputs) and torch.equal(x.targets, y.targets)
        for x, y in zip(parts(a), parts(b), strict=True)
    )


@pytest.mark.parametrize("partition", ["natural", "iid", "dirichlet", "shards", "size"])
@pytest.mark.parametrize("folds", [0, 5])
def test_every_example_is_trained_on_once_or_held_out_once(federate: Federate, partition: str, folds: int) -> None:
    """Clients' training examples and the held-out part together are the data set, and so are clients' own tests."""
    everything = rows(federate(name="heart", partition="iid", clients=1, test_fraction=0.001).clients[0].train)
    found = federate(name="heart", partition=partition, clients=4, folds=folds)
    assert len(everything) in {917, 918}
    assert sum(len(client.train) for client in found.clients) + len(found.test) == 918
    assert rows(*(client.test for client in found.clients)) == rows(found.test)
    assert set(rows(*(client.train for client in found.clients), found.test)) >= set(everything)


@pytest.mark.parametrize("partition", ["natural", "iid", "dirichlet", "shards", "size"])
def test_settings_and_seed_decide_everything(federate: Federate, partition: str) -> None:
    """Equal settings and seed give equal tensors; another seed gives others."""
    first, again = (federate(name="heart", partition=partition, clients=4) for _ in range(2))
    assert same(first, again)
    assert not same(first, federate(seed=2, name="heart", partition=partition, clients=4))


def test_the_held_out_part_does_not_depend_on_the_division(federate: Federate) -> None:
    """Runs that divide the data differently are measured on the same examples."""
    reference = federate(name="heart", partition="natural", clients=0)
    for settings in (
        {"partition": "iid", "clients": 7},
        {"partition": "dirichlet", "clients": 3},
        {"partition": "natural", "clients": 0, "sites": ["hungary"]},
        {"partition": "natural", "clients": 2},
        {"partition": "natural", "clients": 0, "pooled": True, "max_examples": 10},
    ):
        other = federate(name="heart", **settings)
        assert torch.equal(other.test.inputs, reference.test.inputs), settings


class TestNatural:
    """The data's own groups."""

    def test_clients_are_the_groups(self, federate: Federate) -> None:
        """The heart data has its four hospitals, in a stable order."""
        found = federate(name="heart", partition="natural", clients=0)
        assert [client.name for client in found.clients] == HOSPITALS
        sizes = [len(client.train) + len(client.test) for client in found.clients]
        assert sizes == [303, 293, 123, 199]

    def test_sites_keep_some_clients_and_all_of_the_held_out_part(self, federate: Federate) -> None:
        """A hospital that trains alone is still measured on everybody's patients, and keeps its own tensors."""
        everybody = federate(name="heart", partition="natural", clients=0)
        alone = federate(name="heart", partition="natural", sites=["switzerland"])
        assert [client.name for client in alone.clients] == ["switzerland"]
        assert torch.equal(alone.clients[0].train.inputs, everybody.clients[2].train.inputs)
        assert len(alone.test) == len(everybody.test)

    def test_unknown_site_is_refused_with_the_nearest(self, federate: Federate) -> None:
        """A misspelt hospital is an error, never an empty federation."""
        with pytest.raises(DataError, match="no client `Hungry`") as caught:
            federate(name="heart", partition="natural", clients=0, sites=["Hungry"])
        assert "hungary" in caught.value.hint

    def test_more_clients_than_groups_are_refused(self, federate: Federate) -> None:
        """A count that the data cannot meet says how to take all groups."""
        with pytest.raises(DataError, match="4 natural clients, not 10") as caught:
            federate(name="heart", partition="natural")
        assert "data.clients = 0" in caught.value.hint

    def test_fewer_clients_take_the_first_groups(self, federate: Federate) -> None:
        """`clients = 2` keeps the first two hospitals."""
        found = federate(name="heart", partition="natural", clients=2)
        assert [client.name for client in found.clients] == HOSPITALS[:2]

    def test_data_without_groups_are_refused(self, federate: Federate) -> None:
        """Clothes belong to nobody."""
        with pytest.raises(DataError, match="no groups of its own"):
            federate(name="fashion-mnist-10k", partition="natural", clients=0)


class TestHeldOut:
    """Which examples are held out."""

    @pytest.mark.parametrize("fold", [0, 3, 9])
    def test_a_fold_holds_out_a_tenth_of_every_hospital_and_class(self, federate: Federate, fold: int) -> None:
        """Folds are stratified by hospital and label, to within one patient."""
        found = federate(name="heart", partition="natural", clients=0, folds=10, fold=fold)
        for client in found.clients:
            held, trained = np.bincount(client.test.targets, minlength=2), np.bincount(client.train.targets)
            assert abs(held.sum() - (held + trained).sum() / 10) < 1
            assert (abs(held - (held + trained) / 10) < 1).all()

    def test_folds_hold_out_every_example_once(self, federate: Federate) -> None:
        """The ten held-out parts together are the data set."""
        folds = [federate(name="heart", partition="natural", clients=0, folds=10, fold=k) for k in range(10)]
        first = folds[0]
        everything = rows(first.test, *(client.train for client in first.clients))
        assert rows(*(fold.test for fold in folds)) == everything

    def test_test_fraction_holds_within_every_hospital(self, federate: Federate) -> None:
        """A third held out is a third of each hospital, to within one patient."""
        for client in federate(name="heart", partition="natural", clients=0, test_fraction=1 / 3).clients:
            n = len(client.train) + len(client.test)
            assert abs(len(client.test) - n / 3) <= 1

    def test_more_folds_than_examples_are_refused(self, federate: Federate) -> None:
        """A fold cannot be empty."""
        with pytest.raises(DataError, match="918 examples cannot make 1000 folds"):
            federate(name="heart", partition="natural", clients=0, folds=1000)

    def test_held_out_part_too_large_names_the_client(self, federate: Federate) -> None:
        """A split that leaves a hospital nothing to train on is refused."""
        with pytest.raises(DataError, match="switzerland would have no examples to train on"):
            federate(name="heart", partition="natural", clients=0, test_fraction=0.998)


class TestRules:
    """Divisions that simulate clients."""

    def test_a_client_is_measured_on_its_own_mix_of_classes(self, federate: Federate) -> None:
        """A skewed client's test part has the class shares of its training part."""
        found = federate(name="fashion-mnist-10k", partition="dirichlet", alpha=0.1, clients=10)
        for client in found.clients:
            assert abs(mix(client.train) - mix(client.test)).max() < 0.05

    def test_shards_give_the_same_classes_to_both_parts(self, federate: Federate) -> None:
        """A client with two classes is tested on those two."""
        for client in federate(name="fashion-mnist-10k", partition="shards", clients=10).clients:
            assert set(client.test.targets.tolist()) <= set(client.train.targets.tolist())
            assert abs(mix(client.train) - mix(client.test)).max() < 0.1

    def test_more_clients_than_held_out_examples(self, federate: Federate) -> None:
        """Every client trains; those for whom no held-out example is left have an empty test part."""
        found = federate(name="heart", partition="iid", clients=300)
        assert min(len(client.train) for client in found.clients) >= 1
        assert sorted({len(client.test) for client in found.clients}) == [0, 1]

    def test_running_text_has_no_classes_to_skew(self, federate: Federate) -> None:
        """Dirichlet needs one class an example."""
        with pytest.raises(DataError, match="needs one class an example"):
            federate(name="shakespeare", partition="dirichlet")


class TestShape:
    """Capping and pooling."""

    def test_max_examples_caps_training_only(self, federate: Federate) -> None:
        """Each client keeps so many of its training examples and all of its test part."""
        whole, capped = (federate(name="heart", partition="natural", clients=0, max_examples=k) for k in (0, 50))
        for before, after in zip(whole.clients, capped.clients, strict=True):
            assert len(after.train) == 50
            assert set(rows(after.train)) <= set(rows(before.train))
            assert len(after.test) == len(before.test)

    def test_pooled_holds_what_the_clients_hold(self, federate: Federate) -> None:
        """Training without federation sees the same examples, also after `sites` and `max_examples`."""
        settings = {"name": "heart", "partition": "natural", "sites": HOSPITALS[1:3], "max_examples": 40}
        apart, pooled = federate(**settings), federate(**settings, pooled=True)
        assert [client.name for client in pooled.clients] == ["pooled"]
        assert rows(pooled.clients[0].train) == rows(*(client.train for client in apart.clients))
        assert rows(pooled.clients[0].test) == rows(*(client.test for client in apart.clients))


def mix(examples: Examples) -> np.ndarray:
    """Share of each class."""
    return np.bincount(examples.targets, minlength=10) / len(examples)


def test_client_data_is_a_copy(federate: Federate) -> None:
    """Writing into one client's tensors changes no other's."""
    found = federate(name="heart", partition="natural", clients=0)
    client: ClientData = found.clients[0]
    before = found.test.inputs.clone()
    client.test.inputs.zero_()
    client.train.inputs.zero_()
    assert torch.equal(found.test.inputs, before)
