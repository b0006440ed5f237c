"""The comparison sets each arm beside the others on the same held-out examples, and adds nothing up wrongly."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from common.config import RunConfig
from common.errors import ConfigError
from simulations.comparison import (
    FoldResult,
    arms_of,
    check_comparable,
    fold_result,
    read_results,
    summarise,
)
from simulations.run import execute, prepare
from tests.helpers.processes import children, coterie
from tests.helpers.runs import SITE, configuration, prepared, private, tree

FOLDS: dict[str, Any] = {"data": {"folds": 2, "clients": 2}, "comparison": {"enabled": True}}


def result(arm: str, fold: int, correct: dict[str, list[bool]], **changes: Any) -> FoldResult:
    """A fold whose scores are right with certainty, and whose truths alternate."""
    truths = {site: [i % 2 for i in range(len(values))] for site, values in correct.items()}
    scores = {
        site: [float(t if right else 1 - t) for t, right in zip(truths[site], values, strict=True)]
        for site, values in correct.items()
    }
    fields = {"scores": scores, "truths": truths, "correct": correct, "epsilon": {}, **changes}
    return FoldResult(arm=arm, fold=fold, **fields)


def arms(**by_arm: list[dict[str, list[bool]]]) -> list[FoldResult]:
    return [
        result(arm.replace("__", "."), fold, correct)
        for arm, folds in by_arm.items()
        for fold, correct in enumerate(folds)
    ]


RIGHT, WRONG = [True] * 4, [False] * 4
HALF = [True, True, False, False]


class TestArms:
    def test_differ_in_nothing_but_who_trains_together(self) -> None:
        """Alone, pooled and federated are the plain run with other data; the private arm is the run itself."""
        config, plain = private(**FOLDS), configuration(**FOLDS)
        found = arms_of(config, plain, ["a", "b"])
        assert list(found) == ["federated", "federated_dp", "pooled", "alone.a", "alone.b"]
        assert found["federated"] is plain
        assert found["federated_dp"] is config
        assert found["pooled"].data.pooled
        assert found["alone.b"].data.sites == ["b"]
        assert {arm.training for arm in found.values() if arm is not config} == {plain.training}
        assert list(arms_of(plain, plain, ["a"])) == ["federated", "pooled", "alone.a"]

    @pytest.mark.parametrize("make", [private, configuration])
    def test_only_the_run_itself_is_masked(self, make: Any) -> None:
        """Under secure aggregation too, alone, pooled and without privacy are plain runs."""
        unmasked = make(**FOLDS)
        tables = unmasked.model_dump()
        tables["privacy"]["secure_aggregation"] = True
        config, plain = RunConfig.model_validate(tables), configuration(**FOLDS)
        found = arms_of(config, plain, ["a", "b"])
        assert [name for name, arm in found.items() if arm.privacy.secure_aggregation] == [
            "federated_dp" if config.private else "federated"
        ]

    @pytest.mark.parametrize("data", [{"partition": "iid"}, {"pooled": True}])
    def test_need_sites(self, data: dict[str, Any]) -> None:
        """Without the data's own groups there is nothing to compare."""
        with pytest.raises(ConfigError, match="natural"):
            check_comparable(configuration(data={**FOLDS["data"], **data}))

    @pytest.mark.parametrize(
        "changes", [{"simulation": {"devices": {"examples_per_second": 1.0}}}, {"asynchronous": {"buffer_size": 2}}]
    )
    def test_have_no_clock(self, changes: dict[str, Any]) -> None:
        """Who trains alone waits for nobody."""
        with pytest.raises(ConfigError, match="trains each site alone"):
            check_comparable(configuration(**FOLDS, **changes))


class TestFold:
    def test_is_judged_on_every_site(self, tmp_path: Path) -> None:
        """An arm that saw one site is judged on all sites' held-out examples, in their order."""
        alone = prepared(tmp_path, data={"sites": ["client-01"]})
        everyone = prepared(tmp_path).federation
        judged = fold_result("alone.client-01", alone, execute(alone), everyone)
        assert list(judged.correct) == [client.name for client in everyone.clients]
        for client in everyone.clients:
            assert judged.truths[client.name] == client.test.targets.tolist()
            assert judged.scores[client.name] == [float(right) for right in judged.correct[client.name]]

    def test_of_next_token_data_counts_positions(self, tmp_path: Path) -> None:
        """With running text every position is judged."""
        config = configuration(
            model={"name": "lstm", "options": {"embedding": 8, "hidden": 8}}, data={"name": "text", "clients": 0}
        )
        run = prepared(tmp_path, config)
        judged = fold_result("federated", run, execute(run), run.federation)
        assert {len(values) for values in judged.correct.values()} == {4 * 5}

    def test_survives_writing_and_reading(self, tmp_path: Path) -> None:
        """What an interrupted comparison kept is read back; a line that was cut off and all after it are not."""
        rows = arms(federated=[{"a": RIGHT}], pooled=[{"a": HALF}])
        from dataclasses import asdict

        lines = [json.dumps(asdict(row)) + "\n" for row in rows]
        file = tmp_path / "comparison.jsonl"
        assert read_results(file) == []
        file.write_text("".join(lines))
        assert read_results(file) == rows
        file.write_text(lines[0] + lines[1][:20])
        assert read_results(file) == rows[:1]
        file.write_text('{"arm": "federated"}\n')
        assert read_results(file) == []


class TestSummary:
    def test_of_two_sites_and_two_folds(self) -> None:
        """Means are over folds of all examples; gains are paired fold by fold on a site's own examples."""
        rows = arms(
            federated=[{"a": RIGHT, "b": HALF}, {"a": RIGHT, "b": RIGHT}],
            pooled=[{"a": RIGHT, "b": RIGHT}, {"a": RIGHT, "b": RIGHT}],
            alone__a=[{"a": HALF, "b": WRONG}, {"a": HALF, "b": HALF}],
            alone__b=[{"a": WRONG, "b": HALF}, {"a": WRONG, "b": RIGHT}],
        )
        summary = summarise(rows, configuration(**FOLDS))
        assert summary["arms"]["federated"]["accuracy_mean"] == pytest.approx((0.75 + 1.0) / 2)
        assert summary["arms"]["federated"]["accuracy_sd"] == pytest.approx(0.25 / math.sqrt(2))
        assert summary["arms"]["pooled"]["accuracy_mean"] == 1.0
        assert summary["arms"]["alone"]["a"]["sites"]["a"]["accuracy_mean"] == 0.5
        assert summary["pooled_minus_federated"] == pytest.approx(0.125)
        assert summary["test_majority"] == 0.5
        assert summary["gains"]["a"]["federated"] == {
            "accuracy_gain": 0.5, "standard_error": 0.0, "verdict": "gains",
        }  # fmt: skip
        assert summary["gains"]["b"]["federated"]["verdict"] == "no clear gain"
        assert "federated_dp" not in summary["arms"]

    def test_of_a_private_run(self) -> None:
        """The private arm carries what was spent at each site, at most over folds, with delta, unit and relation."""
        rows = arms(federated=[{"a": RIGHT}] * 2, pooled=[{"a": RIGHT}] * 2, alone__a=[{"a": RIGHT}] * 2)
        rows += [result("federated_dp", fold, {"a": HALF}, epsilon={"a": 2.5 + fold}) for fold in (0, 1)]
        spent = summarise(rows, private(**FOLDS))["arms"]["federated_dp"]
        assert spent["epsilon"] == {"a": 3.5}
        assert (spent["delta"], spent["unit"], spent["relation"]) == (1e-5, "example", "add/remove")

    def test_of_one_class_only_knows_no_auc(self) -> None:
        """Where a site's held-out examples are all of one class, its AUC is not a number, and is not made one."""
        rows = [
            result(arm, fold, {"a": RIGHT}, truths={"a": [1] * 4}, scores={"a": [0.9] * 4})
            for arm in ("federated", "pooled", "alone.a")
            for fold in (0, 1)
        ]
        arm = summarise(rows, configuration(**FOLDS))["arms"]["federated"]
        assert arm["auc_mean"] is None
        assert arm["sites"]["a"]["auc_mean"] is None
        json.dumps(arm, allow_nan=False)


class TestWhole:
    def write(self, folder: Path, **changes: Any) -> Path:
        path = folder / "c.toml"
        path.write_text(tomli_w.dumps(tree(**{**FOLDS, "rounds": 2, **changes})))
        return path

    def compare(self, folder: Path, name: str, *words: str, **changes: Any) -> dict[str, Any]:
        path = self.write(folder, **changes)
        out = folder / name
        assert coterie("simulate", path, "--site", SITE, "--out", out, "--quiet", *words) == 0
        comparison = json.loads((out / "result.json").read_text())["comparison"]
        assert isinstance(comparison, dict)
        return comparison

    def test_number_of_workers_changes_nothing(self, tmp_path: Path) -> None:
        """In this process and over two processes the comparison is the same, and no process is left."""
        before = children()
        here = self.compare(tmp_path, "here", "--workers", "1")
        there = self.compare(tmp_path, "there", "--workers", "2")
        assert here == there
        from tests.simulations.pool.test_pool import keepers

        assert children() - before - keepers() == set()

    def test_of_some_sites_judges_only_them(self, tmp_path: Path) -> None:
        """A run on chosen sites is compared on their held-out examples alone, in every arm and fold."""
        data = {"folds": 2, "clients": 4, "sites": ["client-00", "client-02"]}
        comparison = self.compare(tmp_path, "some", "--workers", "1", data=data)
        assert list(comparison["arms"]["alone"]) == ["client-00", "client-02"]
        for line in (tmp_path / "some" / "comparison.jsonl").read_text().splitlines():
            assert list(json.loads(line)["correct"]) == ["client-00", "client-02"]

    def test_with_a_deadline(self, tmp_path: Path) -> None:
        """A run whose clients have a deadline trains in processes of its own, also inside a comparison."""
        comparison = self.compare(tmp_path, "late", "--workers", "2", rounds=1, cohort={"deadline_seconds": 1e4})
        assert set(comparison["arms"]) == {"federated", "pooled", "alone"}

    def test_of_a_client_alone(self, tmp_path: Path) -> None:
        """A federation of one is compared without a fault, also in print."""
        comparison = self.compare(tmp_path, "one", "--workers", "1", data={"folds": 2, "clients": 1})
        assert list(comparison["arms"]["alone"]) == ["client-00"]


def test_settings_of_a_comparison_are_those_of_the_run(tmp_path: Path) -> None:
    """Every arm's configuration is a valid run of its own."""
    config = configuration(**FOLDS)
    for arm in arms_of(config, config, ["client-00", "client-01"]).values():
        assert RunConfig.model_validate(arm.model_dump()) == arm
        prepare(arm, folder=tmp_path, site_file=SITE)
