"""What a run's page says of virtual time, of fairness, and of how clients were trained."""

import json

import pytest

from common.errors import RunError
from server.report import write_report
from server.report.virtual import timescale
from tests.server.report.test_report_page import change, figures, read


def rewrite(folder, **more):
    """Give every round of a sample run more fields; a callable gets the round's number."""
    path = folder / "rounds.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row |= {key: value(row["server_round"]) if callable(value) else value for key, value in more.items()}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def clock(server_round):
    return {"at_seconds": 120.0 * server_round, "work_seconds": 600.0, "wasted_seconds": 150.0}


class TestVirtualTime:
    def test_section_tells_time_work_and_waste(self, sample):
        """How long the run took on the clock, how long devices worked, and what of it was for nothing."""
        text = read(rewrite(sample("fashion"), clock=clock)).text
        assert "On the simulated clock the run took 60 min." in text
        assert "Devices were at work for 5 h 00 min together; 25.0 % of that came to nothing" in text
        assert "Virtual time 60 min 25.0 % of the work wasted" in text

    def test_table_says_when_shares_of_the_final_accuracy_were_reached(self, sample):
        """A row each for 90, 95 and 99 %, with accuracy, round and time."""
        text = read(rewrite(sample("fashion"), clock=clock)).text
        assert "Share of the final accuracy Accuracy First in round After 90 % 77.5 %" in text
        assert "95 % 81.8 %" in text
        assert "99 % 85.2 %" in text

    def test_figures_are_drawn(self, sample):
        """Accuracy over the clock, and every round's work."""
        labels = figures(read(rewrite(sample("fashion"), clock=clock)))
        assert any(label.startswith("Accuracy by virtual time") for label in labels)
        assert any(label.startswith("Work of the devices") for label in labels)

    def test_staleness_is_told_where_aggregation_is_asynchronous(self, sample):
        """Mean and largest, and how many updates were how far behind."""
        stale = lambda r: {"client-00": 0, "client-01": r % 2 * 3}  # noqa: E731
        page = read(rewrite(sample("fashion"), clock=clock, staleness=stale))
        assert "the model had moved on by 0.75 steps on average, and by 3 at most" in page.text
        assert any(label.startswith("Staleness of updates. 60 updates; 75") for label in figures(page))

    def test_runs_without_it_have_no_such_section(self, sample):
        """An older run's page is as it was."""
        assert "Virtual time" not in read(sample("fashion")).text

    def test_a_run_without_any_work_or_evaluation_still_has_a_page(self, sample):
        """Zero seconds and missing accuracies leave gaps, not errors."""
        folder = rewrite(sample("fashion"), clock={"at_seconds": 0.0}, accuracy=None)
        change(folder, accuracy=None)
        assert "On the simulated clock the run took 0 ms." in read(folder).text

    @pytest.mark.parametrize(
        ("seconds", "unit"), [(5, "seconds"), (170, "seconds"), (180, "minutes"), (7200, "hours"), (3 * 86400, "days")]
    )
    def test_axes_have_the_unit_that_reads_best(self, seconds, unit):
        """Seconds for a short run, days for a long one."""
        assert timescale(seconds)[1] == unit


class TestFairness:
    def test_facts_stand_together(self, sample):
        """The worst, median and best served; who took part; the Gini coefficient."""
        text = read(sample("fashion")).text
        for part in (
            "Fairness Accuracy, worst tenth of clients", "Accuracy, median client", "Took part 10 of 10 clients",
            "Gini coefficient of updates",
        ):  # fmt: skip
            assert part in text

    def test_updates_by_client_are_drawn_where_they_differ(self, sample):
        """With failures some gave fewer; where all gave alike a drawing says nothing."""
        assert any(label.startswith("Updates by client") for label in figures(read(sample("fashion"))))
        assert not any(label.startswith("Updates by client") for label in figures(read(sample("heart"))))

    def test_population_counts_though_only_some_were_measured(self, sample):
        """A million clients of which ten were measured are a million clients."""
        folder = sample("fashion")
        change(folder, population={"clients": 1_000_000, "evaluated": 10, "participated": 10})
        text = read(folder).text
        assert "1 000 000 clients trained cnn" in text
        assert "1 000 000 clients; 10 of them took part. What follows of single clients is of 10." in text
        assert "Took part 10 of 1 000 000 clients" in text


class TestHowItWasTrained:
    @pytest.mark.parametrize(
        ("record", "sentence"),
        [
            ({"batching": "on", "why": "", "stacked": True}, "stacked, as one computation, as asked for"),
            ({"batching": "off", "why": "", "stacked": False}, "one by one, as asked for"),
            ({"batching": "auto", "why": "it has dropout", "stacked": False}, "one by one: it has dropout."),
            ({"batching": "auto", "why": "", "stacked": None}, "was being measured"),
            (
                {
                    "batching": "auto", "why": "", "stacked": True,
                    "probes": [
                        {"server_round": i, "stacked": i % 2 == 0, "cpu_seconds": s, "weight": 10.0}
                        for i, s in ((1, 9.0), (2, 2.0), (3, 6.0), (4, 2.0))
                    ],
                },
                "After 4 rounds of trying both ways, clients trained stacked, as one computation: 3 times as quick",
            ),
        ],
        ids=["on", "off", "cannot", "probing", "measured"],
    )  # fmt: skip
    def test_is_told_with_its_reason(self, sample, record, sentence):
        """Asked for, impossible, under way, or found out: with the figure that decided it."""
        folder = sample("fashion")
        (folder / "batching.json").write_text(json.dumps(record))
        assert sentence in read(folder).text

    def test_a_damaged_record_is_named(self, sample):
        """As any other file of the folder."""
        folder = sample("fashion")
        (folder / "batching.json").write_text("[")
        with pytest.raises(RunError, match=r"batching\.json"):
            write_report(folder)
