"""The main job on real data: four hospitals, each alone, federated, with privacy, pooled.

The accuracies of the arms without privacy follow from seeds. The private arm's noise comes from the operating system:
its mean over ten folds was 0.798 with a standard deviation of 0.0041 over eight runs, so that a run falls below the
floor of 0.785 about once in a thousand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import coterie

SITES = ["cleveland", "hungary", "switzerland", "va-long-beach"]


def simulate(capsys: pytest.CaptureFixture[str], folder: Path, *words: str) -> dict[str, Any]:
    assert coterie("simulate", "heart", "--out", folder / "run", "--json", *words) == 0
    out, err = capsys.readouterr()
    assert err == ""
    document = json.loads(out)
    assert isinstance(document, dict)
    return document


def check_form(document: dict[str, Any]) -> None:
    """The documented keys: `federated.accuracy_mean` and so on, `alone.SITE`, and what privacy cost each site."""
    for arm in ("federated", "pooled", "federated_dp"):
        assert 0 <= document[arm]["accuracy_mean"] <= 1
        assert 0 <= document[arm]["auc_mean"] <= 1
        assert list(document[arm]["sites"]) == SITES
    assert list(document["alone"]) == SITES
    assert all(0 <= document["alone"][site]["accuracy_mean"] <= 1 for site in SITES)
    assert list(document["federated_dp"]["epsilon"]) == SITES
    assert document["federated_dp"]["delta"] == 1e-5
    assert document["federated_dp"]["unit"] == "example"
    assert document["federated_dp"]["relation"] == "add/remove"
    for site in SITES:
        assert 2.9 < document["federated_dp"]["epsilon"][site] <= 3.0
        assert document["comparison"]["gains"][site]["federated"]["verdict"] in {"gains", "loses", "no clear gain"}


def test_two_folds_have_the_form_and_most_of_the_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On two folds of ten rounds all arms beat the majority class of 0.553 by far: floors 0.76, with privacy 0.75.

    Measured: federated 0.791; private 0.783 with a standard deviation of 0.006 over ten runs, five of which lie between
    it and the floor.
    """
    document = simulate(capsys, tmp_path, "--set", "data.folds=2", "--set", "rounds=10", "--workers", "1")
    check_form(document)
    assert document["federated"]["accuracy_mean"] >= 0.76
    assert document["pooled"]["accuracy_mean"] >= 0.76
    assert document["federated_dp"]["accuracy_mean"] >= 0.75


@pytest.mark.slow
def test_ten_folds_reach_what_is_promised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Over ten folds: pooled minus federated at most 0.01, federated at least 0.795, at epsilon 3 at least 0.785."""
    document = simulate(capsys, tmp_path, "--workers", "2")
    check_form(document)
    assert document["comparison"]["folds"] == 10
    assert document["comparison"]["pooled_minus_federated"] <= 0.01
    assert document["federated"]["accuracy_mean"] >= 0.795
    assert document["federated_dp"]["accuracy_mean"] >= 0.785
