"""The ClientApp of a real site: what wraps training there, in the order in which a message passes it."""

from __future__ import annotations

from pathlib import Path

from flwr.clientapp import ClientApp

from client.admission import admission_mod
from client.app import make_client_app
from client.mods import sealed_mod
from client.mods.device import device_mod
from client.mods.sealed import MOST_BYTES, ReplayGuard
from client.resources import SiteResources


def make_site_app(
    resources: SiteResources, *, seen: ReplayGuard, folder: Path | None = None, most_bytes: int = MOST_BYTES
) -> ClientApp:
    """A ClientApp that takes sealed messages alone.

    Guard, seal, admission, masks, compression, the accelerator's lock, privacy, clipping, training: what is refused
    earlier costs nothing later, and what leaves passes the same checks on its way out.

    Args:
        resources: The site's own keys, rules, data and ledgers.
        seen: Refuses orders that were taken before.
        folder: Where sealed answers are written; None keeps them in memory.
        most_bytes: Longest message that is opened.
    """
    keys = resources.kit.keys
    sealed = sealed_mod(
        lambda _: keys, resources.kit.coordinator, folder=folder, seen=seen, most_bytes=most_bytes
    )  # fmt: skip
    return make_client_app(
        resources,
        outer=[sealed, admission_mod(resources.admission)],
        mods=[device_mod],
    )
