"""Keys and blobs of the escrow: each depends on all that it is for, and opens nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from common.secagg import SecAggError, escrow

KEY, OTHER = b"k" * 32, b"o" * 32
PAIR = {"group": b"g", "names": ("a", "b"), "offer": b"c"}


def pair(agreed: bytes = KEY, encapsulated: bytes = KEY, **changes: object) -> bytes:
    return escrow.pair_secret(agreed, encapsulated, **(PAIR | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "keys",
    [
        [pair(), pair(OTHER), pair(KEY, OTHER), pair(group=b"h"), pair(names=("a", "c")), pair(offer=b"d")],
        [pair(names=("ab", "c")), pair(names=("a", "bc"))],
        [escrow.self_mask_key(KEY, b"1"), escrow.self_mask_key(KEY, b"2"), escrow.self_mask_key(OTHER, b"1")],
        [escrow.pair_mask_key(KEY, b"1"), escrow.pair_mask_key(KEY, b"2"), escrow.self_mask_key(KEY, b"1")],
        [escrow.channel_key(KEY, sender=a, receiver=b) for a, b in (("a", "b"), ("b", "a"), ("a", "c"))],
        [escrow.round_keys(KEY, 3)[at : at + 32] for at in (0, 32, 64)] + [escrow.round_keys(OTHER, 1)],
        [
            escrow.commitment(group, rank, index, kind, secret)
            for group, rank, index, kind, secret in (
                (b"g", 1, 1, 0, KEY),
                (b"h", 1, 1, 0, KEY),
                (b"g", 2, 1, 0, KEY),
                (b"g", 1, 2, 0, KEY),
                (b"g", 1, 1, 1, KEY),
                (b"g", 1, 1, 0, OTHER),
            )
        ],
    ],
    ids=["pair", "names", "self mask", "pair mask", "channel", "rounds", "commitment"],
)
def test_nothing_is_shared_between_purposes(keys: list[bytes]) -> None:
    """A change of any input gives another key."""
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 32 for key in keys)


def test_a_longer_epoch_begins_alike() -> None:
    """A round's key does not depend on how many rounds there are."""
    assert escrow.round_keys(KEY, 5)[:64] == escrow.round_keys(KEY, 2)


def test_shares_open_in_their_place_alone() -> None:
    """Under another key, in another group or between others: none."""
    sealed = escrow.seal_shares(KEY, b"shares", group=b"g", sender=1, receiver=2)
    assert escrow.open_shares(KEY, sealed, group=b"g", sender=1, receiver=2) == b"shares"
    for key, blob, group, sender, receiver in [
        (OTHER, sealed, b"g", 1, 2),
        (KEY, sealed, b"h", 1, 2),
        (KEY, sealed, b"g", 2, 1),
        (KEY, sealed[:-1], b"g", 1, 2),
        (KEY, b"", b"g", 1, 2),
    ]:
        assert escrow.open_shares(key, blob, group=group, sender=sender, receiver=receiver) is None


def test_a_vault_opens_in_its_round_alone() -> None:
    """It gives its keys by neighbour; of another owner, round or length it is refused."""
    sealed = escrow.seal_vault(KEY, [KEY, OTHER], group=b"g", rank=1, index=2)

    def opened(**changes: object) -> dict[int, bytes]:
        usual = {"group": b"g", "rank": 1, "index": 2, "neighbours": (3, 5)}
        return escrow.open_vault(KEY, sealed, **(usual | changes))  # type: ignore[arg-type]

    assert opened() == {3: KEY, 5: OTHER}
    wrong: list[Callable[[], object]] = [
        lambda: opened(group=b"h"),
        lambda: opened(rank=2),
        lambda: opened(index=1),
        lambda: opened(neighbours=(3,)),
        lambda: escrow.open_vault(OTHER, sealed, group=b"g", rank=1, index=2, neighbours=(3, 5)),
    ]
    for attempt in wrong:
        with pytest.raises(SecAggError, match="shares"):
            attempt()
