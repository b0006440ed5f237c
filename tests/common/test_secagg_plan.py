"""What secure aggregation takes, in figures, before anything runs."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import RunConfig
from common.errors import ConfigError
from common.secagg import SecAggError, Setup
from common.secagg_plan import DIFFERENCES, REVIEW, ROBUST, group_sizes, sums_plan, warnings_of
from tests.helpers.processes import coterie
from tests.helpers.secagg import Federation


def run(**tables: object) -> RunConfig:
    """A run under secure aggregation."""
    privacy = {"secure_aggregation": True, **tables.pop("privacy", {})}  # type: ignore[dict-item]
    return RunConfig.model_validate({"privacy": privacy, **tables})


class TestSums:
    @pytest.mark.parametrize(
        ("sites", "colluding", "quorum", "threshold", "missing"),
        [(3, 1, 3, 2, (0, 0, 0)), (4, 1, 3, 2, (1, 1, 1)), (10, 3, 7, 4, (3, 3, 5)), (100, 33, 67, 34, (33, 33, 65))],
    )
    def test_known_answers(
        self, sites: int, colluding: int, quorum: int, threshold: int, missing: tuple[int, int, int]
    ) -> None:
        """A majority of the honest has to sign; a third of the holders, and more than collude, open a secret."""
        plan = sums_plan(run(secagg={"colluding": colluding}), sites)
        assert (plan["sum"]["quorum"], plan["sum"]["threshold"]) == (quorum, threshold)
        assert tuple(plan["missing"].values()) == missing
        assert plan["sum"]["fewest"] >= colluding + 2
        assert plan["setup"]["legs"] == 4

    def test_many_sites_share_masks_with_some(self) -> None:
        """Beyond 128 a random graph of neighbours, for which a beacon costs one more step."""
        plan = sums_plan(run(secagg={"colluding": 50}), 1000)
        assert plan["sum"]["neighbours"] < 128
        assert not plan["sum"]["complete"]
        assert set(plan["missing"].values()) == {100}
        assert (plan["setup"]["legs"], plan["setup"]["beacon"]) == (5, True)

    @given(sites=st.integers(3, 200), size=st.integers(3, 60))
    @settings(deadline=None, max_examples=50)
    def test_groups_are_alike_and_hold_everybody(self, sites: int, size: int) -> None:
        """At least `group_size` in each where there are so many, and no two differ by more than one."""
        sizes = group_sizes(run(secagg={"group_size": size}), sites)
        assert sum(sizes) == sites
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= min(size, sites)

    def test_sampled_cohorts_have_a_set_up_each(self) -> None:
        """A round's sum is then that of those who were asked."""
        plan = sums_plan(run(cohort={"size": 5}), 20)
        assert (plan["asked"], plan["sum"]["members"], plan["setup"]["epoch_rounds"]) == (5, 5, 1)

    @pytest.mark.parametrize(("bits", "size"), [(16, 2000), (20, 2500), (24, 3000), (32, 4000)])
    def test_fewer_bits_travel_as_fewer_bytes(self, bits: int, size: int) -> None:
        """A thousand values."""
        plan = sums_plan(run(secagg={"bits": bits}, strategy={"weighting": "equal"}), 10, entries=1000)
        assert plan["round"]["update_bytes"] == size

    @pytest.mark.parametrize("sites", [0, 1, 2])
    def test_too_few_sites_are_refused(self, sites: int) -> None:
        """With the number that is needed."""
        with pytest.raises(ConfigError, match="too few") as caught:
            sums_plan(run(), sites)
        assert "3 sites" in caught.value.hint


class TestAgainstTheProtocol:
    """What is told is what members and coordinator do."""

    @pytest.mark.parametrize("step", ["train", "agree", "unmask"])
    @pytest.mark.parametrize(("sites", "colluding"), [(4, 0), (4, 1), (5, 2), (9, 1)])
    def test_so_many_may_be_missing_and_not_one_more(self, sites: int, colluding: int, step: str) -> None:
        """The sum is exact with the losses that are named, and does not come off with one more."""
        lost = sums_plan(run(secagg={"colluding": colluding}), sites)["missing"]
        most = lost[{"train": "update", "agree": "statement", "unmask": "share"}[step]]
        federation = Federation(sites, colluding=colluding)
        (group,) = federation.set_up()
        vectors = {name: np.full(3, i + 1, np.uint32) for i, name in enumerate(federation.names)}
        total, survivors = federation.round(group, vectors, base=b"1", absent={step: federation.names[:most]})
        assert total.tolist() == [sum(int(vectors[name][0]) for name in survivors)] * 3
        with pytest.raises(SecAggError):
            federation.round(group, vectors, base=b"2", absent={step: federation.names[: most + 1]})

    @pytest.mark.parametrize(("sites", "size"), [(5, 0), (8, 4)])
    def test_the_traffic_of_a_set_up_is_told(self, sites: int, size: int) -> None:
        """The most that any member has, within a hundredth: names have other lengths."""
        plan = sums_plan(run(secagg={"group_size": size, "epoch_rounds": 16}), sites)["setup"]
        federation = Federation(sites, group_size=size, epoch_rounds=16)
        down, up, legs = Counter[str](), Counter[str](), 0
        setup = Setup(federation.rules, records=federation.records, names=federation.names)
        while setup.leg is not None:
            requests = setup.requests()
            for name, reply in federation.ask(requests).items():
                setup.receive(name, reply)
                down[name] += len(requests[name])
                up[name] += len(reply)
            setup.advance()
            legs += 1
        assert legs == plan["legs"]
        assert plan["sent_bytes"] == pytest.approx(max(up.values()), rel=0.01)
        assert plan["received_bytes"] == pytest.approx(max(down.values()), rel=0.01)


class TestGroups:
    def test_the_largest_group_leaves_enough_honest_groups(self) -> None:
        """Five bad clients of a hundred spoil five groups at most: the others outvote them, as each strategy needs."""
        rows = {row["strategy"]: row for row in sums_plan(run(), 100, bad=5)["groups_for"]}
        assert set(rows) == set(ROBUST)
        assert {name: row["groups"] for name, row in rows.items()} == {
            "fedmedian": 11, "fedtrimmedavg": 11, "krum": 14, "multikrum": 14, "bulyan": 25,
        }  # fmt: skip
        assert all(row["group_size"] * row["groups"] <= 100 for row in rows.values())

    def test_where_no_group_is_small_enough_nothing_is_claimed(self) -> None:
        """Groups may not be smaller than the smallest sum."""
        rows = {row["strategy"]: row for row in sums_plan(run(secagg={"colluding": 3}), 100, bad=5)["groups_for"]}
        assert rows["bulyan"]["group_size"] is None
        assert rows["krum"]["group_size"] == 7


class TestWarnings:
    def test_there_is_none_without_secure_aggregation(self) -> None:
        """Whatever else is set."""
        assert warnings_of(RunConfig.model_validate({"secagg": {"group_size": 3}}), 10) == []

    def test_it_is_called_experimental_every_time(self) -> None:
        """Also where sites and privacy are as they should be."""
        private = {"unit": "client", "target_epsilon": 1.0}
        assert warnings_of(run(privacy=private), 10) == [REVIEW]

    def test_sums_alone_are_no_privacy(self) -> None:
        """Without differential privacy differences of sums tell about single clients."""
        assert DIFFERENCES in warnings_of(run())

    def test_groups_hide_less(self) -> None:
        """An update hides in its group alone; and too large ones do not hold against the bad clients stated."""
        tables = {"strategy": {"name": "krum", "malicious_clients": 2}, "secagg": {"group_size": 5}}
        held = warnings_of(run(**tables), 35)
        assert any("5 at most, not among all 35" in text for text in held)
        assert not any("too large" in text for text in held)
        assert any("4 or less" in text for text in warnings_of(run(**tables), 34))
        assert any("one group" in text for text in warnings_of(run(**tables), 9))


class TestCommand:
    def test_tells_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What is refused, against whom it holds, and who may be missing; experimental, and no privacy by itself."""
        assert coterie("secagg", "plan", "--sites", "10", "--bad", "1", "--parameters", "1000000") == 0
        text = " ".join(capsys.readouterr().out.split())
        for part in ("fewer than 6", "one site that helps it", "6 of 10 have signed", "4 MB an update", "experimental",
                     "Groups that hold against 1 bad site of 10", "fedmedian 3 3 0"):  # fmt: skip
            assert part in text

    def test_json_is_one_document(self, capsys: pytest.CaptureFixture[str]) -> None:
        """The same figures; the number of sites comes from the scenario where it says so."""
        assert coterie("secagg", "plan", "fashion", "--colluding", "2", "--json") == 0
        document = json.loads(capsys.readouterr().out)
        config = run(secagg={"colluding": 2})
        assert document["sites"] == 10
        assert document["sum"] == sums_plan(config, 10)["sum"]

    def test_what_a_run_could_not_do_is_refused(self, capsys: pytest.CaptureFixture[str]) -> None:
        """In the words in which the run would be."""
        assert coterie("secagg", "plan", "--sites", "9", "--set", "strategy.name=krum") == 3
        assert "secagg.group_size" in capsys.readouterr().err
        assert coterie("secagg", "plan", "heart") == 3
        assert "--sites" in capsys.readouterr().err
