"""Flower mods that wrap the ClientApp, outermost first.

`guard` types every failure; `sealed` opens what came and seals the answer; `secagg` masks an update; `compression`
shortens one; `privacy` applies the site's policy and writes the ledger ahead; `clipping` bounds an update with privacy
unit client.
"""

from client.mods.clipping import clipping_mod
from client.mods.compression import compression_mod
from client.mods.guard import guard_mod
from client.mods.privacy import PrivacyResources, privacy_mod
from client.mods.sealed import ReplayGuard, sealed_mod
from client.mods.secagg import MemberResources, answer_steps, secagg_mod

__all__ = [
    "MemberResources",
    "PrivacyResources",
    "ReplayGuard",
    "answer_steps",
    "clipping_mod",
    "compression_mod",
    "guard_mod",
    "privacy_mod",
    "sealed_mod",
    "secagg_mod",
]
