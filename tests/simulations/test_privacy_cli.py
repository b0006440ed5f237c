"""`coterie privacy plan` and `coterie policy`: what a run would cost, and whether a site takes part."""

import json

import pytest

from common.cli import main


def output(capsys, *words: str, code: int = 0):
    """What a command prints; its exit code must be `code`."""
    with pytest.raises(SystemExit) as stopped:
        main(list(words))
    captured = capsys.readouterr()
    assert stopped.value.code == code, captured.err
    return captured.out, captured.err


def plan(capsys, *words: str):
    out, _ = output(capsys, "privacy", "plan", "heart", *words, "--json")
    return json.loads(out)


def test_the_plan_is_shown_under_both_relations(capsys):
    """Noise, epsilon after each round, and what a site pays; nothing is trained."""
    document = plan(capsys, "--set", "privacy.target_epsilon=3")
    last = document["after"][-1]
    assert last["rounds"] == document["participations"] == 20
    assert last["epsilon"] <= 3
    assert last["privacy_loss"] <= last["renyi_best_order"] <= last["epsilon"] * (1 + 1e-9)
    assert last["replace_one"] > 1.5 * last["privacy_loss"]
    spent = [row["epsilon"] for row in document["after"]]
    assert spent == sorted(spent)
    assert document["site"]["epsilon"] == pytest.approx(last["epsilon"])
    assert document["noise_stddev"] >= document["noise_multiplier"] * document["clipping_norm"]
    assert document["warnings"] == []


def test_what_if_varies_noise_rounds_and_target(capsys):
    """More rounds cost more, more noise less; a larger target needs less noise."""
    tables = plan(capsys, "--set", "privacy.target_epsilon=3", "--what-if")["what_if"]
    for row in tables["epsilon"]:
        assert row["epsilon"] == sorted(row["epsilon"])
    for one, two in zip(tables["noise"], tables["noise"][1:], strict=False):
        assert all(a > b for a, b in zip(one["noise_multiplier"], two["noise_multiplier"], strict=True))


def test_a_small_cohort_of_clients_is_warned_of(capsys):
    """With four clients the noise drowns any update; the example unit is proposed."""
    words = ("--set", "privacy.unit=client", "--set", "privacy.target_epsilon=3", "--set", "training.local_steps=1")
    document = plan(capsys, *words)
    assert document["trust"] == "coordinator"
    assert document["site"]["epsilon_against_coordinator"] is None
    assert "privacy.unit = 'example'" in document["warnings"][0]


SHARED = ("privacy.unit=client", "privacy.secure_aggregation=true", "privacy.target_epsilon=8", "rounds=10")


def words_of(*settings):
    return [word for setting in settings for word in ("--set", setting)]


def test_noise_of_the_clients_holds_against_the_coordinator(capsys):
    """While few help it; it is counted by Renyi accounting alone, and each round by itself."""
    document = plan(capsys, *words_of(*SHARED, "secagg.noise=discrete-gaussian"))
    assert document["trust"] == "cohort"
    assert "replaced by zero" in document["relation"]
    assert document["shares"] == {
        "mechanism": "discrete-gaussian", "bits": 32, "clients": 4, "honest": 2, "colluding": 1,
    }  # fmt: skip
    assert [row["rounds"] for row in document["after"]][-1] == 10
    assert all(row["privacy_loss"] == row["renyi_best_order"] <= row["epsilon"] for row in document["after"])
    assert document["after"][0]["epsilon"] < document["after"][-1]["epsilon"] <= 8
    site = document["site"]
    assert site["epsilon_against_coordinator"] == site["epsilon"] > 8


def test_people_see_the_condition_of_distributed_noise(capsys):
    """Beside the unit, and what neighbours are beside epsilon."""
    out, _ = output(capsys, "privacy", "plan", "heart", *words_of(*SHARED))
    text = " ".join(out.split())
    for words in (
        "the coordinator too, while at most 1 of the clients in a sum help whoever looks",
        "one client's update replaced by zero, survivors the same",
        "skellam noise of 2 honest clients",
        "divided by the number of survivors",
        "counted by Renyi accounting in every column",
    ):
        assert words in text
    assert "there is no protection" not in text


def test_noise_made_for_few_of_many_is_warned_of(capsys):
    """A sum of many has more noise than is counted."""
    many = plan(capsys, *words_of(*SHARED, "data.partition=iid", "data.clients=40"))
    assert any("raise secagg.honest" in warning for warning in many["warnings"])
    fitting = plan(capsys, *words_of(*SHARED, "data.partition=iid", "data.clients=40", "secagg.honest=30"))
    assert not any("secagg.honest" in warning for warning in fitting["warnings"])


def test_people_see_tables(capsys):
    """And what the figures mean."""
    out, _ = output(capsys, "privacy", "plan", "heart", "--set", "privacy.target_epsilon=3", "--what-if")
    for words in ("after rounds", "replace-one", "noise multiplier, by target", "as if all parameters"):
        assert words in out


def test_a_run_without_a_target_has_no_plan(capsys, tmp_path):
    """There is no default budget."""
    (tmp_path / "run.toml").write_text('[data]\nname = "heart"\npartition = "natural"\nclients = 0\n')
    _, err = output(capsys, "privacy", "plan", str(tmp_path / "run.toml"), code=3)
    assert "target_epsilon" in err


def test_a_policy_says_whether_a_site_takes_part(capsys, tmp_path):
    """Its budget, or one of its limits."""
    path = tmp_path / "policy.toml"
    output(capsys, "policy", "init", "--out", str(path), "--epsilon", "4")
    joins = plan(capsys, "--set", "privacy.target_epsilon=3", "--policy", str(path))["policy"]
    assert joins["joins"] is True
    assert joins["epsilon"] <= joins["budget_epsilon"] == 4
    dear = plan(capsys, "--set", "privacy.target_epsilon=6", "--policy", str(path))["policy"]
    assert (dear["joins"], dear["within_limits"]) == (False, True)
    rash = plan(
        capsys, "--set", "privacy.target_epsilon=3", "--set", "privacy.target_delta=1e-4", "--policy", str(path)
    )
    assert (rash["policy"]["joins"], rash["policy"]["within_limits"]) == (False, False)


class TestPolicy:
    """A site's rules, written and checked where they belong."""

    def test_an_example_is_valid_and_is_not_overwritten(self, capsys, tmp_path):
        """Every limit with its default."""
        path = tmp_path / "policy.toml"
        output(capsys, "policy", "init", "--out", str(path))
        out, _ = output(capsys, "policy", "check", str(path), "--json")
        assert json.loads(out)["policy"]["limits"]["units"] == ["example"]
        before = path.read_bytes()
        output(capsys, "policy", "init", "--out", str(path), code=4)
        assert path.read_bytes() == before

    @pytest.mark.parametrize("words", [("--epsilon", "0"), ("--epsilon", "nan"), ("--delta", "1"), ("--delta", "-1")])
    def test_an_impossible_budget_is_not_written(self, capsys, tmp_path, words):
        """With a hint, and no file."""
        _, err = output(capsys, "policy", "init", "--out", str(tmp_path / "p.toml"), *words, code=4)
        assert "hint:" in err
        assert list(tmp_path.iterdir()) == []

    def test_delta_is_compared_with_the_number_of_rows_once_and_here(self, capsys, tmp_path):
        """1e-6 is small for 920 patients; 0.01 would publish some of them."""
        path = tmp_path / "policy.toml"
        output(capsys, "policy", "init", "--out", str(path))
        out, _ = output(capsys, "policy", "check", str(path), "--data", "heart")
        assert "below one over" in out
        path.write_text(path.read_text().replace("largest_delta = 1e-05", "largest_delta = 0.01"))
        _, err = output(capsys, "policy", "check", str(path), "--data", "heart", code=4)
        assert "not below one over" in err
