"""`--vary` becomes arms: every combination once, each repeat with its own seeds, and what cannot be is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from common.errors import ConfigError
from simulations.study.arms import MAX_RUNS, PlannedArm, label_of, parse_vary, plan_arms
from tests.helpers.runs import tree


@pytest.fixture
def source(tmp_path: Path) -> str:
    """A configuration file."""
    path = tmp_path / "tiny.toml"
    path.write_text(tomli_w.dumps(tree(seeds={"cohort": 5})))
    return str(path)


def plan(source: str, *vary: str, repeats: int = 1, overrides: tuple[str, ...] = ()) -> tuple[PlannedArm, ...]:
    return plan_arms(source, parse_vary(vary), repeats=repeats, overrides=overrides)


class TestValues:
    @pytest.mark.parametrize(
        ("word", "values"),
        [
            ("rounds=5,10", ("5", "10")),
            ("strategy.name=fedavg,fedprox", ("fedavg", "fedprox")),
            ("strategy.name = fedavg , fedprox", ("fedavg", "fedprox")),
            ("training.learning_rate=0.1,1e-2", ("0.1", "0.01")),
            ("simulation.devices.partial_work=false,true", ("false", "true")),
            ('data.sites=["a", "b"], ["c"]', ('["a", "b"]', '["c"]')),
            ('model.name="cnn",mlp', ("cnn", "mlp")),
        ],
    )
    def test_are_toml_or_plain_strings(self, word: str, values: tuple[str, ...]) -> None:
        """Numbers, booleans, names and lists; commas within a list do not part values."""
        (varied,) = parse_vary([word])
        assert varied.values == values

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["rounds"], "expected key=value"),
            (["=5,10"], "expected key=value"),
            (["rounds=5"], "one value is nothing to compare"),
            (["rounds="], "one value is nothing to compare"),
            (["rounds=5,5"], "5 stands there twice"),
            (["rounds=5,10", "rounds=6,7"], "given twice"),
            ([], "nothing is varied"),
        ],
    )
    def test_that_make_no_study_are_refused(self, words: list[str], message: str) -> None:
        """With what is wrong and how to mend it."""
        with pytest.raises(ConfigError, match=message) as caught:
            parse_vary(words)
        assert caught.value.hint


class TestArms:
    def test_are_all_combinations_the_last_key_changing_first(self, source: str) -> None:
        """Two strategies under two rates are four arms, each labelled by its values."""
        arms = plan(source, "strategy.name=fedavg,fedprox", "training.learning_rate=0.1,0.2")
        assert [arm.label for arm in arms] == [
            "fedavg, learning rate 0.1",
            "fedavg, learning rate 0.2",
            "fedprox, learning rate 0.1",
            "fedprox, learning rate 0.2",
        ]
        configs = [arm.runs[0].config for arm in arms]
        assert [(c.strategy.name, c.training.learning_rate) for c in configs] == [
            ("fedavg", 0.1), ("fedavg", 0.2), ("fedprox", 0.1), ("fedprox", 0.2),
        ]  # fmt: skip

    def test_differ_from_the_source_only_in_what_is_varied_and_set(self, source: str) -> None:
        """--set holds in every arm."""
        arms = plan(source, "strategy.name=fedavg,fedprox", overrides=("rounds=7",))
        assert {arm.runs[0].config.rounds for arm in arms} == {7}
        assert arms[0].runs[0].config.training.learning_rate == 0.3

    def test_have_folders_of_their_own(self, source: str) -> None:
        """However alike their labels are once what a folder's name cannot hold is left out."""
        arms = plan(source, "training.momentum=0.1,0.5", "strategy.name=fedavg,fedprox", repeats=3)
        folders = [run.folder for arm in arms for run in arm.runs]
        assert len(set(folders)) == 12
        assert folders[0] == "runs/01-momentum-0.1-fedavg-r1"

    def test_do_not_compare_within_themselves(self, tmp_path: Path) -> None:
        """A source with a comparison of its own is varied without it."""
        path = tmp_path / "compared.toml"
        path.write_text(tomli_w.dumps(tree(data={"folds": 2}, comparison={"enabled": True})))
        assert not plan(str(path), "rounds=1,2")[0].runs[0].config.comparison.enabled

    def test_private_arms_know_their_plain_form(self, source: str) -> None:
        """As a run that is simulated alone does."""
        options = ("privacy.noise_multiplier=1", "training.local_steps=1")
        private = plan(source, "privacy.unit=none,example", overrides=options)[1].runs[0]
        assert (private.config.privacy.unit, private.plain.privacy.unit) == ("example", "none")

    def test_a_label_is_what_people_say(self) -> None:
        """A name stands alone, anything else behind the last part of its key."""
        assert label_of({"strategy.name": "fedprox", "strategy.proximal_mu": "0.1"}) == "fedprox, proximal mu 0.1"


class TestRepeats:
    def test_move_every_seed_but_the_datas(self, source: str) -> None:
        """Model, cohort, training and devices differ from one repeat to the next; who holds what stays."""
        runs = plan(source, "rounds=1,2", repeats=2)[0].runs
        first, second = (run.config.seeds for run in runs)
        assert (first.cohort, second.cohort) == (5, 6)
        assert (second.model, second.training, second.devices) == (1, 1, 1)
        assert first.data == second.data == 0

    def test_are_paired_between_arms(self, source: str) -> None:
        """The same repeat has the same seeds in every arm."""
        arms = plan(source, "rounds=1,2", repeats=3)
        assert [r.config.seeds for r in arms[0].runs] == [r.config.seeds for r in arms[1].runs]

    def test_divide_the_data_anew_if_asked_to(self, source: str) -> None:
        """Then the data's seed moves, too."""
        arms = plan_arms(source, parse_vary(["rounds=1,2"]), repeats=2, reseed_data=True)
        assert [run.config.seeds.data for run in arms[0].runs] == [0, 1]


class TestRefusals:
    @pytest.mark.parametrize(
        ("vary", "overrides", "repeats", "message"),
        [
            (["strategy.nmae=fedavg,fedprox"], (), 1, "unknown setting `strategy.nmae`"),
            (["strategy=fedavg,fedprox"], (), 1, "strategy"),
            (["rounds=1,0"], (), 1, "the arm `rounds 0` is not possible"),
            (["rounds=1,2"], ("rounds=3",), 1, "both set and varied"),
            (["seeds.cohort=1,2"], (), 2, "moves with the repeats"),
            (["rounds=1,2"], (), 0, "--repeats 0"),
            (["rounds=1,2"], (), MAX_RUNS, "more than"),
            (["cohort.sampling=uniform,cyclic", "cohort.size=2,9"], ("nonsense=1",), 1, "unknown setting `nonsense`"),
        ],
    )
    def test_what_cannot_be_is_named(
        self, source: str, vary: list[str], overrides: tuple[str, ...], repeats: int, message: str
    ) -> None:
        """A key that no run has, a value no setting takes, a setting given twice, a seed that moves anyway."""
        with pytest.raises(ConfigError, match=message) as caught:
            plan(source, *vary, repeats=repeats, overrides=overrides)
        assert caught.value.hint

    def test_an_arm_whose_settings_contradict_each_other_is_named(self, source: str) -> None:
        """Each value is possible, their combination is not."""
        with pytest.raises(ConfigError, match="the arm `size 2, min survivors 3` is not possible"):
            plan(source, "cohort.size=2,4", "cohort.min_survivors=1,3")
