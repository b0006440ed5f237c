"""Tables and progress print whatever a run ends with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from common.errors import FailureCode
from server.coordinator import RoundRecord
from server.job import ClockRecord
from server.store import RunFolder
from simulations.comparison import summarise
from simulations.progress import ProgressObserver
from simulations.results import FolderObserver
from simulations.tables import print_result
from tests.helpers.runs import configuration, prepared, private
from tests.simulations.test_comparison import FOLDS, HALF, RIGHT, arms, result


def printed(document: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=160)
    print_result(document, console, folder="runs/one")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def document(**changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "tiny",
        "status": "completed",
        "rounds": 3,
        "selected_round": 2,
        "accuracy": 0.75,
        "loss": 0.5,
        "majority_accuracy": 0.4,
        "clients": {"a": {"accuracy": 0.5}, "b": {"accuracy": None}},
        "privacy": None,
        "model": {"name": "linear", "parameters": 1234},
        "data": {"name": "blobs", "partition": "natural", "class_names": []},
        "seconds": {"total": 1.25},
        "comparison": None,
    }
    return {**base, **changes}


COURSE = {
    "reached": [
        {"share": share, "accuracy": share, "server_round": r, "seconds": 600.0 * r}
        for share, r in ((0.9, 1), (0.95, 2), (0.99, 3))
    ],
    "virtual": {"seconds": 3600.0, "work_seconds": 18000.0, "wasted_seconds": 4500.0, "wasted_share": 0.25},
    "staleness": {"mean": 1.5, "most": 7},
    "participation": {"clients": 1_000_000, "took_part": 40, "fewest": 0, "median": 0, "most": 3, "gini": 0.9},
    "fairness": {"clients": 50, "worst_tenth": 0.3, "median": 0.6, "best_tenth": 0.9, "deviation": 0.2},
}


class TestTables:
    def test_usual_run(self) -> None:
        """Accuracy stands beside its baseline; the chosen round and the report's place are told."""
        text = printed(document())
        assert all(word in text for word in ("0.750", "0.400", "model of round 2", "1,234", "runs/one/report.html"))

    @pytest.mark.parametrize(
        "changes",
        [
            {"accuracy": None, "loss": None},
            {"loss": None},
            {"clients": {}},
            {"clients": {"a": {"accuracy": None}}},
            {"status": "stopped-early"},
            {"privacy": {"epsilon": {}, "target_delta": 1e-5, "unit": "example", "relation": "add/remove"}},
            {"privacy": {"epsilon": {"a": 0.0}, "target_delta": 1e-5, "unit": "example", "relation": "add/remove"}},
        ],
    )
    def test_odd_runs(self, changes: dict[str, Any]) -> None:
        """What was not measured is left out; nothing fails."""
        assert "runs/one" in printed(document(**changes))

    def test_comparison_without_privacy(self) -> None:
        """Without a private arm there is no column of epsilon and no cost of privacy."""
        rows = arms(federated=[{"a": RIGHT}] * 2, pooled=[{"a": HALF}] * 2, alone__a=[{"a": HALF}] * 2)
        text = printed(document(comparison=summarise(rows, configuration(**FOLDS))))
        assert "a alone" in text
        assert "epsilon" not in text

    def test_comparison_with_privacy(self) -> None:
        """With one, epsilon and delta stand beside unit and relation."""
        rows = arms(federated=[{"a": RIGHT}] * 2, pooled=[{"a": HALF}] * 2, alone__a=[{"a": HALF}] * 2)
        rows += [result("federated_dp", fold, {"a": HALF}, epsilon={"a": 2.971}) for fold in (0, 1)]
        text = printed(document(comparison=summarise(rows, private(**FOLDS))))
        assert all(word in text for word in ("2.98", "1e-05", "example", "add/remove", "releases none"))

    def test_comparison_without_auc_or_examples(self) -> None:
        """One class only, or no held-out examples at a site: cells stay empty."""
        rows = [
            result(arm, fold, {"a": RIGHT, "b": []}, truths={"a": [1] * 4, "b": []}, scores={"a": [0.9] * 4, "b": []})
            for arm in ("federated", "pooled", "alone.a", "alone.b")
            for fold in (0, 1)
        ]
        assert "b alone" in printed(document(comparison=summarise(rows, configuration(**FOLDS))))

    def test_virtual_time_and_what_came_to_nothing(self) -> None:
        """How long on the clock, when the accuracy was all but there, and what work was wasted."""
        text = printed(document(course=COURSE))
        assert "virtual time  60 min; 95 % of the accuracy after 20 min; 99 % of the accuracy after 30 min" in text
        assert "work          5 h 00 min of devices, 25.0 % of it wasted" in text

    def test_staleness_and_participation(self) -> None:
        """How far behind updates were, and how unevenly they came."""
        text = printed(document(course=COURSE))
        assert "staleness     mean 1.50, at most 7" in text
        assert "took part     40 of 1,000,000 clients, Gini 0.90" in text

    def test_fairness_of_many_clients(self) -> None:
        """Of many the worst and best tenth instead of the very worst and best, which are chance."""
        text = printed(document(course=COURSE))
        assert "per client    worst tenth 0.300, median 0.600, best tenth 0.900" in text

    def test_population_beyond_those_measured(self) -> None:
        """A million clients are a million, however few are listed."""
        assert "1,000,000 clients" in printed(document(population={"clients": 1_000_000}))

    def test_how_clients_were_trained(self) -> None:
        """Stacked or not, and why."""
        record = {"batching": "auto", "why": "the model has dropout", "stacked": False, "probes": []}
        assert "Clients trained one by one: the model has dropout." in printed(document(batching=record))
        assert "Clients trained" not in printed(document())

    @pytest.mark.parametrize("width", [20, 40, 80])
    def test_narrow_terminals(self, width: int) -> None:
        """A narrow terminal wraps, and loses no result."""
        console = Console(file=io.StringIO(), width=width)
        print_result(document(), console, folder="x")
        assert "0.750" in console.file.getvalue()  # type: ignore[attr-defined]


class TestProgress:
    def show(self, folder: Path, *, private_run: bool, clock: float | None = None) -> str:
        """What a terminal shows after a round of one private or plain run."""
        config = private(rounds=2) if private_run else configuration(rounds=2)
        run = prepared(folder / "ledger", config)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
        console = Console(file=io.StringIO(), width=160, force_terminal=True)
        with RunFolder.create(config, folder / "run") as run_folder, Progress(*columns, console=console) as progress:
            keeper = FolderObserver(run, run_folder)
            shown = ProgressObserver(progress, keeper, rounds=2, target_epsilon=config.privacy.target_epsilon)
            shown.round_started(1, ["client-00", "client-01"])
            shown.reply_received("client-00", None)
            shown.reply_received("client-01", FailureCode.CLIENT_LOST)
            record = RoundRecord(
                aggregate_refused=False,
                server_round=1, cohort=["client-00", "client-01"], survivors=["client-00"],
                failures={"client-01": "client-lost"}, train_loss=0.25, accuracy=0.5, loss=None, seconds={},
                clock=None if clock is None else ClockRecord(at_seconds=clock, work_seconds=1, wasted_seconds=0),
            )  # fmt: skip
            keeper.round_finished(record)
            shown.round_finished(record)
            keeper.close()
            progress.refresh()
        return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]

    def test_shows_round_replies_accuracy_and_loss(self, tmp_path: Path) -> None:
        """A terminal shows the round's figures and how many clients failed."""
        text = self.show(tmp_path, private_run=False)
        assert all(word in text for word in ("rounds", "1 failed", "accuracy 0.500", "loss 0.250"))
        assert "epsilon" not in text

    def test_shows_the_clock(self, tmp_path: Path) -> None:
        """Where there is virtual time, a person sees how far it is."""
        assert "12 min on the clock" in self.show(tmp_path, private_run=False, clock=720.0)

    def test_shows_epsilon_against_its_budget(self, tmp_path: Path) -> None:
        """A private run shows what was spent of what."""
        assert "of 5" in self.show(tmp_path, private_run=True)

    def test_masked_updates_move_the_bar_and_their_fates_do_not_move_it_again(self, tmp_path: Path) -> None:
        """Under secure aggregation a client's fate is known only once its sum is open, or given up."""
        run, console = prepared(tmp_path / "ledger"), Console(file=io.StringIO(), width=160)
        with RunFolder.create(configuration(), tmp_path / "run") as folder, Progress(console=console) as progress:
            shown = ProgressObserver(progress, FolderObserver(run, folder), rounds=1, target_epsilon=None)
            shown.round_started(1, ["client-00", "client-01"])
            courses = []
            for told in (
                lambda: shown.update_received("client-00"),
                lambda: shown.update_received("client-01"),
                lambda: shown.reply_received("client-00", None),
                lambda: shown.reply_received("client-01", FailureCode.AGGREGATION_ABORTED),
            ):
                told()
                courses.append((progress.tasks[1].completed, progress.tasks[1].fields["detail"]))
        assert courses == [(1, ""), (2, ""), (2, ""), (2, "1 failed")]
