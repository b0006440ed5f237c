"""A member's secrets of an epoch: how its pair keys, vaults, shares and commitments are made of them, and opened.

Of each round a member has two secrets of 32 bytes: b, from which its self mask comes, and kappa, the key of its vault,
which holds the round's keys of its pairs. Both are shared among its neighbours, round by round: b_1, kappa_1, b_2, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from common.secagg.keys import KEY_BYTES, derive, digest, joined, number
from common.secagg.refusal import SecAggError

SELF, VAULT = 0, 1
"""Kinds of secrets: b and kappa."""
_NONCE: Final = bytes(12)
"""Every key here encrypts one plaintext, once."""


def pair_secret(agreed: bytes, encapsulated: bytes, *, group: bytes, names: tuple[str, str], offer: bytes) -> bytes:
    """z_ij, from X25519 and ML-KEM together: who breaks one of them alone learns nothing.

    Args:
        agreed: The X25519 secret.
        encapsulated: The ML-KEM secret.
        group: The group's digest.
        names: Of both, sorted.
        offer: SHA-256 of the ML-KEM ciphertext, as ML-KEM alone does not bind it.
    """
    return derive(agreed + encapsulated, "pair secret", names[0].encode(), names[1].encode(), offer, salt=group)


def round_keys(secret: bytes, rounds: int) -> bytes:
    """k_ij,r of all rounds from 1, one after another."""
    return b"".join(derive(secret, "round", number(index)) for index in range(1, rounds + 1))


def channel_key(secret: bytes, *, sender: str, receiver: str) -> bytes:
    """What seals the shares of one member for another, in this direction."""
    return derive(secret, "shares", sender.encode(), receiver.encode())


def seal_shares(key: bytes, shares: bytes, *, group: bytes, sender: int, receiver: int) -> bytes:
    """Shares for one neighbour."""
    return AESGCM(key).encrypt(_NONCE, shares, _channel(group, sender, receiver))


def open_shares(key: bytes, sealed: bytes, *, group: bytes, sender: int, receiver: int) -> bytes | None:
    """What `seal_shares` sealed; None if it does not open: then no share of that member is held."""
    try:
        return AESGCM(key).decrypt(_NONCE, sealed, _channel(group, sender, receiver))
    except (InvalidTag, ValueError):
        return None


def seal_vault(kappa: bytes, keys: Sequence[bytes], *, group: bytes, rank: int, index: int) -> bytes:
    """A round's pair keys, under that round's kappa."""
    return AESGCM(kappa).encrypt(_NONCE, b"".join(keys), _vault(group, rank, index))


def open_vault(
    kappa: bytes, vault: bytes, *, group: bytes, rank: int, index: int, neighbours: Sequence[int]
) -> dict[int, bytes]:
    """The pair keys by neighbour.

    Raises:
        SecAggError: `shares`: its owner did not seal it so.
    """
    try:
        keys = AESGCM(kappa).decrypt(_NONCE, vault, _vault(group, rank, index))
    except (InvalidTag, ValueError) as e:
        raise SecAggError("shares") from e
    if len(keys) != KEY_BYTES * len(neighbours):
        raise SecAggError("shares")
    return {j: keys[KEY_BYTES * at : KEY_BYTES * (at + 1)] for at, j in enumerate(neighbours)}


def commitment(group: bytes, rank: int, index: int, kind: int, secret: bytes) -> bytes:
    """What shows whether shares gave the right secret, and hides it: a secret is 32 random bytes."""
    return digest("commitment", group, number(rank), number(index), number(kind), secret)


def self_mask_key(b: bytes, header: bytes) -> bytes:
    """Key of a self mask under a header."""
    return derive(b, "self", header)


def pair_mask_key(key: bytes, header: bytes) -> bytes:
    """Key of a pair's mask under a header: under two headers the masks do not cancel."""
    return derive(key, "pair", header)


def pair_mask_keys(keys: Mapping[int, bytes], header: bytes) -> dict[int, bytes]:
    """`pair_mask_key` of several pairs."""
    return {rank: pair_mask_key(key, header) for rank, key in keys.items()}


def _channel(group: bytes, sender: int, receiver: int) -> bytes:
    return joined((group, number(sender), number(receiver)))


def _vault(group: bytes, rank: int, index: int) -> bytes:
    return joined((group, number(rank), number(index)))
