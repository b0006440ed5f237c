"""The page as a reader gets it: whole, from a run folder in whatever state."""

import json
import re
from html.parser import HTMLParser

import pytest

from common.errors import RunError
from server.report import write_report
from server.report.record import read_record

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects elements, attributes and text; fails where tags do not nest."""

    def __init__(self, html):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert not self.open
        self.text = " ".join(" ".join(self.words).split()).replace("\u202f", " ")

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in {"style", "title"}:
            self.words.append(data)


def read(folder):
    return Page(write_report(folder).read_text(encoding="utf-8"))


def change(folder, **changes):
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps({**result, **changes}))


def figures(page):
    return [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]


@pytest.mark.parametrize("kind", ["heart", "fashion", "thousand"])
def test_page_asks_nothing_of_a_network(sample, kind):
    """The page holds no script, no address and nothing that is loaded from elsewhere."""
    html = write_report(sample(kind)).read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(page.tags)
    assert not [a for a in page.attributes if a[1] in {"src", "href", "srcset", "action"} or a[1].startswith("on")]
    assert not re.search(r"https?:|url\(|@import", html)
    assert "default-src 'none'" in html


@pytest.mark.parametrize("kind", ["heart", "fashion", "thousand"])
def test_page_is_small_and_the_same_every_time(sample, kind):
    """Writing the page again gives the same bytes, few even with a thousand clients, and leaves nothing else behind."""
    folder = sample(kind)
    before = {path.name for path in folder.iterdir()}
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert len(first) < 120_000
    assert {path.name for path in folder.iterdir()} - before == {"report.html"}


def test_headline_says_what_was_trained_and_how_well(sample):
    """The page opens with the clients, the model, the data, the rounds, the accuracy and what it has to beat."""
    text = read(sample("heart")).text
    assert "4 clients trained tabular on heart-disease together, without pooling their data, in 20 rounds." in text
    assert (
        "right for 81.2 % of 184 held-out examples; always naming the commonest class would be right for 54.9 %" in text
    )


def test_privacy_box_names_every_part_of_the_guarantee(sample):
    """Unit, relation, epsilon against its target, delta, noise and each client's spending stand in the privacy box."""
    text = read(sample("heart")).text
    for part in (
        "each training example (unit: example)", "Neighbouring relation add/remove", "at most 2.97, target 3 kept",
        "Delta 1e-5", "Noise multiplier 2.06", "spent at each client over the whole run", "switzerland 2.97 5.71",
        "accuracy here was computed inside the simulation and is not released",
    ):  # fmt: skip
        assert part in text


def test_epsilon_beyond_its_target_is_called_exceeded(sample):
    """A client that spent more than the target turns `kept` into `exceeded`."""
    folder = sample("heart")
    privacy = json.loads((folder / "result.json").read_text())["privacy"]
    change(folder, privacy={**privacy, "epsilon": {"cleveland": 2.9, "hungary": 3.01}})
    text = read(folder).text
    assert "at most 3.01, target 3 exceeded" in text
    assert "target 3 kept" not in text


def test_epsilon_without_bound_is_never_left_out(sample):
    """A client whose epsilon is null, which is how JSON holds infinity, makes the run's epsilon infinite."""
    folder = sample("heart")
    privacy = json.loads((folder / "result.json").read_text())["privacy"]
    change(folder, privacy={**privacy, "epsilon": {"cleveland": 2.9, "hungary": None}})
    text = read(folder).text
    assert "at most ∞, target 3 exceeded" in text
    assert "right at most" not in text


def test_run_without_privacy_says_so_plainly(sample):
    """A run without privacy claims no epsilon and warns of what its model can give away."""
    page = read(sample("fashion"))
    assert "This run used no differential privacy." in page.text
    assert not any("Epsilon" in label for label in figures(page))


def test_comparison_says_who_gains_and_who_does_not(sample):
    """The verdict names the sites that gain over training alone, those that lose, and doubtful differences."""
    text = read(sample("heart")).text
    assert (
        "Federation against training alone, in points of accuracy: gains at cleveland (+3.5 ± 1.2) and long-beach-va "
        "(+6.0 ± 2.0); no clear gain at hungary (+2.0 ± 1.4); loses at switzerland (\u22121.0 ± 0.4)."
    ) in text
    assert "Pooling all data in one place would change federation's accuracy by +0.7 points." in text
    assert "At switzerland no way of training beats always naming the commonest class." in text


def test_failures_are_counted_and_explained(sample):
    """The page counts the requests without an update and says in words what each failure's code means."""
    folder = sample("fashion")
    failed = [reason for row in read_record(folder).rounds for reason in row.failures.values()]
    text = read(folder).text
    assert f"{len(failed)} of 300 requests brought no update" in text
    assert "the client did not answer before its deadline" in text


def test_every_figure_describes_itself(sample):
    """Every drawing is an image with a label that a screen reader can speak."""
    page = read(sample("heart"))
    assert len(figures(page)) == page.tags.count("svg") == 7
    assert all(len(label) > 20 for label in figures(page))


def test_configuration_shows_every_setting(sample):
    """The configuration lists each declared setting once, with the value of this run."""
    folder = sample("heart")
    html = write_report(folder).read_text()
    assert html.count("<td><code>") > 50
    assert re.search(r'class="changed"><td><code>privacy.target_epsilon</code></td>\s*<td[^>]*><code>3.0</code>', html)


def test_many_clients_are_summarised(sample):
    """A thousand clients appear as distributions and quantiles, not by name."""
    page = read(sample("thousand"))
    assert "Training stopped early, after 40 of 50 rounds." in page.text
    assert "Half of the 1 000 clients lie between" in page.text
    assert "Epsilon over all clients: smallest 0," in page.text
    assert page.text.count("phone-") == 2  # the best and the worst


HOSTILE = '<script>alert("x")</script>\'&'


def test_names_cannot_carry_markup(sample):
    """A site, class or data set named like a script is shown as text wherever it appears."""
    folder = sample("heart")
    for file in ("rounds.jsonl", "result.json"):
        text = (folder / file).read_text()
        for name in ("cleveland", "healthy", "heart-disease", "add/remove", "tabular"):
            text = text.replace(f'"{name}"', json.dumps(HOSTILE))
        (folder / file).write_text(text)
    html = write_report(folder).read_text()
    page = Page(html)
    assert "script" not in page.tags
    assert "<script" not in html
    assert HOSTILE in page.text


def test_interrupted_run_has_a_page(sample):
    """Without a result the page tells how far the run came, what was spent and what it promised."""
    folder = sample("heart")
    (folder / "result.json").unlink()
    lines = (folder / "rounds.jsonl").read_text().splitlines(keepends=True)
    (folder / "rounds.jsonl").write_text("".join(lines[:7]) + lines[7][:30])
    text = read(folder).text
    assert "not finished: 7 rounds of 20 are on record" in text
    assert "spent at each client up to the last round on record" in text
    assert "at most 1.76, target 3" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": None, "loss": None, "majority_accuracy": None, "evaluation": None},
        {"clients": {}},
        {"clients": {"a": {}}},
        {"clients": {"a": {"train_examples": 0, "test_examples": 0, "accuracy": 0.0, "class_counts": []}}},
        {"clients": {"a": {"class_counts": [1] * 80, "accuracy": 1.0}}},
        {"clients": {str(i): {"accuracy": 0.5, "train_examples": 7} for i in range(61)}},
        {"privacy": {"epsilon": {}}},
        {"comparison": {"folds": 2, "arms": {}}},
        {"comparison": {"arms": {"federated": {"sites": {"a": {}}}, "alone": {"b": {}}}}},
        {"seconds": {}, "model": {}, "data": {}, "from_a_later_version": 1},
        {"seconds": {"total": 0.0}, "rounds": 0, "status": "failed"},
    ],
    ids="-".join,
)
@pytest.mark.parametrize("rounds", [True, False])
def test_missing_pieces_leave_gaps_not_errors(sample, changes, rounds):
    """Whatever a run did not measure is left out of its page."""
    folder = sample("heart")
    change(folder, **changes)
    if not rounds:
        (folder / "rounds.jsonl").unlink()
    assert "Configuration: all" in read(folder).text


def test_diverged_losses_are_gaps(sample):
    """Rounds whose loss is not finite are left out of the chart, and the rest is drawn."""
    folder = sample("fashion")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    rows[3] |= {"loss": float("nan"), "train_loss": float("inf"), "accuracy": None}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html = write_report(folder).read_text()
    assert "nan" not in re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL).lower()


def test_single_round_is_drawn(sample):
    """A run of one round has its charts, too."""
    folder = sample("heart")
    (folder / "rounds.jsonl").write_text((folder / "rounds.jsonl").read_text().splitlines()[0] + "\n")
    assert len(figures(read(folder))) == 7


@pytest.mark.parametrize(
    ("file", "content", "where"),
    [
        ("result.json", "{", "result.json"),
        ("result.json", '{"clients": {"a": {"accuracy": "high"}}}', "clients.a.accuracy"),
        ("rounds.jsonl", '{"server_round": 1}\nnonsense\n{"server_round": 2}\n', "line 2"),
        ("rounds.jsonl", '{"server_round": 1, "cohort": 5}\n', "cohort"),
        ("run.toml", "rounds = 0", "rounds"),
    ],
)
def test_damaged_file_is_named(sample, file, content, where):
    """A damaged file is refused with its name, the place and a hint, and the former page stays."""
    folder = sample("heart")
    former = write_report(folder).read_bytes()
    (folder / file).write_text(content)
    with pytest.raises(RunError, match=re.escape(where)) as caught:
        write_report(folder)
    assert caught.value.hint
    assert (folder / "report.html").read_bytes() == former


def test_folder_without_a_run_is_refused(tmp_path):
    """A folder that holds no run gets no page."""
    with pytest.raises(RunError, match=r"run\.toml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())
