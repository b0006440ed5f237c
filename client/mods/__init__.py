"""Flower mods that wrap the ClientApp, outermost first.

`guard` types every failure; `sealed` opens what came and seals the answer; `compression` shortens an update; `privacy`
applies the site's policy and writes the ledger ahead; `clipping` bounds an update where the coordinator adds the noise.
"""

from client.mods.clipping import clipping_mod
from client.mods.compression import compression_mod
from client.mods.guard import guard_mod
from client.mods.privacy import PrivacyResources, privacy_mod
from client.mods.sealed import ReplayGuard, sealed_mod

__all__ = [
    "PrivacyResources",
    "ReplayGuard",
    "clipping_mod",
    "compression_mod",
    "guard_mod",
    "privacy_mod",
    "sealed_mod",
]
