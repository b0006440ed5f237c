"""Secure aggregation and differential privacy together: noise of the sites in every sum, and every epsilon a replay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w

from common.config import RunConfig
from common.privacy import spent
from server.store import RunFolder
from simulations.run import execute, prepare
from tests.helpers.processes import coterie
from tests.helpers.runs import SITE, configuration, prepared, private, run, tree
from tests.simulations.test_secagg import FLOAT32, bound_of, furthest, plain

BY_CLIENT: dict[str, Any] = {"unit": "client", "target_epsilon": 8.0, "clipping_norm": 0.5, "secure_aggregation": True}


def distributed(**changes: Any) -> RunConfig:
    """Eight clients that add noise themselves."""
    privacy = {**BY_CLIENT, **changes.pop("privacy", {})}
    return configuration(**{"rounds": 4, "data": {"clients": 8}, "privacy": privacy, **changes})


class TestUnitExample:
    """Each site adds noise to its own training; masks change nothing about that."""

    def test_gives_the_private_run_within_the_bound(self, tmp_path: Path) -> None:
        """The same noise, fixed for this test, with masks and without; the same ledgers."""
        config = private(
            rounds=1,
            privacy={
                "unit": "example", "target_epsilon": 5.0, "expected_batch_size": 4, "sampling_rate": 0.3,
                "secure_aggregation": True,
            },
        )  # fmt: skip
        found, expected = (
            prepare(c, folder=tmp_path / str(i), site_file=SITE, insecure_seed=5)
            for i, c in enumerate((config, plain(config)))
        )
        for i in range(2):
            (tmp_path / str(i)).mkdir()
        masked, unmasked = dict(execute(found).arrays), dict(execute(expected).arrays)
        largest = max(float(np.abs(values).max()) for values in unmasked.values())
        assert furthest(masked, unmasked) <= bound_of(config, found, weight=4) + FLOAT32 * largest
        assert found.spent() == expected.spent()
        assert all(epsilon > 0 for epsilon in found.spent().values())


class TestUnitClient:
    """Each client adds its share of the noise inside the sum: nobody is trusted with an update."""

    @pytest.mark.parametrize("noise", ["skellam", "discrete-gaussian"])
    def test_keeps_its_target_by_every_client_s_own_ledger(self, noise: str, tmp_path: Path) -> None:
        """An event a round before anything leaves; what is shown is the replay of these; the coordinator has none."""
        config = distributed(secagg={"noise": noise})
        _, log = run(tmp_path / "run", config)
        assert all(not failures for failures in log.failures)
        possible = prepared(tmp_path / "run", config)
        plan, ledgers = possible.plan, possible.sites.ledgers
        assert plan is not None
        assert ledgers is not None
        shown = possible.spent()
        for client in possible.federation.clients:
            events = ledgers.of(client.name).events()
            assert [event.server_round for event in events] == [1, 2, 3, 4]
            assert {event.trust for event in events} == {"cohort"}
            assert shown[client.name] == spent(events, budget=plan.budget, unit="client")
            assert 0 < shown[client.name] <= 8
        assert not ledgers.coordinator(plan.budget).events()

    def test_the_noise_is_there(self, tmp_path: Path) -> None:
        """With a rate of next to nothing only noise moves the model: that of all clients, and so no less than that of
        the honest ones counted on. A chi-square bound that raises a false alarm once in a million.
        """
        from scipy import stats

        config = distributed(training={"learning_rate": 1e-9}, model={"name": "mlp", "options": {"hidden": 64}})
        possible = prepared(tmp_path, config)
        plan = possible.plan
        assert plan is not None
        assert plan.shares is not None
        start = {name: tensor.detach().numpy().copy() for name, tensor in possible.model.named_parameters()}
        outcome = execute(possible)
        moved = np.concatenate([(outcome.arrays[name] - start[name]).ravel() for name in start])
        counted_on = plan.noise_stddev * config.rounds**0.5 / 8
        everybody = counted_on * (8 / plan.shares.honest) ** 0.5
        squares = float(np.square(moved / everybody).sum())
        assert stats.chi2.ppf(5e-7, len(moved)) < squares < 1.1 * stats.chi2.isf(5e-7, len(moved))
        assert everybody > counted_on

    def test_is_never_the_same_twice(self, tmp_path: Path) -> None:
        """Noise comes from the operating system, also of simulated clients."""
        one, other = (run(tmp_path / str(i), distributed(rounds=1))[0].arrays for i in range(2))
        assert furthest(dict(one), dict(other)) > 0

    def test_a_result_says_whom_it_holds_against(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Against the coordinator, too; in the table, the document and the page."""
        monkeypatch.chdir(tmp_path)
        Path("tiny.toml").write_text(tomli_w.dumps(tree(data={"clients": 8}, privacy=BY_CLIENT)))
        words = ["simulate", "tiny.toml", "--site", SITE, "--workers", "1"]
        assert coterie(*words, "--out", "told") == 0
        out = " ".join(capsys.readouterr().out.split())
        assert "the coordinator too" in out
        assert "sums of 8 or more updates" in out
        assert coterie(*words, "--out", "document", "--json") == 0
        told, err = capsys.readouterr()
        document = json.loads(told)
        assert err == ""
        assert document["privacy"]["trust"] == "cohort"
        assert document["secure_aggregation"]["smallest_sum"] == 8
        last = RunFolder.open(Path("document")).rounds()[-1]
        assert last["epsilon"] == document["privacy"]["epsilon"]
        page = Path("document/report.html").read_text()
        assert "which sees nothing but sums" in page
