"""What rows of a large population tell, and that a resumed run is held to them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from common.errors import LedgerError
from common.privacy import PrivacyPlan
from server.job import RoundRecord
from server.results import MOST_LISTED, RoundKeeper
from server.store import RunFolder
from tests.helpers.runs import configuration


class Ledgers:
    """What was spent, by client; whoever is not there spent nothing."""

    def __init__(self, **spent: float) -> None:
        self.spent = spent
        self.asked: list[Sequence[str] | None] = []

    def __call__(self, clients: Sequence[str] | None) -> dict[str, float]:
        self.asked.append(clients)
        return {name: self.spent.get(name, 0.0) for name in (self.spent if clients is None else clients)}


class Plan:
    """As much of a plan as is looked at."""

    def __init__(self, *, central: bool) -> None:
        self.central = central


def record(server_round: int, cohort: list[str]) -> RoundRecord:
    return RoundRecord(
        server_round=server_round, cohort=cohort, survivors=cohort, failures={}, train_loss=None, accuracy=None,
        loss=None, aggregate_refused=False, seconds={},
    )  # fmt: skip


def keeper(folder: RunFolder, ledgers: Ledgers, *, clients: int, central: bool = False) -> RoundKeeper:
    return RoundKeeper(folder, spent=ledgers, plan=cast(PrivacyPlan, Plan(central=central)), clients=clients)


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    with RunFolder.create(configuration(), tmp_path / "run") as folder:
        yield folder


class TestLargePopulation:
    """More clients than are listed."""

    @pytest.mark.parametrize("central", [False, True])
    def test_a_row_tells_of_its_cohort_only(self, folder: RunFolder, central: bool) -> None:
        """And no ledger of anybody else is read."""
        ledgers = Ledgers()
        kept = keeper(folder, ledgers, clients=MOST_LISTED + 1, central=central)
        for server_round, cohort in ((1, ["a", "b"]), (2, ["c"])):
            ledgers.spent |= dict.fromkeys(cohort, 2.0 / server_round)
            kept.round_finished(record(server_round, cohort))
        kept.close()
        assert [row["epsilon"] for row in folder.rounds()] == [{"a": 2.0, "b": 2.0}, {"c": 1.0}]
        assert ledgers.asked == [[], ["a", "b"], ["c"]]
        assert (kept.epsilon, kept.most_epsilon) == ({"c": 1.0}, 2.0)

    def test_a_resumed_run_is_held_to_what_any_row_told(self, folder: RunFolder) -> None:
        """Of everybody whom a row names, as it was told last."""
        ledgers = Ledgers(a=1.0, b=1.0)
        kept = keeper(folder, ledgers, clients=2000)
        kept.round_finished(record(1, ["a", "b"]))
        ledgers.spent["a"] = 2.0
        kept.round_finished(record(2, ["a"]))
        kept.close()
        assert keeper(folder, ledgers, clients=2000).most_epsilon == 2.0
        for name, less in (("a", 1.5), ("b", 0.0)):
            with pytest.raises(LedgerError, match=f"the ledger of {name} holds less"):
                keeper(folder, Ledgers(**{**ledgers.spent, name: less}), clients=2000)


def test_a_small_population_is_told_of_in_every_row(folder: RunFolder) -> None:
    """Of everybody, whoever was asked."""
    ledgers = Ledgers(a=1.0, b=0.0)
    kept = keeper(folder, ledgers, clients=2)
    kept.round_finished(record(1, ["a"]))
    kept.close()
    assert folder.rounds()[0]["epsilon"] == {"a": 1.0, "b": 0.0}
