"""Dividing examples among simulated clients: pure functions from labels (int64[n]) to one index array a client.

**Guarantee**: every index appears exactly once, no client is empty, indices ascend within a client, and equal arguments
with an equal generator give equal parts. What is random about a *rule* (class shares, owners of shards) is drawn apart
from its use, so that one rule divides both the training and the held-out examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from common.config.settings import DataSettings
from common.data.collection import Integers
from common.errors import DataError

Rule = Callable[[Integers, np.random.Generator], list[Integers]]
"""Divides labels among the rule's clients."""

_LEAST_ALPHA, _MOST_ALPHA = 1e-6, 1e6
"""Beyond these the shares are one-hot and uniform to machine precision, and the sampler may overflow."""


def client_name(index: int, clients: int) -> str:
    """Name of a simulated client: "client-000" up to a thousand clients, wider beyond."""
    return f"client-{index:0{max(3, len(str(clients - 1)))}d}"


def draw_rule(settings: DataSettings, *, num_classes: int, rng: np.random.Generator) -> Rule:
    """The rule that `settings` ask for, its random parts drawn from `rng`.

    Raises:
        DataError: The partition is `natural`, which is no rule on labels.
    """
    clients = settings.clients
    if settings.partition == "iid":
        return lambda labels, rng: iid(labels, clients=clients, rng=rng)
    if settings.partition == "size":
        return lambda labels, rng: by_size(labels, clients=clients, ratio=settings.size_ratio, rng=rng)
    if settings.partition == "dirichlet":
        shares = class_shares(num_classes=num_classes, clients=clients, alpha=settings.alpha, rng=rng)
        return lambda labels, rng: dirichlet(labels, shares=shares, rng=rng)
    if settings.partition == "shards":
        owners = shard_owners(clients=clients, shards_per_client=settings.shards_per_client, rng=rng)
        return lambda labels, rng: shards(labels, owners=owners, clients=clients, rng=rng)
    raise DataError(f"data.partition = '{settings.partition}' is not a rule on labels", hint="use iid")


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
    return rng.dirichlet(np.full(clients, np.clip(alpha, _LEAST_ALPHA, _MOST_ALPHA)), size=num_classes)


def dirichlet(labels: Integers, *, shares: npt.NDArray[np.float64], rng: np.random.Generator) -> list[Integers]:
    """Each class cut at random into its `shares` (float64[classes, clients]).

    A client that would be empty receives one example of the largest client.
    """
    parts: list[list[Integers]] = [[] for _ in range(shares.shape[1])]
    for label in range(shares.shape[0]):
        members = rng.permutation(np.flatnonzero(labels == label)).astype(np.int64)
        for part, cut in zip(parts, _cut(members, shares[label]), strict=True):
            part.append(cut)
    return _finish([np.concatenate(part) for part in parts], len(labels))


def shard_owners(*, clients: int, shards_per_client: int, rng: np.random.Generator) -> Integers:
    """int64[clients * shards_per_client]: which client owns each shard."""
    return rng.permutation(np.repeat(np.arange(clients), shards_per_client)).astype(np.int64)


def shards(labels: Integers, *, owners: Integers, clients: int, rng: np.random.Generator) -> list[Integers]:
    """Examples sorted by class and cut into equal shards, each given to its owner.

    **Source**: McMahan et al. 2017, "Communication-efficient learning", section 3: two shards a client leave most
    clients with two classes.
    """
    shuffled = rng.permutation(len(labels)).astype(np.int64)
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(order, len(owners))
    parts = [[np.empty(0, np.int64)] for _ in range(clients)]
    for owner, piece in zip(owners.tolist(), pieces, strict=True):
        parts[owner].append(piece)
    return _finish([np.concatenate(part) for part in parts], len(labels))


def _cut(order: Integers, shares: npt.NDArray[np.float64]) -> list[Integers]:
    """`order` in consecutive pieces whose lengths follow `shares` (summing to one) up to rounding."""
    ends = np.rint(np.cumsum(shares)[:-1] * len(order)).astype(np.int64)
    return np.split(order, ends)


def _finish(parts: list[Integers], examples: int) -> list[Integers]:
    """The parts with ascending indices, after the largest gave one example to each that was empty."""
    if examples < len(parts):
        raise DataError(
            f"{client_name(examples, len(parts))} would have no examples: "
            f"{examples} examples cannot be divided among {len(parts)} clients",
            hint="lower data.clients",
        )
    sizes = np.array([len(part) for part in parts])
    for empty in np.flatnonzero(sizes == 0):
        giver = int(sizes.argmax())
        parts[empty], parts[giver] = parts[giver][-1:], parts[giver][:-1]
        sizes[empty], sizes[giver] = 1, sizes[giver] - 1
    return [np.sort(part) for part in parts]
