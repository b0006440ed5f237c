"""What a thousand attached sites cost the coordinator while nothing happens; and a round over some of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

from common.crypto import PartyKeys, read_csr
from common.kit import KitFacts
from common.kit_files import add_pins, begin_kit, complete_kit
from common.pins import Pins
from server.provisioning import Registry
from simulations.benchmarks.plane.processes import line, module, tell

SITES, QUICK_SITES = 1000, 200
ASKED = 100
PROCESSES = 4


def figures(folder: Path, kits: Path, *, quick: bool) -> dict[str, float]:
    """Megabytes (10^6 bytes) and share of a core of the coordinator's process; seconds of a round over 100 of them.

    `quick` attaches 200 sites and extrapolates to nothing: its figures have the number in their names.
    """
    sites = QUICK_SITES if quick else SITES
    folder.mkdir()
    enrol(folder, kits / "server", sites)
    with ExitStack() as stack:
        seconds = 20 if quick else 120
        coordinator = stack.enter_context(module("crowd", kits / "server", sites, ASKED, seconds, folder / "run"))
        address = f"127.0.0.1:{line(coordinator)}"
        share = sites // PROCESSES
        crowds = [
            stack.enter_context(module("waiting", address, folder, i * share, (i + 1) * share))
            for i in range(PROCESSES)
        ]
        for crowd in crowds:
            line(crowd)
        tell(coordinator)
        measured = json.loads(line(coordinator))
    return {
        f"idle_{sites}_rss_mb": measured["rss_mb"],
        f"idle_{sites}_core_percent": measured["core_percent"],
        f"round_over_{ASKED}_of_{sites}_seconds": measured["round_seconds"],
    }


def enrol(folder: Path, server: Path, sites: int) -> None:
    """So many more sites at a coordinator, each with a certificate, pinning it alone: kits that pin a thousand parties
    each would be two gigabytes.
    """
    registry = Registry.open(server)
    coordinator = registry.pins().coordinator
    records = []
    for i in range(sites):
        keys = PartyKeys.generate(f"crowd-{i:04d}", "site")
        facts = KitFacts(federation=registry.facts.federation, name=keys.record.name, role="site")
        (kit := folder / keys.record.name).mkdir(mode=0o700)
        key = read_csr(begin_kit(kit, facts, keys))
        pins = Pins.of(registry.facts.federation, [coordinator, keys.record])
        chain = registry.issue(key, role="site", name=keys.record.name)
        complete_kit(kit, server=registry.facts.server, root=registry.root, chain=chain, pins=pins)
        records.append(keys.record)
    add_pins(server, records)
