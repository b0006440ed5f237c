"""docs/models.md says what the code does."""

import re
from pathlib import Path

import pytest

from common.config import ModelSettings
from common.models import build_model, describe, parameter_count
from common.models.options import limits
from common.site import load_site

TEXT = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")


def row(option) -> str:
    default = str(option.default).lower() if isinstance(option.default, bool) else str(option.default)
    return f"| `{option.name}` | {default} | {'' if option.type is bool else limits(option)} | {option.help} |"


@pytest.mark.parametrize("model", describe(), ids=lambda m: m.name)
def test_every_model_and_option_is_documented(model):
    """One line a model, and under its heading one row an option: default, limits, help; no row for options gone."""
    assert f"| `{model.name}` | {', '.join(model.families)} | {model.summary} |" in TEXT
    section = TEXT.split(f"### `{model.name}`\n")[1].split("\n#")[0] if model.options else ""
    rows = [line for line in section.splitlines() if re.match(r"\| `", line)]
    assert rows == [row(option) for option in model.options]


def test_the_example_of_ones_own_model_works(tmp_path, image):
    """The builder and the entry of `site.toml` in the document build a model."""
    section = TEXT.split("## A model of your own\n")[1]
    for file, language in (("my_models.py", "python"), ("site.toml", "toml")):
        (tmp_path / file).write_text(section.split(f"```{language}\n")[1].split("```")[0])
    settings = ModelSettings(name="my-net", options={"hidden": 5})
    model = build_model(settings, image, site=load_site(tmp_path / "site.toml"))
    assert parameter_count(model) == 12 * 14 * 5 + 5 + 5 * 3 + 3


def test_no_other_model_is_documented():
    """A model that is gone leaves no heading behind."""
    assert set(re.findall(r"^### `(\w+)`$", TEXT, re.MULTILINE)) == {m.name for m in describe() if m.options}
