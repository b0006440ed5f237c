"""A site's own function that builds its data."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.config.settings import DataSettings
from common.data import load_examples, load_federation
from tests.common.data.test_own_data import Register, error, write

FUNCTION = """
import torch
from dataclasses import dataclass
from common.schema import ClientData, DataSchema, Examples, Federation

@dataclass
class Needs:  # looks its own module up in sys.modules
    seed: int

def build(settings, seed):
    part = Examples(inputs=torch.full((4, 2), float(Needs(seed).seed)), targets=torch.tensor([0, 1, 0, 1]))
    clients = tuple(ClientData(name=name, train=part, test=part) for name in ("one", "two"))
    return Federation(schema=DataSchema(kind="tabular", input_shape=(2,), num_classes=2), clients=clients, test=part)
"""


class TestCode:
    """A site's own function."""

    def test_function_gets_settings_and_seed(self, tmp_path: Path, register: Register) -> None:
        """What it returns is the federation; `sites` and `pooled` apply to it."""
        write(tmp_path, "mine.py", FUNCTION)
        site = register("python:mine.py:build")
        found = load_federation(DataSettings(name="own"), seed=7, site=site)
        assert [client.name for client in found.clients] == ["one", "two"]
        assert found.test.inputs.unique().tolist() == [7]
        settings = DataSettings(name="own", partition="natural", sites=["two"], pooled=True)
        assert len(load_federation(settings, seed=7, site=site).clients[0].train) == 4
        assert len(load_examples("own", settings=DataSettings(name="own"), site=site).row_ids) == 12

    @pytest.mark.parametrize(
        ("source", "message"),
        [
            ("python:mine.py", "names no function"),
            ("python:nowhere.py:build", "does not exist"),
            ("python:mine.py:other", "has no function `other`"),
            ("python:bad.py:fails", "failed with ValueError"),
            ("python:bad.py:wrong", "returned a int"),
            ("python:bad.py:empty", "there are no clients"),
            ("python:bad.py:shape", "inputs are torch.float32[4, 2]"),
            ("python:bad.py:labels", "targets lie outside 0..0"),
            ("python:broken.py:build", "failed with SyntaxError"),
        ],
    )
    def test_refusals(self, tmp_path: Path, register: Register, source: str, message: str) -> None:
        """What fails is named; the text of the function's own exception is withheld."""
        write(tmp_path, "mine.py", FUNCTION)
        write(tmp_path, "broken.py", "def build(:")
        write(
            tmp_path,
            "bad.py",
            FUNCTION
            + "from dataclasses import replace\n"
            + "def fails(settings, seed): raise ValueError('SECRET')\n"
            + "def wrong(settings, seed): return 3\n"
            + "def empty(settings, seed): return replace(build(settings, seed), clients=())\n"
            + "def other(settings, seed, **new):\n"
            + "    found = build(settings, seed)\n"
            + "    return replace(found, schema=replace(found.schema, **new))\n"
            + "def shape(settings, seed): return other(settings, seed, input_shape=(3,))\n"
            + "def labels(settings, seed): return other(settings, seed, num_classes=1)\n",
        )
        assert message in str(error(register(source)))
