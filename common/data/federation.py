"""Dividing a data set among clients, as the settings of a run say."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import torch

from common.config.settings import DataSettings
from common.data.bootstrap import bootstrap
from common.data.collection import Collection, Integers, Mask, slug
from common.data.entities import check_division, main_classes, members, units_of
from common.data.loading import load_source
from common.data.partition import divide, divide_alike
from common.data.population import DividedPopulation, Population, Rows
from common.data.split import held_out
from common.errors import DataError
from common.names import NumberedNames
from common.schema import ClientData, Examples, Federation
from common.site import Site

POOLED = "pooled"
"""Name of the one client that holds everybody's examples."""


_MOST_GUESSED = 1000
"""Among more names nobody's misspelt one is looked for."""


class _Draw(IntEnum):
    """Independent streams of one seed: changing one use of randomness leaves the others as they are."""

    SPLIT = 0
    TRAIN = 1
    TEST = 2
    CAP = 3  # and 4 is `bootstrap`'s


def load_federation(settings: DataSettings, *, seed: int, site: Site, tolerant: bool = False) -> Federation:
    """The data set `settings.name`, divided among clients.

    The held-out part `test` depends on the data set, the seed, `test_fraction` and folds only; it stays whole whatever
    the partition, `sites`, `clients`, `pooled` or `max_examples` are. Each client's own `test` is the part of it that
    falls to the client: its group's (natural), or a part with the class shares of its training examples (dirichlet,
    shards) or their share of the whole (iid, size). Where there are fewer held-out examples than clients, some have
    none.

    With `bootstrap` a client's examples are drawn, with replacement, from the training part, and its own `test` from
    the held-out one; `pooled` gives the whole training part, each example once. See `BootstrapPopulation`.

    A site's own data without a `group` is one natural group, named after the data set. A python source divides itself;
    `sites`, `max_examples` and `pooled` apply to what it returns.

    Where examples have entities, entities are divided in place of examples: a rule that looks at classes takes the one
    that most of an entity's examples have. `max_examples` still counts examples.

    With `tolerant` nothing is refused because of how many examples there are: parts can be empty, and names in `sites`
    that the data does not have are passed over. A real site loads its own data so, because whoever sees what fails can
    find by bisection, with folds and fractions of his choice, how many rows it has.

    **Guarantee**: no client's `train` is empty, unless `tolerant` or made by a site's own function as it is asked for;
    no training example is in `test`; no entity is trained on by two clients (but with `bootstrap`, which copies rows),
    or both trained on and held out; equal settings and seed give equal federations, on every machine.

    Raises:
        DataError: There is no such data set, it cannot be read, or it cannot be divided like this.
        DataUnavailableError: It has to be fetched first.
    """
    loaded = load_source(settings, seed=seed, site=site, tolerant=tolerant)
    if isinstance(loaded, Federation):
        return _of_function(loaded, settings, seed, tolerant=tolerant)
    held = held_out(loaded, settings, rng=_rng(seed, _Draw.SPLIT), tolerant=tolerant)
    everybody = _Parts(names=[POOLED], train=[np.flatnonzero(~held)], test=[np.flatnonzero(held)])
    test = _at(loaded.examples, everybody.test[0])
    if settings.partition != "bootstrap":
        parts = _chosen_parts(
            _divided(loaded, settings, seed, held, tolerant=tolerant), settings, seed, tolerant=tolerant
        )
    elif not settings.pooled:
        return Federation(schema=loaded.schema, clients=bootstrap(loaded, settings, held, seed=seed), test=test)
    else:
        parts = everybody
    clients = DividedPopulation(
        parts.names, Rows.taken(loaded.examples, parts.train), Rows.taken(loaded.examples, parts.test)
    )
    return Federation(schema=loaded.schema, clients=clients, test=test)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Parts:
    """Every client's name, and the indices of its training and its held-out examples."""

    names: Sequence[str]
    train: Sequence[Integers]
    test: Sequence[Integers]


def _rng(seed: int, *stream: int) -> np.random.Generator:
    """The generator of one stream. Simulated partitions are public: nothing secret rests on it."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=stream))


def _divided(collection: Collection, settings: DataSettings, seed: int, held: Mask, *, tolerant: bool) -> _Parts:
    """All clients of a partition, with all their examples."""
    if settings.partition == "natural":
        parts = _natural(collection, settings, held, tolerant=tolerant)
    else:
        parts = _by_rule(collection, settings, seed, np.flatnonzero(~held), np.flatnonzero(held))
    if (entities := collection.examples.entities) is not None:
        numbers = entities.numpy()
        check_division([numbers[own] for own in parts.train], numbers[held], where=settings.name)
    return parts


def _natural(collection: Collection, settings: DataSettings, held: Mask, *, tolerant: bool) -> _Parts:
    """Each of the data's own groups."""
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
    order = np.argsort(collection.group_of, kind="stable")
    train, test = (order[chosen[order]] for chosen in (~held, held))
    parts = _Parts(
        names=collection.groups,
        train=_runs(train, collection.group_of[train], len(collection.groups)),
        test=_runs(test, collection.group_of[test], len(collection.groups)),
    )
    for name, own in zip(parts.names, parts.train, strict=True):
        if not len(own) and not tolerant:
            raise DataError(
                f"{settings.name}: {name} would have no examples to train on",
                hint="lower data.test_fraction, or leave out groups with very few rows",
            )
    return parts


def _runs(indices: Integers, owners: Integers, count: int) -> list[Integers]:
    """The indices of each owner from 0 to `count`; owners ascend."""
    return np.split(indices, np.searchsorted(owners, np.arange(1, count)))


def _by_rule(collection: Collection, settings: DataSettings, seed: int, train: Integers, test: Integers) -> _Parts:
    """Each simulated client of a rule on labels."""
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
    return _Parts(
        names=NumberedNames(settings.clients),
        train=[train[part] for part in members(own, units)],
        test=[test[part] for part in members(own_test, test_units)],
    )


def _units(examples: Examples, labels: Integers, indices: Integers) -> tuple[Integers, Integers]:
    """The unit (entity or example) of each of the examples at `indices`, and the class of each unit."""
    if examples.entities is None:
        return np.arange(len(indices)), labels[indices]
    units, _ = units_of(examples.entities.numpy()[indices])
    return units, main_classes(units, labels[indices])


def _chosen_parts(parts: _Parts, settings: DataSettings, seed: int, *, tolerant: bool) -> _Parts:
    """What `sites`, `clients`, `max_examples` and `pooled` leave of a partition."""
    places = _chosen(parts.names, settings, tolerant=tolerant)
    if len(places) < len(parts.names):
        parts = _Parts(
            names=[parts.names[i] for i in places],
            train=[parts.train[i] for i in places],
            test=[parts.test[i] for i in places],
        )
    if most := settings.max_examples:
        capped = [own[_kept(len(own), most, seed, i)] for i, own in enumerate(parts.train)]
        parts = replace(parts, train=capped)
    if settings.pooled:
        return _Parts(names=[POOLED], train=[_all_of(parts.train)], test=[_all_of(parts.test)])
    return parts


def _all_of(parts: Sequence[Integers]) -> Integers:
    """The indices of all parts, part by part."""
    return np.concatenate([np.empty(0, np.int64), *parts])


def _of_function(loaded: Federation, settings: DataSettings, seed: int, *, tolerant: bool) -> Federation:
    """What `sites`, `clients`, `max_examples` and `pooled` leave of the clients that a site's own function made.

    Clients that are made as they are asked for stay so, but for `pooled`.
    """
    names = loaded.names
    places = _chosen(names, settings, tolerant=tolerant)
    most = settings.max_examples

    def client(i: int) -> ClientData:
        found = loaded.clients[places[i]]
        kept = _kept(len(found.train), most, seed, i) if most else None
        return found if kept is None else replace(found, train=_at(found.train, kept))

    population = Population(names if len(places) == len(names) else [names[i] for i in places], client)
    clients: Sequence[ClientData] = population
    if settings.pooled:
        everyone = list(population)
        clients = (
            ClientData(
                name=POOLED,
                train=Examples.joined([client.train for client in everyone]),
                test=Examples.joined([client.test for client in everyone]),
            ),
        )
    elif isinstance(loaded.clients, tuple | list):
        clients = tuple(population)
    return Federation(schema=loaded.schema, clients=clients, test=loaded.test)


def _chosen(names: Sequence[str], settings: DataSettings, *, tolerant: bool) -> Sequence[int]:
    """The places of the clients that `sites` and `clients` keep of a natural partition, in its order."""
    if settings.sites:
        known = set(names)
        for wanted in settings.sites:
            if wanted not in known and not tolerant:
                like = sorted(known) if len(known) <= _MOST_GUESSED else []
                near = difflib.get_close_matches(slug(wanted), like, n=1, cutoff=0.4)
                raise DataError(
                    f"data.sites: {settings.name} has no client `{wanted}`",
                    hint=f"did you mean `{near[0]}`?" if near else f"it has {len(known)} clients",
                )
        wanted_names = set(settings.sites)
        return [i for i, name in enumerate(names) if name in wanted_names]
    if settings.partition != "natural" or settings.clients == 0:
        return range(len(names))
    if settings.clients > len(names):
        raise DataError(
            f"{settings.name} has {len(names)} natural clients, not {settings.clients}",
            hint="set data.clients = 0 to take them all, or data.partition = 'bootstrap' for as many as you like",
        )
    return range(settings.clients)


def _kept(count: int, most: int, seed: int, place: int) -> Integers:
    """Which `most` of `count` training examples the client at a place keeps, drawn at random."""
    if count <= most:
        return np.arange(count)
    return np.sort(_rng(seed, _Draw.CAP, place).permutation(count)[:most])


def _at(examples: Examples, indices: Integers) -> Examples:
    """The examples at `indices`, as a copy."""
    return examples.take(torch.from_numpy(np.asarray(indices, np.int64)))
