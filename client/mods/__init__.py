"""Flower mods that wrap the ClientApp, outermost first: `guard` types every failure, `privacy` writes the ledger
ahead.
"""

from client.mods.guard import guard_mod
from client.mods.privacy import privacy_mod

__all__ = ["guard_mod", "privacy_mod"]
