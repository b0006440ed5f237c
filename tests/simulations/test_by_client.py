"""Privacy by client in whole simulated runs: real clients, the coordinator's noise, both sides' ledgers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from common.config import RunConfig
from common.privacy import spent
from common.privacy.accounting.accountant import against_coordinator
from simulations.run import execute, prepare
from tests.helpers.coordinating import StoppedError, Stopping
from tests.helpers.runs import SITE, as_bytes, configuration, prepared, run

KINDS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "poisson": {"cohort": {"size": 4, "sampling": "poisson"}},
    "adaptive": {"privacy": {"clipping": "adaptive"}},
    "matrix": {"privacy": {"mechanism": "matrix"}, "cohort": {"size": 2, "sampling": "cyclic"}},
}


def by_client(kind: str, **changes: Any) -> RunConfig:
    own = KINDS[kind]
    privacy = {"unit": "client", "target_epsilon": 8.0, "clipping_norm": 0.5, **own.get("privacy", {})}
    rest = {key: value for key, value in own.items() if key != "privacy"}
    return configuration(rounds=6, data={"clients": 8}, privacy=privacy, **rest, **changes)


@pytest.mark.parametrize("kind", KINDS)
class TestRun:
    def test_keeps_its_target_in_the_coordinator_s_ledger(self, kind: str, tmp_path: Path) -> None:
        """Counted for clients; real clients answer every message."""
        config = by_client(kind)
        _, log = run(tmp_path / "run", config)
        assert all(not failures for failures in log.failures)
        possible = prepared(tmp_path / "run", config)
        assert possible.plan is not None
        assert possible.sites.ledgers is not None
        events = possible.sites.ledgers.coordinator(possible.plan.budget).events()
        assert [event.server_round for event in events] == [1, 2, 3, 4, 5, 6]
        assert 0 < spent(events, budget=possible.plan.budget, unit="client") <= 8
        assert set(possible.spent().values()) == {spent(events, budget=possible.plan.budget, unit="client")}

    def test_costs_the_examples_of_a_site_in_the_site_s_own_ledger(self, kind: str, tmp_path: Path) -> None:
        """As often as it took part; and without end against the coordinator, which saw its update."""
        config = by_client(kind)
        run(tmp_path / "run", config)
        possible = prepared(tmp_path / "run", config)
        assert possible.plan is not None
        assert possible.sites.ledgers is not None
        for name, epsilon in possible.sites_spent().items():
            ledger = possible.sites.ledgers.of(name)
            events = ledger.events()
            assert len(events) <= possible.plan.participations
            assert 0 <= epsilon <= possible.plan.site_budget.epsilon
            if events:
                assert spent(against_coordinator(events), budget=ledger.budget) == float("inf")

    def test_repeats_to_the_bit_with_fixed_noise_also_after_a_stop(self, kind: str, tmp_path: Path) -> None:
        """Whoever stops it, wherever: no noise is drawn twice, nothing is released twice."""
        config = by_client(kind)

        def course(path: Path, observer: Any = None) -> dict[str, tuple[str, bytes]]:
            return as_bytes(run(path, config, observer=observer, insecure_seed=3)[0].arrays)

        whole = course(tmp_path / "whole")
        for place in ("started", "recorded"):
            with pytest.raises(StoppedError):
                course(tmp_path / place, Stopping(place, 4))
            assert course(tmp_path / place) == whole


def test_the_model_that_is_left_has_noise_of_the_plan_s_size(tmp_path: Path) -> None:
    """With a learning rate of next to nothing only noise moves it: rounds times noise over the cohort.

    The sum of squares over their variance is chi-square; the bounds raise a false alarm with probability 1e-6.
    """
    config = by_client("fixed", training={"learning_rate": 1e-9})
    possible = prepare(config, folder=tmp_path, site_file=SITE)
    assert possible.plan is not None
    start = {name: tensor.detach().numpy().copy() for name, tensor in possible.model.named_parameters()}
    outcome = execute(possible)
    moved = np.concatenate([(outcome.arrays[name] - start[name]).ravel() for name in start])
    stddev = possible.plan.noise_stddev * 6**0.5 / 8
    squares = float(np.square(moved / stddev).sum())
    assert stats.chi2.ppf(5e-7, len(moved)) < squares < stats.chi2.isf(5e-7, len(moved))
