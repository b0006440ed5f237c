"""A study's page and table: what it says of the question, and that it says no more than the runs show."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from server.report.words import MISSING
from simulations.study.document import describe_study
from simulations.study.folder import Study
from simulations.study.page import verdict, write_study_report
from simulations.study.summary import Summary
from simulations.study.table import print_study
from tests.server.report.test_report_page import Page, figures
from tests.simulations.study.conftest import Made, Make

PAIR = ["strategy.name=fedavg,fedprox"]
CLEAR = [[[0.5, 0.80], [0.5, 0.81], [0.5, 0.82]], [[0.7, 0.90], [0.7, 0.91], [0.7, 0.925]]]


def page(made: Made) -> Page:
    path, study, summary = made
    return Page(write_study_report(path, study, summary).read_text(encoding="utf-8"))


class TestPage:
    def test_asks_nothing_of_a_network_and_runs_no_script(self, make: Make) -> None:
        """As the page of a run."""
        path, study, summary = make(PAIR, CLEAR)
        html = write_study_report(path, study, summary).read_text()
        found = Page(html)
        assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(found.tags)
        assert not re.search(r"https?:|url\(|@import", html)
        assert "default-src 'none'" in html

    def test_is_the_same_every_time(self, make: Make) -> None:
        """Equal folders give equal pages."""
        path, study, summary = make(PAIR, CLEAR)
        first = write_study_report(path, study, summary).read_bytes()
        assert write_study_report(path, study, summary).read_bytes() == first

    def test_has_every_figure_of_a_study_in_virtual_time(self, make: Make) -> None:
        """Final accuracy, its course by round and by the clock, times, wasted work, spread over clients."""
        labels = [label.partition(".")[0] for label in figures(page(make(PAIR, CLEAR)))]
        assert labels == [
            "Final accuracy", "Accuracy by round", "Accuracy by virtual time", "Time to accuracy", "Wasted work",
            "Spread over clients",
        ]  # fmt: skip

    def test_counts_rounds_where_there_is_no_virtual_time(self, make: Make) -> None:
        """No clock and no wasted work."""
        labels = [label.partition(".")[0] for label in figures(page(make(PAIR, CLEAR, seconds=None)))]
        assert labels == ["Final accuracy", "Accuracy by round", "Rounds to accuracy", "Spread over clients"]

    def test_tells_how_to_do_it_again(self, make: Make) -> None:
        """The study's command, and one for each of its runs."""
        path, study, summary = make(PAIR, CLEAR)
        text = page((path, study, summary)).text
        assert "coterie study tiny" in text
        assert text.count("coterie simulate --rerun") == 6
        assert f"coterie study --resume {path}" in text

    def test_table_has_a_row_an_arm(self, make: Make) -> None:
        """Accuracy with its range, the difference with its interval, and when accuracies were reached."""
        text = page(make(PAIR, CLEAR)).text
        assert f"fedavg 81.0 % 80.0 to 82.0 % {MISSING} not reached" in text
        assert re.search(r"fedprox 91\.2 % 90\.0 to 92\.5 % \+10\.2 ± 0\.7", text)

    def test_says_of_private_arms_what_choosing_among_them_costs(self, make: Make) -> None:
        """Every run spent its own budget."""
        options = ["training.local_steps=1", "privacy.unit=example", "privacy.noise_multiplier=1"]
        text = page(make(PAIR, CLEAR, overrides=options, privacy={"epsilon": {"a": 2.5}, "unit": "example"})).text
        assert "whoever chooses among arms by real people's data has spent all of them" in text
        assert "Highest epsilon" in text

    def test_names_cannot_carry_markup(self, make: Make) -> None:
        """Values stand in it as text."""
        path, study, summary = make(PAIR, CLEAR, overrides=["model.name=tiny"])
        bad = type(study)(**{name: getattr(study, name) for name in study.__slots__} | {"name": "<script>x</script>"})
        html = write_study_report(path, bad, summary).read_text()
        assert "<script" not in html

    @pytest.mark.parametrize(
        "arms",
        [
            [[[None]], [[None]]],
            [[[0.5]], [[None]]],
            [[[0.0]], [[0.0]]],
            [[[1.0, 1.0]], [[1.0, 1.0]]],
            [[[0.5, None, 0.6]], [[None, 0.5, 0.6]]],
        ],
    )
    def test_gaps_are_left_not_failed_on(self, make: Make, arms: list[list[list[float | None]]]) -> None:
        """Nothing measured, one arm alone, all alike, other rounds evaluated."""
        made = make(PAIR, arms)
        assert "Do it again" in page(made).text
        assert describe_study(made[1], made[2])["arms"]

    def test_more_arms_than_colours_are_all_in_the_table(self, make: Make) -> None:
        """The courses show the best of them, and say so."""
        rates = ",".join(f"0.{i}" for i in range(1, 10)) + ",0.95"
        text = page(make([f"training.learning_rate={rates}"], [[[i / 20, i / 10]] for i in range(10)])).text
        assert "The 8 best of 10 arms; the table has all." in text
        assert "learning rate 0.95" in text


class TestVerdict:
    def test_calls_clear_what_the_interval_leaves_no_doubt_of(self, make: Make) -> None:
        """With the size of the difference and its interval."""
        _, study, summary = make(PAIR, CLEAR)
        sentences = verdict(study, summary)
        assert "fedprox instead of fedavg: +10.2 ± 0.7 points of accuracy, clearly higher." in sentences
        assert any("95\u202f% interval" in s or "95 % interval" in s for s in sentences)

    def test_calls_chance_what_may_be_chance(self, make: Make) -> None:
        """A difference that changes its sign from seed to seed."""
        _, study, summary = make(PAIR, [[[0.80], [0.70]], [[0.79], [0.74]]])
        assert any("no clear difference" in sentence for sentence in verdict(study, summary))

    def test_claims_nothing_from_one_run_each(self, make: Make) -> None:
        """It asks for repeats instead."""
        _, study, summary = make(PAIR, [[[0.5]], [[0.9]]])
        sentences = verdict(study, summary)
        assert "fedprox instead of fedavg: +40.0 points of accuracy." in sentences
        assert any("--repeats 3" in sentence for sentence in sentences)
        assert not any("clear" in sentence for sentence in sentences)

    def test_warns_where_many_arms_make_a_lucky_one(self, make: Make) -> None:
        """From five on."""
        rates = "training.learning_rate=0.1,0.2,0.3,0.4,0.5"
        _, study, summary = make([rates], [[[0.5]]] * 5)
        assert any("some look better by chance" in sentence for sentence in verdict(study, summary))

    def test_names_the_quickest_and_who_never_came(self, make: Make) -> None:
        """To 95 % of the best."""
        _, study, summary = make(PAIR, CLEAR)
        (said,) = [s.replace("\u202f", " ") for s in verdict(study, summary) if "reached first" in s]
        assert said == (
            "86.6 % was reached first with fedprox, after 20 s on average; 1 arm did not reach it in every run."
        )


def printed(study: Study, summary: Summary, *, width: int) -> str:
    console = Console(width=width, file=io.StringIO())
    print_study(study, summary, console, folder="studies/one")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestTable:
    @pytest.mark.parametrize("width", [40, 80, 160])
    def test_answers_on_any_terminal(self, make: Make, width: int) -> None:
        """Arms, figures, verdict, and where the page is."""
        _, study, summary = make(PAIR, CLEAR)
        text = printed(study, summary, width=width)
        assert all(word in text for word in ("fedprox", "clearly", "studies/one/report.html"))
        assert "81.0 %" in text or width < 80

    def test_leaves_out_what_no_arm_has(self, make: Make) -> None:
        """No epsilon without privacy, no clock without virtual time."""
        _, study, summary = make(PAIR, CLEAR, seconds=None)
        text = printed(study, summary, width=120)
        assert not [word for word in ("epsilon", "virtual", "wasted", "stale") if word in text.split("\n\n")[0]]


def test_document_is_json_with_every_repeats_figures(make: Make) -> None:
    """Means, ranges and values by arm, differences with their verdict, and where each run is."""
    _, study, summary = make(PAIR, CLEAR)
    document = json.loads(json.dumps(describe_study(study, summary), allow_nan=False))
    second = document["arms"][1]
    assert second["accuracy"] == {
        "mean": pytest.approx(0.911667, abs=1e-6), "lowest": 0.9, "highest": 0.925, "values": [0.9, 0.91, 0.925],
    }  # fmt: skip
    assert second["against_first"]["verdict"] == "higher"
    assert second["reached"][1] == {
        "accuracy": pytest.approx(0.866083, abs=1e-6), "runs": 3, "rounds": [2, 2, 2], "seconds": [20.0] * 3,
        "runs_that_did": 3,
    }  # fmt: skip
    assert [run["repeat"] for run in second["runs"]] == [1, 2, 3]
