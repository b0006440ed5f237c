"""Rounds of a large group, in which everybody shares masks with the nearest on a ring: here 8 of 24 members."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from common.secagg import SecAggError, parameters
from common.secagg.messages import Agree, Train
from common.secagg.parameters import Shape
from common.secagg.roster import Circle
from tests.helpers.secagg import Federation, epoch_of, names_of, refusal, total, vectors_of


@pytest.fixture
def federation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Federation]:
    monkeypatch.setattr(parameters, "MOST_COMPLETE", 8)
    parameters._ring.cache_clear()
    yield Federation(24, epoch_rounds=12)
    parameters._ring.cache_clear()


def test_sums_are_exact_with_any_two_dropped(federation: Federation) -> None:
    """With two members gone everybody has neighbours enough."""
    group = federation.set_up()[0]
    assert 0 < group.shape.degree < 20
    vectors = vectors_of(federation.names, 20)
    draw = np.random.default_rng(1)
    for number in range(10):
        away = [federation.names[i] for i in draw.choice(24, 3, replace=False)]
        result, names = federation.round(
            group,
            vectors,
            base=bytes([number]),
            absent={"train": away[:2], "agree": away[2:]},
        )
        assert len(names) == 22
        assert (result == total(vectors, names)).all()


def test_a_survivor_without_neighbours_is_refused(federation: Federation) -> None:
    """If one survivor's neighbours are gone there is no sum, although the others would be enough."""
    group = federation.set_up()[0]
    near = group._circle.neighbours[0][: group.shape.degree - group.shape.least_neighbours + 1]
    with pytest.raises(SecAggError) as refused:
        federation.round(
            group,
            vectors_of(federation.names, 5),
            base=b"b",
            absent={"train": [federation.names[rank] for rank in near]},
        )
    assert refused.value.reason == "survivors"


def test_members_too_far_apart_are_not_asked(federation: Federation) -> None:
    """If the live members would leave each other without neighbours enough, no round begins."""
    group = federation.set_up()[0]
    group.live -= {federation.names[rank] for rank in group._circle.neighbours[0]}
    with pytest.raises(SecAggError) as refused:
        federation.begin(group, base=b"b", size=5)
    assert refused.value.reason == "participants"


def test_a_missing_nonce_ends_the_epoch(federation: Federation) -> None:
    """Nobody can choose among beacons by not revealing."""
    with pytest.raises(SecAggError) as refused:
        federation.set_up(absent={"reveal": federation.names[:1]})
    assert refused.value.reason == "beacon"


def test_a_member_refuses_participants_too_far_apart(federation: Federation) -> None:
    """A member with too few neighbours among the participants takes no part, however many others there are."""
    group = federation.set_up()[0]
    opened = federation.begin(group, base=b"b", size=5)
    asked = Train.from_bytes(opened.requests()[federation.names[0]])
    near = epoch_of(federation).neighbours[: group.shape.degree - group.shape.least_neighbours + 1]
    fewer = Train(
        epoch=asked.epoch,
        index=asked.index,
        participants=tuple(rank for rank in asked.participants if rank not in near),
        certificates=(),
    )
    assert refusal(federation, fewer.to_bytes()) == "participants"


def test_every_signer_looks_at_every_survivor(federation: Federation) -> None:
    """A set in which somebody else has too few neighbours is refused, by members that have enough themselves."""
    group = federation.set_up()[0]
    opened = federation.begin(group, base=b"b", size=5)
    federation.upload(opened, federation.masks(opened, base=b"b"), vectors_of(federation.names, 5))
    victim = group._circle.ring[0]
    near = group._circle.neighbours[victim][: group.shape.degree - group.shape.least_neighbours + 1]
    survivors = tuple(rank for rank in range(24) if rank not in near)
    asked = Agree(epoch=group.epoch, index=1, survivors=survivors).to_bytes()
    for rank in survivors:
        assert refusal(federation, asked, name=federation.names[rank]) == "survivors"


def test_who_is_cut_off_is_not_asked() -> None:
    """On a ring where everybody needs one neighbour, a member between two absent ones is left out; the others stay."""
    shape = Shape(members=6, degree=2, threshold=2, quorum=2, fewest=2, least_neighbours=1)
    circle = Circle(index=0, digest=b"", ring=(0, 1, 2, 3, 4, 5), names=names_of(6), shape=shape)
    assert circle.connected([0, 2, 3, 4]) == (2, 3, 4)
    assert circle.connected([0, 2, 4]) == ()
