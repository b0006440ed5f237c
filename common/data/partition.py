"""Dividing examples among simulated clients: pure functions from labels (int64[n]) to one index array a client.

Where examples have entities, the caller hands in one label an entity: what is divided is then entities.

**Guarantee**: every index appears exactly once, no client is empty, indices ascend within a client, and equal arguments
with an equal generator give equal parts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from common.config.settings import DataSettings
from common.data.collection import Integers
from common.errors import DataError
from common.names import NumberedNames

_LEAST_ALPHA, _MOST_ALPHA = 1e-6, 1e6
"""Beyond these the shares are one-hot and uniform to machine precision, and the sampler may overflow."""


def client_name(index: int, clients: int) -> str:
    """Name of a simulated client: "client-000" up to a thousand clients, wider beyond."""
    return NumberedNames(clients)[index]


def divide(labels: Integers, settings: DataSettings, *, num_classes: int, rng: np.random.Generator) -> list[Integers]:
    """The division that `settings` ask for.

    Raises:
        DataError: There are fewer examples than clients, or the partition is no rule on labels (natural, bootstrap).
    """
    clients = settings.clients
    if settings.partition == "iid":
        return iid(labels, clients=clients, rng=rng)
    if settings.partition == "size":
        return by_size(labels, clients=clients, ratio=settings.size_ratio, rng=rng)
    if settings.partition == "dirichlet":
        shares = class_shares(num_classes=num_classes, clients=clients, alpha=settings.alpha, rng=rng)
        return by_shares(labels, shares=shares, rng=rng)
    if settings.partition == "shards":
        return shards(labels, clients=clients, shards_per_client=settings.shards_per_client, rng=rng)
    raise DataError(f"data.partition = '{settings.partition}' is not a rule on labels", hint="use iid")


def divide_alike(
    labels: Integers,
    settings: DataSettings,
    *,
    like: list[Integers],
    num_classes: int,
    rng: np.random.Generator,
) -> list[Integers]:
    """A second division, of held-out examples, that gives each client what it has of the first.

    Args:
        labels: int64[n], the held-out labels.
        settings: What the first division was made by.
        like: The training labels of each client.
        num_classes: Number of classes.
        rng: Source of randomness.

    Rules that skew classes repeat the class shares that came out of the first division; `iid` and `size`, which do not
    look at classes, repeat the sizes. With fewer held-out examples than clients, the first clients get one each.
    """
    clients = len(like)
    if len(labels) < clients:
        parts = iid(labels, clients=len(labels), rng=rng) if len(labels) else []
        return [*parts, *[np.empty(0, np.int64)] * (clients - len(labels))]
    if settings.partition in {"iid", "size"}:
        return divide(labels, settings, num_classes=num_classes, rng=rng)
    counts = np.stack([np.bincount(own, minlength=num_classes) for own in like], axis=1).astype(np.float64)
    counts[counts.sum(axis=1) == 0] = 1  # nobody trains on this class: its held-out examples are spread evenly
    return by_shares(labels, shares=counts / counts.sum(axis=1, keepdims=True), rng=rng)


def iid(labels: Integers, *, clients: int, rng: np.random.Generator) -> list[Integers]:
    """Evenly at random: sizes differ by at most one, larger ones first."""
    order = rng.permutation(len(labels)).astype(np.int64)
    return _finish(np.array_split(order, clients), len(labels))


def by_size(labels: Integers, *, clients: int, ratio: float, rng: np.random.Generator) -> list[Integers]:
    """At random in unequal sizes: they fall geometrically from the first client to the last, by `ratio` in all."""
    order = rng.permutation(len(labels)).astype(np.int64)
    weights = ratio ** -(np.arange(clients) / max(clients - 1, 1))
    return _finish(_cut(order, weights / weights.sum()), len(labels))


def class_shares(*, num_classes: int, clients: int, alpha: float, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """float64[classes, clients]: the share of each class that goes to each client, from Dirichlet(alpha).

    **Source**: Hsu, Qi and Brown 2019, "Measuring the effects of non-identical data distribution", in the variant that
    draws one distribution over clients for each class, so that every example is used once.
    """
    return rng.dirichlet(np.full(clients, bounded_alpha(alpha)), size=num_classes)


def bounded_alpha(alpha: float) -> float:
    """A concentration that the sampler can take, with shares that are the same to machine precision."""
    return min(max(alpha, _LEAST_ALPHA), _MOST_ALPHA)


def by_shares(labels: Integers, *, shares: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Integers]:
    """Each class cut at random into its `shares` (float64[classes, clients], rows sum to one).

    A client that would be empty receives one example of the largest client.
    """
    parts: list[list[Integers]] = [[] for _ in range(shares.shape[1])]
    for label in range(shares.shape[0]):
        members = rng.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        # A phase of its own for each class: else rounding would favour the same clients in all of them.
        for part, piece in zip(parts, _cut(members, shares[label], phase=rng.random()), strict=True):
            part.append(piece)
    return _finish([np.concatenate(part) for part in parts], len(labels))


def shards(labels: Integers, *, clients: int, shards_per_client: int, rng: np.random.Generator) -> list[Integers]:
    """Examples sorted by class and cut into equal shards, so many of which are dealt to each client at random.

    **Source**: McMahan et al. 2017, "Communication-efficient learning", section 3: two shards a client leave most
    clients with two classes.
    """
    shuffled = rng.permutation(len(labels)).astype(np.int64)
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(order, clients * shards_per_client)
    dealt = rng.permutation(len(pieces)).reshape(clients, shards_per_client)
    return _finish([np.concatenate([pieces[i] for i in hand]) for hand in dealt], len(labels))


def _cut(order: Integers, shares: npt.NDArray[np.float64], *, phase: float = 0.5) -> list[Integers]:
    """`order` in consecutive pieces of lengths that follow `shares`; `phase` in [0, 1) says how ends are rounded."""
    exact = np.cumsum(shares)[:-1] * len(order)
    # Sums of shares are a little off: what is meant to be whole stays whole.
    ends = np.floor(exact + phase + 1e-9).astype(np.int64)
    return np.split(order, np.minimum(ends, len(order)))


def _finish(parts: list[Integers], examples: int) -> list[Integers]:
    """The parts with ascending indices, after the largest gave one example to each that was empty."""
    if examples < len(parts):
        raise DataError(
            f"{client_name(examples, len(parts))} would have no examples: "
            f"{examples} examples cannot be divided among {len(parts)} clients",
            hint="lower data.clients, or set data.partition = 'bootstrap': its clients draw examples with replacement",
        )
    sizes = np.array([len(part) for part in parts])
    for empty in np.flatnonzero(sizes == 0):
        giver = int(sizes.argmax())
        parts[empty], parts[giver] = parts[giver][-1:], parts[giver][:-1]
        sizes[empty], sizes[giver] = 1, sizes[giver] - 1
    return [np.sort(part) for part in parts]
