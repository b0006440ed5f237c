"""From a registered name and options to a model."""

from dataclasses import replace

import pytest
import torch

from common.config import ModelSettings
from common.errors import ModelError, SiteError
from common.models import build_model, describe, initial_model, model_names, parameter_count
from common.site import ModelSource, Site

BUILT_IN = ("cnn", "inception", "linear", "lstm", "mlp", "resnet", "transformer")


def build(name, schema, **options):
    return build_model(ModelSettings(name=name, options=options), schema, site=Site())


def test_every_built_in_model_can_be_chosen_by_name():
    """The built-in names are these seven; a site's own come beside them."""
    assert model_names(Site()) == BUILT_IN
    site = Site(models={"my-net": ModelSource(source="my.py:build")})
    assert model_names(site) == tuple(sorted((*BUILT_IN, "my-net")))


def test_descriptions_name_data_and_options():
    """What the command line prints of a model is read off its builder."""
    described = {m.name: m for m in describe()}
    assert tuple(described) == BUILT_IN
    assert described["mlp"].families == ("tabular", "image")
    assert [(o.name, o.type, o.default) for o in described["lstm"].options] == [
        ("embedding", int, 32), ("hidden", int, 128), ("layers", int, 1), ("dropout", float, 0.0),
        ("bidirectional", bool, False),
    ]  # fmt: skip
    assert all(m.summary.endswith(".") for m in describe())
    assert all(o.help.endswith(".") and not o.required for m in describe() for o in m.options)


def test_an_unknown_model_is_refused_with_the_nearest_name(image):
    """A typing error in the name is answered with a proposal."""
    with pytest.raises(ModelError, match="no model `resnett`") as caught:
        build("resnett", image)
    assert caught.value.hint == "did you mean `resnet`?"


def test_an_unknown_option_is_refused_with_the_nearest_one(text):
    """A typing error in an option is answered with a proposal; with all options where none is near."""
    with pytest.raises(ModelError, match="`lstm` has no option `hiden`") as caught:
        build("lstm", text, hiden=3)
    assert caught.value.hint == "did you mean `hidden`?"
    with pytest.raises(ModelError) as caught:
        build("cnn", replace(text, kind="image", input_shape=(1, 28, 28)), zzz=3)
    assert caught.value.hint == "known: `dropout`, `hidden`"


@pytest.mark.parametrize(
    ("name", "option", "value", "message"),
    [
        ("mlp", "hidden", 0, "must be between 1 and 16,384"),
        ("mlp", "hidden", 10**9, "must be between 1 and 16,384"),
        ("mlp", "layers", -1, "must be between 0 and 256"),
        ("mlp", "dropout", 1.0, "must be between 0 and 0.99"),
        ("mlp", "hidden", 2.5, "default is 64"),
        ("mlp", "hidden", True, "default is 64"),
        ("mlp", "hidden", "big", "default is 64"),
        ("mlp", "dropout", False, "default is 0.0"),
    ],
)
def test_an_impossible_value_is_refused(tabular, name, option, value, message):
    """Numbers outside the limits, NaN and wrong types name the option and what it takes."""
    with pytest.raises(ModelError, match=f"`{option}` of model `{name}` is") as caught:
        build(name, tabular, **{option: value})
    assert message in caught.value.hint


def test_a_whole_number_serves_where_a_fraction_is_declared(tabular):
    """`dropout = 0` in a configuration means 0.0."""
    assert parameter_count(build("mlp", tabular, dropout=0)) == parameter_count(build("mlp", tabular))


@pytest.mark.parametrize(
    ("name", "kind", "proposed"), [("cnn", "tokens", "lstm"), ("lstm", "image", "cnn"), ("mlp", "tokens", "lstm")]
)
def test_a_model_for_other_data_is_refused(text, name, kind, proposed):
    """The error proposes models that take this kind of data."""
    with pytest.raises(ModelError, match=f"not {kind}") as caught:
        build(name, replace(text, kind=kind))
    assert f"`{proposed}`" in caught.value.hint


@pytest.mark.parametrize(("name", "smallest"), [("cnn", 10), ("resnet", 8), ("inception", 8)])
def test_images_too_small_for_the_pooling_are_refused(image, name, smallest):
    """The smallest image that a model takes is accepted, one pixel less is not."""
    options = {} if name == "cnn" else {"width": 4}
    fitting = replace(image, input_shape=(2, smallest, smallest))
    assert build(name, fitting, **options)(torch.zeros(1, 2, smallest, smallest)).shape == (1, 3)
    with pytest.raises(ModelError, match=f"at least {smallest} x {smallest} pixels"):
        build(name, replace(image, input_shape=(2, smallest, smallest - 1)), **options)


@pytest.mark.parametrize("name", ["cnn", "resnet", "inception"])
def test_images_need_three_dimensions(image, name):
    """A description without channels is refused before a layer is built."""
    with pytest.raises(ModelError, match="needs images"):
        build(name, replace(image, input_shape=(28, 28)))


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_tokens_need_a_declared_vocabulary(text, name):
    """The vocabulary's size is never counted from examples, so it must be declared."""
    with pytest.raises(ModelError, match="declares 0 token ids"):
        build(name, replace(text, vocabulary_size=0))


def test_heads_must_divide_the_width(text):
    """The hint names a number of heads that does."""
    with pytest.raises(ModelError, match="does not divide the width 12") as caught:
        build("transformer", text, width=12, heads=8)
    assert "heads = 4" in caught.value.hint


def test_a_bidirectional_lstm_cannot_predict_next_tokens(next_token):
    """Reading backwards would show the model what it is to predict."""
    with pytest.raises(ModelError, match="bidirectional"):
        build("lstm", next_token, bidirectional=True)


def test_a_seed_names_the_starting_weights(image):
    """The same seed gives the same weights, another seed others."""
    first, again, other = (
        initial_model(ModelSettings(), image, seed=seed, site=Site()).state_dict() for seed in (2**63 - 1, 2**63 - 1, 1)
    )
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_building_from_a_seed_leaves_the_generator_as_it_was(image):
    """Other draws of the caller do not depend on whether a model was built meanwhile."""
    before = torch.get_rng_state()
    initial_model(ModelSettings(), image, seed=3, site=Site())
    assert torch.equal(before, torch.get_rng_state())


def test_building_follows_the_callers_generator(image):
    """`build_model` draws from torch's generator, as plain torch code does."""
    torch.manual_seed(5)
    expected = initial_model(ModelSettings(), image, seed=5, site=Site()).state_dict()
    built = build("cnn", image).state_dict()
    assert all(torch.equal(expected[k], built[k]) for k in expected)


def test_a_site_cannot_take_a_built_in_name(image):
    """`cnn` means the same at every party."""
    site = Site(models={"cnn": ModelSource(source="mine.py:build")})
    with pytest.raises(SiteError, match="built-in name `cnn`"):
        build_model(ModelSettings(), image, site=site)
