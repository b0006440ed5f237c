"""What the page says of secure aggregation: who saw what, which sums were made, and what that does not promise."""

import json

import pytest

from common.errors import RunError
from server.report import write_report
from tests.server.report.test_report_page import change, read


def masked(folder, *, tables="", groups=(4,), given_up=()):
    """The sample's run as one under secure aggregation: two epochs, all sums opened but those that were given up."""
    path = folder / "run.toml"
    text = path.read_text()
    switch = "[privacy]\nsecure_aggregation = true\n"
    path.write_text((text.replace("[privacy]\n", switch) if "[privacy]" in text else text + switch) + tables)
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        refused = dict(given_up).get(row["server_round"], "")
        row["aggregation"] = {
            "epoch": 1 + row["server_round"] // 17,
            "index": row["server_round"] % 17,
            "groups": [
                {"members": size, "asked": size, "survivors": 0 if refused else 3, "refused": refused}
                for size in groups
            ],
        }
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_page_says_who_could_see_what(sample):
    """Sums only; against whom that holds, with pins and without; and that it is experimental."""
    text = read(masked(sample("heart"))).text
    for part in (
        "secure aggregation", "refused any sum of fewer than 3 updates", "nor up to 1 client that may help it",
        "without pins it holds if the coordinator keeps to the rules", "one machine held every key", "experimental",
        "Smallest sum 3 updates, at least 2 of honest clients",
        "Sums opened 20 of 20", "Epochs 2, each with keys of its own",
        "Updates clipped to L2 norm 16",
    ):  # fmt: skip
        assert part in text
    assert "Without differential privacy sums" not in text, "the run is private"


def test_runs_without_it_have_no_such_section(sample):
    """Nothing is claimed that was not done."""
    for kind in ("heart", "fashion"):
        assert "ecure aggregation" not in read(sample(kind)).text.partition("Details")[0]


def test_sums_without_privacy_are_warned_of(sample):
    """What sums tell, and what the updates do not tell any more."""
    text = read(masked(sample("fashion"), groups=(10,))).text
    assert "Without differential privacy sums still tell something" in text
    assert "but sums of updates and the trained model can give away" in text


def test_groups_are_told_with_their_size(sample):
    """An update hides in its own group only."""
    folder = masked(sample("fashion"), tables="[secagg]\ngroup_size = 3\n", groups=(4, 3, 3))
    text = read(folder).text
    for part in ("of 3 and 4 clients, drawn anew each epoch", "hides among those of its own group",
                 "3 at most, not among all 10", "Sums opened 90 of 90"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("refused", "words"),
    [("shares", "too few shares came"), ("range", "none that honest updates can give"), ("later", "not be opened")],
)
def test_what_was_given_up_is_told_with_its_reason(sample, refused, words):
    """Also one of a later version."""
    folder = masked(sample("heart"), given_up=[(3, refused), (7, refused)])
    text = read(folder).text
    assert "Sums opened 18 of 20" in text
    assert "Given up 2: " in text
    assert words in text


def test_a_run_under_way_has_the_section_too(sample):
    """Before a round has ended, and before there is a result."""
    folder = masked(sample("heart"))
    (folder / "result.json").unlink()
    assert "Smallest sum" in read(folder).text
    (folder / "rounds.jsonl").unlink()
    text = read(folder).text
    assert "refused any sum of fewer than 3" in text
    assert "Smallest sum" not in text


def test_rounds_without_figures_leave_gaps(sample):
    """A line that says nothing of its sums is no error; one that says nonsense is."""
    folder = masked(sample("heart"))
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    bare = {"server_round": 1, "aggregation": None}
    (folder / "rounds.jsonl").write_text("\n".join([json.dumps(bare), *lines[1:]]) + "\n")
    assert "Sums opened 19 of 19" in read(folder).text
    (folder / "rounds.jsonl").write_text(json.dumps({"server_round": 1, "aggregation": {"groups": 5}}) + "\n")
    with pytest.raises(RunError, match="aggregation"):
        write_report(folder)


def test_a_real_run_is_no_simulation(sample):
    """Then nobody held every key."""
    folder = masked(sample("heart"))
    change(folder, simulated=False)
    assert "one machine held every key" not in read(folder).text
