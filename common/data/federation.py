"""Dividing a data set among clients, as the settings of a run say."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import torch

from common.config.settings import DataSettings
from common.data.collection import Collection, Integers, Mask, slug
from common.data.entities import check_entities, main_classes, members, units_of
from common.data.loading import load_source
from common.data.partition import client_name, divide, divide_alike
from common.data.split import held_out
from common.errors import DataError
from common.schema import ClientData, Examples, Federation
from common.site import Site

POOLED = "pooled"
"""Name of the one client that holds everybody's examples."""


class _Draw(IntEnum):
    """Independent streams of one seed: changing one use of randomness leaves the others as they are."""

    SPLIT = 0
    TRAIN = 1
    TEST = 2
    CAP = 3


def load_federation(settings: DataSettings, *, seed: int, site: Site, tolerant: bool = False) -> Federation:
    """The data set `settings.name`, divided among clients.

    The held-out part `test` depends on the data set, the seed, `test_fraction` and folds only; it stays whole whatever
    the partition, `sites`, `clients`, `pooled` or `max_examples` are. Each client's own `test` is the part of it that
    falls to the client: its group's (natural), or a part with the class shares of its training examples (dirichlet,
    shards) or their share of the whole (iid, size). Where there are fewer held-out examples than clients, some have
    none.

    A site's own data without a `group` is one natural group, named after the data set. A python source divides itself;
    `sites`, `max_examples` and `pooled` apply to what it returns.

    Where examples have entities, entities are divided in place of examples: a rule that looks at classes takes the one
    that most of an entity's examples have. `max_examples` still counts examples.

    With `tolerant` nothing is refused because of how many examples there are: parts can be empty, and names in `sites`
    that the data does not have are passed over. A real site loads its own data so, because whoever sees what fails can
    find by bisection, with folds and fractions of his choice, how many rows it has.

    **Guarantee**: no client's `train` is empty, unless `tolerant`; no training example is in `test`; no entity is
    trained on by two clients, or both trained on and held out; equal settings and seed give equal federations, on every
    machine.

    Raises:
        DataError: There is no such data set, it cannot be read, or it cannot be divided like this.
        DataUnavailableError: It has to be fetched first.
    """
    loaded = load_source(settings, seed=seed, site=site, tolerant=tolerant)
    federation = loaded if isinstance(loaded, Federation) else _divide(loaded, settings, seed, tolerant=tolerant)
    clients = _chosen(federation.clients, settings, tolerant=tolerant)
    clients = [_capped(client, settings.max_examples, _rng(seed, _Draw.CAP, i)) for i, client in enumerate(clients)]
    if settings.pooled:
        clients = [
            ClientData(
                name=POOLED,
                train=Examples.joined([client.train for client in clients]),
                test=Examples.joined([client.test for client in clients]),
            )
        ]
    return Federation(schema=federation.schema, clients=tuple(clients), test=federation.test)


def _rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of one stream. Simulated partitions are public: nothing secret rests on it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _divide(collection: Collection, settings: DataSettings, seed: int, *, tolerant: bool) -> Federation:
    """All clients of a partition, with all their examples."""
    held = held_out(collection, settings, rng=_rng(seed, _Draw.SPLIT), tolerant=tolerant)
    train, test = np.flatnonzero(~held), np.flatnonzero(held)
    if settings.partition == "natural":
        parts = _natural(collection, settings, held, tolerant=tolerant)
    else:
        parts = _by_rule(collection, settings, seed, train, test)
    federation = Federation(
        schema=collection.schema,
        clients=tuple(
            ClientData(name=name, train=_at(collection.examples, own), test=_at(collection.examples, own_test))
            for name, own, own_test in parts
        ),
        test=_at(collection.examples, test),
    )
    check_entities(federation, where=settings.name)
    return federation


def _natural(
    collection: Collection, settings: DataSettings, held: Mask, *, tolerant: bool
) -> list[tuple[str, Integers, Integers]]:
    """Name, training and held-out indices of each of the data's own groups."""
    if collection.group_of is None:
        raise DataError(
            f"{settings.name} has no groups of its own",
            hint="set data.partition = 'iid'; in site.toml, `group` names the column that holds the client",
        )
    if collection.examples.entities is not None:
        # Asked of all rows, so that the answer does not depend on what is held out.
        units, first = units_of(collection.examples.entities.numpy())
        astray = np.zeros(len(first), bool)
        astray[units[collection.group_of != collection.group_of[first][units]]] = True
        if count := int(astray.sum()):
            raise DataError(
                f"{settings.name}: {count} entities have rows in more than one group",
                hint="what their privacy costs would add up over clients: give each entity one group, and different "
                "people different names, or set data.partition = 'iid'",
            )
    parts = [
        (name, np.flatnonzero((collection.group_of == i) & ~held), np.flatnonzero((collection.group_of == i) & held))
        for i, name in enumerate(collection.groups)
    ]
    for name, own, _ in parts:
        if not len(own) and not tolerant:
            raise DataError(
                f"{settings.name}: {name} would have no examples to train on",
                hint="lower data.test_fraction, or leave out groups with very few rows",
            )
    return parts


def _by_rule(
    collection: Collection, settings: DataSettings, seed: int, train: Integers, test: Integers
) -> list[tuple[str, Integers, Integers]]:
    """Name, training and held-out indices of each simulated client."""
    if collection.schema.per_position and settings.partition in {"dirichlet", "shards"}:
        raise DataError(
            f"data.partition = '{settings.partition}' needs one class an example, and {settings.name} is running text",
            hint="set data.partition = 'natural', 'iid' or 'size'",
        )
    targets = collection.examples.targets.numpy()
    labels = np.zeros(len(targets), np.int64) if collection.schema.per_position else targets
    num_classes = 1 if collection.schema.per_position else collection.schema.num_classes
    units, unit_labels = _units(collection.examples, labels, train)
    if len(unit_labels) < min(settings.clients, len(train)):
        raise DataError(
            f"{settings.name}: {len(unit_labels)} entities to train on cannot be divided among {settings.clients} "
            "clients",
            hint="lower data.clients: all examples of an entity go to one client",
        )
    own = divide(unit_labels, settings, num_classes=num_classes, rng=_rng(seed, _Draw.TRAIN))
    test_units, test_labels = _units(collection.examples, labels, test)
    own_test = divide_alike(
        test_labels,
        settings,
        like=[unit_labels[part] for part in own],
        num_classes=num_classes,
        rng=_rng(seed, _Draw.TEST),
    )
    parts = zip(members(own, units), members(own_test, test_units), strict=True)
    return [(client_name(i, settings.clients), train[a], test[b]) for i, (a, b) in enumerate(parts)]


def _units(examples: Examples, labels: Integers, indices: Integers) -> tuple[Integers, Integers]:
    """The unit (entity or example) of each of the examples at `indices`, and the class of each unit."""
    if examples.entities is None:
        return np.arange(len(indices)), labels[indices]
    units, _ = units_of(examples.entities.numpy()[indices])
    return units, main_classes(units, labels[indices])


def _chosen(clients: Sequence[ClientData], settings: DataSettings, *, tolerant: bool) -> list[ClientData]:
    """The clients that `sites` and `clients` keep of a natural partition, in its order."""
    if settings.sites:
        known = {client.name for client in clients}
        for wanted in settings.sites:
            if wanted not in known and not tolerant:
                near = difflib.get_close_matches(slug(wanted), sorted(known), n=1, cutoff=0.4)
                raise DataError(
                    f"data.sites: {settings.name} has no client `{wanted}`",
                    hint=f"did you mean `{near[0]}`?" if near else f"it has {len(known)} clients",
                )
        return [client for client in clients if client.name in settings.sites]
    if settings.partition != "natural" or settings.clients == 0:
        return list(clients)
    if settings.clients > len(clients):
        raise DataError(
            f"{settings.name} has {len(clients)} natural clients, not {settings.clients}",
            hint="set data.clients = 0 to take them all",
        )
    return list(clients[: settings.clients])


def _capped(client: ClientData, most: int, rng: np.random.Generator) -> ClientData:
    """The client with at most `most` training examples, drawn at random; 0 keeps all."""
    if most == 0 or len(client.train) <= most:
        return client
    kept = np.sort(rng.permutation(len(client.train))[:most])
    return ClientData(name=client.name, train=_at(client.train, kept), test=client.test)


def _at(examples: Examples, indices: Integers) -> Examples:
    """The examples at `indices`, as a copy."""
    return examples.take(torch.from_numpy(np.asarray(indices, np.int64)))
