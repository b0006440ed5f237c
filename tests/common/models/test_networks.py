"""What the built-in networks compute."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from common.config import ModelSettings
from common.models import build_model, check_private, initial_model, parameter_count
from common.models.layers import group_norm
from common.models.transformer import sinusoidal_positions
from common.schema import DataSchema
from common.site import Site

CASES = [
    ("cnn", "image", {}),
    ("cnn", "image", {"hidden": 5, "dropout": 0.2}),
    ("resnet", "image", {"width": 4, "blocks": 1, "groups": 3}),
    ("inception", "image", {"width": 4, "dropout": 0.2}),
    ("linear", "image", {}),
    ("linear", "tabular", {}),
    ("mlp", "image", {}),
    ("mlp", "tabular", {"layers": 3, "dropout": 0.2}),
    ("lstm", "text", {"hidden": 8, "layers": 2, "bidirectional": True, "dropout": 0.2}),
    ("lstm", "next_token", {"hidden": 8}),
    ("transformer", "text", {"width": 10, "heads": 2, "dropout": 0.2}),
    ("transformer", "next_token", {"width": 9, "heads": 3, "feed_forward": 5}),
]


def make(name, schema, **options):
    return initial_model(ModelSettings(name=name, options=options), schema, seed=0, site=Site())


def draw(schema, n):
    generator = torch.Generator().manual_seed(n)
    if schema.kind == "tokens":
        return torch.randint(schema.vocabulary_size, (n, *schema.input_shape), generator=generator)
    return torch.randn(n, *schema.input_shape, generator=generator)


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
@pytest.mark.parametrize("n", [0, 1, 3])
def test_logits_have_a_row_an_example(name, kind, options, n, request):
    """Any number of examples gives float32 logits, one row each, by position where the data has targets by position."""
    schema = request.getfixturevalue(kind)
    logits = make(name, schema, **options)(draw(schema, n))
    positions = schema.input_shape if schema.per_position else ()
    assert logits.shape == (n, *positions, schema.num_classes)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_no_example_sees_another(name, kind, options, request):
    """The logits of an example are the same alone and in a batch: nothing is normalised over the batch."""
    schema = request.getfixturevalue(kind)
    model, inputs = make(name, schema, **options).eval(), draw(schema, 4)
    alone = torch.cat([model(inputs[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(model(inputs), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "kind", "options"), CASES)
def test_every_parameter_learns_and_nothing_else_travels(name, kind, options, request):
    """All parameters get a gradient, none is shared, and there are no buffers to leak unnoised."""
    schema = request.getfixturevalue(kind)
    model = make(name, schema, **options)
    model(draw(schema, 4)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert list(model.buffers()) == []
    assert set(model.state_dict()) == {k for k, _ in model.named_parameters()}
    check_private(model)


def test_the_cnn_is_the_usual_small_one():
    """28x28x1 and ten classes: two convolutions, two poolings, one dense layer, 34,826 parameters."""
    schema = DataSchema(kind="image", input_shape=(1, 28, 28), num_classes=10)
    model = make("cnn", schema)
    reference = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(1600, 10),
    )  # fmt: skip
    reference.load_state_dict(dict(zip(reference.state_dict(), model.state_dict().values(), strict=True)))
    inputs = draw(schema, 2)
    assert parameter_count(model) == 34_826
    assert torch.equal(model(inputs), reference(inputs))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [("mlp", (784,), 50_890), ("linear", (32,), 330), ("mlp", (1, 28, 28), 50_890)],
)
def test_dense_models_count_as_they_should(name, shape, expected):
    """One hidden layer of 64 units by default; none in the linear model."""
    schema = DataSchema(kind="tabular" if len(shape) == 1 else "image", input_shape=shape, num_classes=10)
    assert parameter_count(make(name, schema)) == expected


def test_the_resnet_is_resnet_18_by_default():
    """Torch's ResNet-18 without its 7x7 stem: 11,173,962 parameters for three channels and ten classes."""
    schema = DataSchema(kind="image", input_shape=(3, 32, 32), num_classes=10)
    with torch.device("meta"):
        model = build_model(ModelSettings(name="resnet"), schema, site=Site())
    assert parameter_count(model) == 11_173_962


def test_the_lstm_keeps_torchs_parameter_names(text):
    """Its weights load into a plain `nn.LSTM`, which then computes the same sequence."""
    model = make("lstm", text, hidden=8, layers=2, bidirectional=True)
    plain = nn.LSTM(32, 8, num_layers=2, batch_first=True, bidirectional=True)
    plain.load_state_dict(model.lstm.state_dict())
    inputs = torch.randn(3, 7, 32)
    assert torch.equal(model.lstm(inputs)[0], plain(inputs)[0])


@pytest.mark.parametrize("name", ["lstm", "transformer"])
def test_next_token_models_do_not_see_the_future(next_token, name):
    """Changing a token changes no logits before it, and some from it on."""
    model, tokens = make(name, next_token).eval(), draw(next_token, 2)
    changed = tokens.clone()
    changed[:, 4] = (changed[:, 4] + 1) % next_token.vocabulary_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().amax(dim=2).min() > 1e-4


def test_the_transformer_knows_the_order_of_tokens(text):
    """Without positions a mean over tokens would not notice that two of them change places."""
    model, tokens = make("transformer", text).eval(), torch.arange(7).unsqueeze(0)
    assert (model(tokens) - model(tokens.flip(1))).abs().max() > 1e-3


def test_positions_follow_the_paper():
    """Position 0 is sin 0 and cos 0; the first wave turns by one radian a token; odd widths lose the last cosine."""
    table = sinusoidal_positions(3, 5, like=torch.zeros(()))
    assert table.shape == (3, 5)
    torch.testing.assert_close(table[0], torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0]))
    torch.testing.assert_close(table[:, 0], torch.arange(3.0).sin())
    torch.testing.assert_close(table[:, 1], (torch.arange(3.0) * 10_000 ** (-1 / 3)).sin())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing_changes_memory_not_gradients(next_token, dropout):
    """A checkpointed transformer has the same loss and gradients, dropout included."""
    results = []
    for checkpointing in (False, True):
        model = make("transformer", next_token, width=8, heads=2, dropout=dropout, checkpointing=checkpointing)
        torch.manual_seed(1)
        loss = model(draw(next_token, 3)).square().sum()
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(results[0], results[1])


def test_checkpointing_recomputes_in_the_backward_pass(next_token):
    """Each block runs once forward and once more backward; when predicting, once."""
    model = make("transformer", next_token, width=8, heads=2, layers=1, checkpointing=True)
    calls = []
    model.blocks[0].attention.register_forward_hook(lambda *_: calls.append(1))
    loss = model(draw(next_token, 3)).sum()
    assert len(calls) == 1
    loss.backward()
    assert len(calls) == 2
    model.eval()(draw(next_token, 3)).sum().backward()
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("channels", "groups", "expected"), [(64, 8, 8), (12, 8, 6), (8, 8, 4), (6, 4, 3), (3, 8, 1), (7, 3, 1), (2, 8, 1)]
)
def test_groups_divide_channels_and_hold_at_least_two(channels, groups, expected):
    """The number of groups is lowered until it fits."""
    assert group_norm(channels, groups).num_groups == expected


def test_colour_and_oblong_images_fit(image):
    """Channels and sides come from the data's description."""
    for name, options in (("cnn", {}), ("resnet", {"width": 4}), ("inception", {"width": 4})):
        schema = replace(image, input_shape=(3, 11, 20))
        assert make(name, schema, **options)(draw(schema, 2)).shape == (2, 3)
