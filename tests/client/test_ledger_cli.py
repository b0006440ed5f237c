"""`coterie ledger`, through the same entry point as a person's shell."""

import io
import json
import math

import pytest

from client.ledgers import SiteLedgers
from common.cli import main
from common.privacy.accounting.accountant import Renyi, ReplaceOne, spent
from common.privacy.accounting.budget import Budget
from common.privacy.ledger.chain import read_chain
from simulations.ledgers import SimulatedLedgers
from tests.helpers.events import matrix, non_private, sampled, shared

BUDGET = Budget.opened(10.0, 1e-5)
RUN = "3f" * 32


@pytest.fixture
def coterie(capsys, tmp_path, monkeypatch):
    """Run a command in a folder that holds `state`; its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["ledger", *words])
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def site(tmp_path):
    """Two data sets: one that spent in two ways, and one that is new."""
    site = SiteLedgers(tmp_path / "state" / "ledger", tmp_path / "state" / "identity", BUDGET)
    icu = site.open("icu", site.fingerprint([b"1"]))
    for r in (1, 2, 3, 5):
        icu.reserve(sampled(r, rate=0.1, steps=5, run=RUN), planned=9)
    icu.reserve(matrix(unit="client", trust="coordinator", noise=20.0, run="m"), planned=2)
    site.open("ward", site.fingerprint([b"2"]), unit="entity")
    return site


@pytest.fixture
def run_folder(tmp_path):
    """A simulated run of two clients."""
    ledgers = SimulatedLedgers(tmp_path / "runs" / "heart" / "ledgers.db", BUDGET)
    for name in ("cleveland", "hungary"):
        ledgers.of(name).reserve(sampled(rate=0.1), planned=1)
    ledgers.close()
    return tmp_path / "runs" / "heart"


def cut(site, name="icu"):
    path = site.named(name).path
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


class TestShow:
    """`coterie ledger show` says what was spent, by whom, and how it is counted."""

    def test_it_says_what_was_spent_of_what(self, coterie, site):
        """With delta, unit and relation, for every data set."""
        code, out, err = coterie("show")
        used = spent(site.named("icu").events(), budget=BUDGET)
        assert (code, err) == (0, "")
        assert f"epsilon {used:.4g} of 10 spent" in out
        assert "at delta 1e-05, for each example added or removed" in out
        assert "for each entity added or removed" in out
        assert "no events" in out

    def test_the_gate_stands_beside_what_others_say(self, coterie, site):
        """Named as what they are, and against the coordinator, who added one run's noise."""
        _, out, _ = coterie("show", "icu")
        assert f"Renyi, order {BUDGET.order} (the gate)" in out
        assert "as if all parameters had been fixed beforehand" in out
        assert "replace-one" in out
        assert out.count("infinite") == 4

    def test_equal_rounds_of_a_run_are_one_line(self, coterie, site):
        """With the range of rounds; a run with correlated noise shows all rounds that it covers."""
        _, out, _ = coterie("show", "icu")
        (line,) = [line for line in out.splitlines() if RUN[:12] in line]
        assert "1-3, 5" in line
        (line,) = [line for line in out.splitlines() if "matrix-gaussian" in line]
        assert "1-10" in line
        assert "coordinator" in line

    def test_its_document_holds_the_same(self, coterie, site):
        """As one JSON document; null stands for infinity."""
        code, out, err = coterie("show", "icu", "--json")
        (ledger,) = json.loads(out)["ledgers"]
        events = site.named("icu").events()
        figures = {row["accounting"]: row for row in ledger["epsilon"]}
        assert (code, err) == (0, "")
        assert (ledger["unit"], ledger["relation"], ledger["simulated"]) == ("example", "add/remove", False)
        assert ledger["budget"] == {"epsilon": 10.0, "delta": 1e-5, "order": BUDGET.order}
        assert ledger["spent"] == figures[f"Renyi, order {BUDGET.order}"]["epsilon"] == spent(events, budget=BUDGET)
        assert figures["Renyi, best order"]["epsilon"] == Renyi().epsilon(events, delta=1e-5)
        assert figures["replace one"]["epsilon"] == ReplaceOne().epsilon(events, delta=1e-5)
        assert figures["replace one"]["against_coordinator"] is None
        assert [(group["rounds"], group["events"]) for group in ledger["events"]] == [("1-3, 5", 4), ("1", 1)]

    def test_where_every_release_protects_clients_both_units_are_told(self, coterie, site):
        """A client's whole data, and one example of it."""
        site.named("ward").reserve(matrix(unit="client", trust="coordinator", noise=20.0), planned=2)
        (ledger,) = json.loads(coterie("show", "ward", "--json")[1])["ledgers"]
        figures = {(row["unit"], row["gate"]): row["epsilon"] for row in ledger["epsilon"]}
        assert figures["client", True] < figures["example", True]
        assert "unit" in coterie("show", "ward")[1]

    def test_noise_of_a_sum_s_clients_is_shown_with_its_condition(self, coterie, site):
        """It holds against the coordinator, too, while few help whoever looks; what neighbours are is said."""
        for r, colluding in ((1, 2), (2, 2)):
            site.named("ward").reserve(shared(r, noise=20.0, colluding=colluding), planned=2)
        (ledger,) = json.loads(coterie("show", "ward", "--json")[1])["ledgers"]
        assert all(row["against_coordinator"] == row["epsilon"] for row in ledger["epsilon"])
        (group,) = ledger["events"]
        assert (group["kind"], group["trust"], group["rounds"]) == ("distributed-noise", "cohort", "1-2")
        assert group["shares"] == {"mechanism": "skellam", "honest": 2, "colluding": 2}
        assert "replaced by zero" in group["relation"]
        out = " ".join(coterie("show", "ward")[1].split())
        for words in ("2 sites of each sum", "while at most 2 of the clients in a sum help", "by Renyi accounting"):
            assert words in out

    def test_a_release_without_noise_is_infinite(self, coterie, site, tmp_path):
        """In red where there are colours, in words everywhere."""
        open_site = SiteLedgers(
            tmp_path / "state" / "ledger", tmp_path / "state" / "identity", BUDGET, allow_non_private=True
        )
        open_site.named("ward").reserve(non_private(), planned=1)
        _, out, _ = coterie("show", "ward")
        assert "epsilon infinite of 10 spent: nothing more fits" in out
        assert "non-private" in out
        (ledger,) = json.loads(coterie("show", "ward", "--json")[1])["ledgers"]
        assert (ledger["spent"], ledger["share"]) == (None, None)

    def test_a_simulated_run_is_shown_as_such(self, coterie, run_folder):
        """One client, or all."""
        code, out, _ = coterie("show", str(run_folder), "--data", "hungary")
        assert code == 0
        assert "hungary  simulated" in out
        assert "cleveland" not in out
        document = json.loads(coterie("show", str(run_folder), "--json")[1])
        assert [(entry["name"], entry["simulated"]) for entry in document["ledgers"]] == [
            ("cleveland", True),
            ("hungary", True),
        ]

    def test_many_ledgers_have_a_line_each(self, coterie, tmp_path):
        """And how to see one of them."""
        ledgers = SimulatedLedgers(tmp_path / "runs" / "many" / "ledgers.db", BUDGET)
        for i in range(9):
            ledgers.of(f"client-{i}").reserve(sampled(rate=0.1), planned=1)
        ledgers.close()
        code, out, _ = coterie("show", str(tmp_path / "runs" / "many"))
        assert code == 0
        assert sum(line.startswith("client-") for line in out.splitlines()) == 9
        assert "--data NAME" in out
        assert "simulated" in out

    def test_a_ledger_that_cannot_be_trusted_is_said_to_be(self, coterie, site):
        """The others are still shown; nothing is said of what it spent."""
        cut(site)
        code, out, err = coterie("show")
        assert code == 8
        assert "cannot be trusted: it holds 5 of the 6 records" in " ".join(out.split())
        assert "ward" in out
        assert "error:" in err
        assert "coterie ledger accept icu" in err
        code, out, _ = coterie("show", "--json")
        damaged, sound = json.loads(out)["ledgers"]
        assert code == 8
        assert "spent" not in damaged
        assert sound["problem"] is None

    def test_what_is_not_there_is_told_with_what_is(self, coterie, site, tmp_path):
        """A name, and a folder."""
        code, _, err = coterie("show", "icy")
        assert code == 8
        assert "icu, ward" in err
        code, out, _ = coterie("show", "--state", str(tmp_path / "nowhere"), "--json")
        assert code == 8
        assert json.loads(out)["error"]["code"] == "ledger-invalid"

    def test_it_changes_nothing(self, coterie, site, tmp_path):
        """Not even a lock's file."""
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        for command in ("show", "verify"):
            coterie(command)
        coterie("export", "icu")
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


class TestVerify:
    """`coterie ledger verify` checks every line and the counter."""

    def test_sound_ledgers_are_listed(self, coterie, site):
        """With how much is in them."""
        code, out, err = coterie("verify")
        assert (code, err) == (0, "")
        assert out.splitlines() == ["icu: sound (6 records, 5 events)", "ward: sound (1 records, 0 events)"]

    def test_damage_is_an_error_with_a_hint(self, coterie, site):
        """Exit code 8; in JSON each ledger says its own."""
        cut(site)
        code, out, err = coterie("verify")
        assert code == 8
        assert out == "ward: sound (1 records, 0 events)\n"
        assert err.startswith("error: ")
        assert "hint: " in err
        code, out, _ = coterie("verify", "--json")
        assert code == 8
        assert [bool(entry["problem"]) for entry in json.loads(out)["ledgers"]] == [True, False]

    def test_a_simulated_store_is_verified_too(self, coterie, run_folder):
        """And a damaged one refused."""
        code, out, _ = coterie("verify", str(run_folder))
        assert code == 0
        assert "simulated" in out
        (run_folder / "ledgers.db").write_bytes(b"x" * 1000)
        code, _, err = coterie("verify", str(run_folder))
        assert code == 8
        assert "error: " in err


class TestExport:
    """`coterie ledger export` hands the record to whoever asks for it."""

    def test_lines_are_those_of_the_file(self, coterie, site):
        """So that their chain can be checked elsewhere."""
        code, out, _ = coterie("export", "icu")
        assert code == 0
        assert out.encode() == site.named("icu").path.read_bytes()
        assert read_chain(out.encode()).problem == ""

    def test_or_one_document(self, coterie, site):
        """With every record."""
        _, out, _ = coterie("export", "icu", "--json")
        assert json.loads(out)["records"] == site.named("icu").records()

    def test_it_holds_no_secret(self, coterie, site, tmp_path):
        """No salt, in any spelling that a file would have."""
        salt = (tmp_path / "state" / "identity" / "ledgers" / "salt").read_bytes()
        _, out, _ = coterie("export", "icu")
        assert salt.hex() not in out
        assert str(list(salt)) not in out

    def test_one_of_several_has_to_be_named(self, coterie, site):
        """Each has a chain of its own."""
        code, _, err = coterie("export")
        assert code == 8
        assert "icu, ward" in err

    def test_a_file_is_written_once(self, coterie, site, tmp_path):
        """It is not replaced."""
        for expected in (0, 8):
            code, out, _ = coterie("export", "icu", "--out", "icu.jsonl")
            assert (code, out) == (expected, "")
        assert (tmp_path / "icu.jsonl").read_bytes() == site.named("icu").path.read_bytes()

    def test_what_cannot_be_trusted_is_not_exported(self, coterie, site):
        """Nobody can tell what it says."""
        cut(site)
        assert coterie("export", "icu")[:2] == (8, "")


class TestBudget:
    """`coterie ledger budget` is how a budget changes, and the only way."""

    def test_without_a_value_it_shows_the_budget(self, coterie, site):
        """And what was spent of it; nothing is written."""
        before = site.named("icu").path.read_bytes()
        code, out, _ = coterie("budget", "icu")
        assert code == 0
        assert "epsilon 10 at delta 1e-05" in out
        assert site.named("icu").path.read_bytes() == before

    def test_a_change_keeps_what_is_not_named(self, coterie, site):
        """And stands in the ledger, with the ones before it."""
        code, out, _ = coterie("budget", "icu", "--epsilon", "12", "--yes")
        assert code == 0
        assert "epsilon 12 at delta 1e-05" in out
        assert site.named("icu").budget == Budget(epsilon=12.0, delta=1e-5, order=BUDGET.order)
        assert "budget set (UTC)" in coterie("show", "icu")[1]

    def test_nobody_to_ask_is_no_yes(self, coterie, site):
        """A script must say that it means it."""
        code, _, err = coterie("budget", "icu", "--epsilon", "12")
        assert code == 8
        assert "--yes" in err
        assert site.named("icu").budget == BUDGET

    @pytest.mark.parametrize(
        "words", [("--epsilon", "-1"), ("--epsilon", "inf"), ("--delta", "1"), ("--order", "3000")]
    )
    def test_impossible_values_are_refused(self, coterie, site, words):
        """Before anything is asked."""
        code, _, err = coterie("budget", "icu", *words, "--yes")
        assert code == 8
        assert "hint: " in err
        assert site.named("icu").budget == BUDGET

    def test_a_budget_of_nothing_is_refused(self, coterie, site):
        """A data set gets its ledger when it is first trained on."""
        assert coterie("budget", "new", "--epsilon", "1", "--yes")[0] == 8
        assert site.names() == ["icu", "ward"]


class TestAccept:
    """`coterie ledger accept` decides what becomes of a ledger that cannot be trusted."""

    def test_by_default_the_lost_part_had_spent_the_budget(self, coterie, site):
        """The way on is to raise the budget."""
        cut(site)
        code, out, err = coterie("accept", "icu", "--yes")
        assert code == 0
        assert "icu.jsonl.damaged-1" in out
        assert "coterie ledger budget icu" in err
        assert site.named("icu").standing().spent > 10
        assert coterie("verify", "icu")[1] == "icu: sound (7 records, 5 events, 1 accepted by hand)\n"

    def test_or_nothing_was_lost(self, coterie, site):
        """Where the administrator says so."""
        cut(site)
        _, out, _ = coterie("accept", "icu", "--assume-nothing-lost", "--yes", "--json")
        assert json.loads(out)["decision"]["assumed"] == "nothing-lost"
        assert len(site.named("icu").events()) == 4

    def test_the_decision_stays_visible(self, coterie, site):
        """In every view, for ever."""
        cut(site)
        coterie("accept", "icu", "--assume-nothing-lost", "--yes")
        assert "nothing lost" in coterie("show", "icu")[1]
        assert '"record":"accepted"' in coterie("export", "icu")[1]
        (ledger,) = json.loads(coterie("show", "icu", "--json")[1])["ledgers"]
        assert ledger["decisions"][0]["expected"]["records"] == 6

    def test_nobody_to_ask_is_no_yes(self, coterie, site):
        """What was found is told, nothing is written."""
        cut(site)
        before = site.named("icu").path.read_bytes()
        code, _, err = coterie("accept", "icu")
        assert code == 8
        assert "--yes" in err
        assert site.named("icu").path.read_bytes() == before

    @pytest.mark.parametrize(("answer", "expected"), [("y\n", 0), ("n\n", 130), ("\n", 130)])
    def test_on_a_terminal_it_asks(self, coterie, site, monkeypatch, answer, expected):
        """No is the default."""
        terminal = io.StringIO(answer)
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stdin", terminal)
        cut(site)
        code, out, err = coterie("accept", "icu")
        assert code == expected
        assert "it holds 5 of the 6 records" in err
        assert bool(out) == (expected == 0)

    def test_two_assumptions_contradict_each_other(self, coterie, site):
        """One is to be chosen."""
        cut(site)
        assert coterie("accept", "icu", "--assume-spent", "--assume-nothing-lost", "--yes")[0] == 2

    def test_of_a_sound_ledger_there_is_nothing_to_decide(self, coterie, site):
        """It stays as it is."""
        code, _, err = coterie("accept", "icu", "--yes")
        assert code == 8
        assert "nothing to decide" in err

    def test_where_no_budget_is_known_it_must_be_said(self, coterie, site):
        """Neither file can be read."""
        ledger = site.named("icu")
        ledger.path.write_bytes(b"\xff\n")
        ledger.counter.write_bytes(b"\xff")
        code, _, err = coterie("accept", "icu", "--yes")
        assert code == 8
        assert "--epsilon" in err
        assert coterie("accept", "icu", "--yes", "--epsilon", "10", "--delta", "1e-5")[0] == 0
        assert site.named("icu").budget == BUDGET
        assert math.isfinite(site.named("icu").standing().spent)
