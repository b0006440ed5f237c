"""From a file, its `[dp]` table and `--set` to one configuration that knows where each value came from."""

import pytest

from common.config import RunConfig, load_config
from common.config.load import find_scenario, known_keys, scenario_names
from common.errors import ConfigError

TWO_FACED = """
rounds = 7
[training]
learning_rate = 0.3
[privacy]
unit = "example"
target_epsilon = 3.0
[dp.training]
local_steps = 1
learning_rate = 2.0
"""


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("training.lernrate", "training.learning_rate"),
        ("traning.learning_rate", "training"),
        ("learning_rate", "training.learning_rate"),
        ("privacy.epsilon", "privacy.target_epsilon"),
        ("privcy.target_epsilon", "privacy"),
        ("round", "rounds"),
        ("modle", "model"),
        ("q", "strategy.q"),
        ("q.q.q", "strategy.q"),
    ],
)
def test_an_unknown_setting_is_refused_with_the_nearest_known_one(config, written, nearest):
    """A typing mistake never silently leaves a default in force."""
    with pytest.raises(ConfigError, match="unknown setting") as caught:
        config(f"{written}=1")
    assert f"`{nearest}`" in caught.value.hint


def test_an_unknown_setting_in_a_file_names_the_file(write):
    """Which of several files has to be mended."""
    with pytest.raises(ConfigError, match=r"run\.toml: unknown setting `data\.clints`"):
        load_config(write("[data]\nclints = 3\n"))


def test_what_is_like_nothing_known_is_referred_to_the_list(config):
    """No far-fetched guess."""
    with pytest.raises(ConfigError) as caught:
        config("zzzzzzzz=1")
    assert "coterie config show" in caught.value.hint


def test_the_message_for_a_bad_value_quotes_at_most_its_beginning(config):
    """An error fits on a screen."""
    with pytest.raises(ConfigError) as caught:
        config("training.device=" + "x" * 10_000)
    assert len(str(caught.value)) < 200


class TestPrecedence:
    """`--set` wins over `[dp]`, which wins over the rest of the file, which wins over defaults."""

    def test_a_file_replaces_defaults(self, write):
        """And leaves what it does not name."""
        config = load_config(write("rounds = 3\n[training]\nbatch_size = 8\n")).config
        assert (config.rounds, config.training.batch_size, config.training.learning_rate) == (3, 8, 0.1)

    def test_the_dp_table_applies_to_a_private_run(self, write):
        """One file describes the run with privacy ..."""
        loaded = load_config(write(TWO_FACED))
        assert (loaded.config.training.local_steps, loaded.config.training.learning_rate) == (1, 2.0)

    def test_plain_is_the_run_without_privacy(self, write):
        """... and without: the `[dp]` table is left out."""
        plain = load_config(write(TWO_FACED), ["training.batch_size=5"]).plain
        assert not plain.private
        assert (plain.training.local_steps, plain.training.learning_rate, plain.training.batch_size) == (0, 0.3, 5)

    def test_the_dp_table_is_left_out_where_privacy_is_switched_off(self, write):
        """Also by `--set`."""
        loaded = load_config(write(TWO_FACED), ["privacy.unit=none"])
        assert loaded.config == loaded.plain

    def test_plain_runs_mask_nothing(self, write):
        """Who trains alone has nobody to hide among; and what a ring can hold is no matter without one."""
        loaded = load_config(write(TWO_FACED), ["privacy.secure_aggregation=true", "secagg.bits=16"])
        assert loaded.config.privacy.secure_aggregation
        assert not loaded.plain.privacy.secure_aggregation

    def test_the_dp_table_applies_where_privacy_is_switched_on_by_set(self, write):
        """A file that is not private by itself."""
        text = TWO_FACED.replace('unit = "example"\n', "")
        assert load_config(write(text)).config.training.learning_rate == 0.3
        assert load_config(write(text), ["privacy.unit=example"]).config.training.learning_rate == 2.0

    def test_set_wins_over_the_file_and_its_dp_table(self, write):
        """What was typed last counts."""
        loaded = load_config(write(TWO_FACED), ["training.learning_rate=0.5", "rounds=2"])
        assert (loaded.config.training.learning_rate, loaded.config.rounds) == (0.5, 2)
        assert loaded.plain.training.learning_rate == 0.5

    def test_another_model_by_set_leaves_the_options_of_the_files_model(self, write):
        """They belong to the model that the file names, with and without privacy; those set beside it count."""
        path = write(TWO_FACED + '[model]\nname = "mlp"\noptions.hidden = 8\n[dp.model.options]\nhidden = 4')
        for unit, hidden in (("none", 8), ("example", 4)):
            other = load_config(path, ["model.name=linear", f"privacy.unit={unit}"])
            assert (other.config.model.options, other.plain.model.options) == ({}, {})
            same = load_config(path, ["model.name=mlp", f"privacy.unit={unit}"])
            assert (same.config.model.options, same.plain.model.options) == ({"hidden": hidden}, {"hidden": 8})
        assert load_config(path, ["model.name=cnn", "model.options.hidden=2"]).config.model.options == {"hidden": 2}

    def test_every_value_knows_where_it_came_from(self, write):
        """Default, file, its `[dp]` table, or `--set`."""
        path = write(TWO_FACED)
        origins = load_config(path, ["seeds.model=4"]).origins
        assert origins["rounds"] == path
        assert origins["training.learning_rate"] == origins["training.local_steps"] == f"{path} [dp]"
        assert origins["seeds.model"] == "--set"
        assert origins["training.batch_size"] == "default"
        assert set(known_keys()) <= set(origins)

    @pytest.mark.parametrize("text", ["[dp.training]\nlernrate = 1\n", "dp = 3\n", "[dp.privacy]\ntarget_delta = 2\n"])
    def test_a_wrong_dp_table_is_refused_even_where_it_is_not_used(self, write, text):
        """It would be found out only when somebody switches privacy on."""
        with pytest.raises(ConfigError, match="dp"):
            load_config(write(text))


class TestSet:
    """`--set key=value`."""

    @pytest.mark.parametrize(
        ("text", "value"), [("name=heart", "heart"), ("name='heart'", "heart"), ("name = heart", "heart")]
    )
    def test_text_needs_no_quotes(self, config, text, value):
        """TOML if it can be read as such, else text."""
        assert config(text).name == value

    @pytest.mark.parametrize("text", ["rounds", "=5", " =5", ""])
    def test_what_is_not_key_and_value_is_refused(self, config, text):
        """With an example."""
        with pytest.raises(ConfigError) as caught:
            config(text)
        assert "--set" in caught.value.hint

    @pytest.mark.parametrize(
        "pair", [["rounds=5", "rounds.x=1"], ["model=cnn"], ["rounds.x=1"], ["model.options.a.b=1"], ["data.=1"]]
    )
    def test_a_value_is_no_table_and_a_table_no_value(self, config, pair):
        """Refused, not a crash."""
        with pytest.raises(ConfigError):
            config(*pair)

    def test_model_options_are_numbers_booleans_and_names(self, config):
        """Each keeps its type."""
        options = config(
            "model.options.a=1", "model.options.b=0.5", "model.options.c=true", "model.options.d=gelu"
        ).model.options
        assert options == {"a": 1, "b": 0.5, "c": True, "d": "gelu"}
        assert [type(value) for value in options.values()] == [int, float, bool, str]


class TestSource:
    """A file's path or a scenario's name."""

    def test_a_scenario_is_found_by_its_name(self):
        """Installed packages contribute them."""
        assert "heart" in scenario_names()
        assert find_scenario("heart") is not None
        assert load_config("heart").config.name == "heart"

    def test_every_scenario_is_valid(self):
        """With and without its privacy."""
        for name in scenario_names():
            loaded = load_config(name)
            assert not loaded.plain.private

    def test_a_mistyped_scenario_names_the_nearest(self):
        """As for settings."""
        with pytest.raises(ConfigError) as caught:
            load_config("hart")
        assert "`heart`" in caught.value.hint

    def test_what_is_nowhere_lists_the_scenarios(self):
        """There is something to choose from."""
        with pytest.raises(ConfigError, match="no file or scenario") as caught:
            load_config("no/such/file.toml")
        assert "heart" in caught.value.hint

    @pytest.mark.parametrize("data", [b"rounds = = 3", b"\xff\xfe", b"rounds = 1\nrounds = 2"])
    def test_a_file_that_is_not_toml_is_refused(self, tmp_path, data):
        """With the place of the mistake."""
        path = tmp_path / "run.toml"
        path.write_bytes(data)
        with pytest.raises(ConfigError, match="not valid TOML"):
            load_config(path)

    def test_an_empty_file_is_the_defaults(self, write):
        """Nothing is needed."""
        assert load_config(write("")).config == RunConfig()
