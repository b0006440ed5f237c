"""Two hundred rounds of six processes, any of which may be killed at any moment."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from client.ledgers import IDENTITY, LEDGERS, SiteLedgers
from common.config import RunConfig, load_config
from common.privacy import Budget
from server.service.audit import AUDIT, read_lines
from server.store import RunFolder
from simulations.federation import PLAIN, simulated_model
from simulations.loopback import SITES, LocalFederation, Party
from tests.helpers.processes import coterie, wait_until

SEED = 20
MOMENTS = ("round-started", "asked", "received", "round-ended")
"""Lines of the audit log at which somebody may be killed."""


def kills(count: int, rounds: int) -> Iterator[tuple[int, str, str]]:
    """Round, moment and victim of each kill, in order; the same ones each time."""
    draw = random.Random(SEED)
    victims = ["server", *SITES]
    for server_round in sorted(draw.sample(range(2, rounds), count)):
        yield server_round, draw.choice(MOMENTS), draw.choice(victims)


def soak(folder: Path, config: RunConfig, *, count: int) -> Path:
    """Train while processes are killed and started again; the folder of the run that came of it."""
    with LocalFederation(folder) as parties:
        parties.start()
        parties.wait_until_answered()
        with parties.operator() as coordinator:
            run = coordinator.submit(config)["run"]
        audit, seen = parties.state / AUDIT, 0
        for server_round, moment, name in kills(count, config.rounds):
            victim: Party = parties.server if name == "server" else parties.clients[name]

            def reached(server_round: int = server_round, moment: str = moment) -> bool:
                nonlocal seen
                lines = list(read_lines(audit))
                fresh, seen = lines[seen:], len(lines)
                return any(
                    line["event"] == "run-ended" or (line["event"] == moment and _round_of(lines) >= server_round)
                    for line in fresh
                )

            wait_until(reached)
            victim.kill()
            victim.start()
        parties.wait_until_answered()
        with parties.operator() as coordinator:
            for status in coordinator.follow("status", run):
                ended = status
            assert ended["status"] == "completed", ended
            coordinator.fetch(run, folder / "fetched")
        assert coterie("audit-log", "verify", "--kit", parties.kits / "server") == 0
    return folder / "fetched"


def _round_of(lines: list[dict[str, object]]) -> int:
    rounds = [line["round"] for line in lines if isinstance(line.get("round"), int)]
    return max(rounds, default=0)  # type: ignore[type-var,return-value]


def events_at(kits: Path, site: str) -> int:
    """How many events the ledger of a site's data holds, verified."""
    ledgers = SiteLedgers(kits / site / "state" / LEDGERS, kits / site / IDENTITY, Budget.opened(10.0, 1e-5))
    (name,) = ledgers.names()
    return len(ledgers.named(name).events())


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_two_hundred_rounds_with_kills_end_with_the_right_model(tmp_path: Path) -> None:
    """No round is lost, the model is to the byte that of a simulation, and every round is in every site's ledger."""
    config = load_config("heart", [*PLAIN, "privacy.unit=none", "rounds=200"]).config
    fetched = soak(tmp_path, config, count=24)
    assert (fetched / "model.safetensors").read_bytes() == simulated_model(config, tmp_path / "simulation")
    rows = RunFolder.open(fetched).rounds()
    assert [row["server_round"] for row in rows] == list(range(1, 201))
    assert [row["survivors"] for row in rows] == [list(SITES)] * 200
    assert all(events_at(tmp_path / "kits", site) >= 200 for site in SITES)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_private_rounds_with_kills_are_never_under_reported(tmp_path: Path) -> None:
    """With privacy a kill costs at most its round's event again, never a round that nobody counts."""
    private = ["privacy.unit=example", "privacy.noise_multiplier=20", "privacy.target_epsilon="]
    config = load_config("heart", [*PLAIN, *private, "rounds=30"]).config
    fetched = soak(tmp_path, config, count=8)
    rows = RunFolder.open(fetched).rounds()
    assert [row["server_round"] for row in rows] == list(range(1, 31))
    for site in SITES:
        took_part = sum(site in row["survivors"] for row in rows)
        assert took_part <= events_at(tmp_path / "kits", site) <= 30 + 8
