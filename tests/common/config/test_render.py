"""A configuration survives being written, as JSON and as TOML; and every setting is documented."""

import tomllib
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from common.config import RunConfig, load_config
from common.config.load import parse_config, setting_fields
from common.config.render import documented_toml, settings_markdown, to_toml

DOCUMENT = Path(__file__).parents[3] / "docs" / "configuration.md"
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,10}", fullmatch=True)
AMOUNTS = st.floats(min_value=0, exclude_min=True, allow_infinity=False)
OPTION_VALUES = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | NAMES


@st.composite
def configurations(draw):
    """Valid runs of every shape: with and without privacy, with options, with settings that are not set."""
    private = draw(st.booleans())
    privacy, training = {}, {"learning_rate": draw(AMOUNTS), "shuffle": draw(st.booleans())}
    if private:
        training["local_steps"] = draw(st.integers(1, 50))
        privacy = {"unit": "example", draw(st.sampled_from(["target_epsilon", "noise_multiplier"])): draw(AMOUNTS)}
        privacy["target_delta"] = draw(st.floats(0, 0.01, exclude_min=True))
    honest, colluding = draw(st.integers(2, 50)), draw(st.integers(0, 50))
    group_size = draw(st.just(0) | st.integers(honest + colluding, 200))
    return RunConfig.model_validate(
        {
            "name": draw(NAMES),
            "rounds": draw(st.integers(1, 1_000_000)),
            "model": {"name": draw(NAMES), "options": draw(st.dictionaries(NAMES, OPTION_VALUES, max_size=4))},
            "data": {"partition": "natural", "clients": 0, "sites": draw(st.lists(NAMES, max_size=3))},
            "training": training,
            "strategy": {"server_learning_rate": draw(st.none() | AMOUNTS)},
            "privacy": {**privacy, "secure_aggregation": draw(st.booleans())},
            "secagg": {"honest": honest, "colluding": colluding, "group_size": group_size},
            "simulation": {"byzantine_scale": draw(st.floats(allow_nan=False, allow_infinity=False))},
        }
    )


@given(configurations())
@settings(deadline=None, max_examples=60)
def test_a_configuration_survives_every_form_it_is_written_in(config):
    """JSON for messages, TOML for run folders, commented TOML for people: the same run, by the same digest."""
    forms = (
        parse_config(config.canonical_json()),
        RunConfig.model_validate(tomllib.loads(to_toml(config))),
        RunConfig.model_validate(tomllib.loads(documented_toml(config))),
    )
    for form in forms:
        assert form == config
        assert form.digest() == config.digest()


def test_the_commented_file_can_be_loaded(tmp_path):
    """What `config init` writes is a run, options of the model and all."""
    config = load_config("heart", ["model.options.hidden=8", "model.options.kind=gelu"]).config
    path = tmp_path / "run.toml"
    path.write_text(documented_toml(config), encoding="utf-8")
    assert load_config(path).config == config


def test_the_commented_file_names_and_explains_every_setting():
    """Also those that are not set, as a comment."""
    lines = documented_toml(RunConfig()).splitlines()
    words = " ".join(line.removeprefix("# ") for line in lines)
    for key, field in setting_fields():
        leaf = key.rpartition(".")[2]
        assert any(line.startswith((f"{leaf} = ", f"# {leaf} = ")) for line in lines), key
        assert field.description in words, key


def test_every_setting_has_a_help_that_is_a_sentence():
    """A setting that nobody can understand is not declared."""
    for key, field in setting_fields():
        assert field.description, key
        assert field.description.endswith("."), key


def test_docs_configuration_is_what_the_settings_say():
    """Every setting is documented as it is. Write it anew: `python -m common.config.render > docs/configuration.md`."""
    assert DOCUMENT.read_text(encoding="utf-8") == settings_markdown()


def test_the_document_has_a_row_for_every_setting_and_every_table():
    """The renderer leaves nothing out."""
    text = settings_markdown()
    for key, field in setting_fields():
        table, _, leaf = key.rpartition(".")
        section = text.split(f"\n## `[{table}]`\n" if table else "\n## Top level\n")[1].split("\n## ")[0]
        (row,) = (line for line in section.splitlines() if line.startswith(f"| `{leaf}` |"))
        assert row.endswith(f"| {field.description} |")
        assert row.count(" | ") == 3, "a bar in a help would break the table"
