"""The plane's benchmark runs real parties, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.benchmarks.plane import bulk, idle, rounds, sealing, suite


@pytest.fixture(scope="module")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return suite.make_kits(tmp_path_factory.mktemp("plane"), 2)


def test_sealing_and_opening_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair seals one message and opens it again."""
    monkeypatch.setattr(sealing, "SIZE", 3 << 20)
    figures = sealing.figures(pairs=2)
    assert set(figures) == {"seal_gb_per_second", "open_gb_per_second"}
    assert all(value > 0 for value in figures.values())


def test_an_upload_goes_both_ways_beside_a_plain_socket(kits: Path) -> None:
    """The same bytes over TLS alone, over the plane, and sealed over the plane."""
    figures = bulk.figures(kits / "server", kits / bulk.SITE, size=2 << 20, pairs=1)
    assert set(figures) == {"upload_over_raw_tls", "transport_over_raw_tls"}
    assert all(value > 0 for value in figures.values())
    assert (kits / "server" / "received").read_bytes() == (kits / bulk.SITE / "payload").read_bytes()


def test_a_round_has_an_update_of_every_site(kits: Path) -> None:
    """Coordinator and sites are processes; a site that fails would end it."""
    measured = rounds.run(kits, sites=2, megabytes=0.5, rounds=2)
    assert measured["round_seconds"] > 0
    assert measured["models"] > 0


@pytest.mark.slow
def test_sites_that_wait_are_counted_and_can_be_asked(
    kits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures' names tell how many they were."""
    monkeypatch.setattr(idle, "QUICK_SITES", 8)
    monkeypatch.setattr(idle, "ASKED", 4)
    figures = idle.figures(tmp_path / "crowd", kits, quick=True)
    assert set(figures) == {"idle_8_rss_mb", "idle_8_core_percent", "round_over_4_of_8_seconds"}
