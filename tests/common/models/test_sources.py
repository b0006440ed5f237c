"""A site's own models, named in its `site.toml`."""

import os
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch

from common.config import ModelSettings
from common.errors import ModelError, SiteError
from common.models import build_model, sources
from common.site import ModelSource, Site

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
from typing import TYPE_CHECKING
from torch import nn
from common.errors import ModelError
if TYPE_CHECKING:
    from common.schema import DataSchema

class Own(nn.Sequential):
    pass

@dataclass
class Size:
    width: int = 4

def build(schema: DataSchema, *, hidden: int = 4, depth=1) -> nn.Module:
    first, last = nn.Linear(schema.input_shape[0], hidden), nn.Linear(hidden, schema.num_classes)
    return Own(first, nn.BatchNorm1d(hidden), last)

def needs(schema, *, hidden):
    return nn.Linear(schema.input_shape[0], schema.num_classes)

def anything(schema, **options):
    return nn.Linear(schema.input_shape[0], schema.num_classes, bias=options["bias"])

def refuses(schema):
    raise ModelError("too narrow", hint="add a column")

def crashes(schema):
    return nn.Linear(schema.columns, 2)

def wrong_type(schema):
    return 3

def wrong_input(schema):
    return nn.Linear(99, schema.num_classes)

def wrong_output(schema):
    return nn.Linear(schema.input_shape[0], 99)

def pair(schema):
    return nn.LSTM(schema.input_shape[0], 2)

NUMBER = 3
"""


@pytest.fixture
def own(tmp_path, tabular):
    (tmp_path / "nets.py").write_text(SOURCE)

    def build(source, **options):
        site = Site(models={"mine": ModelSource(source=source)}, folder=tmp_path)
        return build_model(ModelSettings(name="mine", options=options), tabular, site=site)

    return build


def test_a_function_in_a_file_builds_the_model(own):
    """`file.py:function`, relative to the folder of `site.toml`; it comes back in training mode, batch norm and all."""
    model = own("nets.py:build", hidden=5)
    assert model[0].out_features == 5
    assert all(layer.training for layer in model.modules())


def test_options_of_ones_own_builder_are_checked_by_its_signature(own):
    """Unknown names are refused; with `**options` any name goes; an option without default is required."""
    with pytest.raises(ModelError, match="no option `hiden`"):
        own("nets.py:build", hiden=5)
    with pytest.raises(ModelError, match="needs option `hidden`"):
        own("nets.py:needs")
    assert own("nets.py:anything", bias=False).bias is None


def test_the_file_is_a_module_of_its_own(own, tmp_path):
    """It shadows nothing that is installed, and is executed again only when it changed."""
    before = set(sys.modules)
    first = type(own("nets.py:build"))
    added = {name for name in set(sys.modules) - before if name.startswith("coterie_site_")}
    assert first is type(own("nets.py:build"))
    os.utime(tmp_path / "nets.py", ns=(0, 0))
    assert first is not type(own("nets.py:build"))
    assert len(added) == 1


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        ("nets.py", "names no function", "my_models.py:build"),
        ("nets.py:", "names no function", "my_models.py:build"),
        ("absent.py:build", "No such file", "relative to site.toml"),
        ("nets.py:biuld", "defines no `biuld`", "did you mean `build`"),
        ("nets.py:NUMBER", "is not a function", "my_models.py:build"),
        ("broken.py:build", "cannot be executed: ZeroDivisionError", "broken.py"),
        ("notes.txt:build", "cannot be executed", "notes.txt"),
        ("entry:absent", "no installed package offers it", "install"),
    ],
)
def test_a_source_that_cannot_be_loaded_is_explained(own, tmp_path, source, message, hint):
    """The error quotes the line of `site.toml` and says how to mend it."""
    (tmp_path / "broken.py").write_text("1 / 0")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SiteError, match=message) as caught:
        own(source)
    assert "models.mine" in str(caught.value)
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("refuses", "too narrow"),
        ("crashes", "builder of model `mine` failed: AttributeError"),
        ("wrong_type", "returned int"),
        ("wrong_input", r"cannot take examples of shape \(6,\)"),
        ("wrong_output", r"returns \(2, 99\) for two examples"),
        ("pair", "returns tuple for two examples"),
    ],
)
def test_a_builder_that_does_not_fit_is_found_before_training(own, function, message):
    """The model is tried on two blank examples."""
    with pytest.raises(ModelError, match=message) as caught:
        own(f"nets.py:{function}")
    assert caught.value.hint


def test_an_installed_package_can_offer_a_model(own, monkeypatch):
    """`entry:NAME` of the entry-point group `coterie.models`; a failing import is explained."""
    points = EntryPoints(
        [
            EntryPoint(name="tiny", group="coterie.models", value="common.models.dense:build_linear"),
            EntryPoint(name="gone", group="coterie.models", value="common.models.absent:build"),
        ]
    )
    monkeypatch.setattr(sources, "entry_points", lambda *, group: points.select(group=group))
    assert own("entry:tiny")(torch.zeros(2, 6)).shape == (2, 2)
    with pytest.raises(SiteError, match="cannot be imported"):
        own("entry:gone")
    with pytest.raises(SiteError) as caught:
        own("entry:tny")
    assert caught.value.hint == "did you mean `tiny`?"
