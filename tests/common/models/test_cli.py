"""`coterie models`."""

import json

import pytest

from common.cli import main
from common.models import model_names
from common.site import Site


class TestModels:
    def test_every_built_in_model_is_listed_with_its_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What a configuration can name is what the command prints."""
        main_ok(["models", "--json"])
        document = json.loads(capsys.readouterr().out)
        assert set(document) == set(model_names(Site()))
        assert document["lstm"]["options"]["hidden"]["default"] == 128

    def test_people_get_a_table(self, capsys: pytest.CaptureFixture[str]) -> None:
        """Without --json the same stands in a table."""
        main_ok(["models"])
        assert "transformer" in capsys.readouterr().out


def main_ok(words: list[str]) -> None:
    """Run a command line that must succeed."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
