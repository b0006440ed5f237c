"""Per-example gradients through Opacus's hooks are those of one example at a time."""

import warnings
from copy import deepcopy

import pytest
import torch
from opacus.grad_sample import GradSampleHooks
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from common.config import ModelSettings
from common.errors import PrivacyError
from common.models import check_private, initial_model
from common.privacy.per_sample import expected_warnings, lstm_grad_sample, register_samplers
from common.schema import DataSchema
from common.site import Site

IMAGE = DataSchema(kind="image", input_shape=(2, 12, 12), num_classes=3)
TABULAR = DataSchema(kind="tabular", input_shape=(6,), num_classes=2)
TEXT = DataSchema(kind="tokens", input_shape=(7,), num_classes=3, vocabulary_size=11)
NEXT = DataSchema(kind="tokens", input_shape=(7,), num_classes=11, vocabulary_size=11, per_position=True)
CASES = [
    pytest.param(name, schema, options, id=f"{name}-{schema.kind}-{'next' if schema.per_position else 'class'}")
    for name, schema, options in (
        ("cnn", IMAGE, {"hidden": 5}),
        ("resnet", IMAGE, {"width": 4, "blocks": 1}),
        ("inception", IMAGE, {"width": 4}),
        ("linear", TABULAR, {}),
        ("mlp", IMAGE, {"layers": 2}),
        ("lstm", NEXT, {"embedding": 5, "hidden": 6}),
        ("lstm", TEXT, {"embedding": 5, "hidden": 6, "layers": 2, "bidirectional": True}),
        ("transformer", NEXT, {"width": 8, "heads": 2}),
        ("transformer", TEXT, {"width": 8, "heads": 2, "checkpointing": True}),
    )
]


class OutputLSTM(nn.LSTM):
    """A subclass of a user's own that returns the output sequence only."""

    def forward(self, x):
        return super().forward(x)[0]


class Scale(nn.Module):
    """A layer that Opacus has no sampler for."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))

    def forward(self, x):
        return x * self.scale


class OwnConvolution(nn.Conv1d):
    """A subclass, for which Opacus looks up no sampler."""


def make(name, schema, options):
    return initial_model(ModelSettings(name=name, options=options), schema, seed=0, site=Site())


def draw(schema, n):
    generator = torch.Generator().manual_seed(n)
    if schema.kind == "tokens":
        return torch.randint(schema.vocabulary_size, (n, *schema.input_shape), generator=generator)
    return torch.randn(n, *schema.input_shape, generator=generator)


def loss_of(model, inputs):
    """Sum over examples of something in which no gradient is zero or constant."""
    return model(inputs).sin().square().sum()


def attach(model):
    register_samplers(model)
    return GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=True)


def hooked_gradients(model, inputs):
    """By parameter name, through the hooks, on a copy of the model."""
    model = deepcopy(model)
    hooks = attach(model)
    with expected_warnings():
        loss_of(model, inputs).backward()
    gradients = {name: p.grad_sample for name, p in model.named_parameters() if p.requires_grad}
    hooks.cleanup()
    return gradients


def one_at_a_time(model, inputs):
    """By parameter name, with plain autograd and batches of one."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    rows = [torch.autograd.grad(loss_of(model, inputs[i : i + 1]), parameters) for i in range(len(inputs))]
    return {name: torch.stack(gradients) for name, gradients in zip(names, zip(*rows, strict=True), strict=True)}


def assert_equal(found, expected, *, relative=1e-5):
    """Every parameter's gradients, example by example, by their distance relative to their length."""
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        assert found[name].shape == rows.shape, name
        distance, length = (x.flatten(1).norm(dim=1) for x in (found[name] - rows, rows))
        assert length.min() > 0, f"{name}: nothing to compare with"
        assert (distance <= relative * length).all(), f"{name}: {(distance / length).max():.1e}"


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, OutputLSTM])
def test_lstm_gradients_are_exact(layers, bidirectional, bias, kind):
    """Any depth, one or two directions, with and without biases; torch's own class and subclasses of it."""
    torch.manual_seed(0)
    lstm = kind(4, 5, num_layers=layers, bidirectional=bidirectional, bias=bias, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.lstm, self.after = nn.Linear(3, 4), lstm, nn.Linear(10 if bidirectional else 5, 2)

        def forward(self, x):
            outputs = self.lstm(self.before(x))
            return self.after(outputs[0] if isinstance(outputs, tuple) else outputs)

    model, inputs = Model(), torch.randn(6, 9, 3)
    assert_equal(hooked_gradients(model, inputs), one_at_a_time(model, inputs))


def test_lstm_gradients_are_exact_in_double_precision():
    """What separates the two ways is rounding: in float64 they agree to a billionth and better."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(OutputLSTM(3, 20, num_layers=2, batch_first=True)).double(), torch.randn(4, 40, 3)
    expected = one_at_a_time(model, inputs.double())
    assert_equal(hooked_gradients(model, inputs.double()), expected, relative=1e-11)


@pytest.mark.parametrize("length", [1, 2])
def test_lstm_gradients_of_short_sequences(length):
    """At length 1 the hidden weights meet only the zero state: their gradient is zero."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(OutputLSTM(3, 4, batch_first=True)), torch.randn(5, length, 3)
    found, expected = hooked_gradients(model, inputs), one_at_a_time(model, inputs)
    for name, rows in expected.items():
        torch.testing.assert_close(found[name], rows, rtol=1e-5, atol=1e-7)
    assert (found["0.weight_hh_l0"].abs().sum() == 0) == (length == 1)


def test_an_lstm_may_be_called_twice():
    """A layer used at two places in one forward pass collects both contributions."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = OutputLSTM(4, 4, batch_first=True)

        def forward(self, x):
            return self.lstm(self.lstm(x))

    torch.manual_seed(0)
    model, inputs = Twice(), torch.randn(5, 6, 4)
    assert_equal(hooked_gradients(model, inputs), one_at_a_time(model, inputs))


def test_an_examples_row_does_not_depend_on_the_others():
    """However large another example's values are, the row of an example stays what it was."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(OutputLSTM(3, 4, batch_first=True)), torch.randn(3, 6, 3)
    extreme = inputs.clone()
    extreme[1] = 1e30
    before, after = hooked_gradients(model, inputs), hooked_gradients(model, extreme)
    for name in before:
        torch.testing.assert_close(before[name][[0, 2]], after[name][[0, 2]])


@pytest.mark.parametrize(("name", "schema", "options"), CASES)
@pytest.mark.parametrize("n", [1, 4])
def test_every_built_in_model_has_exact_gradients(name, schema, options, n):
    """All parameters of all seven models, for batches of one and of several."""
    model, inputs = make(name, schema, options), draw(schema, n)
    check_private(model)
    assert_equal(hooked_gradients(model, inputs), one_at_a_time(model, inputs))


@pytest.mark.parametrize(("name", "schema", "options"), CASES)
def test_an_empty_batch_has_gradients_without_rows(name, schema, options):
    """Poisson sampling draws empty batches; the step is taken all the same, with noise only."""
    model = make(name, schema, options)
    for parameter, rows in hooked_gradients(model, draw(schema, 0)).items():
        assert rows.shape == (0, *model.get_parameter(parameter).shape)


@pytest.mark.parametrize(("name", "schema", "options"), CASES)
def test_privacy_changes_neither_names_nor_predictions(name, schema, options):
    """With hooks and after them the model's state and logits are those of a model that never had any."""
    model, inputs = make(name, schema, options), draw(schema, 3)
    state, logits = {k: v.clone() for k, v in model.state_dict().items()}, model(inputs)
    hooks = attach(model)
    for _ in range(2):
        found = model.state_dict()
        assert list(found) == list(state)
        assert all(torch.equal(found[k], state[k]) for k in state)
        assert torch.equal(model(inputs), logits)
        hooks.cleanup()


def test_successive_batches_are_kept_apart():
    """A second batch after clearing gives its own gradients; registering again changes nothing."""
    model = make("lstm", NEXT, {"embedding": 5, "hidden": 6})
    expected = one_at_a_time(model, draw(NEXT, 4))
    register_samplers(model)
    hooks = attach(model)
    for n in (2, 0, 4):
        hooks.set_grad_sample_to_none()
        with expected_warnings():
            loss_of(model, draw(NEXT, n)).backward()
    assert_equal({name: p.grad_sample for name, p in model.named_parameters()}, expected)
    hooks.cleanup()


def test_autocast_gives_float32_gradients():
    """Under bfloat16 autocast the recomputation stays in float32; what is left is the rounding of its inputs."""
    model, inputs = make("lstm", NEXT, {"embedding": 16, "hidden": 16}), draw(NEXT, 4)
    expected = one_at_a_time(model, inputs)
    hooks = attach(model)
    with expected_warnings(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss_of(model, inputs).backward()
    found = {name: p.grad_sample for name, p in model.named_parameters() if name.startswith("lstm")}
    hooks.cleanup()
    assert {rows.dtype for rows in found.values()} == {torch.float32}
    assert_equal(found, {name: expected[name] for name in found}, relative=0.1)


def test_other_layers_fall_back_to_opacus():
    """A layer without a sampler is run again for each example, with hooks attached for the first time or once more."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), Scale(), nn.Linear(3, 2))
    inputs = torch.randn(5, 4)
    assert_equal(hooked_gradients(model, inputs), one_at_a_time(model, inputs))
    attach(model).cleanup()
    assert_equal(hooked_gradients(model, inputs), one_at_a_time(model, inputs))


def test_other_layers_survive_empty_batches():
    """Opacus's fallback alone stops at an empty batch of a convolution."""
    model = nn.Sequential(OwnConvolution(2, 3, 3), Scale())
    assert hooked_gradients(model, torch.zeros(0, 2, 5))["0.weight"].shape == (0, 3, 2, 3)


def test_the_vector_of_the_padding_is_not_trained():
    """As in plain torch, `padding_idx` has no gradient; Opacus alone would give it one."""
    torch.manual_seed(0)
    model, tokens = nn.Sequential(nn.Embedding(5, 3, padding_idx=2), nn.Linear(3, 2)), torch.arange(5).repeat(3, 1)
    found = hooked_gradients(model, tokens)
    assert_equal(found, one_at_a_time(model, tokens))
    assert found["0.weight"][:, 2].abs().sum() == 0


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LSTM(3, 4), "takes time first"),
        (nn.LSTM(3, 4, proj_size=2, batch_first=True), "projects its hidden state"),
        (nn.LSTM(3, 4, num_layers=2, dropout=0.1, batch_first=True), "drops out between its layers"),
        (nn.GRU(3, 4, batch_first=True), "has no per-example gradients"),
        (nn.RNN(3, 4, batch_first=True), "has no per-example gradients"),
        (nn.MultiheadAttention(4, 2, batch_first=True), "mixes parameters of its own with trainable sub-layers"),
    ],
)
def test_layers_without_exact_gradients_are_refused(layer, message):
    """Before anything is trained, by name, and with a way out."""
    with pytest.raises(PrivacyError, match=f"layer `1` .*{message}") as caught:
        register_samplers(nn.Sequential(nn.Linear(3, 3), layer))
    assert caught.value.hint


def test_a_partly_frozen_lstm_is_refused_and_a_frozen_one_left_alone():
    """Freezing is all or nothing."""
    lstm = OutputLSTM(3, 4, batch_first=True)
    lstm.weight_hh_l0.requires_grad_(False)
    with pytest.raises(PrivacyError, match="frozen in part"):
        register_samplers(nn.Sequential(lstm))
    model = nn.Sequential(lstm.requires_grad_(False), nn.Linear(4, 2))
    inputs = torch.randn(2, 5, 3)
    expected = one_at_a_time(nn.Sequential(model[1]), lstm(inputs))
    assert_equal(hooked_gradients(model, inputs), {f"1.{name[2:]}": rows for name, rows in expected.items()})


@pytest.mark.parametrize("state", [0, 1])
def test_a_loss_on_the_final_state_is_refused(state):
    """Opacus's hooks do not see that gradient; silence would mean a wrong one."""
    lstm = nn.LSTM(3, 4, batch_first=True)
    hooks = attach(lstm)
    output, states = lstm(torch.randn(2, 5, 3))
    with expected_warnings(), pytest.raises(PrivacyError, match="final state") as caught:
        (output.sum() + states[state].sum()).backward()
    assert "[:, -1]" in caught.value.hint
    hooks.cleanup()


def test_initial_states_packed_and_single_sequences_are_refused():
    """The sampler starts from zero states and needs one padded batch."""
    lstm = nn.LSTM(3, 4, batch_first=True)
    hooks, inputs, state = attach(lstm), torch.randn(2, 5, 3), (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    for call in (
        lambda: lstm(inputs, state),
        lambda: lstm(inputs, hx=state),
        lambda: lstm(inputs[0]),
        lambda: lstm(pack_padded_sequence(inputs, torch.tensor([5, 3]), batch_first=True)),
    ):
        with pytest.raises(PrivacyError, match="more than one padded batch"):
            call()
    hooks.cleanup()


def test_without_privacy_an_lstm_can_be_called_in_every_way():
    """The guard sleeps while no hooks are attached, and in predictions."""
    lstm = nn.LSTM(3, 4, batch_first=True)
    hooks, inputs, state = attach(lstm), torch.randn(2, 5, 3), (torch.ones(1, 2, 4), torch.ones(1, 2, 4))
    with torch.no_grad():
        lstm(inputs, state)
    lstm.eval()(inputs, state)
    hooks.cleanup()
    lstm.train()(inputs, state)[1][0].sum().backward()


def test_the_sampler_alone_takes_what_opacus_hands_it():
    """Activations as a list, the gradient of the output, and a result by parameter."""
    lstm = OutputLSTM(3, 4, batch_first=True)
    inputs, gradient = torch.randn(2, 5, 3), torch.randn(2, 5, 4)
    found = lstm_grad_sample(lstm, [inputs], gradient)
    lstm(inputs).backward(gradient)
    assert set(found) == set(lstm.parameters())
    for parameter, rows in found.items():
        torch.testing.assert_close(rows.sum(0), parameter.grad)


def test_only_the_expected_warning_is_silenced():
    """Other warnings still reach the user."""
    with pytest.warns(UserWarning, match="something else"), expected_warnings():
        warnings.warn("something else", UserWarning, stacklevel=1)
