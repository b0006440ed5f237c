"""What a run's result says of its privacy, and who keeps a ledger of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from common.data import schema_of
from common.guarantee import UPDATE_REPLACED
from common.models.weights import ModelWeights
from common.privacy import PrivacyPlan
from common.site import Site
from server.planning import plan_run
from server.results import describe_privacy
from server.service.ledgers import coordinators_ledger, spent_by_run
from tests.helpers.releasing import client_private, plan_of
from tests.helpers.runs import configuration

SHARED: dict[str, Any] = {"privacy": {"secure_aggregation": True}}


def told(plan: PrivacyPlan, config: Any, rounds: int = 0) -> dict[str, Any]:
    """What the result of a run says in which each client took part so often."""
    taken = {"a": rounds} if rounds else {}
    epsilon = {"a": plan.epsilon_after(rounds)} if rounds else {}
    return describe_privacy(config, plan, epsilon=epsilon, taken=taken, examples_epsilon={}, epsilon_is="told")


class TestResult:
    """`privacy` in `result.json`."""

    def test_names_whom_the_clients_noise_holds_against(self) -> None:
        """Unit, relation, trust, and how many honest clients' noise is counted."""
        config = client_private(**SHARED)
        document = told(plan_of(config, 5), config, 4)
        assert (document["unit"], document["trust"], document["relation"]) == ("client", "cohort", UPDATE_REPLACED)
        assert document["shares"] == {
            "mechanism": "skellam", "bits": 32, "clients": 5, "honest": 2, "colluding": 1,
        }  # fmt: skip
        assert document["noise_stddev"] >= document["noise_multiplier"] * document["clipping_norm"]

    def test_replacing_an_update_costs_more_and_says_how_it_is_counted(self) -> None:
        """By Renyi accounting: nobody has computed a privacy loss of such noise."""
        config = client_private(privacy={"secure_aggregation": True, "noise_multiplier": 5.0})
        document = told(plan_of(config, 5), config, 4)
        assert document["epsilon_replace_one"]["a"] > document["epsilon"]["a"] > 0
        assert document["replace_one_by"] == "Renyi, best order"

    def test_of_the_coordinator_s_noise_names_the_coordinator(self) -> None:
        """As before."""
        config = client_private()
        document = told(plan_of(config, 5), config, 4)
        assert (document["trust"], document["relation"], document["shares"]) == ("coordinator", "add/remove", None)
        assert document["replace_one_by"] == "privacy loss"

    def test_of_a_federation_knows_no_epsilon_of_the_sites(self) -> None:
        """Each site's own ledger does."""
        config = client_private(**SHARED)
        document = told(plan_of(config, 5), config)
        assert (document["epsilon"], document["epsilon_replace_one"]) == ({}, {})


class TestCoordinatorsLedger:
    """It is for noise of the coordinator's own."""

    @pytest.mark.parametrize(("changes", "keeps"), [({}, True), (SHARED, False)], ids=["central", "distributed"])
    def test_is_kept_where_the_coordinator_adds_noise(
        self, changes: dict[str, Any], keeps: bool, tmp_path: Path
    ) -> None:
        """Nothing is opened or told elsewhere."""
        config = client_private(**changes)
        plan = plan_of(config, 5)
        ledger = coordinators_ledger(config, plan, state=tmp_path / "state", kit=tmp_path / "kit")
        assert (ledger is not None) is keeps
        assert bool(spent_by_run(ledger, plan, clients=["a"], run=config.digest())) is keeps


def test_the_plan_covers_every_value_that_the_clients_send() -> None:
    """Both sides make the codec from that number."""
    model = {"name": "linear"}
    data = {"name": "digits", "partition": "iid", "clients": 5}
    config = client_private(**SHARED, model=model, data=data)
    planned = plan_run(config, schema_of(config.data, site=Site()), clients=5, site=Site())
    sent = sum(values.size for values in ModelWeights(planned.model).shared().values())
    assert planned.plan is not None
    assert planned.plan.distributed is not None
    assert planned.plan.dimensions == planned.plan.distributed.dimensions == sent


def test_a_run_without_privacy_has_no_ledger_here(tmp_path: Path) -> None:
    """Nor a plan."""
    assert coordinators_ledger(configuration(), None, state=tmp_path, kit=tmp_path) is None
