"""Flower mods that wrap the ClientApp, outermost first.

`guard` types every failure; `privacy` applies the site's policy and writes the ledger ahead; `clipping` bounds an
update where the coordinator adds the noise.
"""

from client.mods.clipping import clipping_mod
from client.mods.guard import guard_mod
from client.mods.privacy import PrivacyResources, privacy_mod

__all__ = ["PrivacyResources", "clipping_mod", "guard_mod", "privacy_mod"]
