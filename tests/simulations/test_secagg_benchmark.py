"""The benchmark of secure aggregation runs the real parties, and measures what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.secagg import SecAggError
from common.secagg.masks import MaskKey
from simulations.benchmarks.plane import suite
from simulations.benchmarks.secagg import epochs, masking, rounds
from simulations.benchmarks.secagg.crowd import Crowd


def test_masks_are_measured_beside_their_cipher_and_flowers() -> None:
    """All three in the same run, over the same number of values."""
    figures = masking.figures(repeats=1, values=5000)
    assert set(figures) == {
        "mask_100x1m_seconds",
        "mask_100x10m_seconds",
        "mask_gb_per_second",
        "mask_over_cipher",
        "flower_mask_100x1m_seconds",
    }
    assert all(value > 0 for value in figures.values())


def test_the_cipher_alone_makes_as_many_bytes_as_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block after another up to the size, under every key."""
    made: list[int] = []

    class Counting:
        def __init__(self, key: bytes) -> None:
            assert len(key) == 32

        def encrypt_into(self, nonce: bytes, data: memoryview, aad: None, buffer: memoryview) -> None:
            assert len(buffer) == len(data) + 16
            made.append(len(data))

    monkeypatch.setattr(masking, "AESGCM", Counting)
    masking.stream([MaskKey(bytes(32), 1)] * 3, (1 << 18) + 100)
    assert sum(made) == 3 * ((1 << 18) + 100)


def test_an_epoch_of_a_hundred_is_measured_at_both_ends() -> None:
    """Set-up by client in time and bytes, and the coordinator's time from the survivors to the sum."""
    figures = epochs.of_a_hundred(rounds=1, count=11, values=50)
    assert set(figures) == {
        "unmask_100x1m_seconds",
        "setup_100_seconds",
        "setup_100_kb",
        "setup_100_received_kb",
    }
    assert all(value > 0 for value in figures.values())


def test_a_crowd_is_measured_by_a_sample() -> None:
    """The figure's name says how many they were."""
    figures = epochs.of_a_crowd(count=40, values=100)
    assert set(figures) == {"client_40x100k_seconds", "client_40x100k_setup_seconds"}
    assert figures["client_40x100k_seconds"] > figures["client_40x100k_setup_seconds"] / 16 > 0


def test_only_measured_members_are_on_the_scale(tmp_path: Path) -> None:
    """Of six members every third is measured; a masked update is four bytes an entry and one for the weight."""
    crowd = Crowd(tmp_path, count=6, colluding=1, values=10, every=3)
    group = crowd.set_up()
    crowd.round(group, server_round=1, dropped={"site-0001"})
    assert crowd.measured == {"site-0000", "site-0003"}
    assert crowd.sent["mask"] == 2 * 4 * 11
    assert crowd.sent["set-up"] > 0
    assert crowd.seconds["unmasking"] > 0


def test_a_wrong_sum_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast and wrong ends the benchmark."""
    crowd = Crowd(tmp_path, count=4, colluding=1, values=10)
    group = crowd.set_up()
    monkeypatch.setattr("common.secagg.round.add_packed", lambda total, data, bits: np.add(total, 1, out=total))
    with pytest.raises((RuntimeError, SecAggError)):
        crowd.round(group, server_round=1, dropped=())


def test_rounds_go_both_ways_over_the_plane(tmp_path: Path) -> None:
    """Masked and sealed runs in turn; a site that fails would end them."""
    kits = suite.make_kits(tmp_path, 3)
    figures = rounds.figures(kits, pairs=1, rounds=2, sites=3, values=1000)
    assert set(figures) == {"round_10x1m_seconds", "round_10x1m_over_sealed"}
    assert all(value > 0 for value in figures.values())
